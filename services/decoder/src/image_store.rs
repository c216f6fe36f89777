//! Image tokens that requests wait for or may use again, and the reservations that pin them.

use crate::metrics::ImageStoreMetrics;
use bytes::Bytes;
use half::{bf16, f16};
use idefics_kernels::DType;
use std::{
    collections::{HashMap, HashSet},
    fmt,
    ops::Range,
    sync::Arc,
    time::Duration,
};
use tokio::time::Instant;

/// Names an image: a hash of its bytes, its options and the model.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct ImageKey(pub [u8; 32]);

impl fmt::Display for ImageKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Debug for ImageKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// The tokens of one image, `[rows, hidden]`, as they came over the wire.
#[derive(Clone)]
pub struct ImageTokens {
    data: Bytes,
    dtype: DType,
    rows: usize,
    hidden: usize,
}

impl fmt::Debug for ImageTokens {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "[{}, {}] {}", self.rows, self.hidden, self.dtype)
    }
}

impl ImageTokens {
    /// Checks a tensor from the wire.
    ///
    /// # Errors
    /// What was expected and what was found: the element type, a length that is not that of the shape, a value that is not
    /// finite.
    pub fn new(data: Bytes, dtype: DType, rows: usize, hidden: usize) -> Result<Self, String> {
        if !matches!(dtype, DType::F32 | DType::F16 | DType::Bf16) {
            return Err(format!("dtype is {dtype}, expected f32, f16 or bf16"));
        }
        let expected = rows.checked_mul(hidden).and_then(|n| n.checked_mul(dtype.size()));
        if expected != Some(data.len()) || data.is_empty() {
            return Err(format!("data has {} bytes, expected those of [{rows}, {hidden}] {dtype}", data.len()));
        }
        let tokens = Self { data, dtype, rows, hidden };
        let bad = tokens.values(0..rows).position(|value| !value.is_finite());
        match bad {
            Some(i) => Err(format!("value {} of row {} is not finite", i % hidden, i / hidden)),
            None => Ok(tokens),
        }
    }

    /// Rows.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Bytes that it takes.
    pub fn bytes(&self) -> usize {
        self.data.len()
    }

    /// The elements of some rows, in order.
    pub fn values(&self, rows: Range<usize>) -> Box<dyn Iterator<Item = f32> + '_> {
        let row = self.hidden * self.dtype.size();
        let bytes = &self.data[rows.start * row..rows.end * row];
        match self.dtype {
            DType::Bf16 => Box::new(bytes.chunks_exact(2).map(|b| bf16::from_le_bytes([b[0], b[1]]).to_f32())),
            DType::F16 => Box::new(bytes.chunks_exact(2).map(|b| f16::from_le_bytes([b[0], b[1]]).to_f32())),
            _ => Box::new(bytes.chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]]))),
        }
    }
}

/// Why a reservation or a tensor is refused.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum StoreError {
    /// As many requests as are allowed are reserved, wait or run.
    #[error("the request takes {wanted} places in the queue, {room} are left; try again later")]
    TooManyRequests {
        /// Sequences of the request.
        wanted: usize,
        /// What is left.
        room: usize,
    },
    /// Nothing can be evicted to make room.
    #[error("image store of {budget_bytes} bytes is full of images that requests wait for; try again later")]
    Full {
        /// The limit.
        budget_bytes: usize,
    },
    /// The tensor is larger than the store.
    #[error("image tokens take {bytes} bytes, the image store has {budget_bytes}; raise decoder.image_store_bytes")]
    TooLarge {
        /// Size of the tensor.
        bytes: usize,
        /// The limit.
        budget_bytes: usize,
    },
    /// Some images are not there.
    #[error("image tokens of {} are not here; encode them again", .0.iter().map(ToString::to_string).collect::<Vec<_>>().join(", "))]
    Missing(Vec<ImageKey>),
}

struct Entry {
    tokens: Arc<ImageTokens>,
    last_used: u64,
}

struct Reservation {
    image_keys: Vec<ImageKey>,
    num_sequences: usize,
    expires_at: Instant,
}

/// An LRU with a byte budget. Images that a reservation names are not evicted while its lease lasts; images that a running
/// request holds live on in that request.
pub struct ImageStore {
    entries: HashMap<ImageKey, Entry>,
    reservations: HashMap<String, Reservation>,
    bytes: usize,
    clock: u64,
    budget_bytes: usize,
    lease: Duration,
    metrics: ImageStoreMetrics,
}

impl ImageStore {
    /// An empty store.
    pub fn new(budget_bytes: usize, lease: Duration) -> Self {
        let metrics = ImageStoreMetrics::new();
        Self { entries: HashMap::new(), reservations: HashMap::new(), bytes: 0, clock: 0, budget_bytes, lease, metrics }
    }

    /// How long a reservation lasts.
    pub fn lease(&self) -> Duration {
        self.lease
    }

    /// Bytes of all images.
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// Reservations whose lease has not ended.
    pub fn num_reservations(&mut self) -> usize {
        self.expire();
        self.reservations.len()
    }

