//! `basal ipam check --watch`: follows every change, so that what was wrong for a moment only is told as well.

mod feed;
mod judge;
mod objects;
mod seen;

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use anyhow::Context as _;
use basal_crds::kvstore::keys;
use basal_ipam::{
    check::Finding,
    ledger::{LedgerChange, Loaded},
    owners::Source,
};
use basal_kvstore::pages::{PAGE_SIZE, list_at};
use basal_objects::{
    object::{Object, resources},
    port::{Freshness, ObjectEvent, ReadError, Scope},
};
use basal_runtime::shutdown::Shutdown;
use futures::{
    FutureExt as _, StreamExt as _, pin_mut, select_biased,
    stream::{self, BoxStream},
};
use tokio::time::Instant;

use self::{
    feed::{RecordChange, Records, Told},
    seen::{Between, Listed, Seen, Suspicion},
};
use super::{config::CheckConfig, read, stores::Stores};
use crate::output::{Format, complain, print};

/// Pause between two looks at the clock.
const TICK: Duration = Duration::from_millis(200);

/// How long a watch that broke may still tell what happened meanwhile.
const CATCH_UP: Duration = Duration::from_secs(5);

/// What the leader's clock and this one may differ by.
const SLACK: Duration = Duration::from_secs(1);

/// How long a suspicion waits for servers that do not answer.
const PATIENCE: Duration = Duration::from_secs(120);

/// Anything that happens.
enum Event {
    Ledger(Told<LedgerChange, Loaded>),
    Record(Told<RecordChange, Records>),
    Object(Result<ObjectEvent, ReadError>),
    Tick,
}

/// Follows; answers whether nothing was wrong.
pub(super) async fn run(config: &CheckConfig, format: Format) -> anyhow::Result<bool> {
    let stores = Stores::connect(config).await?;
    let shutdown = Shutdown::on_signals(stores.env.as_ref())?;
    let mut watch = Watch::start(stores, format).await?;
    let stop = shutdown.drain.cancelled().fuse();
    let end = async {
        match config.action.duration {
            Some(duration) => tokio::time::sleep(duration.0).await,
            None => futures::future::pending().await,
        }
    }
    .fuse();
    {
        let follow = watch.follow().fuse();
        pin_mut!(stop, end, follow);
        select_biased! { () = stop => {}, () = end => {}, broken = follow => broken? }
    }
    watch.end().await
}

/// What is known of one server.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Line {
    /// It is followed; since when again, if it was lost in between.
    Followed(Option<Instant>),
    /// It is not.
    Broken,
}

impl Line {
    /// Whether everything that happened a moment ago has been told.
    fn is_current(self) -> bool {
        match self {
            Self::Followed(again) => again.is_none_or(|again| again.elapsed() >= CATCH_UP),
            Self::Broken => false,
        }
    }
}

struct Watch {
    stores: Stores,
    format: Format,
    events: BoxStream<'static, Event>,
    seen: Seen,
    begun: Instant,
    /// When the streams were last known to have told everything, and when that was looked at.
    drained: Duration,
    last_tick: Duration,
    ledger: Line,
    records: Line,
    objects: Line,
    /// The CiliumNodes were listed; before that there is nothing to compare.
    complete: bool,
    /// The CiliumNodes of a list that is being told.
    listing: Option<BTreeMap<String, Listed>>,
    told: Vec<Finding>,
}

