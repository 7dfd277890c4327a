//! basal-agent
