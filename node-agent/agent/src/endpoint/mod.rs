//! Endpoints: what one ADD makes and one DEL takes away.

pub mod manager;
pub mod record;
pub mod restore;
pub mod state;
pub mod step;

pub use manager::{AddError, Endpoints, EndpointsOptions};
