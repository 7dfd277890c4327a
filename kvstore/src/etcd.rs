//! The adapter: [`Kv`] spoken to real etcd.
//!
//! Each endpoint has a connection of its own that comes up when it is needed. A request goes to the endpoint that
//! answered last; what provably did not happen there (no connection, no leader) is tried at the next one, and a read
//! is tried there after any failure. Nothing else is retried here.

use std::{
    future::Future,
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use async_trait::async_trait;
use basal_runtime::{
    env::{Env, SharedEnv},
    outcome::Outcome,
};
use etcd_client as etcd;
use futures::{StreamExt, stream, stream::BoxStream};
use tokio::sync::Semaphore;
use tonic::transport::{Channel, Endpoint};

use crate::{
    config::{EndpointUrl, EtcdConfig, KvstoreOptions},
    connector::Connector,
    convert::{self, Failed},
    kv::{
        Header, Keys, Kv, KvError, KvRefusal, Lease, LeaseId, Range, RangeAnswer, Revision, Txn, TxnAnswer, WatchBatch,
    },
};

/// Limits of the adapter.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Requests under way at once.
    pub max_inflight: usize,
    /// How long one endpoint may take to give a connection.
    pub connect: Duration,
    /// How long one request may take at one endpoint. Longer than etcd's own limit (7 s), so that etcd's answer,
    /// which says more, comes first.
    pub request: Duration,
    /// Idle time after which a connection is probed.
    pub keepalive_interval: Duration,
    /// How long the probe's answer may take before the connection counts as dead.
    pub keepalive_timeout: Duration,
}

impl From<&KvstoreOptions> for Limits {
    fn from(options: &KvstoreOptions) -> Self {
        Self {
            max_inflight: options.max_inflight,
            connect: Duration::from_secs(5),
            request: Duration::from_secs(10),
            keepalive_interval: options.keepalive_interval,
            keepalive_timeout: options.keepalive_timeout,
        }
    }
}

/// Why the adapter could not be made. No connection is tried yet.
#[derive(Debug, thiserror::Error)]
#[error("etcd endpoint {endpoint}: {why}")]
pub struct EtcdError {
    endpoint: EndpointUrl,
    why: String,
}

/// etcd, reached by gRPC.
#[derive(Clone)]
pub struct EtcdKv {
    shared: Arc<Shared>,
}

struct Shared {
    members: Vec<Member>,
    /// The member that is asked first.
    preferred: AtomicUsize,
    /// Requests that may still start.
    slots: Semaphore,
    limits: Limits,
}

/// One endpoint.
pub(crate) struct Member {
    pub(crate) url: EndpointUrl,
    pub(crate) client: etcd::Client,
    pub(crate) channel: Channel,
}

/// Runs the tasks of tonic's connections through [`Env`].
struct EnvExecutor(SharedEnv);

type ConnectionTask = Pin<Box<dyn Future<Output = ()> + Send>>;

impl hyper::rt::Executor<ConnectionTask> for EnvExecutor {
    fn execute(&self, task: ConnectionTask) {
        // The task ends with the connection.
        drop(self.0.spawn("etcd-connection", task));
    }
}

impl EtcdKv {
    /// Makes the adapter. Connections are made when they are needed, so this succeeds while etcd is away.
    ///
    /// # Errors
    /// An endpoint that makes no URI.
    pub async fn new(env: &SharedEnv, config: &EtcdConfig, limits: Limits) -> Result<Self, EtcdError> {
        let mut urls = config.endpoints.clone();
        shuffle(&**env, &mut urls);
        let mut members = Vec::new();
        for url in urls {
            members.push(member(env, config, limits, url).await?);
        }
        let shared =
            Shared { members, preferred: AtomicUsize::new(0), slots: Semaphore::new(limits.max_inflight), limits };
        Ok(Self { shared: Arc::new(shared) })
    }

    pub(crate) fn members(&self) -> &[Member] {
        &self.shared.members
    }

    pub(crate) fn request_limit(&self) -> Duration {
        self.shared.limits.request
    }

