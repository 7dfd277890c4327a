//! A watch that never ends: kube's watcher, with pauses after errors and a change of the server.
//!
//! It begins with a streamed list: the server sends what there is as events, from its memory, once that is as new as the
//! request. Pages of kinds that nobody wrote for some minutes it takes from etcd, which costs it almost four times as much.
//! They are for servers that stream no lists, and for a stream that broke off.

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
use http::Request;
use kube::{
    Api,
    client::Body,
    core::Status,
    runtime::watcher::{self, Event, InitialListStrategy, watcher},
};
use tokio::time::{sleep, timeout};

use super::{REQUEST_TIMEOUT, Servers, answer, api_resource, body::Watched, typed};
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
    running: Option<Running>,
    /// Whether the next list comes in pages.
    pages: bool,
    failures: Failures,
    pause: Option<Duration>,
}

/// A watcher.
struct Running {
    /// The number of the server that it talks to.
    server: usize,
    /// Whether its lists are streamed.
    streamed: bool,
    stage: Stage,
    events: BoxStream<'static, watcher::Result<Event<Watched>>>,
}

/// How far a watcher is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Stage {
    Begun,
    Lists,
    Follows,
}

impl Running {
    /// Its next event, unless a list is under way and nothing more of it comes.
    async fn next(&mut self) -> Result<Option<watcher::Result<Event<Watched>>>, BrokenOff> {
        let listed = self.stage == Stage::Lists;
        let event = match self.stage {
            Stage::Begun | Stage::Lists => {
                timeout(REQUEST_TIMEOUT, self.events.next()).await.map_err(|_elapsed| BrokenOff)?
            }
            Stage::Follows => self.events.next().await,
        };
        match &event {
            // The watcher begins anew, and at once, when a stream ends before its bookmark "initial-events-end".
            Some(Ok(Event::Init)) if listed => return Err(BrokenOff),
            Some(Ok(Event::Init)) => self.stage = Stage::Lists,
            Some(Ok(Event::InitDone)) => self.stage = Stage::Follows,
            Some(Ok(Event::InitApply(_) | Event::Apply(_) | Event::Delete(_)) | Err(_)) | None => {}
        }
        Ok(event)
    }
}

/// A list that nothing more comes of.
#[derive(Debug, Clone, Copy)]
struct BrokenOff;

