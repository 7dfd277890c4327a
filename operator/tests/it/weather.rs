//! Servers that have bad days: they do not tell everything, do not answer, ask for a pause, or take their time.

use std::{
    sync::{Arc, Mutex},
    time::Duration,
};

use async_trait::async_trait;
use basal_kvstore::kv::{
    Kv, KvError, KvRefusal, Lease, LeaseId, Range, RangeAnswer, Revision, Txn, TxnAnswer, WatchBatch,
};
use basal_objects::{
    object::{Object, ObjectKey, Resource},
    port::{Freshness, MergePatch, ObjectEvent, Objects, Page, Preconditions, ReadError, Refusal, Scope, Start},
};
use basal_runtime::outcome::Outcome;
use futures::{
    StreamExt as _, future,
    stream::{self, BoxStream},
};
use tokio::sync::watch;

/// How a server is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) enum Sky {
    /// As it should be.
    #[default]
    Clear,
    /// Watches lose what happens, and lists out of its memory show nothing.
    Blind,
    /// Nobody answers. What watches have to tell waits.
    Away,
    /// It asks everybody to come back later.
    Throttled,
    /// Every answer takes so long.
    Slow(Duration),
    /// Reads are answered, and writes are refused for want of space. For etcd.
    Full,
    /// Reads are answered, and writes get lost on their way: who made one learns only that it may have happened.
    Lossy,
}

/// The state of one server, as a test sets it. Clones share it.
#[derive(Clone)]
pub(crate) struct Weather(Arc<Mutex<watch::Sender<Sky>>>);

impl Default for Weather {
    fn default() -> Self {
        Self(Arc::new(Mutex::new(watch::Sender::new(Sky::default()))))
    }
}

/// Why a request gets no proper answer.
enum Fails {
    Away,
    Throttled,
    Full,
    Lost,
}

const WHY_AWAY: &str = "connection refused";
const WHY_LOST: &str = "connection reset by peer";

impl Weather {
    pub(crate) fn set(&self, sky: Sky) {
        self.0.lock().unwrap().send_replace(sky);
    }

    fn now(&self) -> Sky {
        *self.0.lock().unwrap().borrow()
    }

    /// What a request meets.
    async fn request(&self, writes: bool) -> Result<(), Fails> {
        match self.now() {
            Sky::Clear | Sky::Blind => Ok(()),
            Sky::Away => Err(Fails::Away),
            Sky::Throttled => Err(Fails::Throttled),
            Sky::Full if writes => Err(Fails::Full),
            Sky::Lossy if writes => Err(Fails::Lost),
            Sky::Full | Sky::Lossy => Ok(()),
            Sky::Slow(time) => {
                tokio::time::sleep(time).await;
                Ok(())
            }
        }
    }

    /// Waits until watches are told again.
    async fn reachable(&self) {
        let mut sky = self.0.lock().unwrap().subscribe();
        sky.wait_for(|sky| *sky != Sky::Away).await.map(drop).unwrap_or_default();
    }
}

/// A server under the weather.
pub(crate) struct Under<P: ?Sized> {
    pub(crate) server: Arc<P>,
    pub(crate) weather: Weather,
}

impl<P: ?Sized> Under<P> {
    pub(crate) fn new(server: Arc<P>, weather: &Weather) -> Self {
        Self { server, weather: weather.clone() }
    }

    /// A watch whose items wait while the server is away.
    fn held_back<T: Send + 'static>(&self, watch: BoxStream<'static, T>) -> BoxStream<'static, T> {
        let state = (watch, self.weather.clone());
        stream::unfold(state, |(mut watch, weather)| async move {
            let item = watch.next().await?;
            weather.reachable().await;
            Some((item, (watch, weather)))
        })
        .boxed()
    }
}

fn read_error(fails: Fails) -> ReadError {
    match fails {
        Fails::Away | Fails::Full | Fails::Lost => ReadError::Unavailable(WHY_AWAY.to_owned()),
        Fails::Throttled => ReadError::TooManyRequests { retry_after: Some(Duration::from_secs(1)) },
    }
}

fn failed<T>(fails: Fails) -> Outcome<T, Refusal> {
    Outcome::Refused(match fails {
        Fails::Away | Fails::Full => Refusal::Unavailable(WHY_AWAY.to_owned()),
        Fails::Throttled => Refusal::TooManyRequests { retry_after: Some(Duration::from_secs(1)) },
        Fails::Lost => return Outcome::Unknown(WHY_LOST.to_owned()),
    })
}

