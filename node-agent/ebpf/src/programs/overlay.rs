//! Programs on `cilium_vxlan`.

use aya_ebpf::{macros::classifier, programs::TcContext};
use basal_ebpf::decide::{self, Verdict};
use basal_maps::{
    mark,
    metrics::{Direction, File},
    reason::Reason,
};

use super::{
    config,
    context::{Frame, OK},
    maps::Pinned,
};

/// Ingress: what other nodes sent.
#[classifier]
pub(super) fn cil_from_overlay(ctx: TcContext) -> i32 {
    let mut frame = Frame { ctx, file: File::Overlay, drops: Direction::Ingress };
    match receive(&mut frame) {
        Ok(action) => action,
        Err(reason) => frame.drop(reason, line!()),
    }
}

#[inline(always)]
fn receive(frame: &mut Frame) -> Result<i32, Reason> {
    let vni = frame.vni().ok_or(Reason::NO_TUNNEL_KEY)?;
    let config = config();
    let view = frame.view(&config)?;
    frame.count(Reason::PLAINTEXT, Direction::Ingress, line!());
    let verdict = decide::from_overlay(&Pinned, &config, vni, &view.packet, view.transport, &view.about);
    if !matches!(verdict, Verdict::Drop(_)) {
        frame.claim()?;
    }
    Ok(frame.act(verdict, &view.packet, &config, line!()))
}

/// Egress: what goes to other nodes. Marks the packet around it with the identity in it, so that the stack can tell
/// tunnel packets from others. What has no tunnel information the device itself drops.
#[classifier]
pub(super) fn cil_to_overlay(ctx: TcContext) -> i32 {
    let frame = Frame { ctx, file: File::Overlay, drops: Direction::Egress };
    if let Some(vni) = frame.vni() {
        frame.ctx.set_mark(mark::encode(mark::MAGIC_OVERLAY, vni));
    }
    OK
}
