//! One call of the plugin, from standard input and environment to the text for standard output.

use std::{io::Read, time::Duration};

use serde_json::json;

use crate::{
    api::{AddRequest, Answer, CheckRequest, DelRequest, Request},
    client::{self, Added, ClientError, Deadline},
    conf::{self, NetConf},
    delete_queue::{Producer, QueueError},
    error::PluginError,
    invocation::{self, Command, Lookup},
    result,
    version::Version,
};

/// How long everything but ADD waits for the agent.
const CALL_TIMEOUT: Duration = Duration::from_secs(30);
/// A configuration is some hundred bytes; GC lists of a full node some ten thousand.
const MAX_INPUT: u64 = 16 << 20;

/// What the process prints and how it ends.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Reply {
    /// The text for standard output; may be empty.
    pub body: String,
    /// Whether the exit code is 0.
    pub success: bool,
}

/// Carries out one call.
pub fn run(lookup: Lookup<'_>, stdin: &mut dyn Read) -> Reply {
    let mut input = Vec::new();
    let read = stdin.take(MAX_INPUT).read_to_end(&mut input);
    let outcome = match read {
        Ok(_) => dispatch(lookup, &input),
        Err(source) => Err(PluginError::Io { what: "network configuration on stdin".to_owned(), source }),
    };
    match outcome {
        Ok(body) => Reply { body, success: true },
        Err(error) => Reply { body: error.to_json(conf::version_of(&input)), success: false },
    }
}

fn dispatch(lookup: Lookup<'_>, input: &[u8]) -> Result<String, PluginError> {
    let command = invocation::command(lookup)?;
    if command == Command::Version {
        return Ok(versions(input));
    }
    let conf = NetConf::parse(input, command)?;
    match command {
        Command::Add => add(lookup, &conf),
        Command::Del => del(lookup, &conf),
        Command::Check => check(lookup, &conf),
        Command::Status => status(&conf),
        Command::Gc => gc(&conf),
        Command::Version => Ok(versions(input)),
    }
}

fn versions(input: &[u8]) -> String {
    let supported: Vec<_> = Version::ALL.iter().map(|version| version.as_str()).collect();
    json!({"cniVersion": conf::version_of(input).as_str(), "supportedVersions": supported}).to_string()
}

fn unfit(answer: &Answer) -> PluginError {
    PluginError::Agent(format!("the agent gave an answer that does not fit the question: {answer:?}"))
}

fn try_again(error: ClientError) -> PluginError {
    match error {
        ClientError::Unfit(_) => PluginError::Agent(error.to_string()),
        _ => PluginError::TryAgain(error.to_string()),
    }
}

fn add(lookup: Lookup<'_>, conf: &NetConf) -> Result<String, PluginError> {
    let request = AddRequest {
        attachment: invocation::attachment(lookup)?,
        netns: invocation::netns(lookup)?,
        pod: invocation::pod(lookup)?,
        ips: conf.ips.clone(),
    };
    match client::add(&conf.socket, &request, Deadline::after(conf.add_timeout)) {
        Ok(Added::Committed(result)) => Ok(result::to_json(&result, conf.version).to_string()),
        Ok(Added::Refused(error)) => Err(error.into()),
        Err(ClientError::TimedOut) => Err(PluginError::TryAgain(format!(
            "the agent has not attached the container within {} s; its log and `basal status` on this node say what it waits for",
            conf.add_timeout.as_secs()
        ))),
        Err(error) => Err(try_again(error)),
    }
}

fn del(lookup: Lookup<'_>, conf: &NetConf) -> Result<String, PluginError> {
    let request = DelRequest { attachment: invocation::attachment(lookup)? };
    let deadline = Deadline::after(CALL_TIMEOUT);
    match del_now(&request, conf, deadline) {
        Err(ClientError::Away { .. } | ClientError::Broken(_)) => {}
        Err(error) => return Err(try_again(error)),
        Ok(answer) => return deleted(answer),
    }
    let queue = Producer::lock(&conf.delete_queue, deadline).map_err(queue_error)?;
    // While we waited for the lock an agent may have begun to listen; it does not look into the queue any more.
    match del_now(&request, conf, deadline) {
        Err(ClientError::Away { .. } | ClientError::Broken(_)) => {
            queue.push(&request).map_err(queue_error)?;
            Ok(String::new())
        }
        Err(error) => Err(try_again(error)),
        Ok(answer) => deleted(answer),
    }
}

fn del_now(request: &DelRequest, conf: &NetConf, deadline: Deadline) -> Result<Answer, ClientError> {
    client::call(&conf.socket, Request::Del(request.clone()), deadline)
}

fn deleted(answer: Answer) -> Result<String, PluginError> {
    match answer {
        Answer::Deleted => Ok(String::new()),
        Answer::Error(error) => Err(error.into()),
        other => Err(unfit(&other)),
    }
}

fn queue_error(error: QueueError) -> PluginError {
    PluginError::TryAgain(format!("the agent is away, and the delete could not be queued: {error}"))
}

fn check(lookup: Lookup<'_>, conf: &NetConf) -> Result<String, PluginError> {
    let request = CheckRequest {
        attachment: invocation::attachment(lookup)?,
        netns: invocation::netns(lookup)?,
        addresses: conf.previous.clone().unwrap_or_default(),
    };
    match client::call(&conf.socket, Request::Check(request), Deadline::after(CALL_TIMEOUT)).map_err(try_again)? {
        Answer::Intact => Ok(String::new()),
        Answer::Error(error) => Err(error.into()),
        other => Err(unfit(&other)),
    }
}

fn status(conf: &NetConf) -> Result<String, PluginError> {
    match client::call(&conf.socket, Request::Ready, Deadline::after(CALL_TIMEOUT)) {
        Ok(Answer::Ready) => Ok(String::new()),
        Ok(Answer::Error(error)) => Err(PluginError::NotAvailable(error.to_string())),
        Ok(other) => Err(unfit(&other)),
        Err(error) => Err(PluginError::NotAvailable(error.to_string())),
    }
}

fn gc(conf: &NetConf) -> Result<String, PluginError> {
    // Without the list everything would be an orphan.
    let valid = conf.valid_attachments.clone().ok_or_else(|| PluginError::Config {
        field: "cni.dev/valid-attachments".to_owned(),
        why: "GC needs the list of attachments that stay".to_owned(),
    })?;
    match client::call(&conf.socket, Request::Gc { valid }, Deadline::after(CALL_TIMEOUT)).map_err(try_again)? {
        Answer::Collected { .. } => Ok(String::new()),
        Answer::Error(error) => Err(error.into()),
        other => Err(unfit(&other)),
    }
}
