//! What every source of identities keeps in the same way: a table of those that exist, who uses which here, and the
//! followers behind one watch.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::{Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use futures::{
    FutureExt as _, StreamExt as _,
    channel::mpsc::{UnboundedSender, unbounded},
    pin_mut, select_biased,
};
use tokio::{sync::Notify, time::Instant};

use super::{Change, Changes};
use crate::{
    identity::{DrawnIdentities, IdentityId},
    labels::Labels,
};

/// How often a number that turned out to be taken is replaced by another before the caller is told to try later:
/// Cilium's.
pub const ATTEMPTS: usize = 16;

/// How long an allocation waits for the first listing of identities.
const SYNC_WAIT: Duration = Duration::from_secs(30);

/// How often the identities in use are looked after without need: Cilium's.
const REFRESH: Duration = Duration::from_secs(5 * 60);

/// What is known of all identities, from a watch. `Age` orders those with the same labels: the least is the one to use.
#[derive(Debug, Clone)]
pub struct KnownIdentities<Age = ()> {
    by_id: BTreeMap<IdentityId, (Labels, Age)>,
    by_labels: BTreeMap<Labels, BTreeSet<(Age, IdentityId)>>,
}

impl<Age> Default for KnownIdentities<Age> {
    fn default() -> Self {
        Self { by_id: BTreeMap::new(), by_labels: BTreeMap::new() }
    }
}

impl<Age: Ord + Copy> KnownIdentities<Age> {
    /// An identity exists with these labels.
    pub fn insert(&mut self, id: IdentityId, labels: Labels, age: Age) {
        self.remove(id);
        self.by_labels.entry(labels.clone()).or_default().insert((age, id));
        self.by_id.insert(id, (labels, age));
    }

    /// An identity is gone.
    pub fn remove(&mut self, id: IdentityId) {
        let Some((labels, age)) = self.by_id.remove(&id) else { return };
        if let Some(ids) = self.by_labels.get_mut(&labels) {
            ids.remove(&(age, id));
            if ids.is_empty() {
                self.by_labels.remove(&labels);
            }
        }
    }

    /// The labels of an identity.
    #[must_use]
    pub fn labels(&self, id: IdentityId) -> Option<&Labels> {
        self.by_id.get(&id).map(|(labels, _)| labels)
    }

    /// The identities with these labels, the oldest first, then the lowest. More than one exist when two agents could not
    /// see each other; all are good.
    pub fn ids<'a>(&'a self, labels: &Labels) -> impl Iterator<Item = IdentityId> + use<'a, Age> {
        self.by_labels.get(labels).into_iter().flatten().map(|(_, id)| *id)
    }

    /// Every identity with its labels.
    pub fn iter(&self) -> impl Iterator<Item = (IdentityId, &Labels)> {
        self.by_id.iter().map(|(id, (labels, _))| (*id, labels))
    }

    /// A number that is neither taken nor excepted: the first one at or after the place that `random` points to.
    #[must_use]
    pub fn free(&self, drawn: DrawnIdentities, except: &BTreeSet<IdentityId>, random: u64) -> Option<IdentityId> {
        drawn.from_place(random).find(|id| !self.by_id.contains_key(id) && !except.contains(id))
    }
}

/// An identity that endpoints of this node use.
#[derive(Debug, Clone, Copy)]
struct InUse {
    id: IdentityId,
    users: usize,
}

/// The identities that exist, and those that endpoints of this node use.
#[derive(Debug, Clone)]
pub struct IdentityTable<Age = ()> {
    /// Those that exist.
    pub known: KnownIdentities<Age>,
    in_use: BTreeMap<Labels, InUse>,
}

impl<Age> Default for IdentityTable<Age> {
    fn default() -> Self {
        Self { known: KnownIdentities::default(), in_use: BTreeMap::new() }
    }
}

impl<Age: Ord + Copy> IdentityTable<Age> {
    /// One user more of what these labels have here already.
    pub fn use_again(&mut self, labels: &Labels) -> Option<IdentityId> {
        let in_use = self.in_use.get_mut(labels)?;
        in_use.users += 1;
        Some(in_use.id)
    }

