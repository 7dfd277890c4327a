//! Endpoints: what one ADD makes and one DEL takes away.

pub mod build;
pub mod error;
pub mod manager;
pub mod record;
pub mod restore;
pub mod state;
pub mod step;

pub use error::AddError;
pub use manager::{Added, Endpoints, EndpointsOptions};
