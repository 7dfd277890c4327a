use proptest::prelude::*;

use super::*;

const BOTH: [Family; 2] = Family::ALL;
const COOL: Duration = Duration::from_secs(30);

fn secs(seconds: u64) -> Duration {
    Duration::from_secs(seconds)
}

fn addresses(blocks: &[&str]) -> Addresses {
    let mut addresses = Addresses::new(COOL);
    addresses.serve(&blocks.iter().map(|block| block.parse().unwrap()).collect::<Vec<_>>());
    addresses
}

fn ip(text: &str) -> IpAddr {
    text.parse().unwrap()
}

fn texts(given: &[IpAddr]) -> Vec<String> {
    given.iter().map(ToString::to_string).collect()
}

#[test]
fn router_health_and_pods_get_the_next_address_of_each_family() {
    let mut node = addresses(&["10.0.3.0/24", "fd00::300/120"]);
    for (owner, given) in [
        (Owner::router(), ["10.0.3.1", "fd00::301"]),
        (Owner::health(), ["10.0.3.2", "fd00::302"]),
        (Owner::new("default/web"), ["10.0.3.3", "fd00::303"]),
    ] {
        assert_eq!(texts(&node.allocate(&owner, &BOTH, &[], secs(0)).unwrap()), given);
        // Asked again, an owner keeps what it has.
        assert_eq!(texts(&node.allocate(&owner, &BOTH, &[], secs(0)).unwrap()), given);
    }
    assert_eq!(node.all().count(), 6);
    let owners: Vec<&str> = node.all().map(|(_, owner)| owner.as_str()).collect();
    assert_eq!(owners[..3], ["router", "health", "default/web"]);
}

#[test]
fn first_and_last_serve_nobody_unless_there_is_no_other() {
    for (block, given) in [
        ("10.0.0.4/30", vec!["10.0.0.5", "10.0.0.6"]),
        ("10.0.0.4/31", vec!["10.0.0.4", "10.0.0.5"]),
        ("10.0.0.4/32", vec!["10.0.0.4"]),
        ("fd00::4/126", vec!["fd00::5", "fd00::6"]),
        ("fd00::4/127", vec!["fd00::4", "fd00::5"]),
    ] {
        let mut node = addresses(&[block]);
        let family = [node.serving().next().unwrap().family()];
        let capacity = node.counts(secs(0))[0].capacity;
        let mut got = Vec::new();
        for index in 0..capacity {
            got.extend(texts(&node.allocate(&Owner::new(&index.to_string()), &family, &[], secs(0)).unwrap()));
        }
        assert_eq!(got, given);
        assert_eq!(
            node.allocate(&Owner::new("late"), &family, &[], secs(0)).unwrap_err().reason(),
            "AddressesExhausted"
        );
    }
}

#[test]
fn a_slash_64_costs_nothing() {
    let mut node = addresses(&["fd00::/64"]);
    assert_eq!(node.counts(secs(0))[0].capacity, (1 << 64) - 2);
    assert_eq!(texts(&node.allocate(&Owner::router(), &[Family::V6], &[], secs(0)).unwrap()), ["fd00::1"]);
}

#[test]
fn a_released_address_rests_and_comes_last() {
    let mut node = addresses(&["10.0.0.0/29"]);
    let v4 = [Family::V4];
    for owner in ["a", "b", "c", "d", "e", "f"] {
        node.allocate(&Owner::new(owner), &v4, &[], secs(0)).unwrap();
    }
    assert_eq!(node.release(&Owner::new("b"), secs(100)), [ip("10.0.0.2")]);
    assert_eq!(node.release(&Owner::new("b"), secs(100)), [] as [IpAddr; 0]);
    let refusal = node.allocate(&Owner::new("g"), &v4, &[], secs(105)).unwrap_err();
    assert_eq!(
        refusal.to_string(),
        "no free IPv4 address in 10.0.0.0/29: 5 in use, 1 released a short while ago, the next one free in 25 s"
    );
    assert!(refusal.is_temporary());
    assert_eq!(
        node.allocate(&Owner::new("g"), &v4, &[ip("10.0.0.2")], secs(129)),
        Err(AddressRefusal::Cooling { address: ip("10.0.0.2"), left: secs(1) })
    );
    assert_eq!(node.counts(secs(129))[0].cooling, 1);
    assert_eq!(node.counts(secs(130))[0].cooling, 0);
    assert_eq!(texts(&node.allocate(&Owner::new("g"), &v4, &[], secs(130)).unwrap()), ["10.0.0.2"]);
    // Behind the cursor comes the one that was free longest.
    node.release(&Owner::new("a"), secs(200));
    node.release(&Owner::new("d"), secs(200));
    assert_eq!(texts(&node.allocate(&Owner::new("h"), &v4, &[], secs(230)).unwrap()), ["10.0.0.4"]);
    assert_eq!(texts(&node.allocate(&Owner::new("i"), &v4, &[], secs(230)).unwrap()), ["10.0.0.1"]);
}

