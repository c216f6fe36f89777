//! The events of a generation on their way to the client, who may be slow.

use crate::{admission::stalled, failure::Failure};
use idefics_proto::gateway::v1::{GenerationEvent, generation_event::Event};
use std::time::Duration;
use tokio::sync::mpsc::{self, OwnedPermit, error::SendTimeoutError};
use tokio_stream::wrappers::ReceiverStream;
use tonic::Status;

/// Events that wait for a slow client before its generation does.
const BUFFER: usize = 32;

/// Where the events of a generation go; bounded, so that a slow client slows only its own stream.
pub(crate) struct Events {
    sender: mpsc::Sender<Result<GenerationEvent, Status>>,
    /// The place of the last message, which is free even where the client reads nothing.
    last: Option<OwnedPermit<Result<GenerationEvent, Status>>>,
    stalled_client: Duration,
}

impl Events {
    /// Both ends. An event that the client has not made room for within `stalled_client` ends the generation.
    pub(crate) fn channel(stalled_client: Duration) -> (Self, ReceiverStream<Result<GenerationEvent, Status>>) {
        let (sender, receiver) = mpsc::channel(BUFFER + 1);
        // Always there: a new channel has room.
        let last = sender.clone().try_reserve_owned().ok();
        (Self { sender, last, stalled_client }, ReceiverStream::new(receiver))
    }

    /// Sends an event as soon as there is room.
    ///
    /// # Errors
    /// If the client has gone or does not read.
    pub(crate) async fn send(&self, event: Event) -> Result<(), Failure> {
        let event = GenerationEvent { event: Some(event) };
        self.sender.send_timeout(Ok(event), self.stalled_client).await.map_err(|error| {
            Failure::Final(match error {
                SendTimeoutError::Timeout(_) => stalled("read", self.stalled_client),
                // Nobody reads this status.
                SendTimeoutError::Closed(_) => Status::cancelled("the caller went away"),
            })
        })
    }

    /// Returns when the client has gone.
    pub(crate) async fn closed(&self) {
        self.sender.closed().await;
    }

    /// Ends the stream with an error, without waiting for the client.
    pub(crate) fn fail(self, status: Status) {
        self.last.map(|place| place.send(Err(status)));
    }
}
