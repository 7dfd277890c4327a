//! basal-e2e
