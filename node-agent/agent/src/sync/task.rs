//! The one task that changes the datapath. Only the interfaces of new endpoints are made beside it, several at a time:
//! until the task hears that one is there it leaves alone what there is of it.

use std::{sync::Arc, time::Duration};

use basal_datapath::{
    check::host_difference,
    kernel::{Device, Kernel, Observed},
    names::IfName,
    op::Op,
    plan::Endpoint,
};
use basal_runtime::{
    backoff::{Backoff, Failures},
    env::{SharedEnv, TaskHandle},
    outcome::Outcome,
};
use futures::{FutureExt, StreamExt, select_biased, stream::BoxStream};
use tokio::{
    sync::{Semaphore, mpsc, oneshot, watch},
    time::Instant,
};
use tokio_util::sync::CancellationToken;

use super::{
    core::{Core, concerns},
    handle::{Answer, AttachError, Datapath, Failure, Made, Message, SyncReport, Verified},
};
use crate::{endpoint::record::EndpointId, metrics::DatapathMetrics, view::View};

/// How often everything is compared, whether or not something happened.
pub const FULL_PASS_INTERVAL: Duration = Duration::from_secs(60);
/// How many interfaces are made at a time. More would only wait for the kernel's lock on devices.
pub const MAKING_AT_ONCE: usize = 16;
/// How long the kernel's own news are collected before what they are about is compared.
const NEWS_DELAY: Duration = Duration::from_secs(1);
/// How soon after one comparison news may lead to the next.
const NEWS_INTERVAL: Duration = Duration::from_secs(5);
const RETRY: Backoff = Backoff::new(Duration::from_millis(200), Duration::from_secs(30));
/// A device that was made has an index, which rows and programs depend on: so many rounds at most.
const ROUNDS: usize = 4;
const QUEUE: usize = 1024;
/// How many messages become one change at most.
const BATCH: usize = 256;

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
            kernel: Arc::clone(&kernel),
            core: Core::new(view, Observed::default()),
            metrics,
            report: publish,
            // A task that held its own inbox open would never end.
            back: messages.downgrade(),
            inbox,
            permits: Arc::new(Semaphore::new(MAKING_AT_ONCE)),
            stop: stop.clone(),
            failures: Failures::none(RETRY),
            next_pass: Instant::now(),
            next_look: None,
            last_pass: None,
            retry: None,
        };
        let handle = env.spawn("datapath", Box::pin(task.run(stop)));
        (Self { messages, report, kernel }, handle)
    }
}

struct Task {
    env: SharedEnv,
    kernel: Arc<dyn Kernel>,
    news: BoxStream<'static, basal_datapath::kernel::KernelEvent>,
    core: Core,
    metrics: DatapathMetrics,
    report: watch::Sender<SyncReport>,
    back: mpsc::WeakSender<Message>,
    inbox: mpsc::Receiver<Message>,
    permits: Arc<Semaphore>,
    stop: CancellationToken,
    failures: Failures,
    /// When everything is compared next.
    next_pass: Instant,
    /// When everything but the ipcache is compared, because the kernel had news.
    next_look: Option<Instant>,
    /// When either was done last.
    last_pass: Option<Instant>,
    /// When everything is compared once more, because something failed.
    retry: Option<Instant>,
}

/// Whom to answer once the changes that their messages led to were carried out.
#[derive(Default)]
struct Batch {
    attached: Vec<(EndpointId, Endpoint, Answer<()>)>,
    detached: Vec<(EndpointId, Endpoint, Answer<()>)>,
    settled: Vec<oneshot::Sender<()>>,
}

