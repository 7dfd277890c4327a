//! basal-operator.

use std::process::ExitCode;

fn main() -> ExitCode {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let ended = runtime.map_err(Into::into).and_then(|runtime| runtime.block_on(basal_operator::process::main()));
    match ended {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            use std::io::Write as _;
            // Where even standard error is closed, the exit code remains.
            writeln!(std::io::stderr(), "basal-operator: {error:#}").unwrap_or_default();
            ExitCode::FAILURE
        }
    }
}
