//! From the decoder's tokens to the caller's text, choice by choice.

use crate::{
    call::Call,
    coordinator::Job,
    detokenize::{Detokenizer, StopTexts},
    events::Events,
    failure::{Failure, RETRY_AFTER},
    metrics,
    replicas::Decoder,
    tokenizer::TextTokenizer,
};
use idefics_common::status;
use idefics_proto::{
    decoder::v1::{self as decoder, generate_response::Event as DecoderEvent},
    gateway::v1::{self as pb, generation_event::Event},
};
use std::{sync::Arc, time::Duration};
use tokio::time::Instant;
use tonic::{Request, Status, Streaming};

/// What has happened to a request so far, over all attempts.
#[derive(Default)]
pub(crate) struct Progress {
    /// The caller was told that the request was accepted.
    pub(crate) started: bool,
    /// Something of the answer has reached the caller: another decoder cannot start over.
    pub(crate) answered: bool,
    pub(crate) timings: pb::Timings,
    completion_tokens: u32,
    /// What the decoder said with the first token.
    first: decoder::FirstToken,
    first_token_at: Option<Instant>,
}

/// A generation that has begun.
pub(crate) struct Stream {
    pub(crate) first: Option<decoder::GenerateResponse>,
    pub(crate) events: Streaming<decoder::GenerateResponse>,
}

impl Stream {
    async fn next(&mut self, decoder: &Decoder, limit: Duration) -> Result<DecoderEvent, Failure> {
        let event = match self.first.take() {
            Some(event) => Some(event),
            None => match tokio::time::timeout(limit, self.events.message()).await {
                Ok(event) => event.map_err(|answer| Failure::from_peer(decoder, answer, &[]))?,
                Err(_) => return Err(Failure::timeout(decoder, limit)),
            },
        };
        event.and_then(|event| event.event).ok_or_else(|| {
            let why = format!("decoder {} ended its stream early; retry later", decoder.uri);
            Failure::Elsewhere(status::unavailable(why, RETRY_AFTER))
        })
    }
}

/// One answer of a request.
struct Choice {
    detokenizer: Detokenizer,
    stops: StopTexts,
    /// Why it ended, seen from here: a stop text ends it before the decoder knows.
    reason: Option<pb::FinishReason>,
    /// What the decoder said at its end.
    finished: Option<decoder::Finished>,
    last_token_at: Option<Instant>,
}

/// A `CancelChoice` that takes longer does not help: the choice goes on until all others have ended.
const CANCEL_TIMEOUT: Duration = Duration::from_secs(5);

/// Hands on what one decoder generates for one request.
pub(crate) struct Relay<'a> {
    job: &'a Job,
    decoder: &'a Decoder,
    events: &'a Events,
    progress: &'a mut Progress,
    choices: Vec<Choice>,
}

impl<'a> Relay<'a> {
    pub(crate) fn new(
        job: &'a Job,
        decoder: &'a Decoder,
        events: &'a Events,
        progress: &'a mut Progress,
        tokenizer: &Arc<TextTokenizer>,
    ) -> Self {
        let choice = |_| Choice {
            detokenizer: Detokenizer::new(Arc::clone(tokenizer)),
            stops: StopTexts::new(job.sampling.stop.clone()),
            reason: None,
            finished: None,
            last_token_at: None,
        };
        Self { job, decoder, events, progress, choices: (0..job.sampling.n).map(choice).collect() }
    }

    /// Runs until every choice has ended; no event may take longer than `limit`.
    ///
    /// # Errors
    /// What the decoder answered, or that the caller has gone.
    pub(crate) async fn run(mut self, mut stream: Stream, limit: Duration) -> Result<(), Failure> {
        while !self.all_ended() {
            let event = stream.next(self.decoder, limit).await?;
            self.progress.answered = true;
            match event {
                DecoderEvent::PromptLogprobs(part) => self.events.send(Event::PromptLogprobs(prompt_logprobs(part))).await?,
                DecoderEvent::Token(token) => self.token(token).await?,
                DecoderEvent::Finished(finished) => self.end_of_choice(finished).await?,
            }
        }
        // Cancels what a stop text has cut off.
        drop(stream);
        self.finish().await
    }

    fn all_ended(&self) -> bool {
        self.choices.iter().all(|choice| choice.reason.is_some())
    }

    fn choice(&mut self, index: u32) -> Result<&mut Choice, Failure> {
        self.choices.get_mut(index as usize).ok_or_else(|| {
            tracing::error!(decoder = self.decoder.uri, index, "decoder sent a choice that was not asked for");
            Failure::Final(Status::internal(format!("decoder {} sent a choice that was not asked for", self.decoder.uri)))
        })
    }

    async fn token(&mut self, token: decoder::GeneratedToken) -> Result<(), Failure> {
        let index = token.choice;
        let choice = self.choice(index)?;
        if choice.reason.is_some() {
            // It was under way when a stop text ended the choice.
            return Ok(());
        }
        let piece = choice.stops.push(&choice.detokenizer.push(token.token_id));
        choice.reason = piece.stopped.then_some(pb::FinishReason::Stop);
        let last_token_at = choice.last_token_at.replace(Instant::now());
        self.note_token(&token, last_token_at);
        self.events.send(Event::Delta(delta(piece.text, token, piece.stopped))).await?;
        if piece.stopped && !self.all_ended() {
            self.cancel(index);
        }
        Ok(())
    }

