//! Copies between host and card through pinned memory, so that uploads do not wait for the card.

use super::driver::{DevicePtr, Event, PinnedBuffer, Stream, check};
use crate::Result;
use cudarc::driver::result;
use std::sync::Arc;

/// Large enough that the bus is busy, small enough that the first copy starts soon.
const SLOT_BYTES: usize = 8 << 20;
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
    slots: Vec<Slot>,
    current: usize,
    used: usize,
}

impl Staging {
    pub(crate) fn new(stream: &Arc<Stream>) -> Result<Self> {
        let slot = || Ok(Slot { memory: PinnedBuffer::new(stream.device(), SLOT_BYTES)?, copied: Event::new(Arc::clone(stream))? });
        let slots = (0..SLOTS).map(|_| slot()).collect::<Result<_>>()?;
        Ok(Self { stream: Arc::clone(stream), slots, current: 0, used: 0 })
    }

    /// Queues a copy of `bytes` bytes to `dst`. `fill` writes the piece from an offset on; it is called for every piece in
    /// order, and pieces are multiples of 64 bytes but for the last.
    pub(crate) fn upload(&mut self, dst: DevicePtr, bytes: usize, mut fill: impl FnMut(usize, &mut [u8])) -> Result<()> {
        let mut offset = 0;
        while offset < bytes {
            if self.used == SLOT_BYTES {
                self.advance()?;
            }
            let room = SLOT_BYTES - self.used;
            let piece = (bytes - offset).min(room);
            let (start, slot) = (self.used, &mut self.slots[self.current]);
            let memory = &mut slot.memory.bytes_mut()[start..start + piece];
            fill(offset, memory);
            let to = dst + offset as u64;
            // SAFETY: the slot is written again only behind `copied`, and `dst` has room for what its owner asked for.
            check("an upload failed", unsafe { result::memcpy_htod_async(to, memory, self.stream.handle()) })?;
            offset += piece;
            self.used = (self.used + piece).next_multiple_of(64).min(SLOT_BYTES);
        }
        Ok(())
    }

    /// Waits for all work and copies from the card.
    pub(crate) fn download(&mut self, src: DevicePtr, out: &mut [u8]) -> Result<()> {
        // A slot of its own, which nothing is on its way from.
        self.advance()?;
        let slot = &mut self.slots[self.current];
        for (i, out) in out.chunks_mut(SLOT_BYTES).enumerate() {
            let memory = &mut slot.memory.bytes_mut()[..out.len()];
            let from = src + (i * SLOT_BYTES) as u64;
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
