//! The ledger in custom resources beyond what the conformance suite of the port asks: former leaders between fence and
//! stamp, objects that somebody deletes, the other store.

use std::sync::{
    Arc, Mutex,
    atomic::{AtomicBool, AtomicUsize, Ordering},
};

use async_trait::async_trait;
use basal_crds::resources::{LEDGER_FINALIZER, LedgerStore};
use basal_ipam::{
    cell::{Block, BlockState, Cell, CellId, Version},
    ledger::{CellSwap, FenceAnswer, Ledger, LedgerChange, LedgerError, SwapAnswer},
    names::{NodeName, TermId},
    prefix::PodCidr,
};
use basal_objects::{
    ledger::{ObjectLedger, Standing, activate, asked, forget_left, standing, switch},
    object::{
        Object, ObjectKey, Resource,
        resources::{LEDGER, POD_CIDR_CELL},
    },
    port::{MergePatch, ObjectEvent, Objects, Page, Preconditions, ReadError, Refusal, Scope, Start},
};
use basal_runtime::{env::SeededEnv, outcome::Outcome};
use basal_sim::objects::ModelObjects;
use futures::{FutureExt as _, StreamExt as _, future::BoxFuture, stream::BoxStream};
use serde_json::{Value, json};

pub(crate) const CELL: &str = "default-10-0-0-0-16";

pub(crate) fn server() -> ModelObjects {
    let server = ModelObjects::new(Arc::new(SeededEnv::new(1)));
    server.define(&LEDGER, true).unwrap();
    server.define(&POD_CIDR_CELL, false).unwrap();
    server
}

pub(crate) fn ledger(server: &ModelObjects) -> ObjectLedger {
    ObjectLedger::new(Arc::new(server.clone()), "default")
}

pub(crate) fn cidr(text: &str) -> PodCidr {
    text.parse().unwrap()
}

pub(crate) fn id(text: &str) -> CellId {
    CellId::new(cidr(text))
}

/// A cell with one granted block.
pub(crate) fn cell(prefix: &str, block: &str, node: &str) -> Cell {
    let mut cell = Cell::new(id(prefix), cidr("10.0.0.0/8"), 24).unwrap();
    let granted = Block { state: BlockState::Granted, node: NodeName::new(node).unwrap(), uid: None };
    cell.set(cidr(block), granted).unwrap();
    cell
}

pub(crate) fn first() -> Cell {
    cell("10.0.0.0/16", "10.0.0.0/24", "a")
}

pub(crate) async fn begin(ledger: &ObjectLedger, number: u64) -> TermId {
    let (seen, term) = (ledger.begin().await.unwrap(), TermId::from_random(number, 0));
    assert_eq!(ledger.take_fence(&seen, &term).await, FenceAnswer::Taken);
    term
}

pub(crate) async fn swap(ledger: &ObjectLedger, term: &TermId, expected: Version, new: Cell) -> SwapAnswer {
    ledger.swap(term, &[CellSwap { expected, new }]).await
}

pub(crate) async fn write(ledger: &ObjectLedger, term: &TermId, expected: Version, new: Cell) -> Version {
    let id = new.id();
    match swap(ledger, term, expected, new).await {
        SwapAnswer::Done(versions) => versions[&id],
        other => panic!("{other:?}"),
    }
}

pub(crate) async fn get(server: &ModelObjects, resource: Resource, name: &str) -> Object {
    server.get(resource, &ObjectKey::cluster(name)).await.unwrap().unwrap()
}

pub(crate) async fn patch(
    server: &ModelObjects,
    resource: Resource,
    seen: &Object,
    body: Value,
) -> Outcome<Object, Refusal> {
    let (uid, resource_version) = (seen.uid().to_owned(), seen.resource_version().to_owned());
    server.patch(resource, &seen.key(), MergePatch { resource_version, uid, subresource: None, body }).await
}

