//! An agent's end of the socket, and the plugin as the runtime calls it.

use std::{
    io::Write as _,
    os::unix::net::{UnixListener, UnixStream},
    path::{Path, PathBuf},
    process::{Command, Stdio},
    sync::mpsc,
    thread,
};

use basal_cni::{
    api::{AddResult, AddressResult, Answer, Call, InterfaceResult, RouteResult},
    frame,
};
use serde_json::{Value, json};
use tempfile::TempDir;

/// A folder with socket and delete queue.
pub(crate) struct Node {
    folder: TempDir,
}

/// What one call of the plugin gave.
#[derive(Debug)]
pub(crate) struct Outcome {
    pub(crate) success: bool,
    /// Null when nothing was printed.
    pub(crate) body: Value,
}

impl Node {
    pub(crate) fn new() -> Self {
        Self { folder: tempfile::tempdir().unwrap() }
    }

    pub(crate) fn socket(&self) -> PathBuf {
        self.folder.path().join("basal.sock")
    }

    pub(crate) fn queue(&self) -> PathBuf {
        self.folder.path().join("deleteQueue")
    }

    /// A configuration with more fields.
    pub(crate) fn conf(&self, more: &Value) -> String {
        let mut conf = json!({"cniVersion": "1.1.0", "name": "cilium", "type": "basal-cni",
            "agent-socket": self.socket(), "delete-queue": self.queue(), "add-timeout": 1});
        for (name, value) in more.as_object().unwrap() {
            conf[name] = value.clone();
        }
        conf.to_string()
    }

    /// Serves connections one after another, on a thread; each call that arrived is sent on.
    pub(crate) fn serve(&self, mut answer: impl FnMut(&Call, UnixStream) + Send + 'static) -> mpsc::Receiver<Call> {
        let listener = UnixListener::bind(self.socket()).unwrap();
        let (calls, received) = mpsc::channel();
        thread::spawn(move || {
            for stream in listener.incoming() {
                let mut stream = stream.unwrap();
                let call: Call = frame::read(&mut stream).unwrap();
                answer(&call, stream);
                if calls.send(call).is_err() {
                    return;
                }
            }
        });
        received
    }

    /// Answers every call alike.
    pub(crate) fn always(&self, answer: Answer) -> mpsc::Receiver<Call> {
        self.serve(move |_, mut stream| frame::write(&mut stream, &answer).unwrap())
    }
}

/// Calls the plugin for container `c1`, interface `eth0`.
pub(crate) fn plugin(command: &str, conf: &str) -> Outcome {
    plugin_with(command, conf, &[])
}

/// Calls the plugin with more variables.
pub(crate) fn plugin_with(command: &str, conf: &str, env: &[(&str, &str)]) -> Outcome {
    let mut child = Command::new(Path::new(env!("CARGO_BIN_EXE_basal-cni")))
        .env_clear()
        .env("CNI_COMMAND", command)
        .env("CNI_CONTAINERID", "c1")
        .env("CNI_IFNAME", "eth0")
        .env("CNI_NETNS", "/run/netns/c1")
        .envs(env.iter().copied())
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut stdin = child.stdin.take().unwrap();
    stdin.write_all(conf.as_bytes()).unwrap();
    drop(stdin);
    let output = child.wait_with_output().unwrap();
    assert_eq!(String::from_utf8_lossy(&output.stderr), "", "the plugin wrote to standard error");
    let body = if output.stdout.is_empty() { Value::Null } else { serde_json::from_slice(&output.stdout).unwrap() };
    Outcome { success: output.status.success(), body }
}

pub(crate) fn result() -> AddResult {
    let interface = |name: &str| InterfaceResult { name: name.into(), mac: "02:00:00:00:00:01".into(), mtu: 1500 };
    AddResult {
        host: interface("lxc0123456789ab"),
        container: interface("eth0"),
        netns: "/run/netns/c1".into(),
        addresses: vec![AddressResult {
            address: "10.0.1.5/32".parse().unwrap(),
            gateway: "10.0.1.1".parse().unwrap(),
        }],
        routes: vec![RouteResult {
            dst: "0.0.0.0/0".parse().unwrap(),
            gateway: Some("10.0.1.1".parse().unwrap()),
            mtu: Some(1450),
        }],
    }
}
