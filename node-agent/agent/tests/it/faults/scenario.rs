//! What is done while something goes wrong.

use basal_cni::api::Request;
use futures::join;

use super::node::{Node, add};
use crate::{machine::Machine, world::add_request};

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Scenario {
    Add,
    AddTwice,
    /// Two containers of one pod name at once, as of a StatefulSet, whose next pod may come up before the runtime has done
    /// with the one before.
    OneName,
    /// DEL without ADD, and twice.
    DelAlone,
    /// The runtime is killed between the agent's answer to ADD and its own acknowledgement, and knows of nothing.
    NoRuntime,
    Gc,
    Restart,
    /// The machine is started anew, then GC.
    Reboot,
}

impl Scenario {
    pub(super) const ALL: [Self; 8] = [
        Self::Add,
        Self::AddTwice,
        Self::OneName,
        Self::DelAlone,
        Self::NoRuntime,
        Self::Gc,
        Self::Restart,
        Self::Reboot,
    ];

    /// What there is before.
    pub(super) async fn before<M: Machine>(self, node: &mut Node<M>) {
        match self {
            Self::Add | Self::AddTwice | Self::OneName | Self::NoRuntime => {}
            Self::DelAlone => node.add("c1", "web-0").await,
            Self::Gc | Self::Restart | Self::Reboot => {
                node.add("c1", "web-0").await;
                node.add("c2", "web-1").await;
            }
        }
        match self {
            Self::Restart => node.world.stop().await,
            Self::Reboot => {
                node.world.stop().await;
                node.world.reboot();
            }
            _ => {}
        }
    }

    pub(super) async fn step<M: Machine>(self, node: &mut Node<M>) {
        match self {
            Self::Add => node.add("c1", "web-0").await,
            Self::AddTwice => {
                node.add("c1", "web-0").await;
                node.add("c1", "web-0").await;
            }
            Self::OneName => {
                let pod = &node.pods["web-0"];
                let (one, two) = join!(add(&node.world, "c1", pod), add(&node.world, "c2", pod));
                node.take("c1", "web-0", one).await;
                node.take("c2", "web-0", two).await;
                node.check().await;
                node.del("c1").await;
            }
            Self::DelAlone => {
                node.del("c9").await;
                node.del("c1").await;
                node.del("c1").await;
            }
            Self::NoRuntime => {
                node.world.kernel.run("c1");
                let request = add_request("c1", Some(node.pods["web-0"].clone()));
                drop(node.world.call(Request::Add(request)).await);
            }
            Self::Gc => node.collect(&["c2"]).await,
            Self::Restart => {
                node.world.start();
                node.revive().await;
            }
            Self::Reboot => {
                node.world.start();
                node.revive().await;
                node.collect(&[]).await;
            }
        }
    }
}
