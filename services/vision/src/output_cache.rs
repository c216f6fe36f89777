//! Image tokens of earlier calls: a second decoder, or one that has evicted them, costs no pass.

use crate::{engine::Encoded, preprocess::PreprocessOptions};
use idefics_proto::vision::v1::SubImage;
use std::{
    collections::{BTreeMap, HashMap},
    sync::Arc,
    time::Instant,
};

/// What tokens are computed from. The gateway's key alone would do if no caller ever erred; with vision's own hash of the
/// bytes, a wrong key cannot get or leave another picture's tokens.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct PictureId {
    pub(crate) key: [u8; 32],
    pub(crate) image_hash: [u8; 32],
    pub(crate) options: PreprocessOptions,
}

/// A picture's tokens, and when they were made. Cheap to clone.
#[derive(Clone, Debug)]
pub(crate) struct Output {
    pub(crate) encoded: Encoded,
    pub(crate) sub_images: Arc<[SubImage]>,
    pub(crate) queued_at: Instant,
    pub(crate) preprocess_started_at: Instant,
    pub(crate) preprocessed_at: Instant,
}

struct Entry {
    output: Output,
    last_used: u64,
}

/// An LRU with a byte budget.
pub(crate) struct OutputCache {
    entries: HashMap<PictureId, Entry>,
    by_use: BTreeMap<u64, PictureId>, // the first one goes first
    bytes: usize,
    clock: u64,
    budget_bytes: usize,
}

impl OutputCache {
    /// An empty cache; a budget of 0 keeps it so.
    pub(crate) fn new(budget_bytes: usize) -> Self {
        Self { entries: HashMap::new(), by_use: BTreeMap::new(), bytes: 0, clock: 0, budget_bytes }
    }

    /// Bytes of all tokens.
    pub(crate) fn bytes(&self) -> usize {
        self.bytes
    }

    /// The tokens of a picture, if they are there.
    pub(crate) fn get(&mut self, id: &PictureId) -> Option<Output> {
        let entry = self.entries.get_mut(id)?;
        self.by_use.remove(&entry.last_used);
        self.clock += 1;
        entry.last_used = self.clock;
        self.by_use.insert(self.clock, *id);
        Some(entry.output.clone())
    }

    /// Keeps the tokens of a picture and evicts what was least recently used; tokens above the budget are not kept.
    pub(crate) fn put(&mut self, id: PictureId, output: Output) {
        let bytes = output.encoded.data.len();
        if bytes > self.budget_bytes {
            return;
        }
        if let Some(replaced) = self.entries.remove(&id) {
            self.by_use.remove(&replaced.last_used);
            self.bytes -= replaced.output.encoded.data.len();
        }
        while self.bytes + bytes > self.budget_bytes {
            let Some((_, oldest)) = self.by_use.pop_first() else { break };
            if let Some(evicted) = self.entries.remove(&oldest) {
                self.bytes -= evicted.output.encoded.data.len();
            }
        }
        self.clock += 1;
        self.bytes += bytes;
        self.by_use.insert(self.clock, id);
        self.entries.insert(id, Entry { output, last_used: self.clock });
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use idefics_kernels::DType;

    fn id(n: u8) -> PictureId {
        PictureId { key: [n; 32], image_hash: [0; 32], options: PreprocessOptions::default() }
    }

    fn output(bytes: usize) -> Output {
        let now = Instant::now();
        Output {
            encoded: Encoded {
                data: vec![0; bytes].into(),
                dtype: DType::F32,
                tokens: 1,
                hidden: bytes / 4,
                started_at: now,
                ended_at: now,
            },
            sub_images: Arc::default(),
            queued_at: now,
            preprocess_started_at: now,
            preprocessed_at: now,
        }
    }

    fn kept(cache: &mut OutputCache) -> Vec<u8> {
        (0..9).filter(|n| cache.entries.contains_key(&id(*n))).collect()
    }

    #[test]
    fn least_recently_used_goes_first() {
        let mut cache = OutputCache::new(48);
        for n in 1..=3 {
            cache.put(id(n), output(16));
        }
        assert!(cache.get(&id(1)).is_some());
        cache.put(id(4), output(20));
        assert_eq!((kept(&mut cache), cache.bytes()), (vec![1, 4], 36));
        assert!(cache.get(&id(2)).is_none());
        cache.put(id(1), output(24));
        assert_eq!((kept(&mut cache), cache.bytes()), (vec![1, 4], 44));
        cache.put(id(5), output(48));
        assert_eq!((kept(&mut cache), cache.bytes(), cache.by_use.len()), (vec![5], 48, 1));
    }

    #[test]
    fn what_exceeds_the_budget_evicts_nothing() {
        let mut cache = OutputCache::new(32);
        cache.put(id(1), output(16));
        cache.put(id(2), output(36));
        assert_eq!(kept(&mut cache), [1]);
        let mut off = OutputCache::new(0);
        off.put(id(1), output(4));
        assert_eq!((kept(&mut off), off.bytes()), (vec![], 0));
    }

    #[test]
    fn every_part_of_the_identity_counts() {
        let mut cache = OutputCache::new(64);
        cache.put(id(1), output(4));
        assert!(cache.get(&PictureId { image_hash: [1; 32], ..id(1) }).is_none());
        assert!(cache.get(&PictureId { options: PreprocessOptions { split: true, ..id(1).options }, ..id(1) }).is_none());
    }
}
