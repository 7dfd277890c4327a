//! Between the port's types and etcd-client's, and what a failed call proves.
//!
//! etcd answers a write with an error in three ways. Some errors are made before the request enters the raft log, or
//! while it is applied but before its first effect: those are refusals. A refusal for lack of space may come *after*
//! the effect (etcd applies the request, then finds the quota exceeded and answers with the error): that one needs a
//! look at the keys. Everything else (time-outs, broken connections, a stopping server) proves nothing.
//! The texts are those of etcd's `api/v3rpc/rpctypes/error.go`; they have not changed since 3.4.

use std::error::Error as StdError;

use basal_runtime::outcome::Outcome;
use etcd_client as etcd;
use tonic::{Code, Status};

use crate::{
    connector::ConnectFailure,
    kv::{
        Compare, Header, Is, KeyValue, Keys, KvError, KvRefusal, LeaseId, Op, OpAnswer, Range, RangeAnswer, Revision,
        Txn, TxnAnswer, WatchEvent,
    },
};

/// What a failed call proves.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Failed {
    /// There is no connection: nothing was sent.
    NotSent(String),
    /// There is no connection, because the server does not accept our certificate: nothing was sent.
    Rejected(String),
    /// Nothing happened: this member could not take the request; another, or a later try, may.
    NotTaken(String),
    /// Nothing happened: the user of this connection may not do that.
    Denied(String),
    /// Nothing happened: the request breaks a limit or a rule.
    Invalid(String),
    /// Nothing happened: the revision is compacted away.
    Compacted,
    /// Nothing happened: the lease does not exist.
    LeaseNotFound,
    /// The store is full. The write may have happened all the same.
    NoSpace(String),
    /// Nothing happened: the store is full.
    Full(String),
    /// Nobody knows.
    Unknown(String),
}

impl Failed {
    /// Whether the same request may be sent to another member without having happened already.
    pub(crate) fn may_go_elsewhere(&self) -> bool {
        matches!(self, Self::NotSent(_) | Self::Rejected(_) | Self::NotTaken(_))
    }

    /// For a read at revision `asked` or about lease `lease`.
    pub(crate) fn into_error(self, asked: Revision, lease: LeaseId) -> KvError {
        match self {
            Self::Denied(why) | Self::Rejected(why) => KvError::Denied(why),
            Self::Compacted => KvError::Compacted { asked },
            Self::LeaseNotFound => KvError::LeaseNotFound(lease),
            Self::NotSent(why)
            | Self::NotTaken(why)
            | Self::Invalid(why)
            | Self::NoSpace(why)
            | Self::Full(why)
            | Self::Unknown(why) => KvError::Unavailable(why),
        }
    }

    /// For a write; `lease` is the one that it names.
    pub(crate) fn into_outcome<T>(self, lease: LeaseId) -> Outcome<T, KvRefusal> {
        Outcome::Refused(match self {
            Self::NotSent(why) | Self::NotTaken(why) => KvRefusal::Unavailable(why),
            Self::Denied(why) | Self::Rejected(why) => KvRefusal::Denied(why),
            Self::Full(why) => KvRefusal::NoSpace(why),
            Self::Invalid(why) => KvRefusal::Invalid(why),
            Self::Compacted => KvRefusal::Invalid("a read in the transaction asks for a compacted revision".to_owned()),
            Self::LeaseNotFound => KvRefusal::LeaseNotFound(lease),
            Self::NoSpace(why) => {
                return Outcome::Unknown(format!("etcd is full and may or may not have written: {why}"));
            }
            Self::Unknown(why) => return Outcome::Unknown(why),
        })
    }
}

impl From<etcd::Error> for Failed {
    fn from(error: etcd::Error) -> Self {
        match error {
            etcd::Error::GRpcStatus(status) => Self::from(status),
            etcd::Error::LeaseKeepAliveError(text) if text == "lease not found" => Self::LeaseNotFound,
            etcd::Error::InvalidArgs(_) | etcd::Error::InvalidUri(_) | etcd::Error::InvalidMetadataValue(_) => {
                Self::Invalid(error.to_string())
            }
            etcd::Error::TransportError(error) => match connect_failure(&error) {
                Some(failure) => failure,
                None => Self::Unknown(with_sources(&error)),
            },
            other => Self::Unknown(other.to_string()),
        }
    }
}

impl From<Status> for Failed {
    fn from(status: Status) -> Self {
        if let Some(source) = status.source() {
            // Made on this side, from a broken or never made connection.
            return connect_failure(source).unwrap_or_else(|| Self::Unknown(with_sources(source)));
        }
        Self::from_server(status.code(), status.message())
    }
}

