//! The CustomResourceDefinitions at a real API server: what it takes, refuses, keeps and shows.

mod api;
mod columns;
mod refusals;
mod survival;
