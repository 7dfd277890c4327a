//! The one task that changes the datapath.

use std::{collections::BTreeSet, sync::Arc, time::Duration};

use basal_datapath::{
    kernel::{Kernel, Observed, OpError, ReadError},
    op::Op,
    plan::Endpoint,
};
use basal_runtime::{
    backoff::{Backoff, Failures},
    env::{SharedEnv, TaskHandle},
    outcome::Outcome,
    reason::Reason,
};
use futures::{FutureExt, StreamExt, select_biased, stream::BoxStream};
use tokio::{
    sync::{mpsc, oneshot, watch},
    time::Instant,
};
use tokio_util::sync::CancellationToken;

use super::core::{Core, concerns};
use crate::{endpoint::record::EndpointId, metrics::DatapathMetrics, view::View};

/// How often everything is compared, whether or not something happened.
pub const FULL_PASS_INTERVAL: Duration = Duration::from_secs(60);
/// How long the kernel's own news are collected before everything is compared.
const NEWS_DELAY: Duration = Duration::from_secs(1);
/// How soon after one comparison news may lead to the next.
const NEWS_INTERVAL: Duration = Duration::from_secs(5);
const RETRY: Backoff = Backoff::new(Duration::from_millis(200), Duration::from_secs(30));
/// A device that was made has an index, which rows and programs depend on: so many rounds at most.
const ROUNDS: usize = 4;
const QUEUE: usize = 1024;

/// Why an endpoint could not be put into the datapath, or taken out.
#[derive(Debug, thiserror::Error)]
pub enum AttachError {
    /// The kernel refused a change.
    #[error(transparent)]
    Refused(#[from] OpError),
    /// Whether a change was made is not known.
    #[error("{op}: the kernel's answer was lost: {why}")]
    Unknown {
        /// The change.
        op: String,
        /// What was lost.
        why: String,
    },
    /// The kernel could not be read.
    #[error(transparent)]
    Read(#[from] ReadError),
    /// The interface that was just made is not there.
    #[error("interface {0} is gone right after it was made; was the container's network namespace deleted?")]
    Vanished(String),
    /// The agent is ending.
    #[error("the agent is ending")]
    Ending,
}

impl AttachError {
    /// The reason for events and metrics.
    #[must_use]
    pub fn reason(&self) -> Reason {
        const UNKNOWN: Reason = Reason::new("KernelAnswerLost");
        const READ: Reason = Reason::new("KernelUnreadable");
        const VANISHED: Reason = Reason::new("DeviceVanished");
        const ENDING: Reason = Reason::new("AgentEnding");
        match self {
            Self::Refused(error) => error.reason(),
            Self::Unknown { .. } => UNKNOWN,
            Self::Read(_) => READ,
            Self::Vanished(_) => VANISHED,
            Self::Ending => ENDING,
        }
    }
}

/// What the task reports.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct SyncReport {
    /// Whether everything was compared once and the kernel held what it should afterwards.
    pub complete: bool,
    /// What failed last and still does; empty when nothing does.
    pub problem: String,
    /// How many changes the comparisons on the timer found and mended.
    pub drift: u64,
    /// Endpoints whose interfaces went away without a DEL.
    pub lost: BTreeSet<EndpointId>,
}

type Edit = Box<dyn FnOnce(&mut View) + Send>;

enum Message {
    Edit(Edit),
    Attach(EndpointId, Box<Endpoint>, oneshot::Sender<Result<(), AttachError>>),
    Detach(EndpointId, oneshot::Sender<Result<(), AttachError>>),
    Verify(EndpointId, oneshot::Sender<Result<Vec<String>, AttachError>>),
    Settle(oneshot::Sender<()>),
}

/// A handle to the task.
#[derive(Debug, Clone)]
pub struct Datapath {
    messages: mpsc::Sender<Message>,
    report: watch::Receiver<SyncReport>,
}

impl Datapath {
    /// Starts the task. Nothing is changed before the first comparison of everything.
    pub fn start(
        env: &SharedEnv,
        kernel: Arc<dyn Kernel>,
        view: View,
        metrics: DatapathMetrics,
        stop: CancellationToken,
    ) -> (Self, TaskHandle) {
        let (messages, inbox) = mpsc::channel(QUEUE);
        let (publish, report) = watch::channel(SyncReport::default());
        let task = Task {
            env: Arc::clone(env),
            news: kernel.events(),
            kernel,
            core: Core::new(view, Observed::default()),
            metrics,
            report: publish,
            inbox,
            failures: Failures::none(RETRY),
            next_pass: Instant::now(),
            last_pass: None,
            retry: None,
        };
        let handle = env.spawn("datapath", Box::pin(task.run(stop)));
        (Self { messages, report }, handle)
    }

    /// What the task reports, and its changes.
    #[must_use]
    pub fn report(&self) -> watch::Receiver<SyncReport> {
        self.report.clone()
    }

    /// Changes what is known. The kernel follows.
    pub async fn edit(&self, edit: impl FnOnce(&mut View) + Send + 'static) {
        // The task is gone only when the agent ends.
        self.messages.send(Message::Edit(Box::new(edit))).await.unwrap_or_default();
    }