pub(super) fn stream(
    servers: Arc<Servers>,
    env: SharedEnv,
    resource: Resource,
    scope: Scope,
) -> BoxStream<'static, Result<ObjectEvent, ReadError>> {
    let failures = Failures::none(PAUSES);
    let watch = Watch { servers, env, resource, scope, running: None, pages: false, failures, pause: None };
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
            let mut running = self.running.take().unwrap_or_else(|| self.begin());
            match running.next().await {
                Ok(Some(Ok(event))) => {
                    // The beginning of a list is no answer of the server yet.
                    if !matches!(event, Event::Init) {
                        self.failures.reset();
                    }
                    // A server that streams none is asked anew each time: it may have learnt it meanwhile.
                    if running.stage == Stage::Follows {
                        self.pages = false;
                    }
                    self.running = Some(running);
                    return Ok(self.event(event));
                }
                Ok(Some(Err(error))) if running.streamed && no_streams(&error) => self.pages = true,
                Ok(Some(Err(error))) => {
                    self.pause = Some(self.failures.next(self.env.as_ref()));
                    match status(&error).map(|status| status.code) {
                        // No answer: another server gets a chance, where there is one.
                        None if self.servers.clients.len() > 1 => self.servers.leave(running.server),
                        // The watcher would ask for the same lost revision again.
                        Some(410) => {}
                        // Without a whole list there is nothing to go on from.
                        _ if running.stage != Stage::Follows => {}
                        _ => self.running = Some(running),
                    }
                    return Err(read_error(&self.resource, &error));
                }
                Err(BrokenOff) => {
                    self.pause = Some(self.failures.next(self.env.as_ref()));
                    self.pages = running.streamed;
                    if self.servers.clients.len() > 1 {
                        self.servers.leave(running.server);
                    }
                    let what = self.resource.plural;
                    return Err(ReadError::Unavailable(format!("the list of {what} broke off before its end")));
                }
                // The watcher's own stream does not end; a new one lists again.
                Ok(None) => {}
            }
        }
    }

    fn begin(&self) -> Running {
        let (server, client) = self.servers.current();
        let kind = api_resource(&self.resource);
        let api: Api<Watched> = match &self.scope.namespace {
            Some(namespace) => Api::namespaced_with(client, namespace, &kind),
            None => Api::all_with(client, &kind),
        };
        let config = watcher::Config {
            label_selector: self.scope.labels.clone(),
            field_selector: self.scope.fields.clone(),
            initial_list_strategy: match self.pages {
                true => InitialListStrategy::ListWatch,
                false => InitialListStrategy::StreamingList,
            },
            ..watcher::Config::default()
        };
        Running { server, streamed: !self.pages, stage: Stage::Begun, events: watcher(api, config).boxed() }
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

/// Lets a streamed list be at quorum, as pages are.
///
/// kube's watcher asks for version 0, by which the server may begin with what it knew some time ago. Without a version it
/// waits until it knows all that was written before the request (Kubernetes documentation, "Streaming lists").
pub(super) fn begin_at_quorum(mut request: Request<Body>) -> Request<Body> {
    let uri = request.uri().to_string();
    if uri.contains("sendInitialEvents=true")
        && let Some(newest) = uri.strip_suffix("&resourceVersion=0")
        && let Ok(newest) = newest.parse()
    {
        *request.uri_mut() = newest;
    }
    request
}

/// Whether a server refuses to stream lists, as those do whose feature gate WatchList is off.
fn no_streams(error: &watcher::Error) -> bool {
    matches!(error, watcher::Error::WatchStartFailed(kube::Error::Api(status)) if status.code == 422)
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

#[cfg(test)]
mod tests {
    use std::{
        collections::VecDeque,
        convert::Infallible,
        sync::{Mutex, atomic::AtomicUsize},
    };

    use basal_runtime::{env::SeededEnv, sync::lock};
    use http::{Response, StatusCode};
    use http_body_util::StreamBody;
    use hyper::body::{Bytes, Frame};
    use kube::{Client, api::WatchParams};
    use serde_json::{Value, json};
    use tower::service_fn;

    use super::*;
    use crate::object::resources::NODE;

    /// What is asked of the server for a watch that begins in a way.
    fn asked(params: &WatchParams, version: &str) -> String {
        let request = kube::core::Request::new("/api/v1/nodes").watch(params, version).unwrap();
        begin_at_quorum(request.map(Into::into)).uri().to_string()
    }

    #[test]
    fn only_a_streamed_list_loses_its_version() {
        let streamed = asked(&WatchParams::streaming_lists(), "0");
        assert!(streamed.contains("sendInitialEvents=true&resourceVersionMatch=NotOlderThan"), "{streamed}");
        assert!(!streamed.contains("resourceVersion="), "{streamed}");
        for version in ["0", "7"] {
            let followed = asked(&WatchParams::default(), version);
            assert!(followed.ends_with(&format!("&resourceVersion={version}")), "{followed}");
        }
    }

    /// What a server says to one request.
    struct Says {
        status: StatusCode,
        lines: Vec<Value>,
        /// Whether the answer has no end.
        open: bool,
    }

    fn says(lines: impl Into<Vec<Value>>) -> Says {
        Says { status: StatusCode::OK, lines: lines.into(), open: false }
    }

    fn open(lines: impl Into<Vec<Value>>) -> Says {
        Says { open: true, ..says(lines) }
    }

    fn node(name: &str, version: u64) -> Value {
        json!({"metadata": {"name": name, "resourceVersion": version.to_string()}})
    }

    fn added(name: &str, version: u64) -> Value {
        json!({"type": "ADDED", "object": node(name, version)})
    }

    fn page(name: &str, version: u64) -> Value {
        json!({"metadata": {"resourceVersion": version.to_string()}, "items": [node(name, version)]})
    }

    fn failure(code: u16) -> Value {
        json!({"kind": "Status", "status": "Failure", "code": code, "message": format!("code {code}"), "reason": "r"})
    }

    /// A watch of nodes at a server that says this, and what it asked for.
    struct Talk {
        events: BoxStream<'static, Result<ObjectEvent, ReadError>>,
        asked: Arc<Mutex<Vec<&'static str>>>,
    }

    impl Talk {
        fn with(answers: impl Into<VecDeque<Says>>) -> Self {
            let answers = Arc::new(Mutex::new(answers.into()));
            let asked = Arc::new(Mutex::new(Vec::new()));
            let noted = Arc::clone(&asked);
            let server = service_fn(move |request: Request<Body>| {
                let query = request.uri().query().unwrap_or_default();
                lock(&noted).push(match () {
                    () if query.contains("sendInitialEvents=true") => "stream",
                    () if query.contains("watch=true") => "follow",
                    () => "page",
                });
                let Says { status, lines, open } = lock(&answers).pop_front().unwrap();
                let lines =
                    stream::iter(lines.into_iter().map(|line| Ok(Frame::data(Bytes::from(format!("{line}\n"))))));
                let rest = if open { stream::pending().boxed() } else { stream::empty().boxed() };
                let body: BoxStream<'static, Result<Frame<Bytes>, Infallible>> = lines.chain(rest).boxed();
                let answer = Response::builder().status(status).body(StreamBody::new(body)).unwrap();
                async { Ok::<_, Infallible>(answer) }
            });
            let servers = Servers { clients: vec![Client::new(server, "default")], current: AtomicUsize::new(0) };
            let env = Arc::new(SeededEnv::new(1));
            Self { events: stream(Arc::new(servers), env, NODE, Scope::default()), asked }
        }

        /// The next events in short: the names of listed and applied objects, and their versions.
        async fn next<const N: usize>(&mut self) -> [String; N] {
            let mut told = [const { String::new() }; N];
            for text in &mut told {
                *text = match self.events.next().await.unwrap() {
                    Ok(ObjectEvent::Restarted) => "restarted".to_owned(),
                    Ok(ObjectEvent::Listed(object)) => format!("{}@{}", object.name(), object.resource_version()),
                    Ok(ObjectEvent::InSync) => "in sync".to_owned(),
                    Ok(ObjectEvent::Applied(object)) => format!("+{}@{}", object.name(), object.resource_version()),
                    Ok(ObjectEvent::Deleted(object)) => format!("-{}", object.name()),
                    Err(ReadError::Unavailable(why)) => why,
                    Err(other) => other.to_string(),
                };
            }
            told
        }

        fn asked(&self) -> Vec<&'static str> {
            std::mem::take(&mut *lock(&self.asked))
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_server_that_streams_no_lists_is_read_in_pages_and_asked_again_when_the_list_is_lost() {
        let refusal = || Says { status: StatusCode::UNPROCESSABLE_ENTITY, ..says([failure(422)]) };
        let lost = json!({"type": "ERROR", "object": failure(410)});
        let mut talk =
            Talk::with([refusal(), says([page("a", 7)]), open([added("b", 8), lost]), refusal(), says([page("a", 9)])]);
        assert_eq!(talk.next().await, ["restarted", "a@7", "in sync", "+b@8"]);
        assert_eq!(talk.asked(), ["stream", "page", "follow"]);
        assert!(talk.next::<1>().await[0].contains("code 410"), "the loss is told");
        assert_eq!(talk.next().await, ["restarted", "a@9", "in sync"]);
        assert_eq!(talk.asked(), ["stream", "page"]);
    }

    #[tokio::test(start_paused = true)]
    async fn a_streamed_list_whose_end_is_not_told_is_read_in_pages() {
        // kube's watcher asks again by itself when a stream ends.
        let ended = (vec![says([added("a", 7)]), open([])], vec!["stream", "stream", "page"]);
        let silent = (vec![open([added("a", 7)])], vec!["stream", "page"]);
        for (mut answers, asked) in [ended, silent] {
            answers.extend([says([page("b", 8)]), open([])]);
            let mut talk = Talk::with(answers);
            let broken = "the list of nodes broke off before its end";
            assert_eq!(talk.next().await, ["restarted", "a@7", broken, "restarted", "b@8", "in sync"]);
            assert_eq!(talk.asked(), asked);
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_list_that_failed_begins_anew() {
        let unavailable = || Says { status: StatusCode::SERVICE_UNAVAILABLE, ..says([failure(503)]) };
        let error = json!({"type": "ERROR", "object": failure(500)});
        let end = json!({"type": "BOOKMARK", "object": {"kind": "Node", "apiVersion": "v1", "metadata":
            {"resourceVersion": "9", "annotations": {"k8s.io/initial-events-end": "true"}}}});
        let mut talk =
            Talk::with([unavailable(), open([added("a", 7), error]), open([added("a", 8), end, added("b", 10)])]);
        assert!(talk.next::<1>().await[0].contains("code 503"), "the refusal is told");
        let [restarted, listed, failed] = talk.next().await;
        assert_eq!((restarted.as_str(), listed.as_str()), ("restarted", "a@7"));
        assert!(failed.contains("code 500"), "{failed}");
        assert_eq!(talk.next().await, ["restarted", "a@8", "in sync", "+b@10"]);
        assert_eq!(talk.asked(), ["stream", "stream", "stream"]);
    }
}