#[async_trait]
impl Objects for Under<dyn Objects> {
    async fn get(&self, resource: Resource, key: &ObjectKey) -> Result<Option<Object>, ReadError> {
        self.weather.request(false).await.map_err(read_error)?;
        self.server.get(resource, key).await
    }

    /// A list that may be old shows nothing.
    async fn list_page(&self, resource: Resource, scope: &Scope, start: &Start) -> Result<Page, ReadError> {
        self.weather.request(false).await.map_err(read_error)?;
        let page = self.server.list_page(resource, scope, start).await?;
        let hidden = *start == Start::First(Freshness::Any) && self.weather.now() == Sky::Blind;
        Ok(if hidden { Page { items: Vec::new(), ..page } } else { page })
    }

    fn watch(&self, resource: Resource, scope: &Scope) -> BoxStream<'static, Result<ObjectEvent, ReadError>> {
        let weather = self.weather.clone();
        let told = move |event: &Result<ObjectEvent, ReadError>| {
            let change = matches!(event, Ok(ObjectEvent::Applied(_) | ObjectEvent::Deleted(_)));
            future::ready(!(change && weather.now() == Sky::Blind))
        };
        self.held_back(self.server.watch(resource, scope).filter(told).boxed())
    }

    async fn create(&self, resource: Resource, object: Object) -> Outcome<Object, Refusal> {
        match self.weather.request(true).await {
            Ok(()) => self.server.create(resource, object).await,
            Err(fails) => failed(fails),
        }
    }

    async fn patch(&self, resource: Resource, key: &ObjectKey, patch: MergePatch) -> Outcome<Object, Refusal> {
        match self.weather.request(true).await {
            Ok(()) => self.server.patch(resource, key, patch).await,
            Err(fails) => failed(fails),
        }
    }

    async fn delete(&self, resource: Resource, key: &ObjectKey, only_if: Preconditions) -> Outcome<(), Refusal> {
        match self.weather.request(true).await {
            Ok(()) => self.server.delete(resource, key, only_if).await,
            Err(fails) => failed(fails),
        }
    }
}

fn kv_error(_: Fails) -> KvError {
    KvError::Unavailable(WHY_AWAY.to_owned())
}

fn kv_failed<T>(fails: Fails) -> Outcome<T, KvRefusal> {
    Outcome::Refused(match fails {
        Fails::Away | Fails::Throttled => KvRefusal::Unavailable(WHY_AWAY.to_owned()),
        Fails::Full => KvRefusal::NoSpace("etcdserver: mvcc: database space exceeded".to_owned()),
        Fails::Lost => return Outcome::Unknown(WHY_LOST.to_owned()),
    })
}

#[async_trait]
impl Kv for Under<dyn Kv> {
    async fn range(&self, range: Range) -> Result<RangeAnswer, KvError> {
        self.weather.request(false).await.map_err(kv_error)?;
        self.server.range(range).await
    }

    async fn txn(&self, txn: Txn) -> Outcome<TxnAnswer, KvRefusal> {
        match self.weather.request(true).await {
            Ok(()) => self.server.txn(txn).await,
            Err(fails) => kv_failed(fails),
        }
    }

    fn watch(&self, prefix: &str, from: Revision) -> BoxStream<'static, Result<WatchBatch, KvError>> {
        let weather = self.weather.clone();
        let told =
            move |batch: &Result<WatchBatch, KvError>| future::ready(batch.is_err() || weather.now() != Sky::Blind);
        self.held_back(self.server.watch(prefix, from).filter(told).boxed())
    }

    async fn lease_grant(&self, ttl: Duration) -> Outcome<Lease, KvRefusal> {
        match self.weather.request(true).await {
            Ok(()) => self.server.lease_grant(ttl).await,
            Err(fails) => kv_failed(fails),
        }
    }

    async fn lease_keep_alive(&self, id: LeaseId) -> Result<Duration, KvError> {
        self.weather.request(false).await.map_err(kv_error)?;
        self.server.lease_keep_alive(id).await
    }

    async fn lease_revoke(&self, id: LeaseId) -> Outcome<(), KvRefusal> {
        match self.weather.request(false).await {
            Ok(()) => self.server.lease_revoke(id).await,
            Err(fails) => kv_failed(fails),
        }
    }
}
