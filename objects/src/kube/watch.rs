//! A watch that never ends: kube's watcher, with pauses after errors and a change of the server.

use std::{sync::Arc, time::Duration};

use basal_runtime::{
    backoff::{Backoff, Failures},
    env::SharedEnv,
    failure::chain,
};
use futures::{
    StreamExt,
    stream::{self, BoxStream},
};
use kube::{
    Api,
    core::Status,
    runtime::watcher::{self, Event, watcher},
};
use tokio::time::sleep;

use super::{Servers, answer, api_resource, body::Watched, typed};
use crate::{
    object::Resource,
    port::{ObjectEvent, ReadError, Scope},
};

/// Pauses after errors in a row.
const PAUSES: Backoff = Backoff::new(Duration::from_millis(500), Duration::from_secs(30));

struct Watch {
    servers: Arc<Servers>,
    env: SharedEnv,
    resource: Resource,
    scope: Scope,
    /// The watcher and the number of the server that it talks to.
    running: Option<(usize, BoxStream<'static, watcher::Result<Event<Watched>>>)>,
    failures: Failures,
    pause: Option<Duration>,
}

pub(super) fn stream(
    servers: Arc<Servers>,
    env: SharedEnv,
    resource: Resource,
    scope: Scope,
) -> BoxStream<'static, Result<ObjectEvent, ReadError>> {
    let watch = Watch { servers, env, resource, scope, running: None, failures: Failures::none(PAUSES), pause: None };
    stream::unfold(watch, |mut watch| async move {
        let event = watch.next().await;
        Some((event, watch))
    })
    .boxed()
}

impl Watch {
    async fn next(&mut self) -> Result<ObjectEvent, ReadError> {
        if let Some(pause) = self.pause.take() {
            sleep(pause).await;
        }
        loop {
            let (server, mut events) = match self.running.take() {
                Some(running) => running,
                None => self.begin(),
            };
            match events.next().await {
                Some(Ok(event)) => {
                    // The beginning of a list is no answer of the server yet.
                    if !matches!(event, Event::Init) {
                        self.failures.reset();
                    }
                    self.running = Some((server, events));
                    return Ok(self.event(event));
                }
                Some(Err(error)) => {
                    self.pause = Some(self.failures.next(self.env.as_ref()));
                    match status(&error) {
                        // The watcher would ask for the same lost revision again.
                        Some(status) if status.code == 410 => {}
                        Some(_) => self.running = Some((server, events)),
                        // No answer: another server gets a chance, where there is one.
                        None if self.servers.clients.len() > 1 => self.servers.leave(server),
                        None => self.running = Some((server, events)),
                    }
                    return Err(read_error(&self.resource, &error));
                }
                // The watcher's own stream does not end; a new one lists again.
                None => {}
            }
        }
    }

    /// Lists at quorum, in pages, then watches. A streamed list would cost the server less, but kube's begins with
    /// whatever is in the server's memory, which may be older than what was seen before.
    fn begin(&self) -> (usize, BoxStream<'static, watcher::Result<Event<Watched>>>) {
        let (server, client) = self.servers.current();
        let kind = api_resource(&self.resource);
        let api: Api<Watched> = match &self.scope.namespace {
            Some(namespace) => Api::namespaced_with(client, namespace, &kind),
            None => Api::all_with(client, &kind),
        };
        let config = watcher::Config {
            label_selector: self.scope.labels.clone(),
            field_selector: self.scope.fields.clone(),
            ..watcher::Config::default()
        };
        (server, watcher(api, config).boxed())
    }

    fn event(&self, event: Event<Watched>) -> ObjectEvent {
        let object = |object: Watched| typed(&self.resource, object.body);
        match event {
            Event::Init => ObjectEvent::Restarted,
            Event::InitApply(listed) => ObjectEvent::Listed(object(listed)),
            Event::InitDone => ObjectEvent::InSync,
            Event::Apply(applied) => ObjectEvent::Applied(object(applied)),
            Event::Delete(deleted) => ObjectEvent::Deleted(object(deleted)),
        }
    }
}

/// What the server said, when it said something.
fn status(error: &watcher::Error) -> Option<&Status> {
    match error {
        watcher::Error::WatchError(status) => Some(status),
        watcher::Error::InitialListFailed(kube::Error::Api(status))
        | watcher::Error::WatchStartFailed(kube::Error::Api(status))
        | watcher::Error::WatchFailed(kube::Error::Api(status)) => Some(status),
        watcher::Error::InitialListFailed(_)
        | watcher::Error::WatchStartFailed(_)
        | watcher::Error::WatchFailed(_)
        | watcher::Error::NoResourceVersion => None,
    }
}

fn read_error(resource: &Resource, error: &watcher::Error) -> ReadError {
    match status(error) {
        Some(status) if matches!(status.code, 401 | 403) => ReadError::Forbidden(status.message.clone()),
        Some(status) if status.code == 404 => ReadError::UnknownKind(answer::kind(resource)),
        Some(status) if status.code == 429 => {
            let seconds = status.details.as_ref().map(|details| details.retry_after_seconds);
            let retry_after = seconds.filter(|seconds| *seconds > 0).map(|seconds| Duration::from_secs(seconds.into()));
            ReadError::TooManyRequests { retry_after }
        }
        _ => ReadError::Unavailable(chain(error)),
    }
}
