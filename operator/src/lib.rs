//! basal-operator
