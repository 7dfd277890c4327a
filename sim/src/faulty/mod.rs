//! The way between a process and a server: it takes time, and things go wrong on it.
//!
//! [`Faulty`] stands before a port and numbers every call. A request that left is on the wire: it arrives even when its
//! sender dies or gives up meanwhile.

mod answer;
mod kv;
mod objects;

use std::{sync::Arc, time::Duration};

use basal_runtime::env::spawn_on_tokio;
use futures::{
    Stream, StreamExt as _,
    future::{self, BoxFuture},
    stream::{self, BoxStream},
};
use tokio::sync::oneshot;

use answer::Answer;

use crate::{
    fault::Fault,
    gate::Gate,
    trace::{Call, Port, ProcessId},
    world::World,
};

/// A port with the wire to it.
#[derive(Clone)]
pub(crate) struct Faulty<P> {
    server: Arc<P>,
    wire: Wire,
}

impl<P> Faulty<P> {
    pub(crate) fn new(server: P, wire: Wire) -> Self {
        Self { server: Arc::new(server), wire }
    }

    fn server(&self) -> Arc<P> {
        Arc::clone(&self.server)
    }
}

/// What a call does at the server.
struct Request<A> {
    call: Call,
    /// Carries it out.
    effect: BoxFuture<'static, A>,
    /// What somebody else does just before, to be first.
    overtaking: BoxFuture<'static, ()>,
}

/// What becomes of a watch after an error.
#[derive(Clone, Copy, PartialEq, Eq)]
enum AfterError {
    Ends,
    GoesOn,
}

/// The wire of one process.
#[derive(Clone)]
pub(crate) struct Wire {
    world: World,
    id: ProcessId,
    /// `None` for the scenario's own calls: they do not go wrong and take no time.
    gate: Option<Arc<Gate>>,
}

/// A call that is about to leave.
struct Departure {
    call: Call,
    fault: Option<Fault>,
}

impl Wire {
    pub(crate) fn of_process(world: World, id: ProcessId, gate: Arc<Gate>) -> Self {
        Self { world, id, gate: Some(gate) }
    }

    pub(crate) fn of_user(world: World, id: ProcessId) -> Self {
        Self { world, id, gate: None }
    }

    /// Numbers a call; `None` when the process is dead, or dies instead of making it.
    fn depart(&self, mut call: Call) -> Option<Departure> {
        let Some(gate) = &self.gate else { return Some(Departure { call, fault: None }) };
        if gate.is_dead() {
            return None;
        }
        let (number, fault) = self.world.number();
        call.number = Some(number);
        let fault = fault.filter(|fault| call.write || fault.concerns_reads());
        if fault == Some(Fault::CrashBefore) {
            self.world
                .note(Some(&self.id), format!("#{number} {} {} [{}]", call.port, call.request, Fault::CrashBefore));
            self.world.end(&self.id, "is killed");
            return None;
        }
        Some(Departure { call, fault })
    }

    fn time(&self) -> Duration {
        match self.gate {
            Some(_) => Duration::from_millis(self.world.draw(&self.world.latency().call)),
            None => Duration::ZERO,
        }
    }

    /// Makes a call. A process that is dead, or dies of this call, gets no answer.
    async fn call<A: Answer>(&self, request: Request<A>) -> A {
        let Request { call, effect, overtaking } = request;
        let Some(Departure { call, fault }) = self.depart(call) else { return future::pending().await };
        if let Some(Fault::Stall(time)) = fault {
            self.world.stall(&self.id.name, time);
            // This task stands still too.
            travel(time).await;
        }
        let (there, back) = (self.time(), self.time());
        let late = if let Some(Fault::Delay(time)) = fault { time } else { Duration::ZERO };
        let (sender, receiver) = oneshot::channel();
        let wire = self.clone();
        let journey = async move {
            travel(there + late).await;
            let before = wire.world.revisions();
            if fault == Some(Fault::Overtake) {
                overtaking.await;
            }
            let answer = match fault {
                Some(Fault::LoseRequest) => A::lost(),
                Some(Fault::Unavailable) => A::unavailable(),
                Some(Fault::Throttle) => A::throttled(),
                _ => effect.await,
            };
            let changed = wire.world.revisions() != before;
            wire.world.answered(&wire.id, call, answer.text(), fault, changed);
            if fault == Some(Fault::CrashAfter) {
                wire.world.end(&wire.id, "is killed");
            }
            travel(back).await;
            let answer = if fault == Some(Fault::LoseAnswer) { A::lost() } else { answer };
            // The sender may have given up, or died.
            sender.send(answer).map_or_else(drop, drop);
        };
        drop(spawn_on_tokio("wire", Box::pin(journey)));
        match receiver.await {
            Ok(answer) => answer,
            // The runtime is going away.
            Err(_) => future::pending().await,
        }
    }

    /// Opens a watch. `error` makes the port's error that stands for a watch that could not be opened.
    fn watch<T, E>(
        &self,
        port: Port,
        request: String,
        server: impl Stream<Item = Result<T, E>> + Send + 'static,
        text: fn(&T) -> String,
        error: fn() -> E,
        after_error: AfterError,
    ) -> BoxStream<'static, Result<T, E>>
    where
        T: Send + 'static,
        E: Send + ToString + 'static,
    {
        let call = Call { number: None, port, write: false, request };
        let Some(Departure { call, fault }) = self.depart(call) else { return stream::pending().boxed() };
        let number = call.number;
        let opened = fault.is_none_or(|fault| matches!(fault, Fault::CrashAfter | Fault::Delay(_) | Fault::Stall(_)));
        self.world.answered(&self.id, call, if opened { "open" } else { "not opened" }.to_owned(), fault, false);
        if fault == Some(Fault::CrashAfter) {
            self.world.end(&self.id, "is killed");
            return stream::pending().boxed();
        }
        let late = match fault {
            Some(Fault::Delay(time)) => time,
            Some(Fault::Stall(time)) => {
                self.world.stall(&self.id.name, time);
                time
            }
            _ => Duration::ZERO,
        };
        let delay = stream::once(travel(late)).filter_map(|()| future::ready(None));
        let items = if opened {
            delay.chain(server).boxed()
        } else if after_error == AfterError::Ends {
            stream::once(future::ready(Err(error()))).boxed()
        } else {
            stream::once(future::ready(Err(error()))).chain(server).boxed()
        };
        let wire = self.clone();
        items
            .then(move |item| {
                let wire = wire.clone();
                async move {
                    if wire.gate.is_some() {
                        travel(Duration::from_millis(wire.world.draw(&wire.world.latency().watch))).await;
                    }
                    let line = item.as_ref().map_or_else(|error| format!("error: {}", error.to_string()), text);
                    wire.world.delivered(&wire.id, number, line);
                    item
                }
            })
            .boxed()
    }
}

/// Takes time, or none at all.
async fn travel(time: Duration) {
    if !time.is_zero() {
        tokio::time::sleep(time).await;
    }
}