    /// Sends one request: to the preferred endpoint first, then, as far as that is safe, to the others.
    async fn call<T, F, Fut>(&self, idempotent: bool, request: F) -> Result<T, Failed>
    where
        F: Fn(etcd::Client) -> Fut,
        Fut: Future<Output = Result<T, etcd::Error>>,
    {
        let Shared { members, preferred, slots, limits } = &*self.shared;
        let _slot = slots.acquire().await.map_err(|error| Failed::NotSent(error.to_string()))?;
        let first = preferred.load(Ordering::Relaxed);
        let mut failures: Vec<Failed> = Vec::new();
        for turn in 0..members.len() {
            let index = (first + turn) % members.len();
            let answer = tokio::time::timeout(limits.request, request(members[index].client.clone())).await;
            let failed = match answer {
                Ok(Ok(value)) => {
                    preferred.store(index, Ordering::Relaxed);
                    return Ok(value);
                }
                Ok(Err(error)) => Failed::from(error),
                Err(_) => Failed::Unknown(format!("{}: no answer within {:?}", members[index].url, limits.request)),
            };
            let is_about_member = failed.may_go_elsewhere() || matches!(failed, Failed::Unknown(_));
            if is_about_member {
                // Whoever comes next should not wait for this member again.
                preferred.store((index + 1) % members.len(), Ordering::Relaxed);
            }
            if failed.may_go_elsewhere() || (idempotent && is_about_member) {
                failures.push(failed);
                continue;
            }
            return Err(failed);
        }
        Err(worst(failures))
    }

    async fn read<T, F, Fut>(&self, request: F) -> Result<T, Failed>
    where
        F: Fn(etcd::Client) -> Fut,
        Fut: Future<Output = Result<T, etcd::Error>>,
    {
        self.call(true, request).await
    }

    async fn write<T, F, Fut>(&self, request: F) -> Result<T, Failed>
    where
        F: Fn(etcd::Client) -> Fut,
        Fut: Future<Output = Result<T, etcd::Error>>,
    {
        self.call(false, request).await
    }

    /// After an answer "no space", which may come before or after the effect: looks whether the transaction's witness
    /// is where the transaction demanded it to be. If it is, the transaction did not happen, and it will not.
    async fn settle_no_space(&self, why: String, witness: Option<(String, Revision)>) -> Failed {
        if let Some((key, demanded)) = witness
            && let Ok(found) = Kv::range(self, Range { keys_only: true, ..Range::one(key) }).await
            && found.kvs.first().map_or(0, |kv| kv.mod_revision) == demanded
        {
            return Failed::Full(why);
        }
        Failed::NoSpace(why)
    }
}

async fn member(env: &SharedEnv, config: &EtcdConfig, limits: Limits, url: EndpointUrl) -> Result<Member, EtcdError> {
    let fail = |why: String| EtcdError { endpoint: url.clone(), why };
    // tonic does its own TLS for https URIs. Ours has to be used instead, but requests must still say https: etcd
    // takes the user from the certificate only then.
    let plain = EndpointUrl { tls: false, ..url.clone() }.to_string();
    let origin = url.to_string().parse().map_err(|error| fail(format!("{error}")))?;
    let endpoint = Endpoint::from_shared(plain)
        .map_err(|error| fail(error.to_string()))?
        .origin(origin)
        .executor(EnvExecutor(Arc::clone(env)))
        .http2_keep_alive_interval(limits.keepalive_interval)
        .keep_alive_timeout(limits.keepalive_timeout)
        .keep_alive_while_idle(true);
    let connector = Connector {
        endpoint: url.clone(),
        tls: config.tls.clone(),
        aliases: Arc::clone(&config.host_aliases),
        time_out: limits.connect,
    };
    let channel = endpoint.connect_with_connector_lazy(connector);
    let options = etcd::ConnectOptions::new().with_require_leader(true);
    let client = etcd::Client::from_channel(etcd::Channel::Tonic(channel.clone()), Some(options))
        .await
        .map_err(|error| fail(error.to_string()))?;
    Ok(Member { url, client, channel })
}