impl Task {
    async fn run(mut self, stop: CancellationToken) {
        loop {
            let due = [self.retry, self.next_look].into_iter().flatten().fold(self.next_pass, Instant::min);
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

    /// The kernel changed: compare soon, but not all the time.
    fn heard(&mut self, alive: bool) {
        let now = Instant::now();
        let earliest = self.last_pass.map_or(now, |last| last + NEWS_INTERVAL);
        self.next_look.get_or_insert(earliest.max(now + NEWS_DELAY));
        if !alive {
            self.news = self.kernel.events();
        }
    }

    /// Takes a message, and with it those that wait behind it, so that many become one change.
    async fn take(&mut self, first: Message) {
        let mut batch = Batch::default();
        let mut next = Some(first);
        for taken in 1.. {
            match next.take() {
                None => break,
                Some(Message::Edit(edit)) => edit(&mut self.core.view),
                Some(Message::Attach(id, build, answer)) => {
                    if !self.started() {
                        self.pass().await;
                    }
                    match build(self.core.view.local()) {
                        Ok(endpoint) => self.make(id, endpoint, answer),
                        Err(error) => answer.send(Err(error.into())).unwrap_or_default(),
                    }
                }
                Some(Message::Made(made)) => self.made(*made, &mut batch),
                Some(Message::Detach(id, answer)) => match self.core.view.endpoints().get(&id).cloned() {
                    None => answer.send(Ok(())).unwrap_or_default(),
                    Some(endpoint) => {
                        self.core.view.remove_endpoint(id);
                        batch.detached.push((id, endpoint, answer));
                    }
                },
                Some(Message::Verify(id, answer)) => {
                    self.finish(std::mem::take(&mut batch)).await;
                    let verified = self.verify(id).await;
                    answer.send(verified).unwrap_or_default();
                }
                Some(Message::Settle(answer)) => batch.settled.push(answer),
            }
            if taken < BATCH {
                next = self.inbox.try_recv().ok();
            }
        }
        self.finish(batch).await;
    }

    /// Carries out what the messages led to, then answers them. An endpoint that something failed of is taken back.
    async fn finish(&mut self, batch: Batch) {
        let failed = self.follow().await;
        let failure_of = |id, endpoint: &Endpoint| {
            let found = failed.iter().find(|(op, _)| concerns(op, id, endpoint));
            found.map_or(Ok(()), |(_, failure)| Err(AttachError::from(failure.clone())))
        };
        let mut undone = Vec::new();
        for (id, endpoint, answer) in batch.attached {
            match failure_of(id, &endpoint) {
                Ok(()) => answer.send(Ok(())).unwrap_or_default(),
                Err(error) => {
                    self.core.view.remove_endpoint(id);
                    undone.push((error, answer));
                }
            }
        }
        for (id, endpoint, answer) in batch.detached {
            answer.send(failure_of(id, &endpoint)).unwrap_or_default();
        }
        if !undone.is_empty() {
            self.follow().await;
        }
        for (error, answer) in undone {
            answer.send(Err(error)).unwrap_or_default();
        }
        for answer in batch.settled {
            answer.send(()).unwrap_or_default();
        }
    }

    fn started(&self) -> bool {
        self.last_pass.is_some()
    }

    /// Carries out what the view's changes lead to. Before the first comparison nothing is touched: what the kernel
    /// holds is not known.
    async fn follow(&mut self) -> Vec<(Op, Failure)> {
        if !self.started() {
            return Vec::new();
        }
        if let Some(mtu) = self.core.follow_mtu() {
            self.tell_mtu(mtu);
        }
        let changes = self.core.view.take_changes();
        if changes.is_empty() {
            return Vec::new();
        }
        let ops = self.core.delta(&changes);
        self.tell_routes();
        let failed = self.carry_out(ops).await;
        self.judge(&failed);
        if !failed.is_empty() {
            self.core.view.put_back(changes);
        }
        failed
    }

    fn tell_mtu(&self, mtu: u32) {
        match self.core.view.local().mtu_problem() {
            Some(problem) => tracing::warn!(problem, "the MTU of the node's device is another one"),
            None => tracing::info!(mtu, "the MTU of the node's device is another one"),
        }
    }

    /// Tells which nodes' pods have no route, when those are others than before.
    fn tell_routes(&self) {
        let without = self.core.without_route();
        self.report.send_if_modified(|report| {
            for (node, why) in without.iter().filter(|(node, why)| report.without_route.get(*node) != Some(*why)) {
                tracing::warn!(
                    %node, %why,
                    "no route to the pods of a node: the network has to route to them, and \
                     direct-routing-skip-unreachable: \"true\" says that it does"
                );
            }
            for node in report.without_route.keys().filter(|node| !without.contains_key(*node)) {
                tracing::info!(%node, "a route to the pods of the node is not missing any more");
            }
            let changed = report.without_route != *without;
            report.without_route.clone_from(without);
            changed
        });
        self.metrics.without_route(without.len());
    }

    /// Carries out ops in their order; answers those that failed.
    async fn carry_out(&mut self, ops: Vec<Op>) -> Vec<(Op, Failure)> {
        let mut failed: Vec<(Op, Failure)> = Vec::new();
        for op in ops {
            let outcome = match held_back(&op, &failed) {
                Some(failure) => Err(failure.clone()),
                None => apply(&*self.kernel, &self.metrics, &op).await,
            };
            match outcome {
                Ok(()) => self.core.applied(&op),
                Err(failure) => failed.push((op, failure)),
            }
        }
        failed
    }

    /// After a failure everything is compared anew, with growing pauses: what is known may be wrong.
    fn judge(&mut self, failed: &[(Op, Failure)]) {
        if let Some((_, failure)) = failed.first() {
            self.fail(failure.to_string());
        }
        self.tell_devices();
    }

    /// Tells on which devices programs masquerade, when those are others than before.
    fn tell_devices(&self) {
        let devices = self.core.masquerade_devices();
        self.report.send_if_modified(|report| {
            let changed = report.masquerade_devices != devices;
            report.masquerade_devices = devices;
            changed
        });
    }

    fn fail(&mut self, problem: String) {
        self.retry = Some(Instant::now() + self.failures.next(&*self.env));
        self.report.send_modify(|report| report.problem = problem);
    }

    /// Compares everything with what the kernel holds, and mends it; without the ipcache where only news call for it.
    async fn pass(&mut self) {
        let first = !self.started();
        let whole = first || self.retry.is_some() || self.next_pass <= Instant::now();
        self.follow().await;
        for round in 0..ROUNDS {
            let read = if whole { self.kernel.read().await } else { self.kernel.read_without_ipcache().await };
            let observed = match read {
                Ok(observed) => observed,
                Err(error) => {
                    tracing::warn!(%error, "datapath");
                    self.schedule(whole);
                    return self.fail(error.to_string());
                }
            };
            let pass = if whole { self.core.full(observed) } else { self.core.full_without_ipcache(observed) };
            self.tell_routes();
            if let Some(mtu) = pass.mtu {
                self.tell_mtu(mtu);
            }
            if round == 0 && !first && pass.lost.is_empty() && pass.mtu.is_none() && self.retry.is_none() {
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
                self.schedule(whole);
                return self.judge(&failed);
            }
        }
        self.retry = None;
        self.failures.reset();
        self.schedule(whole);
        self.tell_devices();
        self.report.send_modify(|report| {
            report.complete = true;
            report.problem.clear();
        });
    }

    fn schedule(&mut self, whole: bool) {
        let now = Instant::now();
        self.last_pass = Some(now);
        self.next_look = None;
        if whole {
            self.next_pass = now + FULL_PASS_INTERVAL;
        }
    }

    /// Begins to make the interface of an endpoint. The end is a message.
    fn make(&mut self, id: EndpointId, endpoint: Endpoint, answer: Answer<()>) {
        let set = Op::SetLink(endpoint.link.clone(), self.core.link_of(&endpoint));
        self.core.making(endpoint.link.clone());
        let (kernel, metrics) = (Arc::clone(&self.kernel), self.metrics.clone());
        let (permits, back, stop) = (Arc::clone(&self.permits), self.back.clone(), self.stop.clone());
        let work = async move {
            // The semaphore is never closed.
            let permit = permits.acquire().await;
            let (result, left) = make_link(&*kernel, &metrics, &endpoint.link, &set).await;
            drop(permit);
            if let Some(back) = back.upgrade() {
                // Without a task the caller sees its answer dropped.
                back.send(Message::Made(Box::new(Made { id, endpoint, set, result, left, answer })))
                    .await
                    .unwrap_or_default();
            }
        };
        self.env.spawn("attach", Box::pin(async move { stop.run_until_cancelled(work).await.unwrap_or_default() }));
    }

    /// The interface of an endpoint is there, or cannot be made.
    fn made(&mut self, made: Made, batch: &mut Batch) {
        let Made { id, endpoint, set, result, left, answer } = made;
        self.core.made(&endpoint.link);
        if let Some(failure) = left {
            // A comparison finds it.
            self.fail(failure.to_string());
        }
        match result {
            Ok(device) => {
                self.core.applied(&set);
                self.core.saw_device(endpoint.link.clone(), device);
                self.core.view.put_endpoint(id, endpoint.clone());
                self.report.send_if_modified(|report| report.lost.remove(&id));
                batch.attached.push((id, endpoint, answer));
            }
            Err(error) => answer.send(Err(error)).unwrap_or_default(),
        }
    }

    async fn verify(&mut self, id: EndpointId) -> Result<Verified, AttachError> {
        self.follow().await;
        let mtu = self.core.view.local().device_mtu;
        let Some(endpoint) = self.core.view.endpoints().get(&id).cloned() else {
            let differences = vec!["it is not in the datapath".to_owned()];
            return Ok(Verified { endpoint: None, mtu, device: None, differences });
        };
        let pass = self.core.full(self.kernel.read().await?);
        if pass.lost.contains(&id) {
            self.report.send_modify(|report| report.lost.extend(pass.lost));
            let differences = vec![format!("the interface {} is gone", endpoint.link)];
            return Ok(Verified { endpoint: None, mtu, device: None, differences });
        }
        let known = self.core.known();
        let own = pass.ops.iter().filter(|op| concerns(op, id, &endpoint));
        let differences = own.map(|op| host_difference(op, &known.state)).collect();
        let device = known.devices.get(&endpoint.link).cloned();
        if !pass.ops.is_empty() {
            self.next_pass = Instant::now();
        }
        Ok(Verified { endpoint: Some(endpoint), mtu, device, differences })
    }
}

/// Why an op is not tried after others failed. While a set of programs cannot be loaded nothing is moved to it, and while
/// something is not moved the set that it runs from is left whole.
fn held_back<'a>(op: &Op, failed: &'a [(Op, Failure)]) -> Option<&'a Failure> {
    let holds = |failed: &Op| match op {
        Op::Attach(..) => matches!(failed, Op::LoadPrograms { .. }),
        Op::UnloadPrograms(_) => matches!(failed, Op::LoadPrograms { .. } | Op::Attach(..)),
        _ => false,
    };
    failed.iter().find(|(op, _)| holds(op)).map(|(_, failure)| failure)
}