    /// Looks at what is known; `None` when the agent is ending.
    pub async fn look<T: Send + 'static>(&self, look: impl FnOnce(&View) -> T + Send + 'static) -> Option<T> {
        let (answer, answered) = oneshot::channel();
        self.edit(move |view| answer.send(look(view)).unwrap_or_else(drop)).await;
        answered.await.ok()
    }

    /// Makes an endpoint's interface, rows and programs.
    ///
    /// # Errors
    /// See [`AttachError`]; nothing of the endpoint is left then, as far as the kernel allows.
    pub async fn attach(&self, id: EndpointId, endpoint: Endpoint) -> Result<(), AttachError> {
        self.ask(|answer| Message::Attach(id, Box::new(endpoint), answer)).await
    }

    /// Removes an endpoint's interface, rows and programs.
    ///
    /// # Errors
    /// See [`AttachError`].
    pub async fn detach(&self, id: EndpointId) -> Result<(), AttachError> {
        self.ask(|answer| Message::Detach(id, answer)).await
    }

    /// What of an endpoint differs from what it should be, in words. It is mended right after.
    ///
    /// # Errors
    /// The kernel cannot be read.
    pub async fn verify(&self, id: EndpointId) -> Result<Vec<String>, AttachError> {
        self.ask(|answer| Message::Verify(id, answer)).await
    }

    /// Waits until everything that was said before is in the kernel, or was refused by it.
    pub async fn settle(&self) {
        let (answer, answered) = oneshot::channel();
        if self.messages.send(Message::Settle(answer)).await.is_ok() {
            answered.await.unwrap_or_default();
        }
    }

    async fn ask<T>(
        &self,
        message: impl FnOnce(oneshot::Sender<Result<T, AttachError>>) -> Message,
    ) -> Result<T, AttachError> {
        let (answer, answered) = oneshot::channel();
        if self.messages.send(message(answer)).await.is_err() {
            return Err(AttachError::Ending);
        }
        answered.await.unwrap_or(Err(AttachError::Ending))
    }
}

struct Task {
    env: SharedEnv,
    kernel: Arc<dyn Kernel>,
    news: BoxStream<'static, basal_datapath::kernel::KernelEvent>,
    core: Core,
    metrics: DatapathMetrics,
    report: watch::Sender<SyncReport>,
    inbox: mpsc::Receiver<Message>,
    failures: Failures,
    next_pass: Instant,
    last_pass: Option<Instant>,
    retry: Option<Instant>,
}

impl Task {
    async fn run(mut self, stop: CancellationToken) {
        loop {
            let due = self.retry.map_or(self.next_pass, |retry| retry.min(self.next_pass));
            select_biased! {
                () = stop.cancelled().fuse() => return,
                // Before the messages: a flood of them must not keep comparisons away. Each puts the next one off.
                () = tokio::time::sleep_until(due).fuse() => self.pass().await,
                message = self.inbox.recv().fuse() => match message {
                    Some(message) => self.take(message).await,
                    None => return,
                },
                news = self.news.next().fuse() => self.heard(news.is_some()),
            }
        }
    }

    /// The kernel changed: compare everything soon, but not all the time.
    fn heard(&mut self, alive: bool) {
        let now = Instant::now();
        let earliest = self.last_pass.map_or(now, |last| last + NEWS_INTERVAL);
        self.next_pass = self.next_pass.min(earliest.max(now + NEWS_DELAY));
        if !alive {
            self.news = self.kernel.events();
        }
    }

    /// Takes a message, and with it all edits that wait behind it, so that many become one change.
    async fn take(&mut self, message: Message) {
        let mut next = Some(message);
        while let Some(message) = next.take() {
            match message {
                Message::Edit(edit) => {
                    edit(&mut self.core.view);
                    next = self.inbox.try_recv().ok();
                }
                Message::Attach(id, endpoint, answer) => {
                    let result = self.attach(id, *endpoint).await;
                    answer.send(result).unwrap_or_default();
                }
                Message::Detach(id, answer) => {
                    let result = self.detach(id).await;
                    answer.send(result).unwrap_or_default();
                }
                Message::Verify(id, answer) => {
                    let result = self.verify(id).await;
                    answer.send(result).unwrap_or_default();
                }
                Message::Settle(answer) => {
                    self.follow().await;
                    answer.send(()).unwrap_or_default();
                }
            }
        }
        self.follow().await;
    }

    fn started(&self) -> bool {
        self.last_pass.is_some()
    }

    /// Carries out what the view's changes lead to. Before the first comparison nothing is touched: what the kernel
    /// holds is not known.
    async fn follow(&mut self) -> Vec<(Op, AttachError)> {
        if !self.started() {
            return Vec::new();
        }
        let changes = self.core.view.take_changes();
        if changes.is_empty() {
            return Vec::new();
        }
        let ops = self.core.delta(&changes);
        let failed = self.carry_out(ops).await;
        self.judge(&failed);
        if !failed.is_empty() {
            self.core.view.put_back(changes);
        }
        failed
    }