/// Fisher-Yates, so that many clients spread over the endpoints.
fn shuffle<T>(env: &dyn Env, items: &mut [T]) {
    for last in (1..items.len()).rev() {
        let bound = last as u64 + 1;
        items.swap(last, usize::try_from(env.random_u64() % bound).unwrap_or(0));
    }
}

/// Of what all endpoints said, the failure that claims least; among equals the first.
fn worst(failures: Vec<Failed>) -> Failed {
    let rank = |failed: &Failed| match failed {
        Failed::Unknown(_) | Failed::NoSpace(_) => 0,
        Failed::Denied(_) | Failed::Rejected(_) => 1,
        _ => 2,
    };
    failures.into_iter().min_by_key(rank).unwrap_or_else(|| Failed::NotSent("no endpoint is configured".to_owned()))
}

#[async_trait]
impl Kv for EtcdKv {
    async fn range(&self, range: Range) -> Result<RangeAnswer, KvError> {
        let asked = range.revision;
        let (key, options) = convert::get_options(&range);
        self.read(|client| {
            let (key, options) = (key.clone(), options.clone());
            async move { kv_client(&client).get(key, Some(options)).await }
        })
        .await
        .map(convert::range_answer)
        .map_err(|failed| failed.into_error(asked, 0))
    }

    async fn txn(&self, txn: Txn) -> Outcome<TxnAnswer, KvRefusal> {
        let witness = convert::witness(&txn);
        let lease = txn.then.iter().chain(&txn.or_else).find_map(convert::lease_of).unwrap_or_default();
        let request = convert::transaction(txn);
        let answer = self
            .write(|client| {
                let request = request.clone();
                async move { kv_client(&client).txn(request).await }
            })
            .await;
        match answer {
            Ok(answer) => Outcome::Done(convert::txn_answer(&answer)),
            Err(Failed::NoSpace(why)) => self.settle_no_space(why, witness).await.into_outcome(lease),
            Err(failed) => failed.into_outcome(lease),
        }
    }

    fn watch(&self, prefix: &str, from: Revision) -> BoxStream<'static, Result<WatchBatch, KvError>> {
        let start = Watching::Opening { kv: self.clone(), prefix: prefix.to_owned(), from };
        stream::unfold(start, Watching::next).boxed()
    }

    async fn lease_grant(&self, ttl: Duration) -> Outcome<Lease, KvRefusal> {
        // etcd counts whole seconds; a part of one more is given, never taken.
        let seconds = i64::try_from(ttl.as_secs() + u64::from(ttl.subsec_nanos() > 0)).unwrap_or(i64::MAX);
        let answer = self.write(|client| async move { client.lease_client().grant(seconds, None).await }).await;
        match answer {
            Ok(granted) => Outcome::Done(Lease { id: granted.id(), ttl: seconds_of(granted.ttl()) }),
            Err(failed) => failed.into_outcome(0),
        }
    }

    async fn lease_keep_alive(&self, id: LeaseId) -> Result<Duration, KvError> {
        self.read(|client| async move {
            // The client swallows the first answer, which tells the time; a second one costs no connection.
            let (mut keeper, mut answers) = client.lease_client().keep_alive(id).await?;
            keeper.keep_alive().await?;
            match answers.message().await? {
                Some(answer) if answer.ttl() > 0 => Ok(seconds_of(answer.ttl())),
                Some(_) => Err(etcd::Error::LeaseKeepAliveError("lease not found".to_owned())),
                None => Err(etcd::Error::LeaseKeepAliveError("the stream ended".to_owned())),
            }
        })
        .await
        .map_err(|failed| failed.into_error(0, id))
    }

    async fn lease_revoke(&self, id: LeaseId) -> Outcome<(), KvRefusal> {
        match self.write(|client| async move { client.lease_client().revoke(id).await }).await {
            Ok(_) | Err(Failed::LeaseNotFound) => Outcome::Done(()),
            Err(failed) => failed.into_outcome(id),
        }
    }
}

/// tonic refuses answers above 4 MB unless told otherwise; the limit here is the page size of the asker.
fn kv_client(client: &etcd::Client) -> etcd::KvClient {
    client.kv_client().max_decoding_message_size(usize::MAX)
}

