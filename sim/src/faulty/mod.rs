//! The way between a process and a server: it takes time, and things go wrong on it.
//!
//! [`Faulty`] stands before a port and numbers every call. A request that left is on the wire: it arrives even when its
//! sender dies or gives up meanwhile.

mod answer;
mod kv;
pub(crate) mod line;
mod objects;
mod watch;

use std::{sync::Arc, time::Duration};

use basal_runtime::env::spawn_on_tokio;
use futures::future::{self, BoxFuture};
use tokio::sync::oneshot;

use answer::Answer;

use self::line::Line;
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

/// The wire of one process.
#[derive(Clone)]
pub(crate) struct Wire {
    world: World,
    id: ProcessId,
    /// `None` for the scenario's own calls: they do not go wrong and take no time.
    gate: Option<Arc<Gate>>,
    line: Arc<Line>,
}

/// A call that is about to leave.
struct Departure {
    call: Call,
    fault: Option<Fault>,
}

impl Wire {
    pub(crate) fn of_process(world: World, id: ProcessId, gate: Arc<Gate>) -> Self {
        Self { world, id, gate: Some(gate), line: Arc::default() }
    }

    pub(crate) fn of_user(world: World, id: ProcessId) -> Self {
        Self { world, id, gate: None, line: Arc::default() }
    }

    /// Numbers a call; `None` when the process is dead, or dies instead of making it.
    fn depart(&self, mut call: Call) -> Option<Departure> {
        let Some(gate) = &self.gate else { return Some(Departure { call, fault: None }) };
        if gate.is_dead() {
            return None;
        }
        let (number, fault) = self.world.number();
        call.number = Some(number);
        let fault = fault.filter(|fault| fault.concerns(&call));
        if fault == Some(Fault::CrashBefore) {
            self.world
                .note(Some(&self.id), format!("#{number} {} {} [{}]", call.port, call.request, Fault::CrashBefore));
            self.world.end(&self.id, "is killed");
            return None;
        }
        if let Some(fault) = fault.filter(|fault| fault.is_in_the_world()) {
            self.world.disturb(&self.id, &self.line, fault, number);
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
        let late = if call.is_for_lease() { late + self.line.lease_delay() } else { late };
        let loses_answer = match fault {
            Some(Fault::LoseAnswer) => true,
            Some(Fault::NewEtcdLeader) => call.port == Port::Kv,
            _ => false,
        };
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
                Some(Fault::Conflict) => match A::conflict() {
                    Some(conflict) => conflict,
                    None => effect.await,
                },
                _ => effect.await,
            };
            let changed = wire.world.revisions() != before;
            let told = wire.world.text(|| answer.text());
            wire.world.answered(&wire.id, call, told, fault, changed);
            if fault == Some(Fault::CrashAfter) {
                wire.world.end(&wire.id, "is killed");
            }
            travel(back).await;
            let answer = if loses_answer { A::lost() } else { answer };
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
}

/// Takes time, or none at all.
async fn travel(time: Duration) {
    if !time.is_zero() {
        tokio::time::sleep(time).await;
    }
}
