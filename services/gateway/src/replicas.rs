//! The peers: who they are, whether they are ready, and which one a request goes to.
//!
//! A task per peer asks it who it is, again and again. A peer is ready if it answers and serves our checkpoint: its shapes and
//! files are ours, and so is its fingerprint. A gateway without weights has no fingerprint of its own; then it is that of most
//! of the decoders that are like us in all else. The gateway is ready with one ready peer of each role.

use crate::{GatewayConfig, media::ImageKey};
use idefics_common::{
    channel::{GrpcChannel, MAX_MESSAGE_BYTES, remote},
    checkpoint::{Checkpoint, CheckpointError},
};
use idefics_proto::{
    decoder::v1::{self as decoder, decoder_service_client::DecoderServiceClient},
    vision::v1::{self as vision, vision_service_client::VisionServiceClient},
};
use std::{
    collections::{BTreeMap, HashMap},
    fmt,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};
use tokio::sync::{Notify, watch};
use tokio_util::sync::{CancellationToken, DropGuard};
use tonic::Status;

/// A service that the gateway uses.
#[derive(Clone)]
pub struct Peer {
    /// Its address; vision is told to ship image tokens to a decoder's.
    pub uri: String,
    /// How it is reached.
    pub channel: GrpcChannel,
}

/// The services that the gateway uses.
#[derive(Clone, Default)]
pub struct Peers {
    /// Decoder replicas.
    pub decoders: Vec<Peer>,
    /// Vision replicas.
    pub visions: Vec<Peer>,
}

impl Peers {
    /// The peers that the configuration names, connected to at their first call. Call it within a tokio runtime.
    ///
    /// # Errors
    /// If a role has none, or a URI is not one.
    pub fn from_config(config: &GatewayConfig) -> Result<Self, String> {
        let peers = |key: &str, uris: &[String]| {
            if uris.is_empty() {
                return Err(format!("gateway.{key} is empty, expected one URI or more such as http://127.0.0.1:50052"));
            }
            let peer = |uri: &String| {
                Ok(Peer { uri: uri.clone(), channel: remote(uri, &config.channel).map_err(|e| format!("gateway.{key}: {e}"))? })
            };
            uris.iter().map(peer).collect::<Result<Vec<_>, String>>()
        };
        Ok(Self { decoders: peers("decoders", &config.decoders)?, visions: peers("visions", &config.visions)? })
    }
}

/// What a peer is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Role {
    Decoder,
    Vision,
}

impl fmt::Display for Role {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Decoder => "decoder",
            Self::Vision => "vision",
        })
    }
}

/// A peer and its client.
pub(crate) struct Replica<C> {
    pub(crate) role: Role,
    pub(crate) uri: String,
    pub(crate) client: C,
    /// Answers and pictures of this gateway that it works on; other gateways' are not known.
    running: AtomicUsize,
    state: Mutex<State>,
    /// Wakes its task before the interval is over.
    probe_now: Notify,
}

pub(crate) type Decoder = Replica<DecoderServiceClient<GrpcChannel>>;
pub(crate) type Vision = Replica<VisionServiceClient<GrpcChannel>>;

struct State {
    /// What it said last.
    info: Option<PeerInfo>,
    /// Why it cannot be asked.
    silent: Option<String>,
    /// Whether its first answer, or its absence, has been noted.
    known: bool,
    /// Why it is not used although it answers.
    refused: Option<String>,
}

/// What a peer says about itself.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct PeerInfo {
    pub(crate) model_fingerprint: String,
    pub(crate) tokens_per_image: u32,
    pub(crate) hidden_size: u32,
    /// 0 for vision.
    pub(crate) max_model_tokens: u32,
    /// By name; empty for a peer of a version that does not tell.
    pub(crate) file_hashes: HashMap<String, String>,
}

