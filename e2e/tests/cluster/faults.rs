//! What goes wrong in a cluster: operators are killed, paused and cut off, servers restart, nodes come and go.

use std::thread;
use std::time::Duration;

use anyhow::Context;
use basal_e2e::cluster::{Cluster, Node, Server};

use crate::api_nodes::{join, leave};
use crate::daemons::{OPERATOR, operators, signal};
use crate::random::Random;
use crate::steps::{Before, Obstacle};
use crate::view::{eventually, leader};

/// Longer than the Lease of these clusters holds, by a good deal.
const LONGER_THAN_THE_LEASE: Duration = Duration::from_secs(5);

/// One fault; a replica that it hits is the leader as often as not.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Fault {
    /// SIGKILL.
    Kill,
    /// SIGKILL of the leader, which got as far as this step with nodes that came, and no farther.
    KillBefore(Before),
    /// SIGSTOP for longer than the Lease holds, then SIGCONT: a leader wakes up in the middle of what it did.
    Pause,
    /// A node's packets to a server are dropped.
    Cut(Server),
    /// A server is killed and comes back on its data.
    Restart(Server),
    /// The API server is away for longer than anybody waits for an answer.
    ApiAway,
}

/// Each fault that is over soon.
pub(crate) const SHORT: [Fault; 9] = [
    Fault::Kill,
    Fault::KillBefore(Before::Claim),
    Fault::KillBefore(Before::CiliumNode),
    Fault::KillBefore(Before::Record),
    Fault::Pause,
    Fault::Cut(Server::Api),
    Fault::Cut(Server::Etcd),
    Fault::Restart(Server::Etcd),
    Fault::Restart(Server::Api),
];

/// A cluster in which things go wrong.
pub(crate) struct Chaos<'a> {
    cluster: &'a Cluster,
    random: Random,
    /// How many nodes there are at most, of those that exist at the API server only.
    most: usize,
    /// Those that are there.
    nodes: Vec<String>,
    /// Some that went, and may come again under their old name.
    gone: Vec<String>,
    /// How many names were used.
    joined: usize,
}

impl<'a> Chaos<'a> {
    /// Starts with half of the nodes.
    pub(crate) fn begin(cluster: &'a Cluster, random: Random, most: usize) -> anyhow::Result<Self> {
        let mut this = Self { cluster, random, most, nodes: Vec::new(), gone: Vec::new(), joined: 0 };
        let names = this.new_names(most / 2);
        this.come(names)?;
        Ok(this)
    }

    /// How many nodes there are.
    pub(crate) fn nodes(&self) -> usize {
        self.nodes.len()
    }

    /// Lets a fault happen and waits until it is over.
    pub(crate) fn inflict(&mut self, fault: Fault) -> anyhow::Result<()> {
        match fault {
            Fault::Kill => {
                let node = self.operator()?;
                self.churn()?;
                self.sleep_up_to(400);
                signal(&node, OPERATOR, "-KILL")
            }
            Fault::KillBefore(step) => self.kill_before(step),
            Fault::Pause => {
                let node = self.operator()?;
                self.churn()?;
                signal(&node, OPERATOR, "-STOP")?;
                let churned = self.churn();
                thread::sleep(LONGER_THAN_THE_LEASE);
                signal(&node, OPERATOR, "-CONT").and(churned)
            }
            Fault::Cut(server) => self.cut(server),
            Fault::Restart(Server::Etcd) => {
                self.churn()?;
                self.cluster.kill_server(Server::Etcd)?;
                let churned = self.churn();
                self.cluster.start_server(Server::Etcd).and(churned)
            }
            Fault::Restart(Server::Api) => self.api_away(Duration::ZERO),
            Fault::ApiAway => self.api_away(Duration::from_secs(20)),
        }
    }

    /// A pause of at most so many milliseconds.
    pub(crate) fn sleep_up_to(&mut self, milliseconds: usize) {
        thread::sleep(Duration::from_millis(self.random.below(milliseconds) as u64));
    }

