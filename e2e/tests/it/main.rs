//! The servers, for real.

#[cfg(test)]
mod servers;