impl<C> Replica<C> {
    fn new(role: Role, uri: String, client: C) -> Arc<Self> {
        let state = Mutex::new(State { info: None, silent: Some("has not answered yet".into()), known: false, refused: None });
        Arc::new(Self { role, uri, client, running: AtomicUsize::new(0), state, probe_now: Notify::new() })
    }

    /// Counts a request for `count` answers or pictures as running here until what is returned is dropped.
    pub(crate) fn start(self: &Arc<Self>, count: usize) -> Running<C> {
        self.running.fetch_add(count, Ordering::Relaxed);
        Running { replica: Arc::clone(self), count }
    }

    /// Takes the replica out until it answers again.
    pub(crate) fn mark_down(&self) {
        self.hear(Err("is not reachable".into()));
        self.probe_soon();
    }

    /// Has it asked who it is at once, whenever the next probe would be.
    pub(crate) fn probe_soon(&self) {
        self.probe_now.notify_one();
    }

    /// What it said last.
    pub(crate) fn info(&self) -> Option<PeerInfo> {
        self.state().info.clone()
    }

    fn is_ready(&self) -> bool {
        let state = self.state();
        state.silent.is_none() && state.refused.is_none()
    }

    fn why_unready(&self) -> String {
        let state = self.state();
        state.silent.clone().or_else(|| state.refused.clone()).unwrap_or_else(|| "is ready".into())
    }

    /// The checkpoint that it serves, if it answers and is `fit`.
    fn fingerprint(&self, fit: impl Fn(&PeerInfo) -> bool) -> Option<String> {
        let state = self.state();
        state.info.as_ref().filter(|info| state.silent.is_none() && fit(info)).map(|info| info.model_fingerprint.clone())
    }

    fn hear(&self, answer: Result<PeerInfo, String>) {
        let mut state = self.state();
        let (role, uri, was_silent) = (self.role, &self.uri, state.silent.is_some());
        let was_known = std::mem::replace(&mut state.known, true);
        match answer {
            Ok(info) => {
                if was_silent {
                    tracing::info!(%role, uri, "peer answers");
                }
                state.silent = None;
                state.info = Some(info);
            }
            Err(why) => {
                if !was_silent || !was_known {
                    tracing::warn!(%role, uri, why, "peer is down");
                }
                state.silent = Some(why);
            }
        }
    }

