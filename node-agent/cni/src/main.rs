//! The executable that the container runtime calls.

use std::{
    io::{self, Write as _},
    process::ExitCode,
};

fn main() -> ExitCode {
    let answer = basal_cni::plugin::run(&|name| std::env::var_os(name), &mut io::stdin().lock());
    let mut text = answer.body;
    if !text.is_empty() {
        text.push('\n');
    }
    let mut stdout = io::stdout().lock();
    match stdout.write_all(text.as_bytes()).and_then(|()| stdout.flush()) {
        Ok(()) if answer.success => ExitCode::SUCCESS,
        _ => ExitCode::FAILURE,
    }
}
