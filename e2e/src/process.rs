//! Processes that run beside the caller.

use std::fs::{self, File};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::OnceLock;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::Duration;
use std::{io, thread};

use anyhow::{Context, bail};
use nix::sys::prctl;
use nix::sys::signal::{Signal, kill, killpg};
use nix::unistd::{Pid, SysconfVar, getpid, getppid, sysconf};

use crate::wait::{self, Check};

/// How long the threads of a process may take to stop.
const FREEZE_LIMIT: Duration = Duration::from_secs(10);

/// A process in a process group of its own that ends, at the latest, with the process that started it.
#[derive(Debug)]
pub struct Process {
    name: String,
    log: PathBuf,
    child: Child,
}

impl Process {
    /// Starts it, its output appended to `log`.
    pub fn start(name: &str, mut command: Command, log: &Path) -> anyhow::Result<Self> {
        let parent = getpid();
        redirect(&mut command, log)?;
        command.process_group(0);
        let end_with_parent = move || {
            prctl::set_pdeathsig(Signal::SIGKILL)?;
            // The parent may have gone before the line above took effect.
            if getppid() != parent {
                return Err(io::Error::from_raw_os_error(nix::libc::ESRCH));
            }
            Ok(())
        };
        #[expect(unsafe_code, reason = "a child can only be bound to its parent between fork and exec")]
        // SAFETY: the closure runs in the forked child; it calls prctl(2) and getppid(2), both async-signal-safe,
        // and neither allocates nor takes a lock.
        unsafe {
            command.pre_exec(end_with_parent)
        };
        let child = spawn_on_lasting_thread(command).with_context(|| format!("starting {name}"))?;
        Ok(Self { name: name.to_owned(), log: log.to_owned(), child })
    }

    /// Its process id.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Where its output goes.
    #[must_use]
    pub fn log(&self) -> &Path {
        &self.log
    }

    /// Fails, with the end of its log, when it has ended.
    pub fn check_running(&mut self) -> anyhow::Result<()> {
        if let Some(status) = self.child.try_wait()? {
            bail!("{} ended with {status}; {} ends with:\n{}", self.name, self.log.display(), tail(&self.log));
        }
        Ok(())
    }

    /// Sends a signal to its process group.
    pub fn signal(&self, signal: Signal) -> anyhow::Result<()> {
        killpg(self.group()?, signal).with_context(|| format!("sending {signal} to {}", self.name))
    }

    /// Freezes it (SIGSTOP) and waits until each of its threads stands still: the signal alone leaves them time to answer.
    pub fn freeze(&self) -> anyhow::Result<()> {
        self.signal(Signal::SIGSTOP)?;
        let tasks = PathBuf::from(format!("/proc/{}/task", self.pid()));
        wait::until(&format!("{} to stand still", self.name), FREEZE_LIMIT, Duration::from_millis(2), || {
            let running =
                fs::read_dir(&tasks)?.filter_map(Result::ok).filter(|task| !stands_still(&task.path())).count();
            Ok(if running == 0 { Check::Done(()) } else { Check::NotYet(format!("{running} threads run")) })
        })
    }

    /// Lets it go on.
    pub fn thaw(&self) -> anyhow::Result<()> {
        self.signal(Signal::SIGCONT)
    }

    /// Asks it to end (SIGTERM) and waits; after `limit` it is killed.
    pub fn stop(mut self, limit: Duration) -> anyhow::Result<ExitStatus> {
        self.signal(Signal::SIGTERM)?;
        let ended = wait::until("the process to end", limit, Duration::from_millis(10), || {
            Ok(self.child.try_wait()?.map_or_else(|| Check::NotYet("it runs".into()), Check::Done))
        });
        match ended {
            Ok(status) => Ok(status),
            Err(_timeout) => self.kill(),
        }
    }

    /// Kills its process group (SIGKILL) and collects it.
    pub fn kill(mut self) -> anyhow::Result<ExitStatus> {
        self.kill_now()
    }

    fn kill_now(&mut self) -> anyhow::Result<ExitStatus> {
        if let Some(status) = self.child.try_wait()? {
            return Ok(status);
        }
        self.signal(Signal::SIGKILL)?;
        Ok(self.child.wait()?)
    }

    fn group(&self) -> anyhow::Result<Pid> {
        Ok(Pid::from_raw(i32::try_from(self.child.id()).context("a process id beyond i32")?))
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // The kernel kills it with this process anyway.
        drop(self.kill_now());
    }
}

/// Starts a process that outlives the caller, in a session of its own; answers its id.
pub fn start_detached(name: &str, command: Command, log: &Path) -> anyhow::Result<u32> {
    spawn_detached(name, command, log).map(collect_when_ended)
}

/// The first half of [`start_detached`], for a thread that can start no other thread.
pub(crate) fn spawn_detached(name: &str, mut command: Command, log: &Path) -> anyhow::Result<Child> {
    redirect(&mut command, log)?;
    #[expect(unsafe_code, reason = "a session can only be left between fork and exec")]
    // SAFETY: setsid(2) is async-signal-safe; the closure neither allocates nor takes a lock.
    unsafe {
        command.pre_exec(|| nix::unistd::setsid().map(drop).map_err(Into::into))
    };
    command.spawn().with_context(|| format!("starting {name}"))
}

/// The second half of [`start_detached`]: while the caller lives, a child that ended does not stay as a zombie.
pub(crate) fn collect_when_ended(mut child: Child) -> u32 {
    let pid = child.id();
    thread::spawn(move || child.wait());
    pid
}