    /// The first user of an identity.
    pub fn hold(&mut self, labels: &Labels, id: IdentityId) {
        self.in_use.insert(labels.clone(), InUse { id, users: 1 });
    }

    /// One user less; true when that was the last one.
    pub fn release(&mut self, labels: &Labels) -> bool {
        let Some(in_use) = self.in_use.get_mut(labels) else { return false };
        in_use.users = in_use.users.saturating_sub(1);
        let was_last = in_use.users == 0;
        if was_last {
            self.in_use.remove(labels);
        }
        was_last
    }

    /// The number stands for other labels now: nobody gets it for these any more.
    pub fn give_up(&mut self, labels: &Labels) {
        self.in_use.remove(labels);
    }

    /// Identities that are in use here and do not exist, or not with these labels.
    #[must_use]
    pub fn missing(&self) -> Vec<(IdentityId, Labels)> {
        let gone = |(labels, in_use): &(&Labels, &InUse)| self.known.labels(in_use.id) != Some(*labels);
        self.in_use.iter().filter(gone).map(|(labels, in_use)| (in_use.id, labels.clone())).collect()
    }
}

/// Everybody who follows the identities of a source, behind its one watch.
#[derive(Debug, Default)]
pub struct IdentityFeed {
    followers: Mutex<Followers>,
    /// Wakes those who wait for the first listing.
    listed: Notify,
    /// An identity was seen to be missing.
    lost: Notify,
}

#[derive(Debug, Default)]
struct Followers {
    /// The first listing is complete.
    was_listed: bool,
    /// The last listing is complete and the watch goes on.
    in_sync: bool,
    senders: Vec<UnboundedSender<Change<IdentityId, Labels>>>,
}

impl IdentityFeed {
    fn followers(&self) -> MutexGuard<'_, Followers> {
        self.followers.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// One follower more: what is known now, then what [`Self::run`] hears.
    pub fn follow(&self, known: impl FnOnce() -> Vec<(IdentityId, Labels)>) -> Changes<IdentityId, Labels> {
        let (sender, receiver) = unbounded();
        let mut followers = self.followers();
        // The receiver is in our hands, so that every message arrives.
        for (id, labels) in known() {
            drop(sender.unbounded_send(Change::Upsert(id, labels)));
        }
        if followers.in_sync {
            drop(sender.unbounded_send(Change::InSync));
        }
        followers.senders.push(sender);
        receiver.boxed()
    }

    /// Waits for the first complete listing, but not for ever.
    ///
    /// # Errors
    /// Why an allocation cannot begin.
    pub async fn listed(&self) -> Result<(), String> {
        let listed = tokio::time::timeout(SYNC_WAIT, async {
            loop {
                let listed = self.listed.notified();
                pin_mut!(listed);
                // From here on no notice is missed.
                listed.as_mut().enable();
                if self.followers().was_listed {
                    return;
                }
                listed.await;
            }
        });
        listed.await.map_err(|elapsed| format!("the identities are not listed yet ({elapsed})"))
    }

    /// An identity was seen to be gone: one in use is restored.
    pub fn lost(&self) {
        self.lost.notify_one();
    }

    /// Hands changes to all followers, and has what is in use and missing restored: at once, after every listing, and
    /// from time to time. `restore` answers the numbers that other labels have got. Runs for ever.
    pub async fn run<R>(&self, changes: Changes<IdentityId, Labels>, restore: impl Fn() -> R)
    where
        R: Future<Output = Vec<(IdentityId, Labels)>>,
    {
        let mut changes = changes.fuse();
        // Counted from one time to the next, however many changes come in between.
        let mut refresh = Instant::now() + REFRESH;
        loop {
            let due = tokio::time::sleep_until(refresh).fuse();
            let lost = self.lost.notified().fuse();
            pin_mut!(due, lost);
            let change = select_biased! {
                () = due => None,
                change = changes.select_next_some() => Some(change),
                () = lost => None,
            };
            if let Some(change) = change {
                self.tell(change);
                continue;
            }
            refresh = Instant::now() + REFRESH;
            for (id, labels) in restore().await {
                tracing::warn!(%id, %labels, "the number of an identity in use was given to other labels");
            }
        }
    }

