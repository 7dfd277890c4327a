//! From what is to what should be.

use std::collections::BTreeSet;

use crate::{
    names::IfName,
    op::Op,
    rows::Row,
    state::{Hook, Link, NodeState},
};

/// The changes that lead from `observed` to `desired`, in this order:
///
/// 1. devices whose kind is wrong go (two VXLAN devices with one port cannot both be up);
/// 2. kernel parameters that are not per device, devices, addresses, then the parameters of devices;
/// 3. programs are loaded, with fresh maps filled;
/// 4. map rows are written, then programs are attached: a packet that meets a new program finds its rows;
/// 5. routes, nftables tables and rules in those of iptables, which send packets to the devices and let them pass;
/// 6. what is not desired goes, in the opposite order: iptables, nftables, routes, programs on devices that stay, devices,
///    what is left of programs on those, policy programs, rows, addresses, parameters never (they are left as they are),
///    program sets that nothing runs from. A device takes its programs along; to detach one the kernel would wait until no
///    CPU runs it.
#[must_use]
pub fn diff(desired: &NodeState, observed: &NodeState) -> Vec<Op> {
    let mut ops = Vec::new();
    let misfit =
        |name: &IfName, link: &Link| desired.links.get(name).is_some_and(|wanted: &Link| !wanted.kind.fits(&link.kind));

    delete_links(observed.links.iter().filter(|(name, link)| misfit(name, link)).map(|(name, _)| name), &mut ops);

    let (of_devices, global): (Vec<_>, Vec<_>) = desired
        .sysctls
        .iter()
        .filter(|(key, value)| observed.sysctls.get(*key) != Some(*value))
        .partition(|(key, _)| key.device_name().is_some());
    ops.extend(global.into_iter().map(|(key, value)| Op::SetSysctl(key.clone(), value.clone())));
    for (name, link) in &desired.links {
        let fits = observed.links.get(name).is_some_and(|found| link_is(link, found));
        if !fits {
            ops.push(Op::SetLink(name.clone(), link.clone()));
        }
    }
    for address in desired.addresses.difference(&observed.addresses) {
        ops.push(Op::AddAddress(address.clone()));
    }
    ops.extend(of_devices.into_iter().map(|(key, value)| Op::SetSysctl(key.clone(), value.clone())));

    if let Some(set) = desired.load_from
        && !desired.programs.is_subset(&observed.programs)
    {
        ops.push(Op::LoadPrograms { set, rows: desired.maps.clone() });
    }
    for (map, rows) in &desired.maps {
        // A map that does not exist is made and filled when programs are loaded.
        let Some(found) = observed.maps.get(map) else { continue };
        for (key, value) in rows {
            if found.get(key) != Some(value) {
                ops.push(Op::PutRow(Row { map: *map, key: key.clone(), value: value.clone() }));
            }
        }
    }
    // Slots first: a hook that runs may call them.
    for policy in [true, false] {
        for (hook, hash) in &desired.hooks {
            let lost = |name: &IfName| observed.links.get(name).is_none_or(|link| misfit(name, link));
            let of_lost_device = hook.link().is_some_and(|name| name.is_managed() && lost(name));
            let wanted = matches!(hook, Hook::Policy { .. }) == policy;
            if wanted && (of_lost_device || observed.hooks.get(hook) != Some(hash)) {
                ops.push(Op::Attach(hook.clone(), *hash));
            }
        }
    }

    for (key, route) in &desired.routes {
        if observed.routes.get(key) != Some(route) {
            ops.push(Op::SetRoute(key.clone(), route.clone()));
        }
    }
    for (name, table) in &desired.nft {
        if observed.nft.get(name) != Some(table) {
            ops.push(Op::SetNft(name.clone(), table.clone()));
        }
    }
    for (table, rules) in &desired.forward {
        if observed.forward.get(table) != Some(rules) {
            ops.push(Op::SetForward(*table, rules.clone()));
        }
    }

    remove(desired, observed, &mut ops);
    ops
}