    /// Puts faults into an order.
    pub(crate) fn shuffle(&mut self, faults: &mut [Fault]) {
        self.random.shuffle(faults);
    }

    fn kill_before(&mut self, step: Before) -> anyhow::Result<()> {
        let node = eventually("a leader", || leader(self.cluster))?;
        self.go()?;
        let names = self.new_names(self.batch());
        let obstacle = Obstacle::put_up(self.cluster, step)?;
        let killed = self
            .come(names.clone())
            .and_then(|()| {
                eventually(&format!("new nodes to reach {step:?}"), || obstacle.reached_by(self.cluster, &names))
            })
            .and_then(|()| signal(&node, OPERATOR, "-KILL"));
        obstacle.take_away(self.cluster).and(killed)
    }

    fn api_away(&mut self, time: Duration) -> anyhow::Result<()> {
        self.churn()?;
        self.cluster.kill_server(Server::Api)?;
        thread::sleep(time);
        self.cluster.start_server(Server::Api)?;
        self.churn()
    }

    /// Drops a node's packets to a server for longer than the Lease holds.
    fn cut(&mut self, server: Server) -> anyhow::Result<()> {
        const TABLE: &str = "basal_e2e_cut";
        let node = self.operator()?;
        self.churn()?;
        let to = self.cluster.address_of(server);
        let drop = format!("ip daddr {} tcp dport {} drop", to.ip(), to.port());
        let rules =
            format!("table inet {TABLE} {{\nchain out {{\ntype filter hook output priority 0\n{drop}\n}}\n}}\n");
        node.run("nft").args(["-f", "-"]).stdin(rules).done()?;
        let churned = self.churn();
        thread::sleep(LONGER_THAN_THE_LEASE);
        node.run("nft").args(["delete", "table", "inet", TABLE]).done().and(churned)
    }

    /// The node of an operator that runs: of the leader, or of any.
    fn operator(&mut self) -> anyhow::Result<Node> {
        let (lead, pick) = (self.random.below(2) == 0, self.random.below(1 << 16));
        eventually("an operator", || {
            if lead && let Ok(node) = leader(self.cluster) {
                return Ok(node);
            }
            let nodes = operators(self.cluster)?;
            nodes.get(pick % nodes.len().max(1)).cloned().context("no operator runs")
        })
    }

    fn batch(&self) -> usize {
        (self.most / 10).max(1)
    }

    /// Some nodes go, others come: new ones, or under the name of one that went.
    fn churn(&mut self) -> anyhow::Result<()> {
        self.go()?;
        let mut names = Vec::new();
        while names.len() < self.batch() && self.nodes.len() + names.len() < self.most {
            if !self.gone.is_empty() && self.random.below(3) == 0 {
                let index = self.random.below(self.gone.len());
                names.push(self.gone.swap_remove(index));
            } else {
                names.extend(self.new_names(1));
            }
        }
        self.come(names)
    }

    fn new_names(&mut self, count: usize) -> Vec<String> {
        let first = self.joined + 1;
        self.joined += count;
        (first..first + count).map(|number| format!("api-{number}")).collect()
    }

    fn come(&mut self, names: Vec<String>) -> anyhow::Result<()> {
        join(self.cluster, &names)?;
        self.nodes.extend(names);
        Ok(())
    }

    /// Some nodes go, many when there are as many as there may be.
    fn go(&mut self) -> anyhow::Result<()> {
        let room = self.most - self.nodes.len();
        let batch = self.batch();
        let count = if room < batch { batch } else { batch / 2 };
        let leaving: Vec<String> = (0..count.min(self.nodes.len()))
            .map(|_| {
                let index = self.random.below(self.nodes.len());
                self.nodes.swap_remove(index)
            })
            .collect();
        leave(self.cluster, &leaving)?;
        self.gone.extend(leaving);
        Ok(())
    }
}