async fn delete(server: &ModelObjects, resource: Resource, name: &str) {
    let seen = get(server, resource, name).await;
    let only_if = Preconditions { uid: seen.uid().to_owned(), resource_version: seen.resource_version().to_owned() };
    assert!(server.delete(resource, &seen.key(), only_if).await.is_done());
}

/// Deletes an object as somebody does who takes its finalizer away first.
async fn force_delete(server: &ModelObjects, resource: Resource, name: &str) {
    let seen = get(server, resource, name).await;
    assert!(patch(server, resource, &seen, json!({ "metadata": { "finalizers": null } })).await.is_done());
    delete(server, resource, name).await;
}

type Hook = BoxFuture<'static, ()>;

/// An API server at which something happens right after a call.
pub(crate) struct Hooked {
    server: ModelObjects,
    after_list: Mutex<Option<Hook>>,
    /// After so many more gets.
    after_get: Mutex<Option<(usize, Hook)>>,
    /// What a get answers instead.
    shown: Mutex<Option<Object>>,
    /// Whether writes of cells get no answer.
    mute_cells: AtomicBool,
    /// How many patches of cells there were.
    patches: AtomicUsize,
    /// After so many more patches one never comes to an end.
    stall: Mutex<Option<usize>>,
    /// That one.
    stalled: Mutex<Option<MergePatch>>,
}

impl Hooked {
    pub(crate) fn new(server: &ModelObjects) -> Arc<Self> {
        let (after_list, after_get, shown) = (Mutex::default(), Mutex::default(), Mutex::default());
        let (mute_cells, patches) = (AtomicBool::default(), AtomicUsize::default());
        let (stall, stalled) = (Mutex::default(), Mutex::default());
        let server = server.clone();
        Arc::new(Self { server, after_list, after_get, shown, mute_cells, patches, stall, stalled })
    }

    /// The ledger of an operator that sees this server.
    pub(crate) fn ledger(self: &Arc<Self>) -> ObjectLedger {
        ObjectLedger::new(Arc::<Self>::clone(self), "default")
    }

    /// From now on writes of cells get no answer, or do again.
    pub(crate) fn mute_cells(&self, mute: bool) {
        self.mute_cells.store(mute, Ordering::SeqCst);
    }

    /// How many patches of cells there were.
    pub(crate) fn patches_of_cells(&self) -> usize {
        self.patches.load(Ordering::SeqCst)
    }

    /// Behind so many patches the next one never comes to an end.
    pub(crate) fn stall_after(&self, patches: usize) {
        *self.stall.lock().unwrap() = Some(patches);
    }

    /// The patch that never came to an end.
    pub(crate) fn stalled(&self) -> Option<MergePatch> {
        self.stalled.lock().unwrap().clone()
    }

    fn stalls(&self, patch: &MergePatch) -> bool {
        let mut stall = self.stall.lock().unwrap();
        match *stall {
            Some(0) => {
                *stall = None;
                *self.stalled.lock().unwrap() = Some(patch.clone());
                true
            }
            left => {
                *stall = left.map(|left| left - 1);
                false
            }
        }
    }

    fn answer(&self, resource: Resource, answer: Outcome<Object, Refusal>) -> Outcome<Object, Refusal> {
        let mute = resource == POD_CIDR_CELL && self.mute_cells.load(Ordering::SeqCst);
        if mute { Outcome::Unknown("lost".to_owned()) } else { answer }
    }

    fn after_list(&self, hook: impl Future<Output = ()> + Send + 'static) {
        *self.after_list.lock().unwrap() = Some(Box::pin(hook));
    }

    fn after_get(&self, gets: usize, hook: impl Future<Output = ()> + Send + 'static) {
        *self.after_get.lock().unwrap() = Some((gets, Box::pin(hook)));
    }

    /// The hook, when this was the get that it waits for.
    fn got(&self) -> Option<Hook> {
        let mut waits = self.after_get.lock().unwrap();
        let (left, hook) = waits.take()?;
        if left == 1 {
            return Some(hook);
        }
        *waits = Some((left - 1, hook));
        None
    }
}