#[test]
fn the_address_that_was_given_last_comes_last() {
    let mut node = addresses(&["10.0.0.0/29"]);
    node.allocate(&Owner::new("a"), &[Family::V4], &[], secs(0)).unwrap();
    node.release(&Owner::new("a"), secs(0));
    assert_eq!(texts(&node.allocate(&Owner::new("b"), &[Family::V4], &[], secs(30)).unwrap()), ["10.0.0.2"]);
}

#[test]
fn both_families_or_none() {
    let mut node = addresses(&["10.0.0.0/24"]);
    let refusal = node.allocate(&Owner::router(), &BOTH, &[], secs(0)).unwrap_err();
    assert_eq!(refusal, AddressRefusal::NoBlock(Family::V6));
    assert_eq!(node.all().count(), 0);
    let mut node = addresses(&["10.0.0.0/24", "fd00::4/127"]);
    for owner in ["a", "b"] {
        node.allocate(&Owner::new(owner), &BOTH, &[], secs(0)).unwrap();
    }
    assert!(node.allocate(&Owner::new("c"), &BOTH, &[], secs(0)).is_err());
    assert_eq!(node.counts(secs(0))[0].used, 2);
}

#[test]
fn a_requested_address_is_given_or_refused_with_the_reason() {
    let mut node = addresses(&["10.0.0.0/24", "fd00::/120"]);
    let (a, b) = (Owner::new("a"), Owner::new("b"));
    let given = node.allocate(&a, &BOTH, &[ip("10.0.0.77")], secs(0)).unwrap();
    assert_eq!(texts(&given), ["10.0.0.77", "fd00::1"]);
    assert_eq!(node.allocate(&a, &BOTH, &[ip("10.0.0.77")], secs(0)).unwrap(), given);
    for (owner, wanted, text) in [
        (&b, "10.0.0.77", "address 10.0.0.77 is in use by a"),
        (&b, "10.0.1.1", "requested address 10.0.1.1 is not in this node's blocks (10.0.0.0/24, fd00::/120)"),
        (&b, "10.0.0.0", "requested address 10.0.0.0 is the first or last one of 10.0.0.0/24 and serves nobody"),
        (&b, "fd00::ff", "requested address fd00::ff is the first or last one of fd00::/120 and serves nobody"),
        (&a, "10.0.0.78", "a has 10.0.0.77 already and asks for 10.0.0.78"),
    ] {
        let refusal = node.allocate(owner, &BOTH, &[ip(wanted)], secs(0)).unwrap_err();
        assert_eq!(refusal.to_string(), text);
        assert_eq!(refusal.is_temporary(), text.contains("is in use"));
    }
    assert_eq!(node.of(&b).count(), 0);
    for wanted in [vec![ip("10.0.0.5"), ip("10.0.0.6")], vec![ip("fd00::5")]] {
        let families = &[Family::V4];
        let refusal = node.allocate(&b, families, &wanted, secs(0)).unwrap_err();
        assert_eq!(refusal, AddressRefusal::NotWanted(*wanted.last().unwrap()));
    }
}

#[test]
fn a_lost_block_keeps_its_addresses_and_gives_no_new_ones() {
    let mut node = addresses(&["10.0.0.0/24"]);
    let v4 = [Family::V4];
    node.allocate(&Owner::new("old"), &v4, &[], secs(0)).unwrap();
    node.serve(&["10.0.9.0/24".parse().unwrap()]);
    assert_eq!(texts(&node.allocate(&Owner::new("new"), &v4, &[], secs(0)).unwrap()), ["10.0.9.1"]);
    assert_eq!(texts(&node.allocate(&Owner::new("old"), &v4, &[], secs(0)).unwrap()), ["10.0.0.1"]);
    assert_eq!(node.draining().map(|(address, _)| address).collect::<Vec<_>>(), [ip("10.0.0.1")]);
    // Nothing confirmed: nobody gets one, and those in use stay.
    node.serve(&[]);
    assert_eq!(node.allocate(&Owner::new("next"), &v4, &[], secs(0)), Err(AddressRefusal::NoBlock(Family::V4)));
    assert_eq!(node.all().count(), 2);
}

