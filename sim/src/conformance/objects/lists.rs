//! Lists: order, scopes, selectors.

use basal_objects::{
    object::{ObjectKey, resources},
    port::{Freshness, Scope},
};
use serde_json::json;

use super::{Case, ObjectsFixture, Verdict, WIDGET, done, read};
use crate::conformance::{holds, same};

pub(super) fn cases() -> Vec<Case<ObjectsFixture>> {
    super::super::cases![
        a_list_is_ordered_and_sees_every_answered_write,
        a_list_of_all_namespaces_has_them_all,
        label_selectors_select,
        field_selectors_select,
        pods_are_selected_by_their_node,
        a_missing_object_is_no_error,
        a_long_list_is_complete,
    ]
}

async fn a_list_is_ordered_and_sees_every_answered_write(f: &ObjectsFixture) -> Verdict {
    for name in ["b", "a-1", "c", "a", "a.1"] {
        f.widget(name).await?;
    }
    same("names", f.names(WIDGET, &f.scope()).await?, ["a", "a-1", "a.1", "b", "c"])?;
    let gone = f.existing(WIDGET, &f.key("b")).await?;
    done("delete", f.delete(WIDGET, &gone).await)?;
    let list = read("list", f.objects.list(WIDGET, &f.scope(), Freshness::Quorum).await)?;
    same("objects", list.items.len(), 4)?;
    holds("the list has a resourceVersion", !list.resource_version.is_empty())?;
    for object in &list.items {
        same("listed", object.resource_version(), f.existing(WIDGET, &object.key()).await?.resource_version())?;
        same("kind", object.0.get("kind"), Some(&json!("Widget")))?;
        same("apiVersion", object.0.get("apiVersion"), Some(&json!(WIDGET.api_version())))?;
    }
    Ok(())
}

async fn a_list_of_all_namespaces_has_them_all(f: &ObjectsFixture) -> Verdict {
    f.widget("a").await?;
    let elsewhere = ObjectKey::namespaced("default", "only-in-this-case");
    let other = f.create(WIDGET, &elsewhere, json!({})).await?;
    let list = read("list", f.objects.list(WIDGET, &Scope::default(), Freshness::Quorum).await)?;
    for key in [f.key("a"), elsewhere] {
        holds(&format!("{key} is listed"), list.items.iter().any(|object| object.key() == key))?;
    }
    done("delete", f.delete(WIDGET, &other).await)
}

async fn label_selectors_select(f: &ObjectsFixture) -> Verdict {
    for (name, labels) in [("a", json!({"app": "web"})), ("b", json!({"app": "db", "tier": "back"})), ("c", json!({}))]
    {
        f.create(WIDGET, &f.key(name), json!({"metadata": {"labels": labels}})).await?;
    }
    for (selector, wanted) in [
        ("app", vec!["a", "b"]),
        ("!app", vec!["c"]),
        ("app=web", vec!["a"]),
        ("app!=web", vec!["b", "c"]),
        ("app in (web, db),tier", vec!["b"]),
        ("app notin (db)", vec!["a", "c"]),
        ("app=web,tier=back", vec![]),
    ] {
        let scope = Scope { labels: Some(selector.to_owned()), ..f.scope() };
        same(selector, f.names(WIDGET, &scope).await?, wanted)?;
    }
    Ok(())
}

async fn field_selectors_select(f: &ObjectsFixture) -> Verdict {
    f.widget("a").await?;
    f.widget("b").await?;
    for (selector, wanted) in [("metadata.name=a", vec!["a"]), ("metadata.name!=a", vec!["b"])] {
        let scope = Scope { fields: Some(selector.to_owned()), ..f.scope() };
        same(selector, f.names(WIDGET, &scope).await?, wanted)?;
    }
    let here = Scope { fields: Some(format!("metadata.namespace={}", f.namespace)), ..Scope::default() };
    same("by namespace", f.names(WIDGET, &here).await?, ["a", "b"])
}

/// A real server needs its ServiceAccount admission switched off for this.
async fn pods_are_selected_by_their_node(f: &ObjectsFixture) -> Verdict {
    let spec = |node: &str| {
        json!({
            "nodeName": node,
            "automountServiceAccountToken": false,
            "containers": [{"name": "a", "image": "a"}],
        })
    };
    for (name, node) in [("a", "n1"), ("b", "n2"), ("c", "n1")] {
        f.create(resources::POD, &f.key(name), json!({"spec": spec(node)})).await?;
    }
    let scope = Scope { fields: Some("spec.nodeName=n1".to_owned()), ..f.scope() };
    same("pods of n1", f.names(resources::POD, &scope).await?, ["a", "c"])?;
    let pod = f.existing(resources::POD, &f.key("a")).await?;
    same("phase", super::field(&pod, "/status/phase"), Some(&json!("Pending")))
}

async fn a_missing_object_is_no_error(f: &ObjectsFixture) -> Verdict {
    same("get", f.get(WIDGET, &f.key("a")).await?, None)?;
    same("list", f.names(WIDGET, &f.scope()).await?, Vec::<String>::new())
}

/// Lists come in pages from a real server.
async fn a_long_list_is_complete(f: &ObjectsFixture) -> Verdict {
    let names: Vec<String> = (0..620).map(|i| format!("w{i:03}")).collect();
    for name in &names {
        f.widget(name).await?;
    }
    same("names", f.names(WIDGET, &f.scope()).await?, names)
}