#[async_trait]
impl Objects for Hooked {
    async fn get(&self, resource: Resource, key: &ObjectKey) -> Result<Option<Object>, ReadError> {
        let shown = self.shown.lock().unwrap().clone();
        let answer = if shown.is_some() { Ok(shown) } else { self.server.get(resource, key).await };
        if let Some(hook) = self.got() {
            hook.await;
        }
        answer
    }

    async fn list_page(&self, resource: Resource, scope: &Scope, start: &Start) -> Result<Page, ReadError> {
        let page = self.server.list_page(resource, scope, start).await;
        let hook = self.after_list.lock().unwrap().take();
        if let Some(hook) = hook {
            hook.await;
        }
        page
    }

    fn watch(&self, resource: Resource, scope: &Scope) -> BoxStream<'static, Result<ObjectEvent, ReadError>> {
        self.server.watch(resource, scope)
    }

    async fn create(&self, resource: Resource, object: Object) -> Outcome<Object, Refusal> {
        let answer = self.server.create(resource, object).await;
        self.answer(resource, answer)
    }

    async fn patch(&self, resource: Resource, key: &ObjectKey, patch: MergePatch) -> Outcome<Object, Refusal> {
        if self.stalls(&patch) {
            std::future::pending::<()>().await;
        }
        let answer = self.server.patch(resource, key, patch).await;
        self.patches.fetch_add(usize::from(resource == POD_CIDR_CELL), Ordering::SeqCst);
        self.answer(resource, answer)
    }

    async fn delete(&self, resource: Resource, key: &ObjectKey, only_if: Preconditions) -> Outcome<(), Refusal> {
        self.server.delete(resource, key, only_if).await
    }
}

#[tokio::test(start_paused = true)]
async fn a_stamp_makes_what_a_former_leader_prepared_worthless() {
    let server = server();
    let (former, later) = (ledger(&server), ledger(&server));
    let term = begin(&former, 1).await;
    write(&former, &term, Version::ABSENT, first()).await;
    let prepared = get(&server, POD_CIDR_CELL, CELL).await;
    let successor = begin(&later, 2).await;
    let stamped = get(&server, POD_CIDR_CELL, CELL).await;
    assert_eq!(stamped.0["spec"]["term"], successor.as_str());
    assert_eq!(stamped.0["spec"]["blocks"], prepared.0["spec"]["blocks"]);
    // Its look at the fence was before the successor's term.
    let late = patch(&server, POD_CIDR_CELL, &prepared, json!({ "spec": { "blocks": [] } })).await;
    assert!(matches!(late, Outcome::Refused(Refusal::Conflict(_))), "{late:?}");
}

#[tokio::test(start_paused = true)]
async fn what_a_former_leader_writes_between_fence_and_stamp_is_honoured() {
    let server = server();
    let former = ledger(&server);
    let term = begin(&former, 1).await;
    write(&former, &term, Version::ABSENT, first()).await;
    let prepared = get(&server, POD_CIDR_CELL, CELL).await;
    let block = json!({ "block": "10.0.7.0/24", "state": "granted", "node": "late" });
    let hook = {
        let (server, block) = (server.clone(), block.clone());
        async move {
            let body = json!({ "spec": { "blocks": [block] } });
            assert!(patch(&server, POD_CIDR_CELL, &prepared, body).await.is_done());
        }
    };
    let hooked = Hooked::new(&server);
    hooked.after_list(hook);
    let later = hooked.ledger();
    let successor = begin(&later, 2).await;
    let cell = get(&server, POD_CIDR_CELL, CELL).await;
    assert_eq!((&cell.0["spec"]["term"], &cell.0["spec"]["blocks"]), (&json!(successor.as_str()), &json!([block])));
    let loaded = later.load().await.unwrap();
    let claims = loaded.cells[&id("10.0.0.0/16")].cell.clone().unwrap();
    assert_eq!(claims.blocks().keys().copied().collect::<Vec<_>>(), [cidr("10.0.7.0/24")]);
}

