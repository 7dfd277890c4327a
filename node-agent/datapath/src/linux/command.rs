//! Commands that speak for the kernel where its own interface has no stable form above netlink attributes.

use std::{ffi::OsStr, io, process::Stdio};

use tokio::{io::AsyncWriteExt as _, process::Command};

/// Runs a command with a text on its standard input; gives what it printed.
pub(super) async fn run(program: impl AsRef<OsStr>, args: &[&str], input: &str) -> io::Result<Vec<u8>> {
    let mut child = Command::new(program)
        .args(args)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .kill_on_drop(true)
        .spawn()?;
    if let Some(mut stdin) = child.stdin.take() {
        match stdin.write_all(input.as_bytes()).await {
            // It ended before it read everything: what it printed says why.
            Err(error) if error.kind() != io::ErrorKind::BrokenPipe => return Err(error),
            _ => {}
        }
    }
    let output = child.wait_with_output().await?;
    if output.status.success() {
        return Ok(output.stdout);
    }
    Err(io::Error::other(String::from_utf8_lossy(&output.stderr).trim().to_owned()))
}
