//! Taking away what is left of connections that ended: rows of connection tracking whose time is over, and translations
//! that belong to none.
//!
//! What is decided here is pure: [`crate::linux`] reads the maps and carries it out.

use std::time::Duration;

use basal_maps::{
    flow::{DIR_IN, DIR_OUT, End, Tuple},
    nat::GRACE,
};

/// How full a map is, and what was taken away.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MapUse {
    /// Name of the map.
    pub map: &'static str,
    /// Rows that are left.
    pub rows: usize,
    /// How many rows fit.
    pub max: u32,
    /// Rows that were taken away.
    pub deleted: usize,
}

/// A row of NAT.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Translation<K> {
    /// Its key.
    pub key: K,
    /// What an end of the flow becomes.
    pub to: End,
    /// Since when, by the clock that starts with the machine.
    pub created: Duration,
}

impl<K: Tuple> Translation<K> {
    /// The key of the translation of what leaves, of the same flow.
    #[must_use]
    pub fn leaving(&self) -> K {
        match self.key.flags() {
            DIR_IN => K::new(self.to, self.key.source(), self.key.nexthdr(), DIR_OUT),
            _ => self.key,
        }
    }

    /// The key of the flow's connection.
    #[must_use]
    pub fn connection(&self) -> K {
        self.leaving().with_addresses_swapped()
    }

    /// True when nobody needs it: its connection is not tracked, or it is a way back that what leaves, which becomes
    /// `taken`, does not take any more because the device has another address.
    ///
    /// One that was just made is spared: its connection follows. So is one without the row of what leaves: the next packet
    /// puts that back.
    #[must_use]
    pub fn is_orphan(&self, tracked: bool, taken: Option<End>, now: Duration) -> bool {
        let passed_by = self.key.flags() == DIR_IN && taken.is_some_and(|taken| taken != self.key.destination());
        self.created + Duration::from_secs(GRACE) < now && (!tracked || passed_by)
    }
}

/// The keys of both translations of a connection that was tracked under `key`: of what leaves, which becomes `to`, and of
/// what comes back.
#[must_use]
pub fn translations_of<K: Tuple>(key: &K, to: End) -> [K; 2] {
    let leaving = key.with_addresses_swapped();
    [leaving, K::new(leaving.destination(), to, leaving.nexthdr(), DIR_IN)]
}

/// When to look next, as Cilium does with `conntrack-gc-interval: 0`: sooner when much was over, later when little was. Half
/// an hour at most (Cilium: twelve), because how full the maps are is told at each look.
///
/// `deleted` is the largest share of a map that was taken away, between 0 and 1.
#[must_use]
pub fn next_interval(last: Duration, deleted: f64) -> Duration {
    const SHORTEST: Duration = Duration::from_secs(10);
    const LONGEST: Duration = Duration::from_mins(30);
    let next = if deleted > 0.25 {
        last.mul_f64(1.0 - deleted.min(0.9))
    } else if deleted < 0.05 {
        last.mul_f64(1.5)
    } else {
        last
    };
    Duration::from_secs(next.as_secs()).clamp(SHORTEST, LONGEST)
}

/// The interval that [`next_interval`] starts from.
pub const FIRST_INTERVAL: Duration = Duration::from_mins(5);

#[cfg(test)]
mod tests {
    use basal_maps::flow::TupleV4;

    use super::*;

    const NOW: Duration = Duration::from_secs(1000);

    fn end(last: u8, port: u16) -> End {
        End::new([10, 0, 1, last].into(), port)
    }

    /// Both rows of a flow from 10.0.1.7 to 10.0.1.99 that leaves as `by`, and its key of connection tracking.
    fn flow(port: u16, by: End) -> ([Translation<TupleV4>; 2], TupleV4) {
        let (pod, web) = (end(7, port), end(99, 443));
        let created = Duration::from_secs(900);
        let out = TupleV4::new(pod, web, 6, DIR_OUT);
        let back = TupleV4::new(web, by, 6, DIR_IN);
        let rows = [Translation { key: out, to: by, created }, Translation { key: back, to: pod, created }];
        (rows, out.with_addresses_swapped())
    }

    #[test]
    fn both_rows_of_a_flow_belong_to_its_connection() {
        let by = end(1, 40000);
        let (rows, tracked) = flow(1000, by);
        assert_eq!(rows.map(|row| row.connection()), [tracked, tracked]);
        assert_eq!(translations_of(&tracked, by), rows.map(|row| row.key));
    }

    #[test]
    fn what_belongs_to_no_connection_goes() {
        for row in flow(1000, end(1, 40000)).0 {
            assert!(row.is_orphan(false, None, NOW));
            assert!(!row.is_orphan(true, None, NOW));
            assert!(!row.is_orphan(false, None, Duration::from_secs(909)), "its connection may follow");
        }
    }

    #[test]
    fn a_way_back_that_nobody_takes_any_more_goes() {
        let ([leaving, back], _) = flow(1000, end(1, 40000));
        assert!(back.is_orphan(true, Some(end(2, 40000)), NOW));
        assert!(!back.is_orphan(true, Some(end(1, 40000)), NOW));
        assert!(!back.is_orphan(true, None, NOW), "the next packet puts the row back");
        assert!(!leaving.is_orphan(true, Some(end(1, 40000)), NOW));
    }

    #[test]
    fn the_interval_follows_what_was_found() {
        let after = |deleted| next_interval(FIRST_INTERVAL, deleted).as_secs();
        assert_eq!([0.0, 0.049, 0.05, 0.25, 0.5, 0.9, 1.0].map(after), [450, 450, 300, 300, 150, 30, 30]);
        assert_eq!(next_interval(Duration::from_secs(11), 1.0).as_secs(), 10);
        assert_eq!(next_interval(Duration::from_mins(25), 0.0), Duration::from_mins(30));
    }
}