impl Watch {
    /// Reads the ledger and the records; the CiliumNodes come with their stream.
    async fn start(stores: Stores, format: Format) -> anyhow::Result<Self> {
        let loaded = stores.load().await?;
        let mut seen = Seen::new(&loaded, stores.quarantine.saturating_sub(SLACK));
        let ticks = stream::unfold((), |()| async { Some((Event::Tick, tokio::time::sleep(TICK).await)) });
        let mut streams = vec![
            stores.objects.watch(resources::CILIUM_NODE, &Scope::default()).map(Event::Object).boxed(),
            ticks.boxed(),
        ];
        if let Some(etcd) = &stores.etcd {
            let (prefix, revision) = (keys::nodes_of(&stores.cluster), loaded.mark.revision);
            let listed = list_at(etcd.kv.as_ref(), &prefix, revision, PAGE_SIZE).await.context("the node records")?;
            let name = |key: &str| key.strip_prefix(&prefix).unwrap_or(key).to_owned();
            seen.all_records(listed.kvs.iter().map(|kv| (name(&kv.key), feed::seen(kv))).collect());
            streams.push(feed::cells(Arc::clone(&stores.ledger), loaded.mark).map(Event::Ledger).boxed());
            streams.push(feed::records(Arc::clone(&etcd.kv), prefix, revision + 1).map(Event::Record).boxed());
        } else {
            let cells = objects::cells(stores.objects.as_ref(), &stores.cluster);
            streams.push(cells.map(Event::Ledger).boxed());
        }
        let events = stream::select_all(streams);
        Ok(Self {
            stores,
            format,
            events: events.boxed(),
            seen,
            begun: Instant::now(),
            drained: Duration::ZERO,
            last_tick: Duration::ZERO,
            ledger: Line::Followed(None),
            records: Line::Followed(None),
            objects: Line::Broken,
            complete: false,
            listing: None,
            told: Vec::new(),
        })
    }

    /// Takes event after event.
    async fn follow(&mut self) -> anyhow::Result<()> {
        while let Some(event) = self.events.next().await {
            match event {
                Event::Tick => self.tick(),
                Event::Ledger(told) => self.ledger_told(told)?,
                Event::Record(told) => self.record_told(told)?,
                Event::Object(told) => self.object_told(told)?,
            }
            if !self.complete {
                continue;
            }
            for suspicion in self.seen.suspicions() {
                self.judge(suspicion).await?;
            }
        }
        anyhow::bail!("the streams of changes ended")
    }

    /// A tick may come after a pause of the whole process, in which events piled up unseen. The tick before it did
    /// not, so what has not come by now did not happen before that.
    fn tick(&mut self) {
        if self.ledger.is_current() {
            self.drained = self.last_tick;
        }
        self.last_tick = self.begun.elapsed();
    }

    fn ledger_told(&mut self, told: Told<LedgerChange, Loaded>) -> anyhow::Result<()> {
        let now = self.begun.elapsed();
        match told {
            Told::Change(change) => {
                for finding in self.seen.ledger(change, Between { earliest: self.drained, latest: now }) {
                    self.tell(finding)?;
                }
            }
            Told::Interrupted(why) => self.ledger = broken("ledger", &why),
            Told::Resumed => self.ledger = again("ledger"),
            Told::Lost(loaded) => {
                self.seen.reload(&loaded, now);
                self.ledger = lost("ledger");
            }
        }
        Ok(())
    }

    fn record_told(&mut self, told: Told<RecordChange, Records>) -> anyhow::Result<()> {
        match told {
            Told::Change((node, record)) => self.seen.record(node, record),
            Told::Interrupted(why) => self.records = broken("node records", &why),
            Told::Resumed => self.records = again("node records"),
            Told::Lost(records) => {
                self.seen.all_records(records);
                self.records = lost("node records");
            }
        }
        Ok(())
    }

    fn object_told(&mut self, told: Result<ObjectEvent, ReadError>) -> anyhow::Result<()> {
        match told {
            Ok(ObjectEvent::Restarted) => self.listing = Some(BTreeMap::new()),
            Ok(ObjectEvent::Listed(object)) => {
                let listed = self.listed(&object);
                self.listing.get_or_insert_default().insert(object.name().to_owned(), listed);
            }
            Ok(ObjectEvent::InSync) => {
                self.seen.all_objects(self.listing.take().unwrap_or_default());
                if std::mem::replace(&mut self.complete, true) {
                    self.objects = lost("CiliumNodes");
                } else {
                    self.objects = Line::Followed(None);
                    let records = if self.stores.etcd.is_some() { ", node records" } else { "" };
                    complain(&format!("following ledger{records} and CiliumNodes"));
                }
            }
            Ok(ObjectEvent::Applied(object)) => {
                self.seen.object(object.name().to_owned(), self.listed(&object));
                self.objects_go_on();
            }
            Ok(ObjectEvent::Deleted(object)) => {
                self.seen.object(object.name().to_owned(), Listed::default());
                self.objects_go_on();
            }
            Err(ReadError::Forbidden(why)) => anyhow::bail!("the API server denied the request: {why}"),
            Err(error) => self.objects = broken("CiliumNodes", &error.to_string()),
        }
        Ok(())
    }