/// Step 6.
fn remove(desired: &NodeState, observed: &NodeState, ops: &mut Vec<Op>) {
    for (table, rules) in &observed.forward {
        if !rules.is_empty() && !desired.forward.contains_key(table) {
            ops.push(Op::SetForward(*table, Vec::new()));
        }
    }
    for name in observed.nft.keys().filter(|name| !desired.nft.contains_key(*name)) {
        ops.push(Op::DeleteNft(name.clone()));
    }
    for key in observed.routes.keys().filter(|key| !desired.routes.contains_key(*key)) {
        ops.push(Op::DeleteRoute(key.clone()));
    }
    // An endpoint has one pin: a program on another device takes the place of the one that was there.
    let replaced = |hook: &Hook| match hook {
        Hook::Endpoint { id, .. } => desired.hooks.contains_key(&Hook::Policy { id: *id }),
        _ => false,
    };
    let stale = observed.hooks.keys().filter(|hook| !desired.hooks.contains_key(*hook) && !replaced(hook));
    let stays = |hook: &&Hook| hook.link().is_some_and(|link| desired.links.contains_key(link));
    let (of_devices_that_stay, others): (Vec<_>, Vec<_>) = stale.partition(stays);
    ops.extend(of_devices_that_stay.into_iter().map(|hook| Op::Detach(hook.clone())));
    delete_links(observed.links.keys().filter(|name| !desired.links.contains_key(*name)), ops);
    ops.extend(others.into_iter().map(|hook| Op::Detach(hook.clone())));
    for (map, rows) in &observed.maps {
        let wanted = desired.maps.get(map);
        for key in rows.keys().filter(|key| wanted.is_none_or(|wanted| !wanted.contains_key(*key))) {
            ops.push(Op::DeleteRow { map: *map, key: key.clone() });
        }
    }
    for address in observed.addresses.difference(&desired.addresses) {
        if desired.links.contains_key(&address.link) {
            ops.push(Op::DeleteAddress(address.clone()));
        }
    }
    let pinned: BTreeSet<_> = observed.programs.union(&observed.broken_programs).collect();
    for hash in pinned.into_iter().filter(|hash| !desired.programs.contains(hash)) {
        ops.push(Op::UnloadPrograms(*hash));
    }
}

fn delete_links<'a>(names: impl Iterator<Item = &'a IfName>, ops: &mut Vec<Op>) {
    let names: BTreeSet<IfName> = names.cloned().collect();
    if !names.is_empty() {
        ops.push(Op::DeleteLinks(names));
    }
}

/// True when an observed device needs no change.
fn link_is(desired: &Link, observed: &Link) -> bool {
    let Link { kind, mtu, up, arp } = desired;
    kind.fits(&observed.kind) && (*mtu, *up, *arp) == (observed.mtu, observed.up, observed.arp)
}

#[cfg(test)]
mod tests {
    use std::collections::{BTreeMap, BTreeSet};

    use basal_maps::config::Config;

    use super::*;
    use crate::{
        forward::{self, FilterTable},
        program::{Object, ProgramSet},
        rows::{self, MapId},
        state::{LinkKind, Route, RouteKey, Symbol, SysctlKey},
    };

