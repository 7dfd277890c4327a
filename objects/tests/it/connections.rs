//! Lost connections: what was not sent is refused, what may have arrived is unknown, another server takes over.

use basal_e2e::servers::free_port;
use basal_objects::{
    object::resources::NODE,
    port::{Objects, ReadError, Refusal},
};
use basal_runtime::outcome::Outcome;

use super::{connect, connect_to, created, named, node, start, until, within};

#[tokio::test(flavor = "multi_thread")]
async fn lost_answers_are_unknown_and_unsent_writes_are_refused() {
    let mut server = start();
    let objects = connect(&server, "admin").await;
    created(&objects, "before").await;

    // The server takes the bytes and dies without an answer.
    server.pause().unwrap();
    let writer = objects.clone();
    let write = async move { writer.create(NODE, node("lost")).await };
    let kill = async {
        tokio::time::sleep(std::time::Duration::from_millis(300)).await;
        server.kill().unwrap();
    };
    let (outcome, ()) = within("the end of a write", futures::future::join(write, kill)).await;
    assert!(outcome.is_unknown(), "{outcome:?}");

    // Nobody listens.
    let refused = objects.create(NODE, node("unsent")).await;
    assert!(matches!(refused, Outcome::Refused(Refusal::Unavailable(_))), "{refused:?}");
    let read = objects.get(NODE, &named("before")).await;
    assert!(matches!(read, Err(ReadError::Unavailable(_))), "{read:?}");

    // The same clients go on when it is back.
    server.restart().unwrap();
    until("the first read after the restart", async || {
        matches!(objects.get(NODE, &named("before")).await, Ok(Some(_)))
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_next_server_is_tried_when_one_cannot_be_reached() {
    let server = start();
    let dead = format!("https://127.0.0.1:{}", free_port(std::net::Ipv4Addr::LOCALHOST.into()).unwrap());
    let objects = connect_to(server.kubeconfig("admin").unwrap(), vec![dead, server.url()]).await;
    let first = objects.create(NODE, node("a")).await;
    assert!(matches!(first, Outcome::Refused(Refusal::Unavailable(_))), "{first:?}");
    created(&objects, "a").await;
}
