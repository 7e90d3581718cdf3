//! One message on a stream: bounded in size and time.

use std::time::Duration;

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::time::timeout;

use super::{ControlError, Hello, Identity, MESSAGE_BYTES_MAX, Message};
use crate::ids::NodeId;

/// Limit for a peer to introduce itself, and for the rest of a message that has begun.
pub(super) const FRAME_LIMIT: Duration = Duration::from_secs(5);

/// Longest reason that is passed on from the other side.
const REASON_CHARS_MAX: usize = 500;

/// A stream of messages; the kind of stream is the caller's choice.
#[derive(Debug)]
pub(super) struct Connection<S> {
    stream: S,
}

impl<S: AsyncRead + AsyncWrite + Unpin + Send> Connection<S> {
    pub(super) const fn new(stream: S) -> Self {
        Self { stream }
    }

    /// The next message; `limit` is for its beginning.
    pub(super) async fn read(
        &mut self,
        limit: Duration,
        what: &'static str,
    ) -> Result<Message, ControlError> {
        let length = timeout(limit, self.stream.read_u32_le())
            .await
            .map_err(|_| ControlError::TimedOut(what))??;
        if length > MESSAGE_BYTES_MAX {
            return Err(ControlError::Protocol(format!(
                "a message of {length} bytes, the limit is {MESSAGE_BYTES_MAX}"
            )));
        }
        let mut bytes = vec![0; length as usize];
        timeout(FRAME_LIMIT, self.stream.read_exact(&mut bytes))
            .await
            .map_err(|_| ControlError::TimedOut("finish its message"))??;
        let message = serde_json::from_slice(&bytes)
            .map_err(|error| ControlError::Protocol(format!("no valid message: {error}")))?;
        match message {
            Message::Refused { reason } => Err(ControlError::Refused(shortened(&reason))),
            message => Ok(message),
        }
    }

    pub(super) async fn write(&mut self, message: &Message) -> Result<(), ControlError> {
        let bytes = serde_json::to_vec(message).map_err(std::io::Error::from)?;
        let length = u32::try_from(bytes.len())
            .ok()
            .filter(|length| *length <= MESSAGE_BYTES_MAX)
            .ok_or_else(|| std::io::Error::other("this node's message is too long"))?;
        let all = async {
            self.stream.write_u32_le(length).await?;
            self.stream.write_all(&bytes).await?;
            self.stream.flush().await
        };
        Ok(timeout(FRAME_LIMIT, all)
            .await
            .map_err(|_| ControlError::TimedOut("read"))??)
    }

    /// Tells the other side why, and closes.
    pub(super) async fn refuse(mut self, reason: &str) {
        let told = self
            .write(&Message::Refused {
                reason: reason.to_owned(),
            })
            .await;
        if told.is_ok() {
            let _ = timeout(FRAME_LIMIT, self.stream.shutdown()).await;
        }
    }

    pub(super) async fn say_hello(&mut self, identity: &Identity) -> Result<(), ControlError> {
        self.write(&Message::Hello {
            hello: identity.hello.clone(),
        })
        .await
    }

    /// Reads the other side's Hello and checks it; a wrong one is refused in words.
    pub(super) async fn expect_hello(
        mut self,
        identity: &Identity,
        wanted: Option<&NodeId>,
    ) -> Result<(Self, Hello), ControlError> {
        let reason = match self.read(FRAME_LIMIT, "introduce itself").await {
            Ok(Message::Hello { hello }) => match identity.check(&hello, wanted) {
                Ok(()) => return Ok((self, hello)),
                Err(reason) => reason,
            },
            Ok(_) => "it did not begin with a Hello".to_owned(),
            Err(ControlError::Protocol(what)) => format!("it sent {what}"),
            Err(error) => return Err(error),
        };
        self.refuse(&reason).await;
        Err(ControlError::WrongPeer(reason))
    }
}

/// What the other side says, made fit for one line of a log.
fn shortened(reason: &str) -> String {
    reason
        .chars()
        .filter(|c| !c.is_control())
        .take(REASON_CHARS_MAX)
        .collect()
}