    fn kinds(ops: &[Op]) -> Vec<&'static str> {
        ops.iter().map(Op::kind).collect()
    }

    fn vxlan(port: u16) -> (IfName, Link) {
        (IfName::vxlan(), Link { kind: LinkKind::Vxlan { port }, mtu: 1500, up: true, arp: true })
    }

    fn set() -> ProgramSet {
        ProgramSet { object: Object::new(b""), config: Config::UNSET }
    }

    fn desired() -> NodeState {
        let mut state = NodeState::default();
        let hash = set().hash();
        state.links.extend([vxlan(8472)]);
        state.sysctls.insert(SysctlKey::global("net/ipv4/ip_forward"), "1".into());
        state.sysctls.insert(SysctlKey::device("ipv4", &IfName::vxlan(), "rp_filter"), "0".into());
        state.programs.insert(hash);
        state.load_from = Some(set());
        rows::host([10, 0, 1, 1].into()).insert_into(&mut state.maps);
        state.hooks.insert(Hook::Device { link: IfName::vxlan(), symbol: Symbol::FromOverlay }, hash);
        state.hooks.insert(Hook::Policy { id: 7 }, hash);
        let key = RouteKey { destination: "10.0.2.0/24".parse().unwrap(), link: IfName::vxlan() };
        state.routes.insert(key, Route::default());
        state.nft.insert("basal".into(), crate::nft::NftTable::default());
        state.forward.insert(FilterTable::ALL[0], forward::rules());
        state
    }

    #[test]
    fn nothing_to_do_is_nothing() {
        assert_eq!(diff(&desired(), &desired()), []);
    }

    #[test]
    fn an_empty_node_is_built_bottom_up() {
        let ops = diff(&desired(), &NodeState::default());
        assert_eq!(
            kinds(&ops),
            [
                "set-sysctl",
                "set-link",
                "set-sysctl",
                "load-programs",
                "attach",
                "attach",
                "set-route",
                "set-nft",
                "set-forward"
            ]
        );
        assert!(matches!(&ops[0], Op::SetSysctl(key, _) if key.path() == "net/ipv4/ip_forward"));
        assert!(matches!(ops[4], Op::Attach(Hook::Policy { .. }, _)), "slots before the hooks that call them");
        let Op::LoadPrograms { rows, .. } = &ops[3] else { panic!("{:?}", ops[3]) };
        assert_eq!(rows[&MapId::Endpoints].len(), 1, "fresh maps are filled before anything runs on them");
    }

    #[test]
    fn a_node_is_taken_down_from_the_top() {
        let ops = diff(&NodeState::default(), &desired());
        assert_eq!(
            kinds(&ops),
            [
                "set-forward",
                "delete-nft",
                "delete-route",
                "delete-links",
                "detach",
                "detach",
                "delete-row",
                "unload-programs"
            ]
        );
    }

    #[test]
    fn programs_go_before_other_devices_and_after_their_own() {
        let link = IfName::new("lxc01").unwrap();
        let hook = |link: &IfName, symbol| Hook::Device { link: link.clone(), symbol };
        let stale = [hook(&IfName::vxlan(), Symbol::ToOverlay), hook(&link, Symbol::FromContainer)];
        let mut observed = desired();
        observed.links.insert(link.clone(), Link { kind: LinkKind::Endpoint(None), ..vxlan(1).1 });
        observed.hooks.extend(stale.clone().map(|hook| (hook, set().hash())));
        let [of_vxlan, of_endpoint] = stale.map(Op::Detach);
        assert_eq!(diff(&desired(), &observed), [of_vxlan, Op::DeleteLinks([link].into()), of_endpoint]);
    }

    #[test]
    fn a_device_of_another_kind_is_made_again_and_gets_its_hooks_back() {
        let mut observed = desired();
        observed.links = BTreeMap::from([vxlan(4789)]);
        let ops = diff(&desired(), &observed);
        assert_eq!(kinds(&ops), ["delete-links", "set-link", "attach"]);
    }

    #[test]
    fn a_changed_row_is_put_and_an_unknown_one_deleted() {
        let mut observed = desired();
        let maps = observed.maps.get_mut(&MapId::Endpoints).unwrap();
        maps.values_mut().for_each(|value| value[0] ^= 1);
        rows::host([10, 0, 1, 99].into()).insert_into(&mut observed.maps);
        assert_eq!(kinds(&diff(&desired(), &observed)), ["put-row", "delete-row"]);
    }

    #[test]
    fn an_endpoint_that_moved_to_another_device_is_not_detached() {
        let hook = |link| Hook::Endpoint { id: 7, link };
        let (mut wanted, mut observed) = (desired(), desired());
        wanted.hooks.insert(hook(IfName::new("lxc01").unwrap()), set().hash());
        observed.hooks.insert(hook(IfName::gone()), set().hash());
        assert_eq!(kinds(&diff(&wanted, &observed)), ["attach"]);
        wanted.hooks.retain(|hook, _| matches!(hook, Hook::Device { .. }));
        assert_eq!(kinds(&diff(&wanted, &observed)), ["detach", "detach"]);
    }

    #[test]
    fn a_broken_set_goes_unless_it_is_made_anew() {
        let other = ProgramSet { object: Object::new(b"other"), ..set() }.hash();
        let mut observed = desired();
        observed.broken_programs = [other].into();
        assert_eq!(diff(&desired(), &observed), [Op::UnloadPrograms(other)]);
        observed.broken_programs = std::mem::take(&mut observed.programs);
        assert_eq!(kinds(&diff(&desired(), &observed)), ["load-programs"]);
    }

    #[test]
    fn new_programs_replace_old_ones_before_those_are_unloaded() {
        let mut observed = desired();
        let old = ProgramSet { config: Config { route_mtu: 1400, ..Config::UNSET }, ..set() }.hash();
        observed.programs = BTreeSet::from([old]);
        observed.hooks.values_mut().for_each(|hash| *hash = old);
        assert_eq!(kinds(&diff(&desired(), &observed)), ["load-programs", "attach", "attach", "unload-programs"]);
    }
}