/// Whether a process exists and is no zombie.
#[must_use]
pub fn is_alive(pid: u32) -> bool {
    start_time(pid).is_some()
}

/// When a process started, in clock ticks since boot (field 22 of /proc/PID/stat); with the id it names a process for
/// good. `None` when there is none or it has ended.
#[must_use]
pub fn start_time(pid: u32) -> Option<u64> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The second field is the name in parentheses, which may hold anything.
    let (_, rest) = stat.rsplit_once(')')?;
    let mut fields = rest.split_whitespace();
    if matches!(fields.next()?, "Z" | "X") {
        return None;
    }
    fields.nth(18)?.parse().ok()
}

/// Whether a thread is stopped, by its folder in /proc; one that has ended is, too (proc_pid_stat(5): the state follows the
/// name in parentheses).
fn stands_still(task: &Path) -> bool {
    let Ok(stat) = fs::read_to_string(task.join("stat")) else { return true };
    stat.rsplit(')').next().is_some_and(|rest| rest.trim_start().starts_with(['T', 't', 'Z', 'X']))
}

/// What a process has used so far.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Usage {
    /// Time on a CPU, of all its threads, in seconds.
    pub cpu_seconds: f64,
    /// The most memory that it had resident at once (`VmHWM`), in bytes.
    pub peak_rss: u64,
    /// The memory that it has resident now (`VmRSS`), in bytes.
    pub rss: u64,
}

impl Usage {
    /// The peak of its memory in MB (10⁶ bytes).
    #[must_use]
    #[expect(clippy::cast_precision_loss, reason = "a figure for people")]
    pub fn peak_megabytes(&self) -> f64 {
        self.peak_rss as f64 / 1e6
    }

    /// The memory that it has resident now in MB (10⁶ bytes).
    #[must_use]
    #[expect(clippy::cast_precision_loss, reason = "a figure for people")]
    pub fn megabytes(&self) -> f64 {
        self.rss as f64 / 1e6
    }
}

/// What a process has used so far, by /proc.
pub fn usage(pid: u32) -> anyhow::Result<Usage> {
    let read = |file: &str| {
        let path = format!("/proc/{pid}/{file}");
        fs::read_to_string(&path).with_context(|| format!("reading {path}"))
    };
    let (stat, status) = (read("stat")?, read("status")?);
    let (_, rest) = stat.rsplit_once(')').context("a process without a name")?;
    // Fields 14 and 15, user and system time; the first of `rest` is field 3.
    let ticks = rest.split_whitespace().skip(11).take(2).map(str::parse::<f64>).sum::<Result<f64, _>>()?;
    let per_second = sysconf(SysconfVar::CLK_TCK)?.context("the length of a clock tick is not known")?;
    let bytes = |field: &str| {
        let value = status.lines().find_map(|line| line.strip_prefix(field)?.trim().strip_suffix(" kB"));
        anyhow::Ok(value.with_context(|| format!("process {pid} has no {field}"))?.parse::<u64>()? * 1024)
    };
    #[expect(clippy::cast_precision_loss, reason = "there are 100 ticks in a second")]
    Ok(Usage { cpu_seconds: ticks / per_second as f64, peak_rss: bytes("VmHWM:")?, rss: bytes("VmRSS:")? })
}

/// Sends a signal to one process; one that has gone is no error.
pub fn signal_pid(pid: u32, signal: Signal) -> anyhow::Result<()> {
    let target = Pid::from_raw(i32::try_from(pid).context("a process id beyond i32")?);
    match kill(target, signal) {
        Ok(()) | Err(nix::errno::Errno::ESRCH) => Ok(()),
        Err(errno) => Err(errno).with_context(|| format!("sending {signal} to process {pid}")),
    }
}

/// The end of a log, for messages.
#[must_use]
pub fn tail(log: &Path) -> String {
    const LINES: usize = 20;
    let Ok(bytes) = fs::read(log) else { return "(no log)".into() };
    let text = String::from_utf8_lossy(&bytes);
    let lines: Vec<&str> = text.lines().collect();
    lines.get(lines.len().saturating_sub(LINES)..).unwrap_or_default().join("\n")
}

fn redirect(command: &mut Command, log: &Path) -> anyhow::Result<()> {
    let file = File::options().create(true).append(true).open(log);
    let file = file.with_context(|| format!("opening {}", log.display()))?;
    command.stdin(Stdio::null()).stdout(file.try_clone()?).stderr(file);
    Ok(())
}

type Order = (Command, Sender<io::Result<Child>>);

/// The parent-death signal fires when the *thread* that forked ends, and test threads come and go: all forks happen on
/// one thread that lives as long as the process.
fn spawn_on_lasting_thread(command: Command) -> io::Result<Child> {
    static SPAWNER: OnceLock<Sender<Order>> = OnceLock::new();
    let spawner = SPAWNER.get_or_init(|| {
        let (orders, inbox): (Sender<Order>, Receiver<Order>) = channel();
        thread::spawn(move || {
            for (mut command, answer) in inbox {
                // The asker waits for the answer; one that has gone took its thread along.
                drop(answer.send(command.spawn()));
            }
        });
        orders
    });
    let gone = || io::Error::other("the thread that starts processes has ended");
    let (answer, child) = channel();
    spawner.send((command, answer)).map_err(|_disconnected| gone())?;
    child.recv().map_err(|_disconnected| gone())?
}
