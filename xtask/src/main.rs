//! Build and check steps that are more than one cargo command.

fn main() {}
