//! A role that lacks a right: it is named, nothing is served wrongly, and nothing is started anew when it is mended.

use std::sync::{Arc, Mutex};

use async_trait::async_trait;
use basal_objects::{
    object::{Object, ObjectKey, Resource, resources},
    port::{MergePatch, ObjectEvent, Objects, Page, Preconditions, ReadError, Refusal, Scope, Start},
};
use basal_runtime::outcome::Outcome;
use futures::stream::BoxStream;

use crate::cluster::{
    LIMIT, LastReadiness, Over, Setup, add_node, cilium_nodes, confirmed, is_served, operator_of, pool, run, run_over,
};

/// Verb, resource and subresource of requests that are denied.
type Right = (&'static str, &'static str, Option<&'static str>);

/// What a server denies at the moment.
#[derive(Clone, Default)]
pub(crate) struct Denied(Arc<Mutex<Option<Right>>>);

impl Denied {
    fn set(&self, right: Option<Right>) {
        *self.0.lock().unwrap() = right;
    }

    fn check(&self, verb: &'static str, resource: Resource, subresource: Option<&'static str>) -> Result<(), Refusal> {
        if *self.0.lock().unwrap() == Some((verb, resource.plural, subresource)) {
            return Err(Refusal::Forbidden(format!("User \"basal-operator\" cannot {verb} it")));
        }
        Ok(())
    }
}

/// A server whose role for the operator may lack a right to write.
pub(crate) struct Denying {
    pub(crate) server: Arc<dyn Objects>,
    pub(crate) denied: Denied,
}

#[async_trait]
impl Objects for Denying {
    async fn get(&self, resource: Resource, key: &ObjectKey) -> Result<Option<Object>, ReadError> {
        self.server.get(resource, key).await
    }

    async fn list_page(&self, resource: Resource, scope: &Scope, start: &Start) -> Result<Page, ReadError> {
        self.server.list_page(resource, scope, start).await
    }

    fn watch(&self, resource: Resource, scope: &Scope) -> BoxStream<'static, Result<ObjectEvent, ReadError>> {
        self.server.watch(resource, scope)
    }

    async fn create(&self, resource: Resource, object: Object) -> Outcome<Object, Refusal> {
        match self.denied.check("create", resource, None) {
            Ok(()) => self.server.create(resource, object).await,
            Err(refusal) => Outcome::Refused(refusal),
        }
    }

    async fn patch(&self, resource: Resource, key: &ObjectKey, patch: MergePatch) -> Outcome<Object, Refusal> {
        match self.denied.check("patch", resource, patch.subresource) {
            Ok(()) => self.server.patch(resource, key, patch).await,
            Err(refusal) => Outcome::Refused(refusal),
        }
    }

    async fn delete(&self, resource: Resource, key: &ObjectKey, only_if: Preconditions) -> Outcome<(), Refusal> {
        self.server.delete(resource, key, only_if).await
    }
}

/// The rights that `/readyz` says are missing.
fn missing(readiness: &LastReadiness) -> String {
    let pending = readiness.pending();
    let rights = pending.iter().find_map(|condition| condition.strip_prefix("rights at the API server: "));
    rights.unwrap_or_default().to_owned()
}

#[test]
fn a_lease_that_may_not_be_made_is_named() {
    run(30, async |world, over| {
        let setup = Setup::new(over, pool(&["10.0.0.0/16"], &["fd00::/104"]));
        let (denied, last) = (setup.denied.clone(), setup.readiness.clone());
        denied.set(Some(("create", "leases", None)));
        operator_of(world, "a", setup);
        add_node(world, "n1", 1).await;
        world.until("it is named", LIMIT, |_| missing(&last).starts_with("create leases: ")).await?;
        assert!(!is_served(world, "n1"));
        denied.set(None);
        world.until("n1 is served", LIMIT, |w| is_served(w, "n1")).await?;
        world.until("nothing is missing", LIMIT, |_| missing(&last).is_empty()).await
    });
}

#[test]
fn a_status_that_may_not_be_written_is_named_on_the_node_too() {
    run_over(Over::CustomResources, 31, async |world| {
        let setup = Setup::new(Over::CustomResources, pool(&["10.0.0.0/16"], &["fd00::/104"]));
        let (denied, last) = (setup.denied.clone(), setup.readiness.clone());
        operator_of(world, "a", setup);
        add_node(world, "n1", 1).await;
        world.until("n1 is served", LIMIT, |w| is_served(w, "n1")).await?;
        assert_eq!(missing(&last), "");
        denied.set(Some(("patch", "ciliumnodes", Some("status"))));
        add_node(world, "n2", 2).await;
        world.until("it is named", LIMIT, |_| missing(&last).starts_with("patch ciliumnodes/status: ")).await?;
        let told = |event: &Object| {
            let note = event.0["note"].as_str().unwrap_or_default();
            event.0["regarding"]["name"] == "n2" && note.contains("cannot patch")
        };
        let events = |w: &basal_sim::world::World| w.objects().all(&resources::EVENT).iter().any(told);
        world.until("an event says so", LIMIT, events).await?;
        assert!(confirmed(&cilium_nodes(world)["n2"]).is_empty());
        denied.set(None);
        world.until("n2 is served", LIMIT, |w| is_served(w, "n2")).await?;
        world.until("nothing is missing", LIMIT, |_| missing(&last).is_empty()).await
    });
}