    /// Carries out ops in their order; answers those that failed.
    async fn carry_out(&mut self, ops: Vec<Op>) -> Vec<(Op, AttachError)> {
        let mut failed = Vec::new();
        for op in ops {
            let outcome = self.kernel.apply(&op).await;
            self.metrics.op(&op, &outcome);
            match outcome {
                Outcome::Done(()) => self.core.applied(&op),
                Outcome::Refused(error) => {
                    tracing::warn!(%op, %error, "datapath");
                    failed.push((op, error.into()));
                }
                Outcome::Unknown(why) => {
                    tracing::warn!(%op, why, "datapath: the answer was lost");
                    failed.push((op.clone(), AttachError::Unknown { op: op.to_string(), why }));
                }
            }
        }
        failed
    }

    /// After a failure everything is compared anew, with growing pauses: what is known may be wrong.
    fn judge(&mut self, failed: &[(Op, AttachError)]) {
        if let Some((_, error)) = failed.first() {
            self.fail(error.to_string());
        }
    }

    fn fail(&mut self, problem: String) {
        self.retry = Some(Instant::now() + self.failures.next(&*self.env));
        self.report.send_modify(|report| report.problem = problem);
    }

    /// Compares everything with what the kernel holds, and mends it.
    async fn pass(&mut self) {
        let first = !self.started();
        self.follow().await;
        for round in 0..ROUNDS {
            let observed = match self.kernel.read().await {
                Ok(observed) => observed,
                Err(error) => {
                    tracing::warn!(%error, "datapath");
                    self.schedule();
                    return self.fail(error.to_string());
                }
            };
            let pass = self.core.full(observed);
            if round == 0 && !first && pass.lost.is_empty() && self.retry.is_none() {
                let found = u64::try_from(pass.ops.len()).unwrap_or(u64::MAX);
                for op in &pass.ops {
                    tracing::warn!(%op, "the datapath was changed behind the agent's back");
                }
                self.metrics.drift(&pass.ops);
                self.report.send_if_modified(|report| {
                    report.drift += found;
                    found > 0
                });
            }
            if !pass.lost.is_empty() {
                self.report.send_modify(|report| report.lost.extend(pass.lost));
            }
            if pass.ops.is_empty() {
                break;
            }
            let failed = self.carry_out(pass.ops).await;
            if !failed.is_empty() {
                self.schedule();
                return self.judge(&failed);
            }
        }
        self.retry = None;
        self.failures.reset();
        self.schedule();
        self.report.send_modify(|report| {
            report.complete = true;
            report.problem.clear();
        });
    }

    fn schedule(&mut self) {
        let now = Instant::now();
        self.last_pass = Some(now);
        self.next_pass = now + FULL_PASS_INTERVAL;
    }

    async fn attach(&mut self, id: EndpointId, endpoint: Endpoint) -> Result<(), AttachError> {
        if !self.started() {
            self.pass().await;
        }
        self.follow().await;
        let name = endpoint.link.clone();
        let set = Op::SetLink(name.clone(), self.core.link_of(&endpoint));
        if let Some((_, error)) = self.carry_out(vec![set]).await.into_iter().next() {
            // What the kernel made of it before it failed must go as well; the next comparison finds it.
            self.carry_out(vec![Op::DeleteLink(name)]).await;
            return Err(error);
        }
        let device = self.kernel.device(&name).await?.ok_or_else(|| AttachError::Vanished(name.to_string()))?;
        self.core.saw_device(name, device);
        self.core.view.put_endpoint(id, endpoint.clone());
        self.report.send_if_modified(|report| report.lost.remove(&id));
        let failed = self.follow().await;
        match failed.into_iter().find(|(op, _)| concerns(op, id, &endpoint)) {
            None => Ok(()),
            Some((_, error)) => {
                self.detach(id).await?;
                Err(error)
            }
        }
    }

    async fn verify(&mut self, id: EndpointId) -> Result<Vec<String>, AttachError> {
        self.follow().await;
        let Some(endpoint) = self.core.view.endpoints().get(&id).cloned() else {
            return Ok(vec!["it is not in the datapath".to_owned()]);
        };
        let pass = self.core.full(self.kernel.read().await?);
        if pass.lost.contains(&id) {
            self.report.send_modify(|report| report.lost.extend(pass.lost));
            return Ok(vec![format!("its interface {} is gone", endpoint.link)]);
        }
        let differences = pass.ops.iter().filter(|op| concerns(op, id, &endpoint)).map(ToString::to_string).collect();
        if !pass.ops.is_empty() {
            self.next_pass = Instant::now();
        }
        Ok(differences)
    }

    async fn detach(&mut self, id: EndpointId) -> Result<(), AttachError> {
        let Some(endpoint) = self.core.view.endpoints().get(&id).cloned() else { return Ok(()) };
        self.core.view.remove_endpoint(id);
        let failed = self.follow().await;
        match failed.into_iter().find(|(op, _)| concerns(op, id, &endpoint)) {
            None => Ok(()),
            Some((_, error)) => Err(error),
        }
    }
}
