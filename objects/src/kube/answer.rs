//! What an HTTP answer, or none, means for a read and for a write.
//!
//! Source: Kubernetes API conventions, "HTTP Status codes" and "Response Status Kind".

use std::{error::Error, time::Duration};

use basal_runtime::{failure::chain, outcome::Outcome};
use http::{HeaderMap, StatusCode, header::RETRY_AFTER};
use serde::{Deserialize, de::DeserializeOwned};

use super::body::Body;
use crate::{
    object::{Object, Resource},
    port::{ReadError, Refusal},
};

/// An answer of the API server.
#[derive(Debug)]
pub(super) struct Answer {
    pub(super) status: StatusCode,
    pub(super) headers: HeaderMap,
    pub(super) body: Vec<u8>,
}

/// Why there is no answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum NoAnswer {
    /// The request did not leave.
    NotSent(String),
    /// The request may have arrived.
    Lost(String),
}

impl From<&kube::Error> for NoAnswer {
    fn from(error: &kube::Error) -> Self {
        let text = chain(error);
        let before_sending = match error {
            // Everything that happens before there is a connection to send on.
            kube::Error::Auth(_) | kube::Error::BuildRequest(_) | kube::Error::HttpError(_) => true,
            kube::Error::Service(error) => could_not_connect(error.as_ref()),
            _ => false,
        };
        if before_sending { Self::NotSent(text) } else { Self::Lost(text) }
    }
}

impl From<NoAnswer> for ReadError {
    fn from(error: NoAnswer) -> Self {
        match error {
            NoAnswer::NotSent(why) | NoAnswer::Lost(why) => Self::Unavailable(why),
        }
    }
}

/// Whether an error of the HTTP client came up while it connected.
fn could_not_connect(error: &(dyn Error + 'static)) -> bool {
    let mut cause = Some(error);
    while let Some(error) = cause {
        if let Some(error) = error.downcast_ref::<hyper_util::client::legacy::Error>() {
            return error.is_connect();
        }
        cause = error.source();
    }
    false
}

/// The `Status` object of a refusal.
#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub(super) struct Status {
    pub(super) message: String,
    pub(super) reason: String,
    pub(super) details: Details,
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub(super) struct Details {
    pub(super) name: String,
    pub(super) retry_after_seconds: u64,
    pub(super) causes: Vec<Cause>,
}

/// One wrong field.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub(super) struct Cause {
    pub(super) field: String,
}

/// The group and plural of a kind, as a user writes it.
pub(super) fn kind(resource: &Resource) -> String {
    if resource.group.is_empty() {
        resource.plural.to_owned()
    } else {
        format!("{}.{}", resource.plural, resource.group)
    }
}

impl Answer {
    /// What a read found; `None` when there is no such object.
    pub(super) fn read<T: DeserializeOwned>(&self, resource: &Resource) -> Result<Option<T>, ReadError> {
        if self.status.is_success() {
            let value = serde_json::from_slice(&self.body);
            return value
                .map(Some)
                .map_err(|error| ReadError::Unavailable(format!("it sent what cannot be read: {error}")));
        }
        let status = self.refusal();
        match self.status {
            StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN => Err(ReadError::Forbidden(status.message)),
            // A missing object is named in the answer; of a missing kind nothing is known that could be named.
            StatusCode::NOT_FOUND if !status.details.name.is_empty() => Ok(None),
            StatusCode::NOT_FOUND => Err(ReadError::UnknownKind(kind(resource))),
            StatusCode::TOO_MANY_REQUESTS => Err(ReadError::TooManyRequests { retry_after: self.retry_after(&status) }),
            code => Err(ReadError::Unavailable(format!("HTTP status {code}: {}", status.message))),
        }
    }

