//! The port [`Objects`] over a real API server.
//!
//! Requests go out as they are asked for: no retry, no rate limit, no cache. A request that got no answer in time is
//! given up; for a write the answer is then `Unknown`.

use std::{
    fmt,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use async_trait::async_trait;
use basal_runtime::{env::SharedEnv, outcome::Outcome};
use futures::stream::BoxStream;
use http::{Request, StatusCode};
use kube::{
    Client, Resource as _,
    api::{
        ApiResource, DeleteParams, DynamicObject, GetParams, ListParams, Patch, PatchParams, PostParams, VersionMatch,
    },
};
use serde_json::{Value, json};
use tokio::time::timeout;

pub use config::{ConnectError, KubeFlags};

use self::{
    answer::{Answer, NoAnswer},
    body::{Body, ListBody, ListMeta},
};
use crate::{
    object::{Object, ObjectKey, Resource, resources::POD_CIDR_CELL},
    port::{Freshness, MergePatch, ObjectEvent, Objects, Page, Preconditions, ReadError, Refusal, Scope, Start},
};

mod answer;
mod body;
mod config;
mod watch;

/// Objects in one page of a list.
const PAGE: u32 = 500;

/// Kinds of which the API server tracks no fields. Of a cell they are as much text as its claims, which operators alone
/// write, and a patch of one with 256 claims took it 55 ms with them and 20 ms without.
///
/// A patch with an empty entry clears them, and an update of an object without any begins none anew (Kubernetes
/// documentation, "Server-Side Apply", clearing managedFields).
const UNTRACKED: [Resource; 1] = [POD_CIDR_CELL];

/// How long a request may take. The API server itself gives up after 60 s; a quorum read behind a slow etcd takes
/// seconds.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(30);

/// The API server, reached through one of several URLs: another one is tried when a connection cannot be made.
#[derive(Clone)]
pub struct KubeObjects {
    servers: Arc<Servers>,
    env: SharedEnv,
}

/// One client for each URL, and which is in use.
struct Servers {
    clients: Vec<Client>,
    current: AtomicUsize,
}

impl Servers {
    /// The client in use, and its number.
    fn current(&self) -> (usize, Client) {
        let index = self.current.load(Ordering::Relaxed) % self.clients.len();
        (index, self.clients[index].clone())
    }

    /// Goes on to the next URL, unless somebody else did so since.
    fn leave(&self, index: usize) {
        let next = (index + 1) % self.clients.len();
        // A failed exchange means that another task has moved on already.
        self.current.compare_exchange(index, next, Ordering::Relaxed, Ordering::Relaxed).unwrap_or_default();
    }
}

impl fmt::Debug for KubeObjects {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("KubeObjects").field("servers", &self.servers.clients.len()).finish_non_exhaustive()
    }
}

impl KubeObjects {
    /// Makes the clients; nothing is sent yet. `name` is what the API server calls them, `basal-operator` for example; `env`
    /// jitters the pauses of watches.
    ///
    /// # Errors
    /// There is no usable kubeconfig or service account.
    pub async fn connect(flags: &KubeFlags, name: &str, env: SharedEnv) -> Result<Self, ConnectError> {
        let clients = config::clients(flags, name).await?;
        Ok(Self { servers: Arc::new(Servers { clients, current: AtomicUsize::new(0) }), env })
    }

    async fn send(&self, request: Result<Request<Vec<u8>>, kube::core::request::Error>) -> Result<Answer, NoAnswer> {
        let request = request.map_err(|error| NoAnswer::NotSent(error.to_string()))?;
        let (index, client) = self.servers.current();
        let answer = async {
            let response = client.send(request.map(Into::into)).await?;
            let (head, body) = response.into_parts();
            let bytes = body.collect_bytes().await?;
            Ok(Answer { status: head.status, headers: head.headers, body: bytes.to_vec() })
        };
        let result = match timeout(REQUEST_TIMEOUT, answer).await {
            Ok(answered) => answered.map_err(|error: kube::Error| NoAnswer::from(&error)),
            Err(_elapsed) => Err(NoAnswer::Lost(format!("no answer within {} s", REQUEST_TIMEOUT.as_secs()))),
        };
        if result.is_err() {
            self.servers.leave(index);
        }
        result
    }

    /// Sends a write and reads the object from its answer.
    async fn write(&self, request: Result<Request<Vec<u8>>, kube::core::request::Error>) -> Outcome<Object, Refusal> {
        match self.send(request).await.map(Answer::written) {
            Ok(outcome) => outcome,
            Err(NoAnswer::NotSent(why)) => Outcome::Refused(Refusal::Unavailable(why)),
            Err(NoAnswer::Lost(why)) => Outcome::Unknown(why),
        }
    }
}