    /// Pins images for a request of `num_sequences` choices; returns those that are not there yet. Naming the same request
    /// again starts over.
    ///
    /// # Errors
    /// [`StoreError::TooManyRequests`] if `room` has no place for so many sequences beside those that are reserved.
    pub fn reserve(
        &mut self,
        request_id: &str,
        image_keys: Vec<ImageKey>,
        num_sequences: usize,
        room: usize,
    ) -> Result<Vec<ImageKey>, StoreError> {
        self.expire();
        self.reservations.remove(request_id);
        self.check_room(request_id, num_sequences, room)?;
        self.clock += 1;
        let mut missing = Vec::new();
        for key in &image_keys {
            match self.entries.get_mut(key) {
                Some(entry) => entry.last_used = self.clock,
                None => missing.push(*key),
            }
        }
        self.metrics.looked_up(image_keys.len() - missing.len(), missing.len());
        self.reservations.insert(request_id.into(), Reservation { image_keys, num_sequences, expires_at: Instant::now() + self.lease });
        self.metrics.set_reservations(self.reservations.len());
        Ok(missing)
    }

    /// Whether a request is reserved for as many sequences.
    pub fn covers(&mut self, request_id: &str, num_sequences: usize) -> bool {
        self.expire();
        self.reservations.get(request_id).is_some_and(|reservation| reservation.num_sequences >= num_sequences)
    }

    /// Whether a request may start: the place that its reservation keeps for it, or one that nobody has.
    ///
    /// # Errors
    /// [`StoreError::TooManyRequests`] if `room` has no place for so many sequences beside those that others have reserved.
    pub fn admit(&mut self, request_id: &str, num_sequences: usize, room: usize) -> Result<(), StoreError> {
        if self.covers(request_id, num_sequences) { Ok(()) } else { self.check_room(request_id, num_sequences, room) }
    }

    fn check_room(&self, request_id: &str, wanted: usize, room: usize) -> Result<(), StoreError> {
        let others = self.reservations.iter().filter(|(id, _)| *id != request_id);
        let room = room.saturating_sub(others.map(|(_, reservation)| reservation.num_sequences).sum());
        if wanted <= room { Ok(()) } else { Err(StoreError::TooManyRequests { wanted, room }) }
    }

    /// Ends a reservation; an unknown one is ignored.
    pub fn release(&mut self, request_id: &str) {
        self.reservations.remove(request_id);
        self.metrics.set_reservations(self.reservations.len());
    }

    /// Stores an image, evicting what was least recently used and is not pinned. The first tensor under a key stays.
    ///
    /// # Errors
    /// [`StoreError::TooLarge`], [`StoreError::Full`].
    pub fn put(&mut self, key: ImageKey, tokens: ImageTokens) -> Result<(), StoreError> {
        self.expire();
        self.clock += 1;
        // Whoever waits for this image is still at work.
        let expires_at = Instant::now() + self.lease;
        self.reservations.values_mut().filter(|r| r.image_keys.contains(&key)).for_each(|r| r.expires_at = expires_at);
        if let Some(entry) = self.entries.get_mut(&key) {
            entry.last_used = self.clock;
            return Ok(());
        }
        let (bytes, budget_bytes) = (tokens.bytes(), self.budget_bytes);
        if bytes > budget_bytes {
            return Err(StoreError::TooLarge { bytes, budget_bytes });
        }
        if self.bytes + bytes > budget_bytes {
            let pinned: HashSet<ImageKey> = self.reservations.values().flat_map(|r| &r.image_keys).copied().collect();
            while self.bytes + bytes > budget_bytes {
                let oldest = self.entries.iter().filter(|(key, _)| !pinned.contains(key)).min_by_key(|(_, entry)| entry.last_used);
                let key = *oldest.ok_or(StoreError::Full { budget_bytes })?.0;
                if let Some(evicted) = self.entries.remove(&key) {
                    self.bytes -= evicted.tokens.bytes();
                    self.metrics.evicted();
                    self.metrics.set_levels(self.bytes, self.entries.len());
                }
            }
        }
        self.bytes += bytes;
        self.entries.insert(key, Entry { tokens: Arc::new(tokens), last_used: self.clock });
        self.metrics.set_levels(self.bytes, self.entries.len());
        Ok(())
    }

    /// Ends the request's reservation, if there is one, and hands out its images.
    ///
    /// # Errors
    /// [`StoreError::Missing`] names every image that is not there; the reservation stays.
    pub fn take(&mut self, request_id: &str, keys: &[ImageKey]) -> Result<HashMap<ImageKey, Arc<ImageTokens>>, StoreError> {
        self.clock += 1;
        let mut missing: Vec<ImageKey> = Vec::new();
        let mut found = HashMap::new();
        for key in keys {
            match self.entries.get_mut(key) {
                Some(entry) => {
                    entry.last_used = self.clock;
                    found.insert(*key, Arc::clone(&entry.tokens));
                }
                None if missing.contains(key) => {}
                None => missing.push(*key),
            }
        }
        if !missing.is_empty() {
            return Err(StoreError::Missing(missing));
        }
        self.reservations.remove(request_id);
        self.metrics.set_reservations(self.reservations.len());
        Ok(found)
    }

