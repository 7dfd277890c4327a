//! Programs on `cilium_host` and `cilium_net`.

use aya_ebpf::{macros::classifier, programs::TcContext};
use basal_ebpf::decide;
use basal_maps::{
    metrics::{Direction, File},
    reason::Reason,
};

use super::{
    config,
    context::{Frame, OK},
    maps::Pinned,
};

/// Egress of `cilium_host`: what the stack routes to pods.
#[classifier]
pub(super) fn cil_from_host(ctx: TcContext) -> i32 {
    let mut frame = Frame { ctx, file: File::Host, drops: Direction::Egress };
    let config = config();
    let view = match frame.view(&config) {
        Ok(view) => view,
        Err(reason) => return frame.drop(reason, line!()),
    };
    let verdict = decide::from_host(&Pinned, &config, frame.mark(), &view.packet, &view.about);
    frame.act(verdict, &view.packet, &config, line!())
}

/// Ingress of `cilium_host` and `cilium_net`: what reaches the host over them.
#[classifier]
pub(super) fn cil_to_host(ctx: TcContext) -> i32 {
    let frame = Frame { ctx, file: File::Host, drops: Direction::Ingress };
    frame.count(Reason::FORWARDED, Direction::Egress, line!());
    OK
}
