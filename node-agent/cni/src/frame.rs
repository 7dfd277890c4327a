//! Messages on a stream: a length of four bytes, big-endian, then so many bytes of JSON.

use std::io::{self, Read, Write};

use serde::{Serialize, de::DeserializeOwned};

/// The longest message that is accepted, in bytes. A GC list of 100,000 attachments stays below.
pub const MAX_LEN: usize = 16 << 20;

/// Why there is no message.
#[derive(Debug, thiserror::Error)]
pub enum FrameError {
    /// The stream ended between two messages.
    #[error("the connection was closed")]
    Closed,
    /// The stream failed, or ended within a message.
    #[error("the connection failed: {0}")]
    Io(#[from] io::Error),
    /// The length is above [`MAX_LEN`].
    #[error("a message of {0} bytes is longer than the {MAX_LEN} that are accepted")]
    TooLong(usize),
    /// The bytes are no such message.
    #[error("the message does not parse: {0}")]
    Json(#[from] serde_json::Error),
}

impl FrameError {
    /// Whether the peer took longer than the stream's time-out.
    #[must_use]
    pub fn is_timeout(&self) -> bool {
        matches!(self, Self::Io(error) if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut))
    }
}

/// The bytes of a message, length included.
///
/// # Errors
/// `TooLong` or `Json`.
pub fn encode<T: Serialize>(message: &T) -> Result<Vec<u8>, FrameError> {
    let mut bytes = vec![0; 4];
    serde_json::to_writer(&mut bytes, message)?;
    let len = bytes.len() - 4;
    let header = length(len)?;
    bytes[..4].copy_from_slice(&header);
    Ok(bytes)
}

fn length(len: usize) -> Result<[u8; 4], FrameError> {
    match u32::try_from(len) {
        Ok(short) if len <= MAX_LEN => Ok(short.to_be_bytes()),
        _ => Err(FrameError::TooLong(len)),
    }
}

/// How many bytes follow a header.
///
/// # Errors
/// `TooLong`.
pub fn body_len(header: [u8; 4]) -> Result<usize, FrameError> {
    let len = u32::from_be_bytes(header) as usize;
    if len > MAX_LEN { Err(FrameError::TooLong(len)) } else { Ok(len) }
}

/// Writes one message.
///
/// # Errors
/// See [`FrameError`].
pub fn write<T: Serialize>(stream: &mut impl Write, message: &T) -> Result<(), FrameError> {
    stream.write_all(&encode(message)?)?;
    stream.flush()?;
    Ok(())
}

/// Reads one message.
///
/// # Errors
/// See [`FrameError`].
pub fn read<T: DeserializeOwned>(stream: &mut impl Read) -> Result<T, FrameError> {
    let mut header = [0; 4];
    match stream.read(&mut header)? {
        0 => return Err(FrameError::Closed),
        n => stream.read_exact(&mut header[n..])?,
    }
    let len = body_len(header)?;
    // The length is the peer's word: memory is taken as bytes arrive.
    let mut body = Vec::new();
    let got = stream.take(len as u64).read_to_end(&mut body)?;
    if got < len {
        return Err(io::Error::from(io::ErrorKind::UnexpectedEof).into());
    }
    Ok(serde_json::from_slice(&body)?)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn what_is_written_is_read(text in ".*", more in ".*") {
            let mut stream = Vec::new();
            write(&mut stream, &text).unwrap();
            write(&mut stream, &more).unwrap();
            let mut stream = stream.as_slice();
            prop_assert_eq!(read::<String>(&mut stream).unwrap(), text);
            prop_assert_eq!(read::<String>(&mut stream).unwrap(), more);
            prop_assert!(matches!(read::<String>(&mut stream), Err(FrameError::Closed)));
        }

        #[test]
        fn garbage_is_an_error(bytes in proptest::collection::vec(any::<u8>(), 1..64)) {
            // A text needs quotation marks; garbage of this length that is a valid frame of a text is not drawn.
            let result = read::<Vec<u32>>(&mut bytes.as_slice());
            prop_assert!(result.is_err());
        }
    }

    #[test]
    fn a_length_beyond_the_limit_is_refused_before_memory_is_taken() {
        assert!(matches!(read::<String>(&mut &[0xff_u8; 8][..]), Err(FrameError::TooLong(_))));
    }
}
