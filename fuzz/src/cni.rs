//! What the container runtime writes to the plugin's standard input, and what comes over the agent's socket.

use std::time::Duration;

use basal_cni::{
    api::{Answer, Call},
    conf::{NetConf, version_of},
    frame,
    invocation::Command,
    version::Version,
};

const COMMANDS: [Command; 6] =
    [Command::Add, Command::Del, Command::Check, Command::Status, Command::Gc, Command::Version];

pub(crate) fn stdin(input: &[u8]) {
    // An error is answered in the version that was asked for, whatever else is wrong.
    let version = version_of(input);
    assert_eq!(Version::parse(version.as_str()).ok(), Some(version));
    for command in COMMANDS {
        match NetConf::parse(input, command) {
            Ok(conf) => check(&conf, command),
            Err(error) => {
                assert!((1..=99).contains(&error.code()), "code {} belongs to nobody", error.code());
                super::explained(&error);
            }
        }
    }
}

fn check(conf: &NetConf, command: Command) {
    assert!(conf.version >= command.since());
    assert!(command == Command::Version || !conf.name.is_empty());
    assert!((Duration::from_secs(1)..=Duration::from_secs(600)).contains(&conf.add_timeout));
    assert!(command != Command::Check || conf.previous.is_some());
}

pub(crate) fn frame(input: &[u8]) {
    if let Ok(call) = frame::read::<Call>(&mut &input[..]) {
        let mut written = Vec::new();
        frame::write(&mut written, &call).expect("what was read fits a frame");
        assert_eq!(frame::read::<Call>(&mut written.as_slice()).ok(), Some(call));
    }
    if let Err(error) = frame::read::<Answer>(&mut &input[..]) {
        super::explained(&error);
    }
}