#[tokio::test(start_paused = true)]
async fn a_later_leader_that_comes_between_keeps_its_fence() {
    let server = server();
    let former = ledger(&server);
    let term = begin(&former, 1).await;
    write(&former, &term, Version::ABSENT, first()).await;
    let hook = {
        let server = server.clone();
        async move {
            begin(&ledger(&server), 3).await;
        }
    };
    let hooked = Hooked::new(&server);
    hooked.after_list(hook);
    let second = hooked.ledger();
    let seen = second.begin().await.unwrap();
    assert_eq!(second.take_fence(&seen, &TermId::from_random(2, 0)).await, FenceAnswer::Lost);
    let third = TermId::from_random(3, 0);
    assert_eq!(get(&server, LEDGER, "default").await.0["spec"]["term"], third.as_str());
    assert_eq!(get(&server, POD_CIDR_CELL, CELL).await.0["spec"]["term"], third.as_str());
}

#[tokio::test(start_paused = true)]
async fn a_cell_that_waits_for_its_finalizer_is_a_cell() {
    let server = server();
    let ledger = ledger(&server);
    let term = begin(&ledger, 1).await;
    let version = write(&ledger, &term, Version::ABSENT, first()).await;
    delete(&server, POD_CIDR_CELL, CELL).await;
    let loaded = ledger.load().await.unwrap();
    let stored = &loaded.cells[&id("10.0.0.0/16")];
    assert_eq!(stored.cell, Ok(first()));
    assert!(stored.version > version);
    write(&ledger, &term, stored.version, cell("10.0.0.0/16", "10.0.9.0/24", "b")).await;
    // The next term stamps it as well.
    let term = begin(&ledger, 2).await;
    assert_eq!(get(&server, POD_CIDR_CELL, CELL).await.0["spec"]["term"], term.as_str());
}

#[tokio::test(start_paused = true)]
async fn a_cell_that_lost_its_object_ends_the_term_and_is_known_to_the_next() {
    let server = server();
    let ledger = ledger(&server);
    let term = begin(&ledger, 1).await;
    let version = write(&ledger, &term, Version::ABSENT, first()).await;
    ledger.load().await.unwrap();
    force_delete(&server, POD_CIDR_CELL, CELL).await;
    let answer = swap(&ledger, &term, version, first()).await;
    assert_eq!(answer, SwapAnswer::Conflict([id("10.0.0.0/16")].into()));
    assert!(matches!(ledger.load().await, Err(LedgerError::StoreReplaced(why)) if why.contains("10.0.0.0/16")));
    assert!(matches!(ledger.read_fence().await, Err(LedgerError::StoreReplaced(_))), "for the whole term");

    let term = begin(&ledger, 2).await;
    let loaded = ledger.load().await.unwrap();
    let lost = &loaded.cells[&id("10.0.0.0/16")];
    assert_eq!((lost.version, lost.cell.as_ref().map(|cell| cell.blocks().len())), (Version::ABSENT, Ok(0)));
    // Cells of another mask do not overlap it.
    let wider = cell("10.0.0.0/12", "10.0.0.0/20", "b");
    let answer = swap(&ledger, &term, Version::ABSENT, wider).await;
    assert_eq!(answer, SwapAnswer::Conflict([id("10.0.0.0/12")].into()));
    write(&ledger, &term, Version::ABSENT, first()).await;
    assert_eq!(ledger.load().await.unwrap().cells[&id("10.0.0.0/16")].cell, Ok(first()));
}

