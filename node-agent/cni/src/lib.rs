//! basal-cni
