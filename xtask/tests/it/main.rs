//! The Helm chart: what it refuses, and what a real API server makes of what it renders.

mod chart;
mod rights;
mod values;
