//! Watches on the wire.

use std::{sync::Arc, time::Duration};

use futures::{
    FutureExt as _, StreamExt as _, pin_mut, select_biased,
    stream::{self, BoxStream},
};
use tokio::time::Instant;

use super::{Departure, Wire, line::Seen, travel};
use crate::{
    fault::Fault,
    trace::{Call, Port},
};

/// What a port's watches are like.
pub(super) struct Kind<T, E> {
    pub(super) port: Port,
    /// An item as text, for the trace.
    pub(super) text: fn(&T) -> String,
    /// What tells that the watch broke.
    pub(super) error: fn() -> E,
    /// Whether an item is a change that a half-open connection can lose.
    pub(super) can_be_lost: fn(&T) -> bool,
    /// Whether the watch goes on after an error by itself; otherwise the caller opens another one.
    pub(super) goes_on: bool,
}

/// How long after a lost change the watches of a process list again.
const HEALED: Duration = Duration::from_secs(30);

/// Opens the watch at the server.
type Open<T, E> = Box<dyn Fn() -> BoxStream<'static, Result<T, E>> + Send>;

struct Watch<T, E> {
    kind: Kind<T, E>,
    open: Open<T, E>,
    wire: Wire,
    number: Option<u64>,
    state: State<T, E>,
    seen: Seen,
}

enum State<T, E> {
    /// It cannot be opened.
    Refused,
    /// It is opened then. Who asked for it may stand still until later.
    Late(Instant),
    Open(BoxStream<'static, Result<T, E>>),
    Ended,
}

/// What comes first.
enum Next<T, E> {
    Item(Option<Result<T, E>>),
    LineChanged,
}

impl Wire {
    /// Opens a watch.
    pub(super) fn watch<T, E>(
        &self,
        kind: Kind<T, E>,
        request: String,
        open: Open<T, E>,
    ) -> BoxStream<'static, Result<T, E>>
    where
        T: Send + 'static,
        E: Send + ToString + 'static,
    {
        let call = Call { number: None, port: kind.port, write: false, request };
        let Some(Departure { call, fault }) = self.depart(call) else { return stream::pending().boxed() };
        let number = call.number;
        let refused =
            matches!(fault, Some(Fault::LoseRequest | Fault::LoseAnswer | Fault::Unavailable | Fault::Throttle));
        self.world.answered(&self.id, call, if refused { "not opened" } else { "open" }.to_owned(), fault, false);
        let state = match fault {
            Some(Fault::CrashAfter) => {
                self.world.end(&self.id, "is killed");
                return stream::pending().boxed();
            }
            Some(Fault::Delay(time)) => State::Late(Instant::now() + time),
            Some(Fault::Stall(time)) => {
                self.world.stall(&self.id.name, time);
                State::Late(Instant::now() + time)
            }
            _ if refused => State::Refused,
            _ => State::Late(Instant::now()),
        };
        let watch = Watch { kind, open, wire: self.clone(), number, state, seen: self.line.now() };
        stream::unfold(watch, |mut watch| async move {
            let item = watch.next_item().await?;
            Some((item, watch))
        })
        .boxed()
    }
}

impl<T, E: ToString> Watch<T, E> {
    async fn next_item(&mut self) -> Option<Result<T, E>> {
        loop {
            match &mut self.state {
                State::Ended => return None,
                State::Refused => return Some(self.broken()),
                State::Late(at) => {
                    travel(at.saturating_duration_since(Instant::now())).await;
                    self.state = State::Open((self.open)());
                }
                State::Open(items) => {
                    let line = Arc::clone(&self.wire.line);
                    let line_changed = line.changed();
                    if let Some(ends) = self.wire.line.take_gap(&mut self.seen) {
                        if !self.kind.goes_on {
                            return Some(self.broken());
                        }
                        self.state = State::Late(ends);
                        continue;
                    }
                    let next = {
                        let line_changed = line_changed.fuse();
                        pin_mut!(line_changed);
                        select_biased! {
                            () = line_changed => Next::LineChanged,
                            item = items.next().fuse() => Next::Item(item),
                        }
                    };
                    if let Next::Item(item) = next
                        && let Some(item) = self.arrive(item?).await
                    {
                        return Some(item);
                    }
                }
            }
        }
    }

    /// The error that a broken watch gives. One that does not go on by itself ends with it.
    fn broken(&mut self) -> Result<T, E> {
        let error = (self.kind.error)();
        self.wire.world.delivered(&self.wire.id, self.number, format!("error: {}", error.to_string()));
        self.state = if self.kind.goes_on { State::Late(Instant::now()) } else { State::Ended };
        Err(error)
    }

    /// An item on its way; `None` when it gets lost.
    async fn arrive(&mut self, item: Result<T, E>) -> Option<Result<T, E>> {
        let world = &self.wire.world;
        if self.wire.gate.is_some() {
            travel(Duration::from_millis(world.draw(&world.latency().watch))).await;
            self.wire.line.ready().await;
        }
        let lost = item.as_ref().is_ok_and(self.kind.can_be_lost) && self.wire.line.take_drop(&mut self.seen);
        let text = world.text(|| {
            let text = item.as_ref().map_or_else(|error| format!("error: {}", error.to_string()), self.kind.text);
            if lost { format!("lost: {text}") } else { text }
        });
        world.delivered(&self.wire.id, self.number, text);
        if lost {
            let line = Arc::clone(&self.wire.line);
            world.later(HEALED, move |_| line.break_off(Duration::ZERO));
        }
        (!lost).then_some(item)
    }
}