fn seconds_of(ttl: i64) -> Duration {
    Duration::from_secs(u64::try_from(ttl).unwrap_or_default())
}

/// A watch on its way.
enum Watching {
    Opening { kv: EtcdKv, prefix: String, from: Revision },
    Open { stream: Box<etcd::WatchStream>, from: Revision },
    Ended,
}

type Step = Option<(Result<WatchBatch, KvError>, Watching)>;

impl Watching {
    async fn next(self) -> Step {
        match self {
            Self::Opening { kv, prefix, from } => match kv.open_watch(&prefix, from).await {
                // The watch would wait, in silence, until the store's revision has come so far again.
                Ok((_, header)) if header.revision < from - 1 => {
                    let why = format!("the store is at revision {}, before {from}: it was restored", header.revision);
                    Some((Err(KvError::Unavailable(why)), Self::Ended))
                }
                Ok((stream, header)) => {
                    let delivered = if from > 0 { from - 1 } else { header.revision };
                    let header = Header { revision: delivered, ..header };
                    Some((Ok(WatchBatch { header, events: Vec::new() }), Self::Open { stream: Box::new(stream), from }))
                }
                Err(failed) => Some((Err(failed.into_error(from, 0)), Self::Ended)),
            },
            Self::Open { mut stream, from } => {
                let answer = match stream.message().await {
                    Ok(Some(answer)) => watch_batch(&answer),
                    Ok(None) => Err(Failed::Unknown("the watch ended".to_owned())),
                    Err(error) => Err(Failed::from(error)),
                };
                Some(match answer {
                    Ok(batch) => (Ok(batch), Self::Open { stream, from }),
                    Err(failed) => (Err(failed.into_error(from, 0)), Self::Ended),
                })
            }
            Self::Ended => None,
        }
    }
}

impl EtcdKv {
    /// Starts a watch and waits for etcd's confirmation.
    async fn open_watch(&self, prefix: &str, from: Revision) -> Result<(etcd::WatchStream, Header), Failed> {
        let (key, end) = convert::key_range(&Keys::Prefix(prefix.to_owned()));
        let options = etcd::WatchOptions::new()
            .with_range(end.unwrap_or_default())
            .with_start_revision(from)
            .with_progress_notify();
        let (stream, first) = self
            .read(|client| {
                let (key, options) = (key.clone(), options.clone());
                async move {
                    let mut watch = client.watch_client().max_decoding_message_size(usize::MAX);
                    let mut stream = watch.watch(key, Some(options)).await?;
                    let first = stream.message().await?;
                    Ok((stream, first))
                }
            })
            .await?;
        let first = first.ok_or_else(|| Failed::Unknown("the watch ended before it began".to_owned()))?;
        watch_batch(&first).map(|batch| (stream, batch.header))
    }
}

fn watch_batch(answer: &etcd::WatchResponse) -> Result<WatchBatch, Failed> {
    if answer.compact_revision() > 0 {
        return Err(Failed::Compacted);
    }
    if answer.canceled() {
        return Err(Failed::from_cancel_reason(answer.cancel_reason()));
    }
    let events: Vec<_> = answer.events().iter().filter_map(convert::watch_event).collect();
    let mut header = convert::header(answer.header());
    // While a watch catches up, etcd writes the store's newest revision into the header of every part. What has been
    // delivered ends with the last event.
    if let Some(last) = events.last() {
        header.revision = last.mod_revision();
    }
    Ok(WatchBatch { header, events })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_failure_that_claims_least_wins() {
        let not_sent = || Failed::NotSent("a".to_owned());
        assert_eq!(worst(vec![not_sent(), Failed::Rejected("b".to_owned())]), Failed::Rejected("b".to_owned()));
        assert_eq!(worst(vec![not_sent(), Failed::NotTaken("b".to_owned())]), not_sent());
        assert_eq!(worst(vec![not_sent(), Failed::Unknown("b".to_owned())]), Failed::Unknown("b".to_owned()));
        assert_eq!(worst(vec![]), Failed::NotSent("no endpoint is configured".to_owned()));
    }
}
