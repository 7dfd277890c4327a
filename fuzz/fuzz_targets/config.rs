//! libFuzzer's loop around a target of `basal-fuzz`.
#![no_main]

libfuzzer_sys::fuzz_target!(|input: &[u8]| basal_fuzz::run("config", input));
