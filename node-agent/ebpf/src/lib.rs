//! What Basal's kernel programs decide, as functions that are compiled and tested on the host too.
#![no_std]