#[tokio::test(start_paused = true)]
async fn a_ledger_that_was_deleted_ends_the_term_and_comes_back_with_its_cells() {
    for made_anew in [false, true] {
        let server = server();
        let (former, later) = (ledger(&server), ledger(&server));
        let term = begin(&former, 1).await;
        let version = write(&former, &term, Version::ABSENT, first()).await;
        force_delete(&server, LEDGER, "default").await;
        if made_anew {
            begin(&later, 2).await;
        }
        let answer = swap(&former, &term, version, first()).await;
        assert!(matches!(answer, SwapAnswer::StoreReplaced(_)), "{answer:?}");
        let term = begin(&later, 3).await;
        let object = get(&server, LEDGER, "default").await;
        assert_eq!(object.0["spec"]["cells"], json!(["10.0.0.0/16"]));
        assert_eq!(object.0["metadata"]["finalizers"], json!([LEDGER_FINALIZER]));
        let loaded = later.load().await.unwrap();
        assert!(loaded.fence.holds(&term));
        assert_eq!(loaded.cells[&id("10.0.0.0/16")].cell, Ok(first()));
    }
}

#[tokio::test(start_paused = true)]
async fn a_conflict_by_the_stamp_of_a_successor_ends_the_term() {
    let server = server();
    let hooked = Hooked::new(&server);
    let former = hooked.ledger();
    let term = begin(&former, 1).await;
    let version = write(&former, &term, Version::ABSENT, first()).await;
    // Between its look at the fence and its write.
    hooked.after_get(1, {
        let server = server.clone();
        async move {
            begin(&ledger(&server), 2).await;
        }
    });
    assert_eq!(swap(&former, &term, version, first()).await, SwapAnswer::FenceLost);
}

#[tokio::test(start_paused = true)]
async fn a_cell_is_on_the_list_before_it_is_made_whoever_changes_the_ledger_meanwhile() {
    let server = server();
    let hooked = Hooked::new(&server);
    let ledger = hooked.ledger();
    let term = begin(&ledger, 1).await;
    // The look at the fence, and then the one at the list, which is written next.
    hooked.after_get(2, {
        let server = server.clone();
        async move {
            let seen = get(&server, LEDGER, "default").await;
            let body = json!({ "metadata": { "annotations": { "theirs": "1" } } });
            assert!(patch(&server, LEDGER, &seen, body).await.is_done());
        }
    });
    write(&ledger, &term, Version::ABSENT, first()).await;
    assert_eq!(get(&server, LEDGER, "default").await.0["spec"]["cells"], json!(["10.0.0.0/16"]));
}

#[tokio::test(start_paused = true)]
async fn a_ledger_that_is_older_than_it_was_ends_the_term() {
    let server = server();
    let hooked = Hooked::new(&server);
    let ledger = hooked.ledger();
    let term = begin(&ledger, 1).await;
    let old = get(&server, LEDGER, "default").await;
    write(&ledger, &term, Version::ABSENT, first()).await;
    *hooked.shown.lock().unwrap() = Some(old);
    let error = ledger.read_fence().await.unwrap_err().to_string();
    assert!(error.contains("the resourceVersion of the Ledger was"), "{error}");
}

#[tokio::test(start_paused = true)]
async fn what_happens_to_a_ledger_before_its_fence_is_taken_is_noticed() {
    let server = server();
    let ledger = ledger(&server);
    let term = begin(&ledger, 1).await;
    let seen = ledger.begin().await.unwrap();
    let object = get(&server, LEDGER, "default").await;
    assert!(patch(&server, LEDGER, &object, json!({ "spec": { "store": "etcd" } })).await.is_done());
    let answer = ledger.take_fence(&seen, &TermId::from_random(2, 0)).await;
    assert!(matches!(answer, FenceAnswer::Refused(_)), "{answer:?}");
    let object = get(&server, LEDGER, "default").await;
    assert_eq!(object.0["spec"]["term"], term.as_str());
    assert!(patch(&server, LEDGER, &object, json!({ "spec": { "store": "custom-resources" } })).await.is_done());
    ledger.begin().await.unwrap();
    force_delete(&server, LEDGER, "default").await;
    assert!(matches!(ledger.read_fence().await, Err(LedgerError::StoreReplaced(_))));
}

