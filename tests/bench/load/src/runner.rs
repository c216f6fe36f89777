//! Sends conversations under open or closed load and notes what became of each request.

use crate::{
    client::{Answer, Client, Failure, Reply},
    workload::{Conversation, Kind},
};
use serde::Serialize;
use std::{
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};
use tokio::{task::JoinSet, time::Instant};

/// When conversations begin.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Load {
    /// At these times, ascending, whatever the server does.
    Open {
        /// Conversations per second that were meant.
        rate: f64,
        /// One per conversation, since the start.
        #[serde(skip)]
        arrivals: Vec<Duration>,
    },
    /// This many clients, each beginning its next conversation when its last one has ended.
    Closed {
        /// The clients.
        concurrency: usize,
    },
}

/// What became of a request. Times are since the start of the run.
#[derive(Clone, Debug)]
pub struct Outcome {
    /// What it was.
    pub kind: Kind,
    /// When it was due: its arrival, or the end of the request that it follows. Latencies count from here, so that a driver or
    /// a connection that is late makes them longer and never hides them.
    pub due: Duration,
    /// When each token came.
    pub token_times: Vec<Duration>,
    /// When it ended.
    pub ended: Duration,
    /// The answer, or why there is none.
    pub result: Result<Answer, Failure>,
}

/// Runs each conversation once; returns when the last one has ended. The second turn follows the first at once, and is not
/// sent where the first was not answered.
pub async fn run(client: &Client, conversations: Vec<Conversation>, load: &Load) -> Vec<Outcome> {
    let started = Instant::now();
    let mut tasks = JoinSet::new();
    match load {
        Load::Open { arrivals, .. } => {
            for (conversation, arrival) in conversations.into_iter().zip(arrivals) {
                let due = started + *arrival;
                tokio::time::sleep_until(due).await;
                let client = client.clone();
                tasks.spawn(async move { converse(&client, conversation, started, due).await });
            }
        }
        Load::Closed { concurrency } => {
            let queue = Arc::new(Mutex::new(conversations.into_iter()));
            for _ in 0..*concurrency {
                let (client, queue) = (client.clone(), Arc::clone(&queue));
                let next = move || queue.lock().unwrap_or_else(PoisonError::into_inner).next();
                tasks.spawn(async move {
                    let mut outcomes = Vec::new();
                    while let Some(conversation) = next() {
                        outcomes.extend(converse(&client, conversation, started, Instant::now()).await);
                    }
                    outcomes
                });
            }
        }
    }
    tasks.join_all().await.into_iter().flatten().collect()
}

async fn converse(client: &Client, conversation: Conversation, started: Instant, due: Instant) -> Vec<Outcome> {
    let first = client.ask(conversation.first.clone()).await;
    let second = first.result.as_ref().ok().and_then(|answer| conversation.second(&answer.text));
    let answered = first.ended;
    let mut outcomes = vec![outcome(conversation.kind, started, due, first)];
    if let Some(second) = second {
        outcomes.push(outcome(Kind::SecondTurn, started, answered, client.ask(second).await));
    }
    outcomes
}

fn outcome(kind: Kind, started: Instant, due: Instant, reply: Reply) -> Outcome {
    Outcome {
        kind,
        due: due - started,
        token_times: reply.token_times.into_iter().map(|at| at - started).collect(),
        ended: reply.ended - started,
        result: reply.result,
    }
}
