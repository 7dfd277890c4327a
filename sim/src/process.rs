//! A simulated process: what it gets from its surroundings.

use std::{sync::Arc, time::Duration};

use basal_kvstore::kv::Kv;
use basal_objects::port::Objects;
use basal_runtime::env::{Env, SeededEnv, SharedEnv, TaskFuture, TaskHandle, spawn_on_tokio};
use jiff::Timestamp;
use tokio_util::sync::CancellationToken;

use crate::{
    gate::{Ended, Gate},
    trace::ProcessId,
    world::World,
};

/// Everything that a process may touch.
#[derive(Clone)]
#[expect(missing_debug_implementations, reason = "holds trait objects")]
pub struct ProcessPorts {
    /// Which process this is. The name serves as host name too.
    pub id: ProcessId,
    /// Clock, randomness, tasks.
    pub env: SharedEnv,
    /// etcd, as this process reaches it.
    pub kv: Arc<dyn Kv>,
    /// The API server, as this process reaches it.
    pub objects: Arc<dyn Objects>,
    /// Cancelled when the process is asked to stop.
    pub stop: CancellationToken,
}

/// What a process runs, at each start anew.
pub(crate) type Program = Arc<dyn Fn(ProcessPorts) -> TaskFuture + Send + Sync>;

/// Whether a process that ended starts again.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Restart {
    /// It stays away.
    Never,
    /// It starts again so much later, as kubelet does it.
    After(Duration),
}

/// The surroundings of one incarnation: the world's clock, random numbers of its own, tasks that die with it.
pub(crate) struct SimEnv {
    world: World,
    id: ProcessId,
    gate: Arc<Gate>,
    random: SeededEnv,
}

impl SimEnv {
    pub(crate) fn new(world: World, id: ProcessId, gate: Arc<Gate>, seed: u64) -> Self {
        Self { world, id, gate, random: SeededEnv::new(seed) }
    }
}

impl Env for SimEnv {
    fn now(&self) -> Timestamp {
        self.world.clock_of(&self.id.name)
    }

    fn random_u64(&self) -> u64 {
        self.random.random_u64()
    }

    fn spawn(&self, name: &'static str, future: TaskFuture) -> TaskHandle {
        self.world.note(Some(&self.id), format!("starts task {name}"));
        let (world, id) = (self.world.clone(), self.id.clone());
        let task = self.gate.guard(future);
        spawn_on_tokio(
            name,
            Box::pin(async move {
                if let Ended::Panicked(message) = task.await {
                    world.end(&id, &format!("panics in task {name}: {message}"));
                    world.condemn(format!("{id} panicked in task {name}: {message}"));
                }
            }),
        )
    }
}