    fn note_token(&mut self, token: &decoder::GeneratedToken, last_token_at: Option<Instant>) {
        let progress = &mut *self.progress;
        progress.completion_tokens += 1;
        progress.first = token.first.unwrap_or(progress.first);
        let now = Instant::now();
        if progress.first_token_at.is_none() {
            progress.first_token_at = Some(now);
            metrics::first_token(self.job.call.elapsed());
        }
        if let Some(last) = last_token_at {
            metrics::next_token(now - last);
        }
    }

    /// Has the decoder stop a choice while others go on; nobody waits for it.
    fn cancel(&self, choice: u32) {
        let mut client = self.decoder.client.clone();
        let call: &Call = &self.job.call;
        let mut request = Request::new(decoder::CancelChoiceRequest { request_id: call.peer_request_id.clone(), choice });
        request.set_timeout(CANCEL_TIMEOUT);
        tokio::spawn(async move {
            let cancelled = tokio::time::timeout(CANCEL_TIMEOUT, client.cancel_choice(request)).await;
            if !matches!(cancelled, Ok(Ok(_))) {
                tracing::debug!("a choice was left to end by itself");
            }
        });
    }

    async fn end_of_choice(&mut self, finished: decoder::Finished) -> Result<(), Failure> {
        let choice = self.choice(finished.choice)?;
        choice.finished = Some(finished);
        if choice.reason.is_some() {
            return Ok(());
        }
        // The last characters may still complete a stop text.
        let piece = choice.stops.push(&choice.detokenizer.finish());
        let text = if piece.stopped { piece.text } else { piece.text + &choice.stops.finish() };
        let reason = match finished.reason() {
            decoder::FinishReason::Length if !piece.stopped => pb::FinishReason::Length,
            _ => pb::FinishReason::Stop,
        };
        choice.reason = Some(reason);
        let delta = pb::Delta { text, choice: finished.choice, finish_reason: reason.into(), ..Default::default() };
        self.events.send(Event::Delta(delta)).await
    }

    async fn finish(&mut self) -> Result<(), Failure> {
        let total_ms = self.job.call.elapsed_ms();
        let timings = pb::Timings { total_ms, ..self.phases() };
        let prompt = &self.job.prompt;
        let (prompt_tokens, image_tokens) = (prompt.token_ids.len() as u32, prompt.image_tokens);
        let Progress { completion_tokens, first: decoder::FirstToken { cached_tokens, .. }, .. } = *self.progress;
        let request_id = &self.job.call.request_id;
        tracing::debug!(request_id, prompt_tokens, image_tokens, completion_tokens, total_ms, "finished");
        let usage = pb::Usage { prompt_tokens, image_tokens, completion_tokens, cached_tokens };
        metrics::finished(&usage, self.job.call.elapsed());
        let finish_reasons = self.choices.iter().map(|choice| choice.reason.unwrap_or_default().into()).collect();
        self.events.send(Event::Finished(pb::Finished { finish_reasons, usage: Some(usage), timings: Some(timings) })).await
    }

    /// Where the time went, as the decoder says. Of a choice that a stop text has cut off it says no end; that is now.
    fn phases(&self) -> pb::Timings {
        let decoder::FirstToken { queue_ms, prefill_ms, .. } = self.progress.first;
        let ends: Option<Vec<f64>> =
            self.choices.iter().map(|choice| choice.finished.map(|f| f.queue_ms + f.prefill_ms + f.decode_ms)).collect();
        let decode_ms = match ends {
            // The other choices wait in the queue while the first computes the prompt.
            Some(ends) => (ends.into_iter().fold(0.0, f64::max) - queue_ms - prefill_ms).max(0.0),
            None => self.progress.first_token_at.map_or(0.0, |at| at.elapsed().as_secs_f64() * 1e3),
        };
        pb::Timings { queue_ms, prefill_ms, decode_ms, ..self.progress.timings }
    }
}

fn delta(text: String, token: decoder::GeneratedToken, stopped: bool) -> pb::Delta {
    let logprobs = token.logprob.map(|logprob| pb::TokenLogprobs { token_id: token.token_id, logprob, top: top(token.top) });
    let finish_reason = if stopped { pb::FinishReason::Stop } else { pb::FinishReason::Unspecified };
    pb::Delta {
        text,
        token_ids: vec![token.token_id],
        logprobs: logprobs.into_iter().collect(),
        choice: token.choice,
        finish_reason: finish_reason.into(),
    }
}

fn prompt_logprobs(part: decoder::PromptLogprobs) -> pb::PromptLogprobs {
    let token = |token: decoder::PromptToken| pb::TokenLogprobs { token_id: token.token_id, logprob: token.logprob, top: top(token.top) };
    pb::PromptLogprobs { start: part.start, tokens: part.tokens.into_iter().map(token).collect() }
}

fn top(top: Vec<decoder::TokenLogprob>) -> Vec<pb::TopLogprob> {
    top.into_iter().map(|top| pb::TopLogprob { token_id: top.token_id, logprob: top.logprob }).collect()
}
