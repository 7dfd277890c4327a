//! The state of etcd in one line, as `cilium status` prints it.

use std::{fmt, time::Duration};

use basal_runtime::outcome::Outcome;
use etcd_client as etcd;
use http_body_util::BodyExt;
use hyper::http;
use tower::{Service, ServiceExt};

use crate::{
    config::EndpointUrl,
    convert::Failed,
    etcd::{EtcdKv, Member},
    leases::SessionReport,
    lock::Locks,
    session::Session,
};

/// Locks below this path exist only to prove that etcd can write.
const PROBE_PATH: &str = "cilium/.initlock";

/// How long the quorum probe may take.
const PROBE_LIMIT: Duration = Duration::from_secs(10);

/// What one endpoint says of itself.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EndpointStatus {
    /// The endpoint.
    pub url: EndpointUrl,
    /// Its state, or why there is none.
    pub state: Result<MemberState, String>,
}

/// A member that answered.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MemberState {
    /// etcd's version.
    pub version: String,
    /// Whether it leads. etcd tells only its root user; to others no member looks like the leader.
    pub is_leader: bool,
}

/// The state of etcd and of the session with it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EtcdStatus {
    /// The endpoints, in the order of their names.
    pub endpoints: Vec<EndpointStatus>,
    /// Data leases held.
    pub leases: usize,
    /// Lock leases held.
    pub lock_leases: usize,
    /// Whether a write went through, or why not.
    pub quorum: Result<(), String>,
}

/// Cilium's line: `etcd: 1/1 connected, leases=1, lock leases=1, has-quorum=true: https://a:2379 - 3.6.6 (Leader)`.
impl fmt::Display for EtcdStatus {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let connected = self.endpoints.iter().filter(|endpoint| endpoint.state.is_ok()).count();
        let quorum = self.quorum.as_ref().err().map_or("true", String::as_str);
        write!(
            f,
            "etcd: {connected}/{} connected, leases={}, lock leases={}, has-quorum={quorum}",
            self.endpoints.len(),
            self.leases,
            self.lock_leases
        )?;
        for (i, EndpointStatus { url, state }) in self.endpoints.iter().enumerate() {
            f.write_str(if i == 0 { ": " } else { "; " })?;
            match state {
                Ok(MemberState { version, is_leader: true }) => write!(f, "{url} - {version} (Leader)")?,
                Ok(MemberState { version, is_leader: false }) => write!(f, "{url} - {version}")?,
                Err(error) => write!(f, "{url} - {error}")?,
            }
        }
        Ok(())
    }
}

/// Whether etcd counts as usable.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Health {
    /// It does. The text is the status line.
    Ok(String),
    /// It does not.
    Failure(String),
}

/// Counts failed quorum probes: one alone is no failure of etcd.
#[derive(Debug, Clone, Copy)]
pub struct QuorumTracker {
    tolerated: u32,
    failed: u32,
}

impl QuorumTracker {
    /// Tolerates so many failures in a row (`kvstore-max-consecutive-quorum-errors`, 2).
    #[must_use]
    pub const fn new(tolerated: u32) -> Self {
        Self { tolerated, failed: 0 }
    }

    /// Judges a status, and the ones before it.
    pub fn judge(&mut self, status: &EtcdStatus) -> Health {
        match &status.quorum {
            Ok(()) => self.failed = 0,
            Err(error) => {
                self.failed = self.failed.saturating_add(1);
                if self.failed > self.tolerated {
                    return Health::Failure(format!(
                        "Err: quorum check failed {} times in a row: {error}",
                        self.failed
                    ));
                }
            }
        }
        if !status.endpoints.iter().any(|endpoint| endpoint.state.is_ok()) {
            return Health::Failure(format!("Err: not able to connect to any etcd endpoint: {status}"));
        }
        Health::Ok(status.to_string())
    }

    /// The time between two looks in a cluster of so many nodes, as Cilium's agents have it: 30 s, or 5 s while a
    /// probe fails, times the natural logarithm of the number of nodes plus one.
    #[must_use]
    pub fn interval(&self, nodes: usize) -> Duration {
        let base: f64 = if self.failed > 0 { 5.0 } else { 30.0 };
        let nodes = u32::try_from(nodes.max(1)).unwrap_or(u32::MAX);
        Duration::from_secs_f64(base * f64::from(nodes).ln_1p())
    }
}

/// Asks every endpoint, and proves by a lock that etcd can write.
pub async fn gather(etcd: &EtcdKv, session: &Session, locks: &Locks) -> EtcdStatus {
    let probe = probe_quorum(session, locks);
    let members = futures::future::join_all(etcd.members().iter().map(|member| ask(member, etcd.request_limit())));
    let (quorum, mut endpoints) = futures::future::join(probe, members).await;
    endpoints.sort_by(|a, b| a.url.cmp(&b.url));
    let SessionReport { leases, lock_leases, .. } = session.report();
    EtcdStatus { endpoints, leases, lock_leases, quorum }
}

