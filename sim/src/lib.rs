//! basal-sim