/// The path of a kind's objects.
fn path(resource: &Resource, namespace: Option<&str>) -> String {
    DynamicObject::url_path(&api_resource(resource), namespace)
}

fn api_resource(resource: &Resource) -> ApiResource {
    ApiResource {
        group: resource.group.to_owned(),
        version: resource.version.to_owned(),
        api_version: resource.api_version(),
        kind: resource.kind.to_owned(),
        plural: resource.plural.to_owned(),
    }
}

/// An object with its kind and API version, which the items of a list lack.
fn typed(resource: &Resource, Body(mut item): Body) -> Object {
    if let Some(fields) = item.as_object_mut() {
        fields.entry("apiVersion").or_insert_with(|| resource.api_version().into());
        fields.entry("kind").or_insert_with(|| resource.kind.into());
    }
    Object(item)
}

#[async_trait]
impl Objects for KubeObjects {
    async fn get(&self, resource: Resource, key: &ObjectKey) -> Result<Option<Object>, ReadError> {
        let path = path(&resource, key.namespace.as_deref());
        let answer = self.send(kube::core::Request::new(path).get(&key.name, &GetParams::default())).await?;
        Ok(answer.read(&resource)?.map(|Body(object)| Object(object)))
    }

    async fn list_page(&self, resource: Resource, scope: &Scope, start: &Start) -> Result<Page, ReadError> {
        let mut params = ListParams {
            label_selector: scope.labels.clone(),
            field_selector: scope.fields.clone(),
            ..ListParams::default()
        };
        match start {
            Start::First(Freshness::Quorum) => params.limit = Some(PAGE),
            // The API server answers from its memory, in one piece.
            Start::First(Freshness::Any) => {
                params.resource_version = Some("0".to_owned());
                params.version_match = Some(VersionMatch::NotOlderThan);
            }
            Start::Behind(place) => {
                (params.limit, params.continue_token) = (Some(PAGE), Some(place.clone()));
            }
        }
        let path = path(&resource, scope.namespace.as_deref());
        let answer = self.send(kube::core::Request::new(path).list(&params)).await?;
        if answer.status == StatusCode::GONE && params.continue_token.is_some() {
            let what = resource.plural;
            return Err(ReadError::Unavailable(format!("the list of {what} expired before all its pages were read")));
        }
        let page = answer.read(&resource)?.ok_or_else(|| ReadError::UnknownKind(answer::kind(&resource)))?;
        let ListBody { metadata: ListMeta { resource_version, r#continue: next }, items } = page;
        let items = items.unwrap_or_default().into_iter().map(|item| typed(&resource, item)).collect();
        Ok(Page { items, resource_version, next: Some(next).filter(|next| !next.is_empty()) })
    }

    fn watch(&self, resource: Resource, scope: &Scope) -> BoxStream<'static, Result<ObjectEvent, ReadError>> {
        watch::stream(Arc::clone(&self.servers), Arc::clone(&self.env), resource, scope.clone())
    }

    async fn create(&self, resource: Resource, object: Object) -> Outcome<Object, Refusal> {
        let path = path(&resource, object.key().namespace.as_deref());
        let body = object.0.to_string().into_bytes();
        self.write(kube::core::Request::new(path).create(&PostParams::default(), body)).await
    }

    async fn patch(&self, resource: Resource, key: &ObjectKey, patch: MergePatch) -> Outcome<Object, Refusal> {
        let request = kube::core::Request::new(path(&resource, key.namespace.as_deref()));
        let MergePatch { resource_version, uid, subresource, mut body } = patch;
        let seen = json!({"resourceVersion": resource_version, "uid": uid});
        match body.as_object_mut().map(|body| body.entry("metadata").or_insert_with(|| json!({}))) {
            Some(Value::Object(metadata)) => {
                metadata.extend(seen.as_object().cloned().unwrap_or_default());
                if UNTRACKED.contains(&resource) {
                    metadata.insert("managedFields".to_owned(), json!([{}]));
                }
            }
            _ => return Outcome::Refused(Refusal::Invalid("the patch or its metadata is no JSON object".to_owned())),
        }
        let (params, patch) = (PatchParams::default(), Patch::Merge(body));
        self.write(match subresource {
            Some(subresource) => request.patch_subresource(subresource, &key.name, &params, &patch),
            None => request.patch(&key.name, &params, &patch),
        })
        .await
    }

    async fn delete(&self, resource: Resource, key: &ObjectKey, only_if: Preconditions) -> Outcome<(), Refusal> {
        let path = path(&resource, key.namespace.as_deref());
        let preconditions =
            kube::api::Preconditions { uid: Some(only_if.uid), resource_version: Some(only_if.resource_version) };
        let params = DeleteParams::background().preconditions(preconditions);
        self.write(kube::core::Request::new(path).delete(&key.name, &params)).await.map(|_status| ())
    }
}
