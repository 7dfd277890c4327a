//! Endpoints: what one ADD makes and one DEL takes away.

pub mod record;
pub mod step;
