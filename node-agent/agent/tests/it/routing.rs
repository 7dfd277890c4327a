//! An agent whose routing is changed.

use basal_cni::api::{Answer, ComponentState, Request, StatusReport};
use basal_crds::{kvstore::keys, names::ClusterName};
use basal_datapath::{
    names::IfName,
    program::ProgramHash,
    rows::{self, MapId},
    state::{NodeState, Route},
};
use basal_ipam::names::NodeName;

use crate::{node::record, world::World};

async fn put_node(world: &World, name: &str, address: &str) {
    let mut record = record(name);
    record.addresses[0].ip = address.parse().unwrap();
    if name == "n3" {
        record.ipv4_cidrs = vec!["10.0.3.0/24".parse().unwrap()];
    }
    let key = keys::node(&ClusterName::default(), &NodeName::new(name).unwrap());
    world.put(&key, record.to_json().as_bytes()).await;
}

async fn status(world: &World) -> StatusReport {
    let Answer::Status(status) = world.ask(Request::Status).await else { panic!("no status") };
    *status
}

/// The route to a block, with its device.
fn route(world: &World, block: &str) -> Option<(String, Route)> {
    let block = block.parse().unwrap();
    let routes = world.kernel.observed().state.routes;
    routes.into_iter().find(|(key, _)| key.destination == block).map(|(key, route)| (key.link.to_string(), route))
}

async fn restart(world: &mut World, arguments: &[&'static str]) {
    world.stop().await;
    world.arguments = arguments.to_vec();
    world.start();
    world.until_ready().await;
}

/// The MTU of a pod's default route.
fn pods_mtu(world: &World) -> Option<u32> {
    world.kernel.pod("c1").routes[&"0.0.0.0/0".parse().unwrap()].mtu
}

#[tokio::test(start_paused = true)]
async fn an_agent_with_another_mtu_gives_it_to_its_pods() {
    let mut world = World::ready().await;
    world.add("c1", None).await;
    assert_eq!(pods_mtu(&world), Some(1450));
    for (argument, mtu) in [("--mtu=1400", 1350), ("--mtu=1500", 1450)] {
        restart(&mut world, &[argument]).await;
        assert_eq!(pods_mtu(&world), Some(mtu), "{argument}");
    }
    world.stop().await;
}

#[tokio::test(start_paused = true)]
async fn a_node_goes_from_a_tunnel_to_native_routing_and_back_with_its_pods() {
    let mut world = World::ready().await;
    world.add("c1", None).await;
    put_node(&world, "n2", "172.18.0.2").await;
    world.until("the node is known", || route(&world, "10.0.2.0/24").is_some()).await;
    assert_eq!(pods_mtu(&world), Some(1450));
    let tunneled = world.kernel.observed().state;

    restart(&mut world, &["--routing-mode=native", "--auto-direct-node-routes=true"]).await;
    let direct = Route { gateway: "172.18.0.2".parse().ok(), ..Route::default() };
    assert_eq!(route(&world, "10.0.2.0/24"), Some(("eth0".to_owned(), direct)));
    assert!(!world.kernel.observed().state.links.contains_key(&IfName::vxlan()));
    assert_eq!(pods_mtu(&world), Some(1500));
    let found = status(&world).await;
    assert_eq!((found.routing.as_str(), found.datapath.state), ("Native", ComponentState::Ok));
    let Answer::Nodes(nodes) = world.ask(Request::Nodes).await else { panic!("no nodes") };
    assert!(nodes.iter().all(|node| node.tunnel_endpoint.is_none()), "{nodes:?}");

    restart(&mut world, &[]).await;
    assert_eq!(pods_mtu(&world), Some(1450));
    let but_programs = |state: NodeState| NodeState {
        hooks: state.hooks.into_keys().map(|hook| (hook, ProgramHash::FOREIGN)).collect(),
        programs: Default::default(),
        ..state
    };
    assert_eq!(
        but_programs(world.kernel.observed().state),
        but_programs(tunneled),
        "the tunnel's device is another one"
    );
    world.stop().await;
}

#[tokio::test(start_paused = true)]
async fn routes_follow_a_node_and_one_that_cannot_be_made_is_told() {
    let mut world = World::ready().await;
    restart(&mut world, &["--routing-mode=native", "--auto-direct-node-routes=true"]).await;
    put_node(&world, "n2", "172.18.0.2").await;
    put_node(&world, "n3", "192.0.2.3").await;
    world.until("there is a route", || route(&world, "10.0.2.0/24").is_some()).await;
    let row = rows::ipcache("192.0.2.3/32".parse().unwrap(), 6, None);
    let known = || world.kernel.observed().state.maps[&MapId::Ipcache].contains_key(&row.key);
    world.until("the other is known", known).await;
    let told = status(&world).await.datapath;
    let text = "no route to the pods of default/n3: 192.0.2.3 is on no network of this node's devices";
    assert_eq!((told.state, told.message.as_str()), (ComponentState::Warning, text));
    assert!(world.readiness.is_ready(), "what can work does");

    put_node(&world, "n2", "172.18.0.22").await;
    let hop = |block: &str| route(&world, block).and_then(|(_, route)| route.gateway).map(|hop| hop.to_string());
    world.until("the route follows", || hop("10.0.2.0/24").as_deref() == Some("172.18.0.22")).await;
    put_node(&world, "n3", "172.18.0.3").await;
    world.until("the other is near now", || hop("10.0.3.0/24").as_deref() == Some("172.18.0.3")).await;
    assert_eq!(status(&world).await.datapath.state, ComponentState::Ok);

    put_node(&world, "n3", "192.0.2.3").await;
    world.until("its route is gone", || hop("10.0.3.0/24").is_none()).await;
    let skipping = ["--routing-mode=native", "--auto-direct-node-routes", "--direct-routing-skip-unreachable"];
    restart(&mut world, &skipping).await;
    assert_eq!(status(&world).await.datapath.state, ComponentState::Ok, "the network has a route to it");
    world.stop().await;
}
