//! Watches: list first, then every change.

use basal_objects::{
    object::Object,
    port::{ObjectEvent, ReadError, Scope},
};
use futures::stream::BoxStream;
use serde_json::json;

use super::{Case, ObjectsFixture, Verdict, WIDGET, done};
use crate::conformance::{Departure, holds, next, read, same};

pub(super) fn cases() -> Vec<Case<ObjectsFixture>> {
    super::super::cases![
        a_watch_lists_first,
        a_watch_lists_every_answered_write,
        a_watch_tells_every_change,
        a_watch_shows_what_the_write_answered,
        an_object_enters_and_leaves_a_label_selection,
        a_watch_of_one_name_sees_no_other,
        a_finalized_object_is_changed_before_it_goes,
    ]
}

type Watch = BoxStream<'static, Result<ObjectEvent, ReadError>>;

async fn event(watch: &mut Watch) -> Verdict<ObjectEvent> {
    read("watch", next("watch", watch).await?)
}

/// `+name` for an applied object, `-name` for a deleted one.
async fn change(watch: &mut Watch) -> Verdict<String> {
    match event(watch).await? {
        ObjectEvent::Applied(object) => Ok(format!("+{}", object.name())),
        ObjectEvent::Deleted(object) => Ok(format!("-{}", object.name())),
        other => Err(Departure(format!("got {other:?}, wanted a change"))),
    }
}

/// Reads the list that a watch begins with.
async fn list(watch: &mut Watch) -> Verdict<Vec<Object>> {
    same("first", event(watch).await?, ObjectEvent::Restarted)?;
    let mut objects = Vec::new();
    loop {
        match event(watch).await? {
            ObjectEvent::Listed(object) => objects.push(object),
            ObjectEvent::InSync => return Ok(objects),
            other => return Err(Departure(format!("{other:?} in the list"))),
        }
    }
}

async fn a_watch_lists_first(f: &ObjectsFixture) -> Verdict {
    let (a, b) = (f.widget("a").await?, f.widget("b").await?);
    same("list", list(&mut f.objects.watch(WIDGET, &f.scope())).await?, [a, b])
}

async fn a_watch_lists_every_answered_write(f: &ObjectsFixture) -> Verdict {
    let mut written = Vec::new();
    for name in ["a", "b", "c", "d", "e", "f", "g", "h"] {
        written.push(f.widget(name).await?);
        same("list", list(&mut f.objects.watch(WIDGET, &f.scope())).await?.len(), written.len())?;
    }
    let changed = done("patch", f.patch(WIDGET, &written[0], json!({"spec": {"size": 2}})).await)?;
    written[0] = changed;
    same("list", list(&mut f.objects.watch(WIDGET, &f.scope())).await?, written)
}

async fn a_watch_tells_every_change(f: &ObjectsFixture) -> Verdict {
    let mut watch = f.objects.watch(WIDGET, &f.scope());
    same("list", list(&mut watch).await?, [])?;
    let created = f.widget("a").await?;
    let patched = done("patch", f.patch(WIDGET, &created, json!({"spec": {"size": 2}})).await)?;
    f.widget("b").await?;
    done("delete", f.delete(WIDGET, &patched).await)?;
    for wanted in ["+a", "+a", "+b", "-a"] {
        same("change", change(&mut watch).await?, wanted)?;
    }
    Ok(())
}

async fn a_watch_shows_what_the_write_answered(f: &ObjectsFixture) -> Verdict {
    let mut watch = f.objects.watch(WIDGET, &f.scope());
    list(&mut watch).await?;
    let created = f.widget("a").await?;
    same("created", event(&mut watch).await?, ObjectEvent::Applied(created.clone()))?;
    let patched = done("patch", f.patch_status(WIDGET, &created, json!({"status": {"ready": true}})).await)?;
    same("patched", event(&mut watch).await?, ObjectEvent::Applied(patched.clone()))?;
    done("delete", f.delete(WIDGET, &patched).await)?;
    match event(&mut watch).await? {
        ObjectEvent::Deleted(last) => {
            same("uid", last.uid(), patched.uid())?;
            same("last state", last.0.get("status"), patched.0.get("status"))?;
            holds("the deletion has a version of its own", last.resource_version() != patched.resource_version())
        }
        other => Err(Departure(format!("got {other:?}, wanted a deletion"))),
    }
}

async fn an_object_enters_and_leaves_a_label_selection(f: &ObjectsFixture) -> Verdict {
    let label = |value: &str| json!({"metadata": {"labels": {"app": value}}});
    let mut watch = f.objects.watch(WIDGET, &Scope { labels: Some("app=web".to_owned()), ..f.scope() });
    list(&mut watch).await?;
    let outside = f.create(WIDGET, &f.key("a"), label("db")).await?;
    let inside = done("enter", f.patch(WIDGET, &outside, label("web")).await)?;
    let left = done("leave", f.patch(WIDGET, &inside, label("db")).await)?;
    done("delete outside", f.delete(WIDGET, &left).await)?;
    f.create(WIDGET, &f.key("b"), label("web")).await?;
    for wanted in ["+a", "-a", "+b"] {
        same("change", change(&mut watch).await?, wanted)?;
    }
    Ok(())
}

async fn a_watch_of_one_name_sees_no_other(f: &ObjectsFixture) -> Verdict {
    f.widget("a").await?;
    f.widget("b").await?;
    let scope = Scope { fields: Some("metadata.name=b".to_owned()), ..f.scope() };
    let mut watch = f.objects.watch(WIDGET, &scope);
    same("list", list(&mut watch).await?.len(), 1)?;
    let a = f.existing(WIDGET, &f.key("a")).await?;
    let b = f.existing(WIDGET, &f.key("b")).await?;
    done("patch", f.patch(WIDGET, &a, json!({"spec": {"size": 2}})).await)?;
    done("patch", f.patch(WIDGET, &b, json!({"spec": {"size": 2}})).await)?;
    same("change", change(&mut watch).await?, "+b")
}

async fn a_finalized_object_is_changed_before_it_goes(f: &ObjectsFixture) -> Verdict {
    let held = json!({"metadata": {"finalizers": ["basal.io/a"]}});
    let created = f.create(WIDGET, &f.key("a"), held).await?;
    let mut watch = f.objects.watch(WIDGET, &f.scope());
    list(&mut watch).await?;
    done("delete", f.delete(WIDGET, &created).await)?;
    let ObjectEvent::Applied(deleting) = event(&mut watch).await? else {
        return Err(Departure("wanted the deleting object".to_owned()));
    };
    holds("it is deleting", deleting.is_deleting())?;
    done("patch", f.patch(WIDGET, &deleting, json!({"metadata": {"finalizers": null}})).await)?;
    same("change", change(&mut watch).await?, "-a")
}