impl Failed {
    /// What an error that etcd itself answered proves.
    fn from_server(code: Code, message: &str) -> Self {
        let why = message.strip_prefix("etcdserver: ").map(str::to_owned);
        let full = || message.to_owned();
        match (code, why.as_deref()) {
            (Code::PermissionDenied | Code::Unauthenticated, _) => Self::Denied(full()),
            // Without etcd's own mark the status may be made by a proxy or by this side while it read the answer.
            (_, None) => Self::Unknown(format!("{code:?}: {message}")),
            (Code::InvalidArgument, Some("revision of auth store is old")) => Self::NotTaken(full()),
            (Code::InvalidArgument, Some(text))
                if text.starts_with("user name is empty") || text.starts_with("authentication failed") =>
            {
                Self::Denied(full())
            }
            (Code::InvalidArgument, _) => Self::Invalid(full()),
            (Code::OutOfRange, Some("mvcc: required revision has been compacted")) => Self::Compacted,
            (Code::OutOfRange, _) => Self::Invalid(full()),
            (Code::NotFound, Some("requested lease not found")) => Self::LeaseNotFound,
            (Code::ResourceExhausted, Some("mvcc: database space exceeded")) => Self::NoSpace(full()),
            (Code::ResourceExhausted, Some("too many requests")) | (Code::Unavailable, Some("no leader")) => {
                Self::NotTaken(full())
            }
            (Code::FailedPrecondition, Some("not capable" | "not leader" | "rpc not supported for learner")) => {
                Self::NotTaken(full())
            }
            (Code::FailedPrecondition, _) => Self::Invalid(full()),
            (code, _) => Self::Unknown(format!("{code:?}: {message}")),
        }
    }

    /// What the text proves with which a watch was cancelled.
    pub(crate) fn from_cancel_reason(reason: &str) -> Self {
        for text in ["permission denied", "invalid auth token", "user name is empty"] {
            if reason.contains(text) {
                return Self::Denied(reason.to_owned());
            }
        }
        if reason.contains("required revision has been compacted") {
            Self::Compacted
        } else {
            Self::Unknown(reason.to_owned())
        }
    }
}