    fn tell(&self, change: Change<IdentityId, Labels>) {
        let mut followers = self.followers();
        match &change {
            Change::Upsert(..) | Change::Delete(_) => {}
            Change::InSync => {
                (followers.was_listed, followers.in_sync) = (true, true);
                self.listed.notify_waiters();
                // What is in use here may be missing from the start on.
                self.lost.notify_one();
            }
            Change::Stale(_) => followers.in_sync = false,
            Change::Invalid { name, problem } => tracing::warn!(name, problem, "unreadable identity"),
        }
        followers.senders.retain(|sender| sender.unbounded_send(change.clone()).is_ok());
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        identity::{IdentityPlace, IdentityRange},
        names::ClusterId,
    };

    fn labels(text: &str) -> Labels {
        Labels::parse_canonical(text).unwrap()
    }

    #[test]
    fn several_identities_of_one_set_of_labels_are_known() {
        let mut known = KnownIdentities::default();
        let (a, b) = (labels("k8s:a=1;"), labels("k8s:b=1;"));
        for (id, labels) in [(301, &a), (300, &a), (302, &b)] {
            known.insert(IdentityId::new(id), labels.clone(), ());
        }
        assert_eq!(known.ids(&a).map(IdentityId::get).collect::<Vec<_>>(), [300, 301]);
        known.insert(IdentityId::new(300), b.clone(), ());
        known.remove(IdentityId::new(302));
        known.remove(IdentityId::new(302));
        assert_eq!(known.ids(&a).map(IdentityId::get).collect::<Vec<_>>(), [301]);
        assert_eq!(known.ids(&b).map(IdentityId::get).collect::<Vec<_>>(), [300]);
        assert_eq!(known.labels(IdentityId::new(300)), Some(&b));
        assert_eq!(known.iter().count(), 2);
    }

    #[test]
    fn the_oldest_identity_comes_first() {
        let mut known = KnownIdentities::default();
        let a = labels("k8s:a=1;");
        for (id, age) in [(300, 7), (301, 3), (302, 3)] {
            known.insert(IdentityId::new(id), a.clone(), age);
        }
        assert_eq!(known.ids(&a).map(IdentityId::get).collect::<Vec<_>>(), [301, 302, 300]);
    }

    #[test]
    fn every_free_number_can_be_drawn_and_no_other() {
        let drawn = IdentityRange::of(ClusterId::new(0)).drawn_in(IdentityPlace::Etcd);
        let mut known = KnownIdentities::default();
        let draw = |known: &KnownIdentities, except: &BTreeSet<IdentityId>, random| {
            known.free(drawn, except, random).map(IdentityId::get)
        };
        let (none, last) = (BTreeSet::new(), u64::from(drawn.count()) - 1);
        assert_eq!(draw(&known, &none, 0), Some(257));
        assert_eq!(draw(&known, &none, last), Some(65_535));
        known.insert(IdentityId::new(65_535), labels("k8s:a=1;"), ());
        assert_eq!(draw(&known, &none, last), Some(257), "the search wraps around");
        let except = BTreeSet::from([IdentityId::new(257)]);
        assert_eq!(draw(&known, &except, last), Some(259));
        for id in (257..=65_535).step_by(2) {
            known.insert(IdentityId::new(id), labels("k8s:a=1;"), ());
        }
        assert_eq!(draw(&known, &none, 12_345), None);
    }

    #[test]
    fn an_identity_is_held_until_its_last_user_goes() {
        let mut table = IdentityTable::<()>::default();
        let (a, id) = (labels("k8s:a=1;"), IdentityId::new(300));
        assert_eq!(table.use_again(&a), None);
        table.hold(&a, id);
        assert_eq!(table.use_again(&a), Some(id));
        assert_eq!(table.missing(), [(id, a.clone())]);
        table.known.insert(id, a.clone(), ());
        assert_eq!(table.missing(), []);
        assert!(!table.release(&a) && table.release(&a) && !table.release(&a));
        assert_eq!(table.use_again(&a), None);
    }
}
