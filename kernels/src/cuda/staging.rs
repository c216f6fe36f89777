//! Copies between host and card through pinned memory, so that uploads do not wait for the card, and downloads for nothing but what
//! was queued before them.

use super::driver::{DevicePtr, Event, PinnedBuffer, Stream, check};
use crate::Result;
use cudarc::driver::result;
use std::sync::{Arc, Mutex, PoisonError};

/// Of a slot for weights and the like: large enough that the bus is busy, small enough that the first copy starts soon.
pub(crate) const SLOT_BYTES: usize = 8 << 20;
/// One is filled while others are on their way.
const SLOTS: usize = 4;

struct Slot {
    memory: PinnedBuffer,
    /// Behind the last copy out of this slot.
    copied: Event,
}

/// A ring of pinned slots. Small uploads share one; a slot is filled anew only when the card has read it.
pub(crate) struct Staging {
    stream: Arc<Stream>,
    slot_bytes: usize,
    slots: Vec<Slot>,
    current: usize,
    used: usize,
}

impl Staging {
    /// With slots of `slot_bytes`, a multiple of 64.
    pub(crate) fn new(stream: &Arc<Stream>, slot_bytes: usize) -> Result<Self> {
        let slot = || Ok(Slot { memory: PinnedBuffer::new(stream.device(), slot_bytes)?, copied: Event::new(Arc::clone(stream))? });
        let slots = (0..SLOTS).map(|_| slot()).collect::<Result<_>>()?;
        Ok(Self { stream: Arc::clone(stream), slot_bytes, slots, current: 0, used: 0 })
    }

    /// Queues a copy of `bytes` bytes to `dst`. `fill` writes the piece from an offset on; it is called for every piece in
    /// order, and pieces are multiples of 64 bytes but for the last.
    pub(crate) fn upload(&mut self, dst: DevicePtr, bytes: usize, mut fill: impl FnMut(usize, &mut [u8])) -> Result<()> {
        let mut offset = 0;
        while offset < bytes {
            if self.used == self.slot_bytes {
                self.advance()?;
            }
            let room = self.slot_bytes - self.used;
            let piece = (bytes - offset).min(room);
            let (start, slot) = (self.used, &mut self.slots[self.current]);
            let memory = &mut slot.memory.bytes_mut()[start..start + piece];
            fill(offset, memory);
            let to = dst + offset as u64;
            // SAFETY: the slot is written again only behind `copied`, and `dst` has room for what its owner asked for.
            check("an upload failed", unsafe { result::memcpy_htod_async(to, memory, self.stream.handle()) })?;
            offset += piece;
            self.used = (self.used + piece).next_multiple_of(64).min(self.slot_bytes);
        }
        Ok(())
    }

    /// Waits for all work and copies from the card.
    pub(crate) fn download(&mut self, src: DevicePtr, out: &mut [u8]) -> Result<()> {
        // A slot of its own, which nothing is on its way from.
        self.advance()?;
        let (slot, slot_bytes) = (&mut self.slots[self.current], self.slot_bytes);
        for (i, out) in out.chunks_mut(slot_bytes).enumerate() {
            let memory = &mut slot.memory.bytes_mut()[..out.len()];
            let from = src + (i * slot_bytes) as u64;
            // SAFETY: the slot is ours until the synchronisation below, and `src` has as many bytes as its owner says.
            check("a download failed", unsafe { result::memcpy_dtoh_async(memory, from, self.stream.handle()) })?;
            self.stream.synchronize()?;
            out.copy_from_slice(memory);
        }
        self.used = 0;
        Ok(())
    }

    /// Goes to the next slot and waits until the card has read what it held.
    fn advance(&mut self) -> Result<()> {
        self.slots[self.current].copied.record()?;
        self.current = (self.current + 1) % SLOTS;
        self.used = 0;
        self.slots[self.current].copied.wait()
    }
}

/// Pinned memory of one download, and the point in the stream behind its copy.
struct Landing {
    memory: PinnedBuffer,
    copied: Event,
}

/// Landings that no download has. Pinning memory takes as long as many a step, so that it is kept.
#[derive(Clone, Default)]
struct Landings(Arc<Mutex<Vec<Landing>>>);

impl Landings {
    fn take(&self, bytes: usize) -> Option<Landing> {
        let mut free = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let found = free.iter().position(|landing| landing.memory.len() >= bytes)?;
        Some(free.swap_remove(found))
    }

    fn give_back(&self, landing: Landing) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).push(landing);
    }
}

/// Downloads that are begun, and waited for later: each has pinned memory of its own.
pub(crate) struct Downloads {
    stream: Arc<Stream>,
    landings: Landings,
}

/// Fewest bytes of a landing: a page.
const MIN_LANDING_BYTES: usize = 4 << 10;

impl Downloads {
    pub(crate) fn new(stream: &Arc<Stream>) -> Self {
        Self { stream: Arc::clone(stream), landings: Landings::default() }
    }

    /// Queues a copy of `bytes` bytes from `src`.
    pub(crate) fn begin(&self, src: DevicePtr, bytes: usize) -> Result<Arriving> {
        let landing = match self.landings.take(bytes) {
            Some(landing) => landing,
            None => Landing {
                memory: PinnedBuffer::new(self.stream.device(), bytes.next_power_of_two().max(MIN_LANDING_BYTES))?,
                copied: Event::new(Arc::clone(&self.stream))?,
            },
        };
        let mut arriving = Arriving { landing: Some(landing), landings: self.landings.clone() };
        // A tensor of no elements may have no memory that the driver would take the address of.
        if bytes > 0
            && let Some(Landing { memory, copied }) = &mut arriving.landing
        {
            // SAFETY: the memory is read behind `copied` only. It may be on its way for a download that was dropped: then that copy
            // comes first in the stream. `src` has as many bytes as its owner says.
            let queued = unsafe { result::memcpy_dtoh_async(&mut memory.bytes_mut()[..bytes], src, self.stream.handle()) };
            check("a download failed", queued)?;
            copied.record()?;
        }
        Ok(arriving)
    }
}

/// A copy that is on its way to the host. Its memory goes back when it is dropped, waited for or not.
pub(crate) struct Arriving {
    landing: Option<Landing>,
    landings: Landings,
}

impl Arriving {
    /// Waits for the copy and hands its bytes out.
    pub(crate) fn wait(mut self, out: &mut [u8]) -> Result<()> {
        if let Some(Landing { memory, copied }) = &mut self.landing {
            copied.wait()?;
            out.copy_from_slice(&memory.bytes_mut()[..out.len()]);
        }
        Ok(())
    }
}

impl Drop for Arriving {
    fn drop(&mut self) {
        if let Some(landing) = self.landing.take() {
            self.landings.give_back(landing);
        }
    }
}