/// Finds our own connector's error among the causes.
fn connect_failure(error: &(dyn StdError + 'static)) -> Option<Failed> {
    let mut cause = Some(error);
    while let Some(error) = cause {
        if let Some(failure) = error.downcast_ref::<ConnectFailure>() {
            let text = failure.to_string();
            return Some(if failure.is_denied() { Failed::Rejected(text) } else { Failed::NotSent(text) });
        }
        cause = error.source();
    }
    None
}

fn with_sources(error: &(dyn StdError + 'static)) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text.push_str(": ");
        text.push_str(&error.to_string());
        cause = error.source();
    }
    text
}

/// The first key after all keys that start with `prefix`, as etcd wants the end of a range; `\0` means the end of
/// the key space.
fn prefix_end(prefix: &str) -> Vec<u8> {
    let mut end = prefix.as_bytes().to_vec();
    while let Some(last) = end.pop() {
        if last < u8::MAX {
            end.push(last + 1);
            return end;
        }
    }
    vec![0]
}

/// Start and, for more than one key, end of the range.
pub(crate) fn key_range(keys: &Keys) -> (Vec<u8>, Option<Vec<u8>>) {
    // etcd takes no empty key; the smallest one is a zero byte.
    let start = |text: &str| if text.is_empty() { vec![0] } else { text.as_bytes().to_vec() };
    match keys {
        Keys::One(key) => (key.as_bytes().to_vec(), None),
        Keys::Prefix(prefix) => (start(prefix), Some(prefix_end(prefix))),
        Keys::PrefixFrom { prefix, from } => (start(from.max(prefix)), Some(prefix_end(prefix))),
    }
}

pub(crate) fn get_options(range: &Range) -> (Vec<u8>, etcd::GetOptions) {
    let (key, end) = key_range(&range.keys);
    let mut options = etcd::GetOptions::new().with_limit(range.limit).with_revision(range.revision);
    if let Some(end) = end {
        options = options.with_range(end);
    }
    if range.keys_only {
        options = options.with_keys_only();
    }
    (key, options)
}

fn compare(compare: Compare) -> etcd::Compare {
    use etcd::CompareOp::{Equal, Greater};
    let key = compare.key;
    match compare.is {
        Is::Absent => etcd::Compare::version(key, Equal, 0),
        Is::Present => etcd::Compare::version(key, Greater, 0),
        Is::ModRevision(revision) => etcd::Compare::mod_revision(key, Equal, revision),
        Is::CreateRevision(revision) => etcd::Compare::create_revision(key, Equal, revision),
        Is::Value(value) => etcd::Compare::value(key, Equal, value),
        Is::Lease(lease) => etcd::Compare::lease(key, Equal, lease),
    }
}

fn operation(op: Op) -> etcd::TxnOp {
    match op {
        Op::Put { key, value, lease } => etcd::TxnOp::put(key, value, Some(etcd::PutOptions::new().with_lease(lease))),
        Op::Delete(keys) => {
            let (key, end) = key_range(&keys);
            let options = end.map(|end| etcd::DeleteOptions::new().with_range(end));
            etcd::TxnOp::delete(key, options)
        }
        Op::Get(range) => {
            let (key, options) = get_options(&range);
            etcd::TxnOp::get(key, Some(options))
        }
    }
}

pub(crate) fn transaction(txn: Txn) -> etcd::Txn {
    etcd::Txn::new()
        .when(txn.when.into_iter().map(compare).collect::<Vec<_>>())
        .and_then(txn.then.into_iter().map(operation).collect::<Vec<_>>())
        .or_else(txn.or_else.into_iter().map(operation).collect::<Vec<_>>())
}

pub(crate) fn header(header: Option<&etcd::ResponseHeader>) -> Header {
    header.map_or_else(Header::default, |h| Header { cluster_id: h.cluster_id(), revision: h.revision() })
}

fn key_value(kv: etcd::KeyValue) -> KeyValue {
    let (create_revision, mod_revision) = (kv.create_revision(), kv.mod_revision());
    let (version, lease) = (kv.version(), kv.lease());
    let (key, value) = kv.into_key_value();
    let key = String::from_utf8(key).unwrap_or_else(|error| String::from_utf8_lossy(error.as_bytes()).into_owned());
    KeyValue { key, value, create_revision, mod_revision, version, lease }
}

pub(crate) fn range_answer(mut answer: etcd::GetResponse) -> RangeAnswer {
    RangeAnswer {
        header: header(answer.header()),
        more: answer.more(),
        kvs: answer.take_kvs().into_iter().map(key_value).collect(),
    }
}

pub(crate) fn txn_answer(answer: &etcd::TxnResponse) -> TxnAnswer {
    TxnAnswer {
        header: header(answer.header()),
        succeeded: answer.succeeded(),
        answers: answer
            .op_responses()
            .into_iter()
            .filter_map(|response| match response {
                etcd::TxnOpResponse::Put(_) => Some(OpAnswer::Put),
                etcd::TxnOpResponse::Delete(deleted) => Some(OpAnswer::Delete(deleted.deleted())),
                etcd::TxnOpResponse::Get(got) => Some(OpAnswer::Get(range_answer(got))),
                // The port sends none.
                etcd::TxnOpResponse::Txn(_) => None,
            })
            .collect(),
    }
}

/// `None` for an event without a key, which etcd does not send.
pub(crate) fn watch_event(event: &etcd::Event) -> Option<WatchEvent> {
    let kv = key_value(event.kv()?.clone());
    Some(match event.event_type() {
        etcd::EventType::Put => WatchEvent::Put(kv),
        etcd::EventType::Delete => WatchEvent::Delete { key: kv.key, mod_revision: kv.mod_revision },
    })
}

/// The lease that an operation names, if any.
pub(crate) fn lease_of(op: &Op) -> Option<LeaseId> {
    match op {
        Op::Put { lease, .. } if *lease != 0 => Some(*lease),
        _ => None,
    }
}

/// A key that tells whether a transaction took effect: one that it demands to be at a certain revision and then
/// writes. Only a transaction that writes nothing when its conditions fail has one.
pub(crate) fn witness(txn: &Txn) -> Option<(String, Revision)> {
    if txn.or_else.iter().any(|op| !matches!(op, Op::Get(_))) {
        return None;
    }
    txn.when.iter().find_map(|compare| {
        let revision = match compare.is {
            Is::Absent | Is::ModRevision(0) | Is::CreateRevision(0) => 0,
            Is::ModRevision(revision) => revision,
            _ => return None,
        };
        let written = txn.then.iter().any(|op| matches!(op, Op::Put { key, .. } if *key == compare.key));
        written.then(|| (compare.key.clone(), revision))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn outcome(code: Code, message: &str) -> Outcome<(), KvRefusal> {
        Failed::from(Status::new(code, message)).into_outcome(7)
    }

    #[test]
    fn refusals_are_only_what_etcd_decides_before_an_effect() {
        use KvRefusal as R;
        let text = |message: &str| message.to_owned();
        for (code, message, refusal) in [
            (Code::PermissionDenied, "etcdserver: permission denied", R::Denied(text("etcdserver: permission denied"))),
            (
                Code::InvalidArgument,
                "etcdserver: user name is empty",
                R::Denied(text("etcdserver: user name is empty")),
            ),
            (Code::InvalidArgument, "etcdserver: duplicate key given in txn request", {
                R::Invalid(text("etcdserver: duplicate key given in txn request"))
            }),
            (Code::NotFound, "etcdserver: requested lease not found", R::LeaseNotFound(7)),
            (Code::Unavailable, "etcdserver: no leader", R::Unavailable(text("etcdserver: no leader"))),
            (Code::ResourceExhausted, "etcdserver: too many requests", {
                R::Unavailable(text("etcdserver: too many requests"))
            }),
            (Code::InvalidArgument, "etcdserver: revision of auth store is old", {
                R::Unavailable(text("etcdserver: revision of auth store is old"))
            }),
        ] {
            assert_eq!(outcome(code, message), Outcome::Refused(refusal), "{message}");
        }
    }

    #[test]
    fn everything_else_is_unknown() {
        for (code, message) in [
            (Code::Unavailable, "etcdserver: request timed out"),
            (Code::Unavailable, "etcdserver: leader changed"),
            (Code::Unavailable, "etcdserver: server stopped"),
            (Code::Unavailable, "no healthy upstream"),
            (Code::ResourceExhausted, "etcdserver: mvcc: database space exceeded"),
            (Code::DeadlineExceeded, "etcdserver: context deadline exceeded"),
            (Code::OutOfRange, "Error, decoded message length too large"),
            (Code::InvalidArgument, "said by a proxy"),
            (Code::Internal, ""),
            (Code::Unknown, "raft proposal dropped"),
        ] {
            assert!(outcome(code, message).is_unknown(), "{code:?} {message}");
        }
    }

    #[test]
    fn a_connection_that_never_was_is_a_refusal() {
        let endpoint = crate::config::EndpointUrl::parse("https://a:1").unwrap();
        let failure = |failure| Failed::from(Status::from_error(Box::new(tonic::ConnectError(Box::new(failure)))));
        let refused = failure(ConnectFailure::Tcp {
            endpoint: endpoint.clone(),
            source: std::io::ErrorKind::ConnectionRefused.into(),
        });
        assert!(matches!(refused, Failed::NotSent(_)), "{refused:?}");
        let denied = failure(ConnectFailure::Rejected {
            endpoint,
            alert: rustls::AlertDescription::CertificateExpired,
            certificate: "/c.crt".into(),
        });
        assert!(matches!(&denied, Failed::Rejected(why) if why.contains("renew /c.crt")), "{denied:?}");
        let broken: Box<dyn StdError + Send + Sync> = Box::new(std::io::Error::from(std::io::ErrorKind::BrokenPipe));
        assert!(matches!(Failed::from(Status::from_error(broken)), Failed::Unknown(_)));
    }

    #[test]
    fn ranges_end_where_the_prefix_ends() {
        assert_eq!(key_range(&Keys::One("a".into())), (b"a".to_vec(), None));
        assert_eq!(key_range(&Keys::Prefix("a/".into())), (b"a/".to_vec(), Some(b"a0".to_vec())));
        assert_eq!(key_range(&Keys::Prefix(String::new())), (vec![0], Some(vec![0])));
        let page = |from: &str| key_range(&Keys::PrefixFrom { prefix: "a/".into(), from: from.into() });
        assert_eq!(page("a/b\0"), (b"a/b\0".to_vec(), Some(b"a0".to_vec())));
        assert_eq!(page(""), (b"a/".to_vec(), Some(b"a0".to_vec())));
    }

    #[test]
    fn a_witness_is_demanded_and_written() {
        let put = |key: &str| Op::Put { key: key.into(), value: vec![], lease: 0 };
        let txn = |is, or_else| Txn { when: vec![Compare::new("a", is)], then: vec![put("b"), put("a")], or_else };
        assert_eq!(witness(&txn(Is::Absent, vec![])), Some(("a".to_owned(), 0)));
        assert_eq!(witness(&txn(Is::ModRevision(5), vec![Op::Get(Range::one("a"))])), Some(("a".to_owned(), 5)));
        assert_eq!(witness(&txn(Is::ModRevision(5), vec![put("c")])), None);
        assert_eq!(witness(&txn(Is::Value(vec![]), vec![])), None);
        assert_eq!(witness(&Txn { then: vec![put("a")], ..Txn::default() }), None);
    }
}