#[test]
fn after_a_restart_addresses_are_occupied_whatever_serves() {
    let mut node = Addresses::new(COOL);
    for (owner, address) in [("router", "10.0.0.1"), ("a", "10.0.0.2"), ("a", "fd00::2"), ("gone", "192.168.0.7")] {
        node.occupy(&Owner::new(owner), ip(address)).unwrap();
        node.occupy(&Owner::new(owner), ip(address)).unwrap();
    }
    let refusal = node.occupy(&Owner::new("b"), ip("10.0.0.2")).unwrap_err();
    assert_eq!(refusal, AddressRefusal::InUse { address: ip("10.0.0.2"), owner: Owner::new("a") });
    node.serve(&["10.0.0.0/24".parse().unwrap()]);
    assert_eq!(texts(&node.allocate(&Owner::new("b"), &[Family::V4], &[], secs(0)).unwrap()), ["10.0.0.3"]);
    assert_eq!(node.release(&Owner::new("a"), secs(0)), [ip("10.0.0.2"), ip("fd00::2")]);
    // Taken over again at once by the one that had it.
    node.occupy(&Owner::new("a"), ip("10.0.0.2")).unwrap();
    node.release(&Owner::new("a"), secs(20));
    assert!(matches!(
        node.allocate(&Owner::new("c"), &[Family::V4], &[ip("10.0.0.2")], secs(40)),
        Err(AddressRefusal::Cooling { .. })
    ));
}

#[derive(Debug, Clone)]
enum Step {
    Allocate(u8),
    Ask(u8, u8),
    Release(u8),
    Wait(u8),
    Serve(bool, bool),
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let step = prop_oneof![
        6 => any::<u8>().prop_map(Step::Allocate),
        2 => (any::<u8>(), 0_u8..20).prop_map(|(owner, address)| Step::Ask(owner, address)),
        4 => any::<u8>().prop_map(Step::Release),
        3 => (0_u8..20).prop_map(Step::Wait),
        1 => any::<(bool, bool)>().prop_map(|(a, b)| Step::Serve(a, b)),
    ];
    prop::collection::vec(step, 1..150)
}

proptest! {
    /// The oracle keeps a list of what was given and taken back, and looks through all of it.
    #[test]
    fn agrees_with_a_list(steps in steps()) {
        let blocks: [PodCidr; 2] = ["10.0.0.0/29".parse().unwrap(), "10.0.0.8/29".parse().unwrap()];
        let mut node = addresses(&["10.0.0.0/29", "10.0.0.8/29"]);
        let mut serving = blocks.to_vec();
        let mut now = 0;
        let mut given: Vec<(IpAddr, String)> = Vec::new();
        let mut resting: Vec<(IpAddr, u64)> = Vec::new();
        for step in steps {
            let free = |given: &[(IpAddr, String)], resting: &[(IpAddr, u64)], now| -> Vec<IpAddr> {
                serving
                    .iter()
                    .flat_map(|block| (block.first() + 1..block.last()).map(|number| Family::V4.address(number)))
                    .filter(|address| !given.iter().any(|(other, _)| other == address))
                    .filter(|address| !resting.iter().any(|(other, until)| other == address && *until > now))
                    .collect()
            };
            let (owner, wanted) = match &step {
                Step::Allocate(owner) => (format!("o{}", owner % 14), vec![]),
                Step::Ask(owner, address) => (format!("o{}", owner % 14), vec![Family::V4.address(0x0a00_0000 + u128::from(*address))]),
                Step::Release(owner) => {
                    let owner = format!("o{}", owner % 14);
                    let back = node.release(&Owner::new(&owner), secs(now));
                    let had: Vec<IpAddr> = given.iter().filter(|(_, o)| *o == owner).map(|(a, _)| *a).collect();
                    prop_assert_eq!(&back, &had);
                    given.retain(|(_, o)| *o != owner);
                    resting.extend(back.into_iter().map(|address| (address, now + 30)));
                    continue;
                }
                Step::Wait(time) => {
                    now += u64::from(*time);
                    continue;
                }
                Step::Serve(a, b) => {
                    serving = blocks.iter().zip([*a, *b]).filter(|(_, on)| *on).map(|(block, _)| *block).collect();
                    node.serve(&serving);
                    continue;
                }
            };
            let free = free(&given, &resting, now);
            let held = given.iter().find(|(_, o)| *o == owner).map(|(address, _)| *address);
            match node.allocate(&Owner::new(&owner), &[Family::V4], &wanted, secs(now)) {
                Ok(got) => {
                    prop_assert!(wanted.is_empty() || got == wanted);
                    match held {
                        Some(held) => prop_assert_eq!(&got, &[held]),
                        None => {
                            prop_assert!(free.contains(&got[0]), "{} is not free", got[0]);
                            given.push((got[0], owner));
                        }
                    }
                }
                Err(refusal) => match wanted.first() {
                    None => prop_assert!(held.is_none() && free.is_empty(), "{refusal}"),
                    Some(address) => prop_assert!(held != Some(*address) && (held.is_some() || !free.contains(address)), "{refusal}"),
                },
            }
        }
    }
}
