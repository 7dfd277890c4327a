//! Endpoints from before a restart: their addresses are reserved, and the view holds them before the first comparison.

use std::net::IpAddr;

use basal_datapath::{kernel::Observed, names::IfName, plan::NodePlan};

use crate::{
    endpoint::{
        build::endpoint,
        record::Addresses,
        restore::{self, Restored},
        state::{Slot, State, by_family},
    },
    node::registration::OwnAddresses,
    view::View,
};

/// The node's own addresses of an earlier run. All are on `cilium_host`. The router addresses must stay what they are,
/// because pods have them as their gateways; routes to pods show which they are by their source. `published` are the
/// health addresses that the CiliumNode shows, if it is still there.
pub(super) fn own_addresses(observed: &Observed, published: &[IpAddr]) -> OwnAddresses {
    let host = IfName::host();
    let sources =
        observed.state.routes.iter().filter(|(key, _)| key.link == host).filter_map(|(_, route)| route.source);
    let held: Vec<IpAddr> = observed
        .state
        .addresses
        .iter()
        .filter(|address| address.link == host)
        .map(|address| address.net.addr())
        .collect();
    let mut router = by_family(sources);
    let others = |router: &Addresses| {
        let is_router = |ip: &IpAddr| router.iter().any(|router| router == *ip);
        by_family(held.iter().copied().filter(|ip| !is_router(ip) && !published.contains(ip)))
    };
    // A family whose routes somebody took away.
    let unclaimed = others(&router);
    router.v4 = router.v4.or(unclaimed.v4);
    router.v6 = router.v6.or(unclaimed.v6);
    let unclaimed = others(&router);
    let published = by_family(published.iter().copied());
    let health = Addresses { v4: published.v4.or(unclaimed.v4), v6: published.v6.or(unclaimed.v6) };
    OwnAddresses { router, health }
}

/// Whether the routes in pods may have been made for another MTU: by an agent of the other kind of routing, or whose devices
/// had another one. The kernel's answer does not show what is in the pods.
pub(super) fn of_another_mtu(observed: &Observed, plan: &NodePlan) -> bool {
    let links = &observed.state.links;
    let mut pods = links.iter().filter(|(name, _)| name.is_endpoint());
    links.contains_key(&IfName::vxlan()) != plan.routing.tunnel().is_some()
        || pods.any(|(_, link)| link.mtu != plan.device_mtu)
}

/// Reserves what endpoints from before the restart hold. Of two records with one address the first stands. The other is
/// known as one that has nothing, not even its number, which may be the first one's as well: so GC and DEL find its record.
pub(super) fn keep(restored: &mut Restored, state: &mut State) {
    let mut refused = Vec::new();
    let unreadable = restored.unreadable.iter().map(|(key, (slot, _))| (key, slot));
    for (key, slot) in restored.kept.iter().chain(unreadable).chain(&restored.removed) {
        if let Err(error) = state.restore(key.clone(), slot.clone()) {
            tracing::error!(%key, %error, "two records hold one address; this one is not taken over, and stays until DEL or GC");
            refused.push((key.clone(), slot.clone()));
        }
    }
    for (key, slot) in refused {
        restored.kept.remove(&key);
        restored.unreadable.remove(&key);
        restored.removed.remove(&key);
        let nothing =
            Slot { addresses: Addresses::default(), record: None, connected: false, announced: false, ..slot };
        state.insert(key, nothing);
    }
}

/// Puts endpoints from before the restart into the view, so that the first comparison adopts them.
pub(super) fn put_restored(restored: &Restored, view: &mut View) {
    for slot in restored.kept.values().filter(|slot| slot.connected) {
        let Some(record) = &slot.record else { continue };
        match endpoint(record, view.local()) {
            Ok(endpoint) => view.put_endpoint(slot.id, endpoint),
            Err(error) => {
                tracing::error!(attachment = %record.attachment, %error, "an endpoint from before the restart")
            }
        }
    }
    for (key, (slot, shown)) in &restored.unreadable {
        match restore::endpoint(key, shown, view.local()) {
            Ok(endpoint) => view.put_endpoint(slot.id, endpoint),
            Err(error) => tracing::error!(%key, %error, "an endpoint without a readable record"),
        }
    }
}

#[cfg(test)]
mod tests {
    use basal_datapath::state::{Address, Route, RouteKey};

    use super::*;

    fn ip(text: &str) -> IpAddr {
        text.parse().unwrap()
    }

    fn observed(addresses: &[&str], sources: &[&str]) -> Observed {
        let mut observed = Observed::default();
        observed.state.addresses =
            addresses.iter().map(|text| Address { link: IfName::host(), net: ip(text).into() }).collect();
        for source in sources {
            let key = RouteKey { destination: ip(source).into(), link: IfName::host() };
            observed.state.routes.insert(key, Route { source: Some(ip(source)), ..Route::default() });
        }
        observed
    }

    #[test]
    fn the_pods_gateway_stays_what_it_is() {
        let both = ["10.0.1.7", "10.0.1.9", "fd00::7", "fd00::9"];
        let found = |sources: &[&str], published: &[&str]| {
            let published: Vec<_> = published.iter().map(|text| ip(text)).collect();
            let found = own_addresses(&observed(&both, sources), &published);
            [found.router, found.health].map(|of| of.iter().map(|ip| ip.to_string()).collect::<Vec<_>>())
        };
        let expected = [vec!["10.0.1.9", "fd00::7"], vec!["10.0.1.7", "fd00::9"]];
        assert_eq!(found(&["10.0.1.9", "fd00::7"], &["10.0.1.7", "fd00::9"]), expected);
        assert_eq!(found(&["10.0.1.9", "fd00::7"], &[]), expected, "the CiliumNode was deleted");
        assert_eq!(found(&[], &["10.0.1.7", "fd00::9"]), expected, "the routes were deleted");
        let earlier = own_addresses(&observed(&["10.0.1.1"], &["10.0.1.1"]), &[ip("10.0.1.2")]);
        assert_eq!(earlier.health.v4, "10.0.1.2".parse().ok(), "a version before this did not put it anywhere");
    }
}
