//! basal-datapath
