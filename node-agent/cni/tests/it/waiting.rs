//! An agent that is away, slow, or goes away.

use std::{fs, os::unix::net::UnixListener, sync::mpsc, thread};

use basal_cni::{
    api::{Ack, Answer, Request},
    delete_queue::Consumer,
    frame,
};
use serde_json::json;

use crate::agent::{Node, plugin, result};

#[test]
fn add_waits_and_then_asks_to_be_tried_again() {
    let node = Node::new();
    let away = plugin("ADD", &node.conf(&json!({})));
    assert_eq!(away.body["code"], 11, "{away:?}");
    assert!(away.body["msg"].as_str().unwrap().contains("basal.sock"));

    // An agent that never answers sees the connection close.
    let listener = UnixListener::bind(node.socket()).unwrap();
    let (closed, seen) = mpsc::channel();
    thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        let _call: basal_cni::api::Call = frame::read(&mut stream).unwrap();
        closed.send(matches!(frame::read::<Ack>(&mut stream), Err(frame::FrameError::Closed))).unwrap();
    });
    let slow = plugin("ADD", &node.conf(&json!({})));
    assert_eq!(slow.body["code"], 11, "{slow:?}");
    assert!(seen.recv().unwrap());
}

#[test]
fn add_outlives_a_restart_of_the_agent() {
    let node = Node::new();
    let mut first = true;
    let calls = node.serve(move |_, mut stream| {
        if std::mem::take(&mut first) {
            return;
        }
        frame::write(&mut stream, &Answer::Added(result())).unwrap();
        assert_eq!(frame::read::<Ack>(&mut stream).unwrap(), Ack::Received);
        frame::write(&mut stream, &Answer::Committed).unwrap();
    });
    let outcome = plugin("ADD", &node.conf(&json!({"add-timeout": 60})));
    assert!(outcome.success, "{outcome:?}");
    assert_eq!(calls.recv().unwrap(), calls.recv().unwrap());
}

#[test]
fn del_without_an_agent_is_queued_until_the_queue_is_full() {
    let node = Node::new();
    for _ in 0..2 {
        let outcome = plugin("DEL", &node.conf(&json!({})));
        assert!(outcome.success, "{outcome:?}");
    }
    let consumer = Consumer::lock(&node.queue()).unwrap();
    let queued = consumer.waiting().unwrap();
    assert_eq!(queued.len(), 1);
    assert_eq!(queued[0].request.as_ref().unwrap().attachment.container_id, "c1");
    consumer.remove(&queued[0]).unwrap();
    drop(consumer);

    for i in 0..basal_cni::delete_queue::MAX_FILES {
        fs::write(node.queue().join(format!("{i}.delete")), "").unwrap();
    }
    let outcome = plugin("DEL", &node.conf(&json!({})));
    assert_eq!(outcome.body["code"], 11, "{outcome:?}");
}

#[test]
fn del_that_breaks_off_is_queued_and_one_that_is_answered_is_not() {
    let node = Node::new();
    let calls = node.serve(|_, _| {});
    assert!(plugin("DEL", &node.conf(&json!({}))).success);
    assert!(matches!(calls.recv().unwrap().request, Request::Del(_)));
    assert_eq!(Consumer::lock(&node.queue()).unwrap().waiting().unwrap().len(), 1);

    let other = Node::new();
    let _calls = other.always(Answer::Deleted);
    assert!(plugin("DEL", &other.conf(&json!({}))).success);
    assert!(!other.queue().exists());
}