async fn probe_quorum(session: &Session, locks: &Locks) -> Result<(), String> {
    let path = format!("{PROBE_PATH}/{:x}", session.env().random_u64());
    let probe = async {
        let held = locks.lock(&path).await.map_err(|error| error.to_string())?;
        match held.unlock().await {
            Outcome::Done(()) => Ok(()),
            Outcome::Refused(refusal) => Err(refusal.to_string()),
            Outcome::Unknown(why) => Err(why),
        }
    };
    let timed_out = |_| format!("no write went through within {PROBE_LIMIT:?}");
    tokio::time::timeout(PROBE_LIMIT, probe).await.map_err(timed_out)?
}

async fn ask(member: &Member, limit: Duration) -> EndpointStatus {
    let state = match tokio::time::timeout(limit, member_state(member)).await {
        Ok(state) => state,
        Err(_) => Err(format!("no answer within {limit:?}")),
    };
    EndpointStatus { url: member.url.clone(), state }
}

async fn member_state(member: &Member) -> Result<MemberState, String> {
    let answer = member.client.maintenance_client().status().await;
    match answer {
        Ok(status) => {
            let id = status.header().map_or(0, etcd::ResponseHeader::member_id);
            Ok(MemberState { version: status.version().to_owned(), is_leader: id != 0 && id == status.leader() })
        }
        Err(error) => match Failed::from(error) {
            // Since 3.5.26 and 3.6.6 only the root user may ask for the status; everybody may ask for the version.
            Failed::Denied(_) => version(member).await.map(|version| MemberState { version, is_leader: false }),
            failed => Err(failed.into_error(0, 0).to_string()),
        },
    }
}

/// `GET /version`, which etcd answers on the same connection.
async fn version(member: &Member) -> Result<String, String> {
    let request = http::Request::get("/version").body(tonic::body::Body::empty()).map_err(|error| error.to_string())?;
    let mut channel = member.channel.clone();
    let ready = channel.ready().await.map_err(|error| error.to_string())?;
    let answer = ready.call(request).await.map_err(|error| error.to_string())?;
    let body = answer.into_body().collect().await.map_err(|error| error.to_string())?.to_bytes();
    let json: serde_json::Value = serde_json::from_slice(&body).map_err(|error| error.to_string())?;
    match json.get("etcdserver").and_then(serde_json::Value::as_str) {
        Some(version) => Ok(version.to_owned()),
        None => Err("/version names no etcdserver".to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn endpoint(url: &str, state: Result<(&str, bool), &str>) -> EndpointStatus {
        EndpointStatus {
            url: EndpointUrl::parse(url).unwrap(),
            state: match state {
                Ok((version, is_leader)) => Ok(MemberState { version: version.to_owned(), is_leader }),
                Err(error) => Err(error.to_owned()),
            },
        }
    }

    fn status(quorum: Result<(), &str>) -> EtcdStatus {
        EtcdStatus {
            endpoints: vec![endpoint("https://a", Ok(("3.6.6", true))), endpoint("https://b", Err("away"))],
            leases: 1,
            lock_leases: 2,
            quorum: quorum.map_err(str::to_owned),
        }
    }

    #[test]
    fn prints_ciliums_line() {
        assert_eq!(
            status(Ok(())).to_string(),
            "etcd: 1/2 connected, leases=1, lock leases=2, has-quorum=true: \
             https://a:2379 - 3.6.6 (Leader); https://b:2379 - away"
        );
        assert!(status(Err("no lock")).to_string().contains(", has-quorum=no lock: https://a"));
    }

    #[test]
    fn only_repeated_failures_of_the_probe_count() {
        let mut tracker = QuorumTracker::new(2);
        for _ in 0..2 {
            assert!(matches!(tracker.judge(&status(Err("x"))), Health::Ok(_)));
        }
        let failure = "Err: quorum check failed 3 times in a row: x".to_owned();
        assert_eq!(tracker.judge(&status(Err("x"))), Health::Failure(failure));
        assert!(matches!(tracker.judge(&status(Ok(()))), Health::Ok(_)));
        assert!(matches!(tracker.judge(&status(Err("x"))), Health::Ok(_)));
        let mut alone = status(Ok(()));
        alone.endpoints.remove(0);
        assert!(matches!(tracker.judge(&alone), Health::Failure(_)));
    }

    #[test]
    fn larger_clusters_look_less_often() {
        let mut tracker = QuorumTracker::new(2);
        let seconds = |tracker: QuorumTracker, nodes| tracker.interval(nodes).as_secs();
        assert_eq!([1, 128, 8192].map(|nodes| seconds(tracker, nodes)), [20, 145, 270]);
        tracker.judge(&status(Err("x")));
        assert_eq!([1, 128, 8192].map(|nodes| seconds(tracker, nodes)), [3, 24, 45]);
    }
}
