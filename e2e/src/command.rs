//! Commands that run to their end, which must come within a limit.

use std::ffi::OsStr;
use std::io::Write;
use std::path::Path;
use std::process::{Command, Output, Stdio};
use std::sync::mpsc::channel;
use std::time::Duration;

use anyhow::{Context, bail};
use nix::sys::signal::Signal;

use crate::process::signal_pid;

/// Builds a command line; [`Run::output`] or one of its siblings runs it.
#[derive(Debug)]
pub struct Run {
    command: Command,
    stdin: Option<Vec<u8>>,
    limit: Duration,
}

/// No command of the harness needs longer; one that does is stuck.
const LIMIT: Duration = Duration::from_secs(300);

impl Run {
    /// A command by path or by name in `PATH`.
    pub fn new(program: impl AsRef<OsStr>) -> Self {
        Self { command: Command::new(program), stdin: None, limit: LIMIT }
    }

    /// Appends one argument.
    #[must_use]
    pub fn arg(mut self, arg: impl AsRef<OsStr>) -> Self {
        self.command.arg(arg);
        self
    }

    /// Appends arguments.
    #[must_use]
    pub fn args<S: AsRef<OsStr>>(mut self, args: impl IntoIterator<Item = S>) -> Self {
        self.command.args(args);
        self
    }

    /// Sets an environment variable.
    #[must_use]
    pub fn env(mut self, key: &str, value: impl AsRef<OsStr>) -> Self {
        self.command.env(key, value);
        self
    }

    /// Sets the working folder.
    #[must_use]
    pub fn dir(mut self, dir: &Path) -> Self {
        self.command.current_dir(dir);
        self
    }

    /// Bytes for its standard input.
    #[must_use]
    pub fn stdin(mut self, bytes: impl Into<Vec<u8>>) -> Self {
        self.stdin = Some(bytes.into());
        self
    }

    /// Kills it after this time, instead of five minutes.
    #[must_use]
    pub fn limit(mut self, limit: Duration) -> Self {
        self.limit = limit;
        self
    }

    /// The words of the command line, for messages.
    #[must_use]
    pub fn words(&self) -> String {
        let words = std::iter::once(self.command.get_program()).chain(self.command.get_args());
        words.map(|word| word.to_string_lossy().into_owned()).collect::<Vec<_>>().join(" ")
    }

    /// Runs it; any exit code is an answer.
    pub fn output(mut self) -> anyhow::Result<Output> {
        let words = self.words();
        let stdin = if self.stdin.is_some() { Stdio::piped() } else { Stdio::null() };
        self.command.stdin(stdin).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = self.command.spawn().with_context(|| format!("starting `{words}`"))?;
        let writer = child.stdin.take().zip(self.stdin).map(|(mut pipe, bytes)| {
            // In a thread: a child that writes before it has read everything must not block us.
            std::thread::spawn(move || pipe.write_all(&bytes))
        });
        let pid = child.id();
        let (done, ended) = channel();
        // In a thread: its output must be read all the time, and reading has no limit.
        std::thread::spawn(move || done.send(child.wait_with_output()));
        let output = match ended.recv_timeout(self.limit) {
            Ok(output) => output.with_context(|| format!("waiting for `{words}`"))?,
            Err(_timeout) => {
                signal_pid(pid, Signal::SIGKILL)?;
                bail!("`{words}` did not end within {} s", self.limit.as_secs());
            }
        };
        if let Some(writer) = writer {
            // A broken pipe means that the command did not want all of it; its exit code decides.
            drop(writer.join());
        }
        Ok(output)
    }

    /// Runs it and answers what it printed. Fails when its exit code is not 0, with what it wrote to standard error.
    pub fn text(self) -> anyhow::Result<String> {
        let words = self.words();
        let output = self.output()?;
        if !output.status.success() {
            let said = [output.stderr.as_slice(), output.stdout.as_slice()]
                .map(|bytes| String::from_utf8_lossy(bytes).trim().to_owned())
                .join("\n");
            bail!("`{words}` failed with {}: {}", output.status, said.trim());
        }
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    }

    /// Runs it and drops what it printed.
    pub fn done(self) -> anyhow::Result<()> {
        self.text().map(drop)
    }

    /// Runs it and parses what it printed as JSON.
    pub fn json(self) -> anyhow::Result<serde_json::Value> {
        let words = self.words();
        let text = self.text()?;
        serde_json::from_str(&text).with_context(|| format!("`{words}` did not print JSON: {text}"))
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::Run;

    #[test]
    fn a_command_gets_its_input_and_its_errors_are_told() {
        assert_eq!(Run::new("cat").stdin("x".repeat(1 << 20)).text().unwrap().len(), 1 << 20);
        let error = Run::new("sh").args(["-c", "echo why >&2; exit 3"]).done().unwrap_err().to_string();
        assert!(error.contains("exit status: 3") && error.contains("why"), "{error}");
    }

    #[test]
    fn a_command_that_hangs_is_killed() {
        let error = Run::new("sleep").arg("600").limit(Duration::from_millis(50)).done().unwrap_err().to_string();
        assert!(error.contains("did not end"), "{error}");
    }
}
