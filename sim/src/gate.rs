//! What every task of a simulated process runs behind, so that all of them can be stopped at once.

use std::{
    any::Any,
    collections::BTreeMap,
    panic::AssertUnwindSafe,
    pin::Pin,
    sync::{Arc, Mutex},
    task::{Context, Poll, Waker},
};

use basal_runtime::{env::TaskFuture, sync::lock};
use futures::{FutureExt as _, future::BoxFuture};

/// How a task behind a gate ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Ended {
    /// It returned.
    Returned,
    /// Its process died.
    Killed,
    /// It panicked, with this message.
    Panicked(String),
}

#[derive(Debug, Default)]
struct State {
    dead: bool,
    paused: bool,
    last_task: u64,
    /// Of the tasks that wait for something.
    wakers: BTreeMap<u64, Waker>,
}

/// The gate of one process: open, closed for a while (the process is paused), or closed for good (it is dead).
#[derive(Debug, Default)]
pub(crate) struct Gate(Mutex<State>);

impl Gate {
    pub(crate) fn is_dead(&self) -> bool {
        lock(&self.0).dead
    }

    /// No task runs a further step; what they hold is dropped.
    pub(crate) fn kill(&self) {
        self.change(|state| state.dead = true);
    }

    /// No task runs a further step until the gate opens again; time goes on.
    pub(crate) fn pause(&self) {
        self.change(|state| state.paused = true);
    }

    pub(crate) fn resume(&self) {
        self.change(|state| state.paused = false);
    }

    fn change(&self, change: impl FnOnce(&mut State)) {
        let wakers = {
            let mut state = lock(&self.0);
            change(&mut state);
            std::mem::take(&mut state.wakers)
        };
        // In the order in which the tasks were started.
        wakers.into_values().for_each(Waker::wake);
    }

    /// Puts a task behind the gate.
    pub(crate) fn guard(self: &Arc<Self>, task: TaskFuture) -> Guarded {
        let id = {
            let mut state = lock(&self.0);
            state.last_task += 1;
            state.last_task
        };
        Guarded { gate: Arc::clone(self), id, task: Some(AssertUnwindSafe(task).catch_unwind().boxed()) }
    }
}

/// A task behind a gate.
pub(crate) struct Guarded {
    gate: Arc<Gate>,
    id: u64,
    task: Option<BoxFuture<'static, Result<(), Box<dyn Any + Send>>>>,
}

impl Future for Guarded {
    type Output = Ended;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Ended> {
        {
            let mut state = lock(&self.gate.0);
            if !state.dead {
                state.wakers.insert(self.id, cx.waker().clone());
            }
            if state.paused && !state.dead {
                return Poll::Pending;
            }
        }
        if self.gate.is_dead() {
            // What the task holds goes without its lock held: a drop may ask the gate again.
            self.task = None;
            return Poll::Ready(Ended::Killed);
        }
        let Some(task) = &mut self.task else { return Poll::Ready(Ended::Killed) };
        match task.poll_unpin(cx) {
            Poll::Pending => Poll::Pending,
            Poll::Ready(Ok(())) => Poll::Ready(Ended::Returned),
            Poll::Ready(Err(payload)) => Poll::Ready(Ended::Panicked(message(payload.as_ref()))),
        }
    }
}

impl Drop for Guarded {
    fn drop(&mut self) {
        lock(&self.gate.0).wakers.remove(&self.id);
    }
}

fn message(payload: &(dyn Any + Send)) -> String {
    let text = payload.downcast_ref::<&str>().map(|text| (*text).to_owned());
    text.or_else(|| payload.downcast_ref::<String>().cloned()).unwrap_or_else(|| "a panic without a text".to_owned())
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use basal_runtime::env::spawn_on_tokio;
    use tokio::sync::mpsc::{self, UnboundedReceiver};

    use super::*;

    /// A task that sends a number each second, behind a new gate.
    fn ticking() -> (Arc<Gate>, UnboundedReceiver<u32>) {
        let gate = Arc::new(Gate::default());
        let (sender, receiver) = mpsc::unbounded_channel();
        let task = gate.guard(Box::pin(async move {
            for tick in 0.. {
                sender.send(tick).unwrap();
                tokio::time::sleep(Duration::from_secs(1)).await;
            }
        }));
        spawn_on_tokio("ticking", Box::pin(async move { drop(task.await) }));
        (gate, receiver)
    }

    fn drain(receiver: &mut UnboundedReceiver<u32>) -> usize {
        std::iter::from_fn(|| receiver.try_recv().ok()).count()
    }

    #[tokio::test(start_paused = true)]
    async fn a_dead_process_runs_no_further_step_and_lets_go() {
        let (gate, mut ticks) = ticking();
        tokio::time::sleep(Duration::from_millis(2500)).await;
        gate.kill();
        assert_eq!(drain(&mut ticks), 3);
        assert_eq!(ticks.recv().await, None);
    }

    #[tokio::test(start_paused = true)]
    async fn a_paused_process_wakes_up_where_it_was() {
        let (gate, mut ticks) = ticking();
        tokio::time::sleep(Duration::from_millis(2500)).await;
        gate.pause();
        tokio::time::sleep(Duration::from_secs(60)).await;
        assert_eq!(drain(&mut ticks), 3);
        gate.resume();
        tokio::time::sleep(Duration::from_millis(1500)).await;
        assert_eq!(drain(&mut ticks), 2);
    }

    #[tokio::test]
    async fn a_task_that_starts_in_a_dead_process_never_runs() {
        let gate = Arc::new(Gate::default());
        gate.kill();
        assert_eq!(gate.guard(Box::pin(async { unreachable!() })).await, Ended::Killed);
    }

    #[tokio::test]
    async fn a_panic_is_told() {
        let gate = Arc::new(Gate::default());
        assert_eq!(gate.guard(Box::pin(async { panic!("no {}", 1) })).await, Ended::Panicked("no 1".to_owned()));
    }
}
