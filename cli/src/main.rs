//! basal.

use std::process::ExitCode;

fn main() -> ExitCode {
    basal::main()
}