    /// A change came: the watch goes on where it was, if it was broken.
    fn objects_go_on(&mut self) {
        if self.objects == Line::Broken {
            self.objects = again("CiliumNodes");
        }
    }

    async fn judge(&mut self, suspicion: Suspicion) -> anyhow::Result<()> {
        let began = Instant::now();
        let is_true = loop {
            match judge::is_true(&self.stores, &suspicion).await {
                Ok(answer) => break answer,
                Err(error) if began.elapsed() >= PATIENCE => {
                    return Err(error.context("a duplicate could not be looked at again"));
                }
                Err(_) => tokio::time::sleep(TICK).await,
            }
        };
        if is_true {
            let (one, other) = (suspicion.one.holding, suspicion.other.holding);
            let places = [&one, &other].map(|holding| format!("{}: {}", holding.node, holding.source));
            self.tell(Finding::two_owners((one.block, &one.node), (other.block, &other.node), places.to_vec()))?;
        }
        Ok(())
    }

    /// Tells a finding at once, and each place of a duplicate once.
    fn tell(&mut self, finding: Finding) -> anyhow::Result<()> {
        if self.told.contains(&finding) {
            return Ok(());
        }
        let line = match self.format {
            Format::Json => serde_json::to_string(&finding)?,
            Format::Text => format!("{} {}", self.stores.env.now(), super::cells(&finding).join("   ")),
        };
        self.told.push(finding);
        print(&format!("{line}\n")).map(drop)
    }

    /// What came of it.
    async fn end(self) -> anyhow::Result<bool> {
        let (changes, grants) = (self.seen.changes(), self.seen.grants());
        let (seconds, findings) = (self.begun.elapsed().as_secs(), self.told.len());
        complain(&format!("{changes} changes, {grants} blocks granted in {seconds} s, {findings} findings"));
        if !self.told.is_empty() {
            return Ok(false);
        }
        let lines = [
            ("ledger", self.ledger != Line::Broken || self.has_all_cells().await),
            ("node records", self.records != Line::Broken),
            ("CiliumNodes", self.complete && (self.objects != Line::Broken || self.has_all_objects().await)),
        ];
        if let Some((what, _)) = lines.into_iter().find(|(_, followed)| !followed) {
            anyhow::bail!("the {what} were not followed to the end");
        }
        Ok(true)
    }

    /// A watch of the API server that broke says nothing when it goes on, until there is something new.
    async fn has_all_cells(&self) -> bool {
        self.stores.etcd.is_none() && self.stores.load().await.is_ok_and(|loaded| self.seen.has_cells(&loaded))
    }

    /// The same of the CiliumNodes.
    async fn has_all_objects(&self) -> bool {
        let listed = self.stores.objects.list(resources::CILIUM_NODE, &Scope::default(), Freshness::Quorum).await;
        listed.is_ok_and(|list| {
            let all = list.items.iter().map(|object| (object.name().to_owned(), self.listed(object))).collect();
            self.seen.has_objects(&all)
        })
    }

    /// What a CiliumNode says. One that cannot be read gives nobody anything.
    fn listed(&self, object: &Object) -> Listed {
        let node = read::cilium_node(object).unwrap_or_default();
        let confirmed = match self.stores.published() {
            Source::Confirmation => node.confirmed,
            _ => Vec::new(),
        };
        Listed { blocks: node.pod_cidrs.iter().filter_map(|text| text.parse().ok()).collect(), confirmed }
    }
}

fn broken(what: &str, why: &str) -> Line {
    complain(&format!("the {what} are not followed at the moment: {why}"));
    Line::Broken
}

fn again(what: &str) -> Line {
    complain(&format!("the {what} are followed again; nothing was missed"));
    Line::Followed(Some(Instant::now()))
}

fn lost(what: &str) -> Line {
    complain(&format!("the {what} are followed again; what happened in between is not known"));
    Line::Followed(Some(Instant::now()))
}
