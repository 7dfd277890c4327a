//! basal
