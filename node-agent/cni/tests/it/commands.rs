//! Each command with an agent that answers.

use std::collections::BTreeSet;

use basal_cni::{
    api::{Ack, AgentError, Answer, Attachment, PodRef, Request},
    frame,
};
use serde_json::json;

use crate::agent::{Node, plugin, plugin_with, result};

fn c1() -> Attachment {
    Attachment { container_id: "c1".into(), ifname: "eth0".into() }
}

#[test]
fn add_prints_the_result_after_the_agent_committed() {
    let node = Node::new();
    let calls = node.serve(|_, mut stream| {
        frame::write(&mut stream, &Answer::Added(result())).unwrap();
        assert_eq!(frame::read::<Ack>(&mut stream).unwrap(), Ack::Received);
        frame::write(&mut stream, &Answer::Committed).unwrap();
    });
    let args = [("CNI_ARGS", "IgnoreUnknown=1;K8S_POD_NAMESPACE=ns;K8S_POD_NAME=p;K8S_POD_UID=u")];
    let outcome = plugin_with("ADD", &node.conf(&json!({"runtimeConfig": {"ips": ["10.0.1.5"]}})), &args);
    assert!(outcome.success, "{outcome:?}");
    assert_eq!(outcome.body["ips"][0]["address"], "10.0.1.5/32");
    let Request::Add(request) = calls.recv().unwrap().request else { panic!("no ADD arrived") };
    assert_eq!(request.attachment, c1());
    assert_eq!(request.netns, "/run/netns/c1");
    assert_eq!(request.pod, Some(PodRef { namespace: "ns".into(), name: "p".into(), uid: Some("u".into()) }));
    assert_eq!(request.ips, ["10.0.1.5".parse::<std::net::IpAddr>().unwrap()]);
}

#[test]
fn add_that_the_agent_did_not_commit_fails() {
    let node = Node::new();
    let _calls = node.serve(|_, mut stream| {
        frame::write(&mut stream, &Answer::Added(result())).unwrap();
        // The agent dies between the acknowledgement and its commit.
        assert_eq!(frame::read::<Ack>(&mut stream).unwrap(), Ack::Received);
    });
    let outcome = plugin("ADD", &node.conf(&json!({})));
    assert!(!outcome.success);
    assert_eq!(outcome.body["code"], 11);
}

#[test]
fn errors_of_the_agent_get_the_codes_of_the_specification() {
    for (error, code) in [
        (AgentError::TryAgain { message: "no address".into() }, 11),
        (AgentError::NotReady { message: "no block".into() }, 50),
        (AgentError::Invalid { field: "ips".into(), message: "in use".into() }, 7),
        (AgentError::UnknownAttachment { message: "c1".into() }, 3),
        (AgentError::Damaged { message: "no route".into() }, 100),
        (AgentError::ApiVersion { supported: 2, asked: 1 }, 11),
        (AgentError::Failed { message: "netns".into() }, 101),
    ] {
        let node = Node::new();
        let _calls = node.always(Answer::Error(error.clone()));
        for command in ["ADD", "DEL", "CHECK"] {
            let more = if command == "CHECK" { json!({"prevResult": {}}) } else { json!({}) };
            let outcome = plugin(command, &node.conf(&more));
            assert!(!outcome.success);
            assert_eq!(outcome.body["code"], code, "{command} {error:?}: {outcome:?}");
            assert_eq!(outcome.body["cniVersion"], "1.1.0");
        }
    }
}

#[test]
fn check_passes_on_what_add_answered() {
    let node = Node::new();
    let calls = node.always(Answer::Intact);
    let previous = basal_cni::result::to_json(&result(), basal_cni::version::Version::NEWEST);
    assert!(plugin("CHECK", &node.conf(&json!({"prevResult": previous}))).success);
    let Request::Check(request) = calls.recv().unwrap().request else { panic!("no CHECK arrived") };
    assert_eq!(request.addresses, ["10.0.1.5/32".parse::<ipnet::IpNet>().unwrap()]);
}

#[test]
fn status_tells_whether_the_agent_is_ready() {
    let node = Node::new();
    assert_eq!(plugin("STATUS", &node.conf(&json!({}))).body["code"], 50);
    let calls = node.always(Answer::Ready);
    assert!(plugin("STATUS", &node.conf(&json!({}))).success);
    assert_eq!(calls.recv().unwrap().request, Request::Ready);

    let other = Node::new();
    let _calls = other.always(Answer::Error(AgentError::NotReady { message: "no confirmed PodCIDR".into() }));
    let outcome = plugin("STATUS", &other.conf(&json!({})));
    assert_eq!((&outcome.body["code"], &outcome.body["msg"]), (&json!(50), &json!("no confirmed PodCIDR")));
}

#[test]
fn gc_passes_on_the_list_and_demands_it() {
    let node = Node::new();
    let calls = node.always(Answer::Collected { removed: BTreeSet::new() });
    let outcome = plugin("GC", &node.conf(&json!({})));
    assert_eq!(outcome.body["code"], 7);
    assert!(outcome.body["msg"].as_str().unwrap().contains("cni.dev/valid-attachments"));

    let valid = json!({"cni.dev/valid-attachments": [{"containerID": "c1", "ifname": "eth0"}]});
    assert!(plugin("GC", &node.conf(&valid)).success);
    assert_eq!(calls.recv().unwrap().request, Request::Gc { valid: BTreeSet::from([c1()]) });
}

#[test]
fn version_needs_no_agent() {
    let outcome = plugin("VERSION", r#"{"cniVersion":"0.4.0"}"#);
    assert!(outcome.success);
    assert_eq!(outcome.body["cniVersion"], "0.4.0");
    assert_eq!(
        outcome.body["supportedVersions"],
        json!(["0.1.0", "0.2.0", "0.3.0", "0.3.1", "0.4.0", "1.0.0", "1.1.0"])
    );
}
