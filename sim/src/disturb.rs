//! Faults that happen in the world rather than to a call.

use std::{sync::Arc, time::Duration};

use basal_objects::{
    object::{Object, resources},
    port::MergePatch,
};
use serde_json::{Value, json};

use crate::{fault::Fault, faulty::line::Line, trace::ProcessId, world::World};

/// How long the cache of another API server stays where it is.
const OLD_CACHE: Duration = Duration::from_secs(10);

impl World {
    /// Makes a fault happen, at the moment when a process makes a call.
    pub(crate) fn disturb(&self, id: &ProcessId, line: &Arc<Line>, fault: Fault, call: u64) {
        self.note(Some(id), format!("{fault}, before #{call}"));
        match fault {
            Fault::Lag(time) => line.hold(time),
            Fault::Gap(time) => line.break_off(time),
            Fault::DropEvent => line.drop_one(),
            Fault::FailOver(changes) => self.objects().fail_over(changes.into(), OLD_CACHE),
            Fault::LoseLease(time) => {
                line.slow_leases(time);
                self.free_leases();
            }
            Fault::EndLeases => self.kv().expire_leases(),
            Fault::ClockJump(seconds) => self.move_clock(&id.name, seconds.into()),
            Fault::NewEtcdLeader => self.kv().cut_watches(),
            Fault::Compact => {
                let (kv, objects) = self.revisions();
                // Compacted there already: then there is nothing to forget.
                self.kv().compact(kv).unwrap_or_default();
                self.objects().compact(objects).unwrap_or_default();
            }
            Fault::Restore(revisions) => {
                self.kv().roll_back(revisions.into(), true);
                self.rolled_back();
            }
            Fault::Rewind(revisions) => {
                self.kv().roll_back(revisions.into(), false);
                self.rolled_back();
            }
            Fault::CrashBefore
            | Fault::CrashAfter
            | Fault::LoseRequest
            | Fault::LoseAnswer
            | Fault::Overtake
            | Fault::Conflict
            | Fault::Unavailable
            | Fault::Throttle
            | Fault::Delay(_)
            | Fault::Stall(_) => {}
        }
        self.look();
    }

    /// Lets every Lease of a leader election name nobody.
    fn free_leases(&self) {
        for lease in self.objects().all(&resources::LEASE) {
            let held = |lease: &Object| lease.0.pointer("/spec/holderIdentity").and_then(Value::as_str).is_some();
            if held(&lease) {
                let patch = MergePatch {
                    resource_version: lease.resource_version().to_owned(),
                    uid: lease.uid().to_owned(),
                    subresource: None,
                    body: json!({"spec": {"holderIdentity": null}}),
                };
                // Nothing lies between this and the read.
                self.objects().patch_now(&resources::LEASE, &lease.key(), &patch).map_or_else(drop, drop);
            }
        }
    }
}