    /// Whether it is ready, given what speaks against its last answer.
    fn judge(&self, refusal: impl Fn(&PeerInfo) -> Option<String>) -> bool {
        let mut state = self.state();
        let refused = state.info.as_ref().and_then(refusal);
        if refused != state.refused {
            if let Some(why) = &refused {
                tracing::warn!(role = %self.role, uri = self.uri, why, "peer is not used");
            }
            state.refused = refused;
        }
        state.silent.is_none() && state.refused.is_none()
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A request that a replica works on.
pub(crate) struct Running<C> {
    replica: Arc<Replica<C>>,
    count: usize,
}

impl<C> Drop for Running<C> {
    fn drop(&mut self) {
        self.replica.running.fetch_sub(self.count, Ordering::Relaxed);
    }
}

/// What requests have in common that should meet the same caches: a picture, or the start of a text.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Affinity([u8; 32]);

impl Affinity {
    /// Ids at the start of a prompt that are taken for a conversation's prefix.
    const PREFIX_TOKENS: usize = 64;

    pub(crate) fn of_image(key: ImageKey) -> Self {
        Self(*key.as_bytes())
    }

    pub(crate) fn of_prompt(token_ids: &[u32]) -> Self {
        let mut hasher = blake3::Hasher::new();
        for id in token_ids.iter().take(Self::PREFIX_TOKENS) {
            hasher.update(&id.to_le_bytes());
        }
        Self(hasher.finalize().into())
    }

    /// Rendezvous hashing: each replica has its own weight for each affinity, and the heaviest wins. Adding or removing a
    /// replica moves only what was its own.
    fn weight(self, uri: &str) -> u64 {
        let hash = blake3::keyed_hash(&self.0, uri.as_bytes());
        u64::from_le_bytes(std::array::from_fn(|i| hash.as_bytes()[i]))
    }
}

/// All peers.
pub(crate) struct Replicas {
    decoders: Vec<Arc<Decoder>>,
    visions: Vec<Arc<Vision>>,
    /// What our configuration says that image tokens look like.
    tokens_per_image: u32,
    hidden_size: u32,
    file_hashes: BTreeMap<&'static str, String>,
    /// Our checkpoint's, where we have its weights.
    own_fingerprint: Option<String>,
    /// The checkpoint that is served.
    fingerprint: Mutex<Option<String>>,
    ready: watch::Sender<bool>,
}

/// Answers or pictures that a replica may have to work on beyond the least loaded one, and still be preferred for what it has cached.
const SLACK: usize = 4;
/// Half the first pause after a peer did not answer.
const FIRST_PAUSE: Duration = Duration::from_millis(50);

impl Replicas {
    /// Reads samples of the checkpoint's weights where they are there.
    ///
    /// # Errors
    /// If they are there but cannot be read.
    pub(crate) fn new(peers: Peers, checkpoint: &Checkpoint) -> Result<Self, CheckpointError> {
        let decoder = |peer: Peer| {
            let client = DecoderServiceClient::new(peer.channel);
            let client = client.max_decoding_message_size(MAX_MESSAGE_BYTES).max_encoding_message_size(MAX_MESSAGE_BYTES);
            Replica::new(Role::Decoder, peer.uri, client)
        };
        let vision = |peer: Peer| {
            let client = VisionServiceClient::new(peer.channel);
            let client = client.max_decoding_message_size(MAX_MESSAGE_BYTES).max_encoding_message_size(MAX_MESSAGE_BYTES);
            Replica::new(Role::Vision, peer.uri, client)
        };
        let own_fingerprint = if checkpoint.has_weights() { Some(checkpoint.fingerprint()?) } else { None };
        Ok(Self {
            decoders: peers.decoders.into_iter().map(decoder).collect(),
            visions: peers.visions.into_iter().map(vision).collect(),
            tokens_per_image: checkpoint.tokens_per_image() as u32,
            hidden_size: checkpoint.config.text_config.hidden_size as u32,
            file_hashes: checkpoint.file_hashes.clone(),
            own_fingerprint,
            fingerprint: Mutex::new(None),
            ready: watch::Sender::new(false),
        })
    }

    /// Starts to ask the peers who they are; ends when the guard is dropped.
    pub(crate) fn probe(self: &Arc<Self>, config: &GatewayConfig) -> DropGuard {
        let stop = CancellationToken::new();
        let (interval, timeout) = (Duration::from_millis(config.probe_interval_ms), Duration::from_millis(config.probe_timeout_ms));
        for decoder in &self.decoders {
            let client = decoder.client.clone();
            let ask = move || {
                let mut client = client.clone();
                async move { client.get_info(decoder::GetInfoRequest {}).await.map(|answer| answer.into_inner().into()) }
            };
            tokio::spawn(stop.clone().run_until_cancelled_owned(watch_peer(Arc::clone(self), Arc::clone(decoder), ask, interval, timeout)));
        }
        for vision in &self.visions {
            let client = vision.client.clone();
            let ask = move || {
                let mut client = client.clone();
                async move { client.get_info(vision::GetInfoRequest {}).await.map(|answer| answer.into_inner().into()) }
            };
            tokio::spawn(stop.clone().run_until_cancelled_owned(watch_peer(Arc::clone(self), Arc::clone(vision), ask, interval, timeout)));
        }
        stop.drop_guard()
    }

    /// Whether there is a ready peer of each role.
    pub(crate) fn watch_ready(&self) -> watch::Receiver<bool> {
        self.ready.subscribe()
    }

    /// The checkpoint being served.
    ///
    /// # Errors
    /// Why no decoder is ready, if none ever was.
    pub(crate) fn fingerprint(&self) -> Result<String, String> {
        let served = self.fingerprint.lock().unwrap_or_else(PoisonError::into_inner).clone();
        served.ok_or_else(|| none_ready(Role::Decoder, &self.decoders))
    }

    /// Longest context that every ready decoder takes, in tokens.
    ///
    /// # Errors
    /// Why no decoder is ready.
    pub(crate) fn max_model_tokens(&self) -> Result<u32, String> {
        let limits = self.decoders.iter().filter(|d| d.is_ready()).filter_map(|d| d.info()).map(|info| info.max_model_tokens);
        limits.min().ok_or_else(|| none_ready(Role::Decoder, &self.decoders))
    }

    /// Ready decoders, the preferred one first.
    ///
    /// # Errors
    /// Why each is not ready, if none is.
    pub(crate) fn decoders_for(&self, affinity: Affinity) -> Result<Vec<Arc<Decoder>>, String> {
        ranked(Role::Decoder, &self.decoders, affinity)
    }

    /// Ready vision replicas, the preferred one first: the one that may have the picture's tokens.
    ///
    /// # Errors
    /// Why each is not ready, if none is.
    pub(crate) fn visions_for(&self, affinity: Affinity) -> Result<Vec<Arc<Vision>>, String> {
        ranked(Role::Vision, &self.visions, affinity)
    }

    fn record<C>(&self, replica: &Replica<C>, answer: Result<PeerInfo, String>) {
        replica.hear(answer);
        self.judge();
    }

    /// Decides anew who is ready. Peers of another fingerprint count too: after the next answer they may be the majority.
    fn judge(&self) {
        let mut served = self.fingerprint.lock().unwrap_or_else(PoisonError::into_inner);
        let fit = |info: &PeerInfo| self.difference(info).is_none();
        let fingerprints: Vec<String> = self.decoders.iter().filter_map(|d| d.fingerprint(fit)).collect();
        let votes = |candidate: &str| fingerprints.iter().filter(|f| *f == candidate).count();
        // Of equally many the one that is served stays, otherwise the first configured decoder's counts.
        let mut winner = served.clone().filter(|f| votes(f) > 0);
        for candidate in &fingerprints {
            if winner.as_ref().is_none_or(|w| votes(candidate) > votes(w)) {
                winner = Some(candidate.clone());
            }
        }
        if winner.is_some() && *served != winner {
            tracing::info!(fingerprint = winner, "serving a checkpoint");
            served.clone_from(&winner);
        }
        let refusal = |info: &PeerInfo| self.refusal(info, served.as_deref());
        // Every peer is judged, not only the first that is ready.
        let decoders = self.decoders.iter().filter(|d| d.judge(refusal)).count();
        let visions = self.visions.iter().filter(|v| v.judge(refusal)).count();
        let ready = decoders > 0 && visions > 0;
        self.ready.send_if_modified(|known| std::mem::replace(known, ready) != ready);
    }

    fn refusal(&self, info: &PeerInfo, served: Option<&str>) -> Option<String> {
        self.difference(info).or_else(|| {
            let served = served.filter(|served| served != &info.model_fingerprint)?;
            let found = &info.model_fingerprint;
            Some(format!("serves the checkpoint {found}, expected {served} of most decoders; start all roles with the same --model"))
        })
    }

    /// How a peer's checkpoint differs from ours.
    fn difference(&self, info: &PeerInfo) -> Option<String> {
        let PeerInfo { model_fingerprint, tokens_per_image, hidden_size, file_hashes, .. } = info;
        if (*tokens_per_image, *hidden_size) != (self.tokens_per_image, self.hidden_size) {
            let (rows, columns) = (self.tokens_per_image, self.hidden_size);
            return Some(format!(
                "has image tokens of [{tokens_per_image}, {hidden_size}], expected [{rows}, {columns}] of the gateway's checkpoint"
            ));
        }
        for (file, ours) in &self.file_hashes {
            if let Some(theirs) = file_hashes.get(*file).filter(|theirs| *theirs != ours) {
                return Some(format!(
                    "has another {file} (hash {}) than the gateway (hash {}); start all roles with the same --model",
                    abbreviated(theirs),
                    abbreviated(ours)
                ));
            }
        }
        let ours = self.own_fingerprint.as_ref().filter(|ours| *ours != model_fingerprint)?;
        Some(format!(
            "serves the checkpoint {model_fingerprint}, expected {ours}, the gateway's own; start all roles with the same --model"
        ))
    }
}

/// Enough of a hash to tell files apart.
fn abbreviated(hash: &str) -> &str {
    hash.get(..12).unwrap_or(hash)
}

/// Asks one peer who it is, for ever: every `interval` while it answers, at once when a call found it down, and with growing
/// pauses up to `interval` while it does not.
async fn watch_peer<C, Ask, Answer>(replicas: Arc<Replicas>, replica: Arc<Replica<C>>, ask: Ask, interval: Duration, timeout: Duration)
where
    Ask: Fn() -> Answer,
    Answer: Future<Output = Result<PeerInfo, Status>>,
{
    let mut pause = FIRST_PAUSE;
    loop {
        let answer = match tokio::time::timeout(timeout, ask()).await {
            Ok(Ok(info)) => Ok(info),
            Ok(Err(status)) => Err(format!("does not answer: {}", status.message())),
            Err(_) => Err(format!("does not answer within {} ms", timeout.as_millis())),
        };
        pause = if answer.is_ok() { FIRST_PAUSE } else { (pause * 2).min(interval) };
        let wait = if answer.is_ok() { interval } else { pause };
        replicas.record(&replica, answer);
        tokio::select! {
            () = tokio::time::sleep(wait) => {}
            () = replica.probe_now.notified() => {}
        }
    }
}

/// Each replica and why it is not ready.
fn none_ready<C>(role: Role, replicas: &[Arc<Replica<C>>]) -> String {
    let reasons: Vec<String> = replicas.iter().map(|r| format!("{} {}", r.uri, r.why_unready())).collect();
    format!("no {role} is ready: {}", if reasons.is_empty() { "none is configured".into() } else { reasons.join("; ") })
}

fn ranked<C>(role: Role, replicas: &[Arc<Replica<C>>], affinity: Affinity) -> Result<Vec<Arc<Replica<C>>>, String> {
    let mut ready: Vec<_> = replicas.iter().filter(|r| r.is_ready()).cloned().collect();
    let load = |r: &Arc<Replica<C>>| r.running.load(Ordering::Relaxed);
    let Some(least) = ready.iter().map(load).min() else {
        return Err(none_ready(role, replicas));
    };
    ready.sort_by_key(|r| (load(r) > least + SLACK.max(least / 2), std::cmp::Reverse(affinity.weight(&r.uri))));
    Ok(ready)
}

impl From<decoder::GetInfoResponse> for PeerInfo {
    fn from(info: decoder::GetInfoResponse) -> Self {
        let decoder::GetInfoResponse { model_fingerprint, tokens_per_image, hidden_size, max_model_tokens, file_hashes, .. } = info;
        Self { model_fingerprint, tokens_per_image, hidden_size, max_model_tokens, file_hashes }
    }
}

impl From<vision::GetInfoResponse> for PeerInfo {
    fn from(info: vision::GetInfoResponse) -> Self {
        let vision::GetInfoResponse { model_fingerprint, tokens_per_image, hidden_size, file_hashes, .. } = info;
        Self { model_fingerprint, tokens_per_image, hidden_size, max_model_tokens: 0, file_hashes }
    }
}