    /// What became of a write.
    pub(super) fn written(self) -> Outcome<Object, Refusal> {
        if self.status.is_success() {
            return match serde_json::from_slice(&self.body) {
                Ok(Body(object)) => Outcome::Done(Object(object)),
                Err(error) => Outcome::Unknown(format!("the API server's answer cannot be read: {error}")),
            };
        }
        let status = self.refusal();
        match self.status {
            StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN => Outcome::Refused(Refusal::Forbidden(status.message)),
            StatusCode::NOT_FOUND => Outcome::Refused(Refusal::NotFound(status.message)),
            StatusCode::CONFLICT if status.reason == "AlreadyExists" => Outcome::Refused(Refusal::AlreadyExists),
            StatusCode::CONFLICT => Outcome::Refused(Refusal::Conflict(status.message)),
            StatusCode::TOO_MANY_REQUESTS => {
                Outcome::Refused(Refusal::TooManyRequests { retry_after: self.retry_after(&status) })
            }
            // The uid in a patch is a precondition; the API server calls it a change of an immutable field.
            StatusCode::UNPROCESSABLE_ENTITY if status.details.causes.iter().any(|c| c.field == "metadata.uid") => {
                Outcome::Refused(Refusal::Conflict(status.message))
            }
            // etcd may have taken the write before the API server lost its answer.
            code if !code.is_client_error() || code == StatusCode::REQUEST_TIMEOUT => {
                Outcome::Unknown(format!("HTTP status {code}: {}", status.message))
            }
            _ => Outcome::Refused(Refusal::Invalid(status.message)),
        }
    }

    fn refusal(&self) -> Status {
        serde_json::from_slice(&self.body).unwrap_or_else(|_no_status_object| Status {
            message: String::from_utf8_lossy(&self.body).trim().to_owned(),
            ..Status::default()
        })
    }

    fn retry_after(&self, status: &Status) -> Option<Duration> {
        let header = self.headers.get(RETRY_AFTER).and_then(|value| value.to_str().ok()?.parse().ok());
        header.or(Some(status.details.retry_after_seconds).filter(|seconds| *seconds > 0)).map(Duration::from_secs)
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;
    use crate::object::resources::CILIUM_NODE;

    fn answer(code: u16, body: &Value) -> Answer {
        let status = StatusCode::from_u16(code).unwrap();
        Answer { status, headers: HeaderMap::new(), body: body.to_string().into_bytes() }
    }

    fn status(message: &str, reason: &str) -> Value {
        json!({"kind": "Status", "message": message, "reason": reason, "details": {"name": "n1"}})
    }

    #[test]
    fn a_missing_object_and_a_missing_kind_are_told_apart() {
        assert_eq!(answer(404, &status("gone", "NotFound")).read::<Body>(&CILIUM_NODE), Ok(None));
        let no_kind = Answer { body: b"404 page not found\n".to_vec(), ..answer(404, &Value::Null) };
        assert_eq!(no_kind.read::<Body>(&CILIUM_NODE), Err(ReadError::UnknownKind("ciliumnodes.cilium.io".into())));
    }

    #[test]
    fn client_errors_are_refusals_and_server_errors_are_unknown() {
        let written = |code: u16, reason: &str| answer(code, &status("text", reason)).written();
        assert_eq!(written(409, "Conflict"), Outcome::Refused(Refusal::Conflict("text".into())));
        assert_eq!(written(409, "AlreadyExists"), Outcome::Refused(Refusal::AlreadyExists));
        assert_eq!(written(422, "Invalid"), Outcome::Refused(Refusal::Invalid("text".into())));
        let other_uid = json!({"message": "text", "details": {"causes": [{"field": "metadata.uid"}]}});
        assert_eq!(answer(422, &other_uid).written(), Outcome::Refused(Refusal::Conflict("text".into())));
        assert_eq!(written(400, "BadRequest"), Outcome::Refused(Refusal::Invalid("text".into())));
        assert_eq!(written(403, "Forbidden"), Outcome::Refused(Refusal::Forbidden("text".into())));
        assert_eq!(written(404, "NotFound"), Outcome::Refused(Refusal::NotFound("text".into())));
        assert!(written(500, "InternalError").is_unknown());
        assert!(written(504, "Timeout").is_unknown());
        assert!(written(200, "").is_done());
    }

    #[test]
    fn a_pause_is_read_from_header_or_body() {
        let mut busy = answer(429, &json!({"details": {"retryAfterSeconds": 2}}));
        let pause = |seconds| ReadError::TooManyRequests { retry_after: Some(Duration::from_secs(seconds)) };
        assert_eq!(busy.read::<Body>(&CILIUM_NODE), Err(pause(2)));
        busy.headers.insert(RETRY_AFTER, 7.into());
        assert_eq!(busy.read::<Body>(&CILIUM_NODE), Err(pause(7)));
    }
}