/// Makes one change, and counts it.
async fn apply(kernel: &dyn Kernel, metrics: &DatapathMetrics, op: &Op) -> Result<(), Failure> {
    let outcome = kernel.apply(op).await;
    metrics.op(op, &outcome);
    match outcome {
        Outcome::Done(()) => Ok(()),
        Outcome::Refused(error) => {
            tracing::warn!(%op, %error, "datapath");
            Err(error.into())
        }
        Outcome::Unknown(why) => {
            tracing::warn!(%op, why, "datapath: the answer was lost");
            Err(Failure::Unknown { op: op.to_string(), why })
        }
    }
}

/// Makes an interface and reads it back. Where that fails it is removed, and the other answer says why it could not be.
async fn make_link(
    kernel: &dyn Kernel,
    metrics: &DatapathMetrics,
    name: &IfName,
    set: &Op,
) -> (Result<Device, AttachError>, Option<Failure>) {
    let made = async {
        apply(kernel, metrics, set).await?;
        kernel.device(name).await?.ok_or_else(|| AttachError::Vanished(name.to_string()))
    };
    let made = made.await;
    let left = match made {
        Ok(_) => None,
        // The kernel may have made a part of it before it failed.
        Err(_) => apply(kernel, metrics, &Op::DeleteLinks([name.clone()].into())).await.err(),
    };
    (made, left)
}

#[cfg(test)]
mod tests {
    use basal_datapath::{
        program::{Object, ProgramHash, ProgramSet},
        rows::Rows,
        state::{Hook, Symbol},
    };
    use basal_maps::config::Config;

    use super::*;

    #[test]
    fn a_set_stays_whole_while_anything_runs_from_it() {
        let set = ProgramSet { object: Object::new(b"new"), config: Config::UNSET };
        let load = Op::LoadPrograms { set, rows: Rows::default() };
        let hook = Hook::Device { link: IfName::host(), symbol: Symbol::FromHost };
        let (attach, detach) = (Op::Attach(hook.clone(), set.hash()), Op::Detach(hook));
        let unload = Op::UnloadPrograms(ProgramHash::FOREIGN);
        let after = |failed: &Op, op: &Op| {
            let failed = [(failed.clone(), Failure::Unknown { op: failed.to_string(), why: "lost".to_owned() })];
            held_back(op, &failed).is_some()
        };
        assert!(after(&load, &attach) && after(&load, &unload));
        assert!(after(&attach, &unload), "a hook runs from it still");
        assert!(!after(&attach, &attach) && !after(&load, &detach) && !after(&detach, &unload));
        assert!(held_back(&unload, &[]).is_none());
    }
}
