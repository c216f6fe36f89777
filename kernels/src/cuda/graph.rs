//! Sequences of launches, recorded once and replayed as one.

use super::driver::{self, Stream, check};
use crate::{Error, GraphKey, Result};
use cudarc::driver::{result, sys};
use std::{collections::HashMap, mem::ManuallyDrop, sync::Arc};

/// How far a sequence of ops has got.
enum Recording {
    /// It ran, launch by launch: what is loaded or chosen at first use is there now, which a capture would not allow.
    Warm {
        /// It could not be recorded once already.
        failed: bool,
    },
    Ready(Graph),
    /// It could not be recorded twice: it runs launch by launch.
    Refused,
}

/// Most keys that are remembered: the batch sizes of decoding at a few widths of the block tables, in both places of its inputs, or
/// the pictures' sizes that come most often. A graph takes memory on the card.
const MAX_RECORDINGS: usize = 512;

struct Entry {
    recording: Recording,
    last_used: u64,
}

/// What [`Backend::graphed`](crate::Backend::graphed) has seen lately.
pub(crate) struct Graphs {
    stream: Arc<Stream>,
    entries: HashMap<GraphKey, Entry>,
    clock: u64,
}

struct Graph(sys::CUgraphExec);

// SAFETY: a handle that the driver locks itself.
unsafe impl Send for Graph {}

impl Drop for Graph {
    fn drop(&mut self) {
        // SAFETY: instantiated once, destroyed once.
        let _ = unsafe { result::graph::exec_destroy(self.0) };
    }
}

impl Graphs {
    pub(crate) fn new(stream: &Arc<Stream>) -> Self {
        Self { stream: Arc::clone(stream), entries: HashMap::new(), clock: 0 }
    }

    /// Runs `f` at the first sight of `key`, records and launches it at the second, and replays it from the third on. What the
    /// driver does not record is run.
    pub(crate) fn run(&mut self, key: GraphKey, f: &mut dyn FnMut() -> Result<()>) -> Result<()> {
        let recording = match self.entries.get(&key).map(|entry| &entry.recording) {
            None => {
                f()?;
                Some(Recording::Warm { failed: false })
            }
            Some(Recording::Warm { failed }) => match self.record(key, f) {
                Ok(graph) => {
                    self.launch(&graph)?;
                    Some(Recording::Ready(graph))
                }
                Err(Error::Device(error)) => {
                    tracing::warn!(?key, error, "cannot be recorded as a graph; launched one by one");
                    f()?;
                    Some(if *failed { Recording::Refused } else { Recording::Warm { failed: true } })
                }
                Err(error) => return Err(error),
            },
            Some(Recording::Refused) => {
                f()?;
                None
            }
            Some(Recording::Ready(graph)) => {
                self.launch(graph)?;
                None
            }
        };
        self.note(key, recording);
        Ok(())
    }

    /// Remembers that a key was used, and what there is for it now, if that is new. Who was not used for longest is forgotten.
    fn note(&mut self, key: GraphKey, recording: Option<Recording>) {
        self.clock += 1;
        if let Some(entry) = self.entries.get_mut(&key) {
            entry.last_used = self.clock;
            if let Some(recording) = recording {
                entry.recording = recording;
            }
        } else if let Some(recording) = recording {
            if self.entries.len() == MAX_RECORDINGS
                && let Some(oldest) = self.entries.iter().min_by_key(|(_, entry)| entry.last_used).map(|(key, _)| *key)
            {
                self.entries.remove(&oldest);
            }
            self.entries.insert(key, Entry { recording, last_used: self.clock });
        }
    }

    fn launch(&self, graph: &Graph) -> Result<()> {
        self.stream.device().bind()?;
        // SAFETY: the graph is instantiated, and its nodes' memory lives as long as the model whose ops it recorded.
        check("a graph cannot be launched", unsafe { result::graph::launch(graph.0, self.stream.handle()) })
    }

    fn record(&self, key: GraphKey, f: &mut dyn FnMut() -> Result<()>) -> Result<Graph> {
        self.stream.device().bind()?;
        let _alone = driver::without_captures();
        let free_before = self.stream.device().memory()?.0;
        let capture = Capture::begin(&self.stream)?;
        f()?;
        let template = capture.end()?;
        // SAFETY: captured above; the instance does not need the template.
        let instance = unsafe { result::graph::instantiate(template.0, sys::CUgraphInstantiate_flags(0)) };
        let graph = check("a graph cannot be instantiated", instance).map(Graph)?;
        // It takes its memory here and not at the first launch, whose failure would be that of the step.
        // SAFETY: instantiated above; the stream captures no more.
        check("a graph does not fit", unsafe { result::graph::upload(graph.0, self.stream.handle()) })?;
        let kib = free_before.saturating_sub(self.stream.device().memory()?.0) >> 10;
        tracing::debug!(?key, kib, "recorded a graph");
        Ok(graph)
    }
}

/// A stream that records what is queued. Left without [`end`](Self::end), by an error or a panic, it goes back to running it.
struct Capture<'a>(&'a Stream);

impl<'a> Capture<'a> {
    fn begin(stream: &'a Stream) -> Result<Self> {
        // Other threads may allocate meanwhile: another engine loads, or ends.
        let mode = sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL;
        // SAFETY: the stream lives; the capture is ended whatever happens.
        check("a capture cannot begin", unsafe { result::stream::begin_capture(stream.handle(), mode) })?;
        Ok(Self(stream))
    }

    fn end(self) -> Result<Template> {
        ManuallyDrop::new(self).end_once()
    }

    fn end_once(&self) -> Result<Template> {
        // SAFETY: begun in `begin`; called by `end` or by `drop`.
        check("a capture cannot end", unsafe { result::stream::end_capture(self.0.handle()) }).map(Template)
    }
}

impl Drop for Capture<'_> {
    fn drop(&mut self) {
        drop(self.end_once());
    }
}

/// What was captured.
struct Template(sys::CUgraph);

impl Drop for Template {
    fn drop(&mut self) {
        // SAFETY: captured once, destroyed once.
        let _ = unsafe { result::graph::destroy(self.0) };
    }
}
