//! basal-crds