#[tokio::test(start_paused = true)]
async fn a_watch_tells_that_the_ledger_is_not_the_one_of_its_load() {
    for unseen in [false, true] {
        let server = server();
        let ours = ledger(&server);
        begin(&ours, 1).await;
        let mut watch = ours.watch(ours.load().await.unwrap().mark);
        assert!(watch.next().now_or_never().is_none());
        force_delete(&server, LEDGER, "default").await;
        if unseen {
            begin(&ledger(&server), 2).await;
            server.cut_watches();
        }
        let told = watch.next().await;
        assert!(matches!(told, Some(Err(LedgerError::StoreReplaced(_)))), "{told:?}");
    }
}

#[tokio::test(start_paused = true)]
async fn a_list_after_a_gap_tells_of_the_cell_that_went_and_of_no_other() {
    let server = server();
    let ledger = ledger(&server);
    let term = begin(&ledger, 1).await;
    write(&ledger, &term, Version::ABSENT, first()).await;
    write(&ledger, &term, Version::ABSENT, cell("10.1.0.0/16", "10.1.0.0/24", "b")).await;
    let mut watch = ledger.watch(ledger.load().await.unwrap().mark);
    assert!(watch.next().now_or_never().is_none());
    force_delete(&server, POD_CIDR_CELL, CELL).await;
    server.cut_watches();
    assert_eq!(watch.next().await, Some(Ok(LedgerChange::CellGone(id("10.0.0.0/16")))));
    assert!(watch.next().now_or_never().is_none());
}

#[tokio::test(start_paused = true)]
async fn a_stamp_brings_a_finalizer_back() {
    let server = server();
    let ledger = ledger(&server);
    let term = begin(&ledger, 1).await;
    write(&ledger, &term, Version::ABSENT, first()).await;
    let seen = get(&server, POD_CIDR_CELL, CELL).await;
    assert!(patch(&server, POD_CIDR_CELL, &seen, json!({ "metadata": { "finalizers": ["theirs"] } })).await.is_done());
    begin(&ledger, 2).await;
    let finalizers = get(&server, POD_CIDR_CELL, CELL).await.0["metadata"]["finalizers"].clone();
    assert_eq!(finalizers, json!(["theirs", LEDGER_FINALIZER]));
}

#[tokio::test(start_paused = true)]
async fn an_index_write_is_no_write_of_the_fence() {
    let server = server();
    let (leader, candidate) = (ledger(&server), ledger(&server));
    let term = begin(&leader, 1).await;
    let seen = candidate.begin().await.unwrap();
    write(&leader, &term, Version::ABSENT, first()).await;
    assert_eq!(candidate.take_fence(&seen, &TermId::from_random(2, 0)).await, FenceAnswer::Taken);
}

#[tokio::test(start_paused = true)]
async fn objects_of_other_clusters_and_strays_are_no_cells() {
    let server = server();
    let (ours, theirs) = (ledger(&server), ObjectLedger::new(Arc::new(server.clone()), "other"));
    let (term, other) = (begin(&ours, 1).await, begin(&theirs, 1).await);
    write(&ours, &term, Version::ABSENT, first()).await;
    write(&theirs, &other, Version::ABSENT, cell("10.0.0.0/16", "10.0.3.0/24", "x")).await;
    let mut stray = get(&server, POD_CIDR_CELL, CELL).await;
    stray.0["metadata"] = json!({ "name": "copy" });
    assert!(server.create(POD_CIDR_CELL, stray).await.is_done());
    let loaded = ours.load().await.unwrap();
    assert_eq!(loaded.cells.keys().copied().collect::<Vec<_>>(), [id("10.0.0.0/16")]);
    assert_eq!(loaded.cells[&id("10.0.0.0/16")].cell, Ok(first()));
    assert_eq!(loaded.strays, ["PodCIDRCell copy"]);
}