    /// Ends the reservations whose lease has ended. Every other call does it too.
    pub fn expire(&mut self) {
        let now = Instant::now();
        self.reservations.retain(|_, reservation| reservation.expires_at > now);
        self.metrics.set_reservations(self.reservations.len());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LEASE: Duration = Duration::from_secs(60);

    fn key(n: u8) -> ImageKey {
        ImageKey([n; 32])
    }

    /// 16 bytes.
    fn tokens(value: f32) -> ImageTokens {
        ImageTokens::new(value.to_le_bytes().repeat(4).into(), DType::F32, 2, 2).unwrap()
    }

    #[test]
    fn tensors_are_checked() {
        let new = |data: Vec<u8>, dtype, rows, hidden| ImageTokens::new(data.into(), dtype, rows, hidden);
        assert!(new(vec![0; 8], DType::U8, 2, 4).unwrap_err().contains("dtype is u8"));
        assert!(new(vec![0; 15], DType::F32, 2, 2).unwrap_err().contains("15 bytes"));
        assert!(new(vec![], DType::F32, 0, 2).is_err());
        assert!(new(vec![0; 8], DType::F32, usize::MAX, 2).is_err());
        let nan = [0f32, 1.0, 2.0, f32::NAN].iter().flat_map(|v| v.to_le_bytes()).collect();
        assert_eq!(new(nan, DType::F32, 2, 2).unwrap_err(), "value 1 of row 1 is not finite");
        let infinite = [bf16::ONE, bf16::INFINITY].iter().flat_map(|v| v.to_le_bytes()).collect();
        assert!(new(infinite, DType::Bf16, 1, 2).is_err());
    }

    #[tokio::test(start_paused = true)]
    async fn least_recently_used_goes_first_and_pinned_stays() {
        let mut store = ImageStore::new(32, LEASE);
        store.put(key(1), tokens(1.0)).unwrap();
        store.put(key(2), tokens(2.0)).unwrap();
        assert_eq!(store.reserve("a", vec![key(1), key(3)], 1, 8).unwrap(), [key(3)]);
        store.put(key(3), tokens(3.0)).unwrap();
        assert_eq!(store.take("other", &[key(2), key(1), key(2)]).unwrap_err(), StoreError::Missing(vec![key(2)]));
        assert_eq!(store.put(key(4), tokens(4.0)).unwrap_err(), StoreError::Full { budget_bytes: 32 });
        let found = store.take("a", &[key(1), key(3)]).unwrap();
        assert_eq!(found[&key(3)].values(0..1).collect::<Vec<_>>(), [3.0, 3.0]);
        store.put(key(4), tokens(4.0)).unwrap();
        assert_eq!(store.bytes(), 32);
    }

    #[tokio::test(start_paused = true)]
    async fn leases_end() {
        let mut store = ImageStore::new(16, LEASE);
        store.put(key(1), tokens(1.0)).unwrap();
        store.reserve("a", vec![key(1)], 2, 3).unwrap();
        assert_eq!(store.reserve("b", vec![], 2, 3).unwrap_err(), StoreError::TooManyRequests { wanted: 2, room: 1 });
        assert!(store.put(key(2), tokens(2.0)).is_err());
        tokio::time::advance(LEASE).await;
        assert_eq!(store.num_reservations(), 0);
        store.put(key(2), tokens(2.0)).unwrap();
        store.reserve("b", vec![], 2, 3).unwrap();
    }

    #[tokio::test(start_paused = true)]
    async fn unreserved_requests_leave_the_places_of_others_alone() {
        let mut store = ImageStore::new(16, LEASE);
        store.reserve("a", vec![], 2, 3).unwrap();
        let full = |wanted, room| Err(StoreError::TooManyRequests { wanted, room });
        assert_eq!((store.admit("b", 1, 3), store.admit("b", 2, 3)), (Ok(()), full(2, 1)));
        // What a reservation was made for is kept, even where others have come in meanwhile; more is not.
        assert_eq!((store.admit("a", 2, 1), store.admit("a", 3, 3), store.admit("a", 3, 2)), (Ok(()), Ok(()), full(3, 2)));
        tokio::time::advance(LEASE).await;
        assert_eq!((store.admit("a", 2, 1), store.admit("b", 3, 3)), (full(2, 1), Ok(())));
    }

    #[test]
    fn first_tensor_under_a_key_stays() {
        let mut store = ImageStore::new(64, LEASE);
        store.put(key(1), tokens(1.0)).unwrap();
        store.put(key(1), tokens(2.0)).unwrap();
        assert_eq!(store.take("a", &[key(1)]).unwrap()[&key(1)].values(0..1).next(), Some(1.0));
    }
}
