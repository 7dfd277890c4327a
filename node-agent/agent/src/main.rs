//! The executable.

use std::process::ExitCode;

fn main() -> ExitCode {
    // Reading and writing maps takes a thread for moments; probes and pods do not wait for that.
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build();
    match runtime.map_err(Into::into).and_then(|runtime| runtime.block_on(basal_agent::process::main())) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            use std::io::Write as _;
            // Where even standard error is closed, the exit code remains.
            writeln!(std::io::stderr(), "basal-agent: {error:#}").unwrap_or_default();
            ExitCode::FAILURE
        }
    }
}