#[tokio::test(start_paused = true)]
async fn only_the_active_store_grants() {
    // Where the kinds are not defined nobody can have chosen custom resources, and nothing can be kept in them.
    let bare = ModelObjects::new(Arc::new(SeededEnv::new(1)));
    activate(&bare, "default", LedgerStore::Etcd).await.unwrap();
    assert!(activate(&bare, "default", LedgerStore::CustomResources).await.is_err());
    let server = server();
    assert_eq!(standing(None), Ok(None));
    activate(&server, "default", LedgerStore::Etcd).await.unwrap();
    let chosen = Standing { store: LedgerStore::Etcd, move_to: None, leaving: None };
    assert_eq!(standing(Some(&get(&server, LEDGER, "default").await)), Ok(Some(chosen)));
    activate(&server, "default", LedgerStore::Etcd).await.unwrap();
    let ledger = ledger(&server);
    let error = ledger.begin().await.unwrap_err();
    assert!(matches!(error, LedgerError::NotActive { .. }), "{error}");
    assert!(error.to_string().contains("set kvstore to \"etcd\""), "{error}");
    let error = activate(&server, "default", LedgerStore::CustomResources).await.unwrap_err();
    assert!(matches!(error, LedgerError::NotActive { .. }), "{error}");

    // Chosen meanwhile: the term ends.
    let seen = get(&server, LEDGER, "default").await;
    assert!(patch(&server, LEDGER, &seen, json!({ "spec": { "store": "custom-resources" } })).await.is_done());
    let term = begin(&ledger, 1).await;
    let seen = get(&server, LEDGER, "default").await;
    assert!(patch(&server, LEDGER, &seen, json!({ "spec": { "store": "etcd" } })).await.is_done());
    assert_eq!(swap(&ledger, &term, Version::ABSENT, first()).await, SwapAnswer::FenceLost);
    assert!(matches!(ledger.read_fence().await, Err(LedgerError::NotActive { .. })));
}

#[tokio::test(start_paused = true)]
async fn a_ledger_is_filled_only_while_the_claims_are_to_be_moved_into_it() {
    let server = server();
    let filled = ObjectLedger::filled(Arc::new(server.clone()), "default");
    let answer = filled.take_fence(&filled.begin().await.unwrap(), &TermId::from_random(1, 0)).await;
    assert!(matches!(answer, FenceAnswer::StoreReplaced(_)), "nobody asks for it: {answer:?}");
    assert_eq!(server.all(&LEDGER), []);
    activate(&server, "default", LedgerStore::Etcd).await.unwrap();
    let filled = ObjectLedger::filled(Arc::new(server.clone()), "default");
    assert!(matches!(filled.begin().await, Err(LedgerError::NotActive { .. })));
    let ask = async |spec: Value| {
        let seen = get(&server, LEDGER, "default").await;
        assert!(patch(&server, LEDGER, &seen, json!({ "spec": spec })).await.is_done());
    };
    ask(json!({ "moveTo": "custom-resources" })).await;
    let term = begin(&filled, 1).await;
    write(&filled, &term, Version::ABSENT, first()).await;
    assert!(matches!(ledger(&server).begin().await, Err(LedgerError::NotActive { .. })), "it is not active yet");

    // A Ledger that changed since is not switched.
    let old = asked(&server, "default").await.unwrap().unwrap();
    ask(json!({ "moveTo": null })).await;
    let version = filled.load().await.unwrap().cells[&id("10.0.0.0/16")].version;
    assert_eq!(swap(&filled, &term, version, first()).await, SwapAnswer::FenceLost, "called off");
    ask(json!({ "moveTo": "custom-resources" })).await;
    assert!(switch(&server, "default", &old, LedgerStore::CustomResources).await.is_err());

    let now = asked(&server, "default").await.unwrap().unwrap();
    switch(&server, "default", &now, LedgerStore::CustomResources).await.unwrap();
    let found = asked(&server, "default").await.unwrap().unwrap();
    let (store, leaving) = (LedgerStore::CustomResources, Some(LedgerStore::Etcd));
    assert_eq!(found.standing, Standing { store, move_to: None, leaving });
    forget_left(&server, "default", &found).await.unwrap();
    assert_eq!(asked(&server, "default").await.unwrap().unwrap().standing.leaving, None);
}
