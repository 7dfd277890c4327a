//! basal-agent
pub mod endpoint;
pub mod identity;
pub mod journal;
pub mod mac;
pub mod view;
