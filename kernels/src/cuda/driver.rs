//! The driver API with owned handles: context, stream, events, memory. The only place that names `cudarc::driver`.

use crate::{Error, Result};
use cudarc::driver::{result, sys};
use std::{
    collections::BTreeSet,
    fmt,
    sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, atomic::AtomicUsize},
};

/// Address on the device.
pub(crate) type DevicePtr = sys::CUdeviceptr;

/// Turns a driver's answer into this crate's error. `what` is what was tried.
pub(crate) fn check<T>(what: impl fmt::Display, answer: std::result::Result<T, result::DriverError>) -> Result<T> {
    answer.map_err(|error| {
        let text =
            |s: std::result::Result<&std::ffi::CStr, _>| s.map_or_else(|_| format!("{:?}", error.0), |s| s.to_string_lossy().into_owned());
        Error::Device(format!("{what}: {} ({})", text(error.error_string()), text(error.error_name())))
    })
}

/// Whether the driver's library can be loaded.
pub(crate) fn is_present() -> bool {
    static PRESENT: OnceLock<bool> = OnceLock::new();
    // SAFETY: looking for a library runs its initialisers only.
    *PRESENT.get_or_init(|| unsafe { sys::is_culib_present() })
}

/// The CUDA that the driver is for: major and minor number.
pub(crate) fn version() -> Result<(i32, i32)> {
    let mut version = 0;
    // SAFETY: it is written.
    check("the driver's version", unsafe { sys::cuDriverGetVersion(&mut version) }.result())?;
    Ok((version / 1000, version % 1000 / 10))
}

/// Held while a stream is captured, and by what a capture by another engine of the process may not survive, or may make fail: a library
/// that starts, ends, plans, or loads its code (ggml-org/llama.cpp#13990).
pub(crate) fn without_captures() -> MutexGuard<'static, ()> {
    static LOCK: Mutex<()> = Mutex::new(());
    LOCK.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A card and its primary context.
pub(crate) struct Device {
    handle: sys::CUdevice,
    context: sys::CUcontext,
    /// As the driver calls it.
    pub(crate) name: String,
    /// Major and minor number.
    pub(crate) compute_capability: (i32, i32),
    /// Streaming multiprocessors.
    pub(crate) multiprocessors: usize,
    /// Most dynamic shared memory of a block, in bytes.
    pub(crate) max_shared_bytes: usize,
}

// SAFETY: both handles may be used from every thread; the driver locks them itself.
unsafe impl Send for Device {}
// SAFETY: see above.
unsafe impl Sync for Device {}

impl Device {
    /// Opens card `ordinal`.
    pub(crate) fn open(ordinal: usize) -> Result<Arc<Self>> {
        if !is_present() {
            return Err(Error::Device(
                "libcuda.so.1 is not there: no NVIDIA driver is installed, or the container was not given one".into(),
            ));
        }
        check("the NVIDIA driver cannot be initialised", result::init())?;
        let count = check("cards cannot be counted", result::device::get_count())? as usize;
        if ordinal >= count {
            return Err(Error::Device(format!("cuda:{ordinal} does not exist: the driver shows {count} cards")));
        }
        let handle = check(format_args!("cuda:{ordinal} cannot be opened"), result::device::get(ordinal as i32))?;
        let name = check("the card's name", result::device::get_name(handle))?;
        // SAFETY: the handle came from the driver.
        let attribute = |attribute| check("the card's properties", unsafe { result::device::get_attribute(handle, attribute) });
        use sys::CUdevice_attribute as A;
        let compute_capability =
            (attribute(A::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?, attribute(A::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?);
        if compute_capability.0 < 8 {
            let (major, minor) = compute_capability;
            return Err(Error::Device(format!("{name} has compute capability {major}.{minor}, expected 8.0 (A100) or above")));
        }
        let multiprocessors = attribute(A::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)? as usize;
        let max_shared_bytes = attribute(A::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN)? as usize;
        // SAFETY: the handle came from the driver; released in `drop`.
        let retain = || check("no context", unsafe { result::primary_ctx::retain(handle) });
        let context = retain()?;
        // Once more for the life of the process: cuBLASLt keeps state of the context, which must not go and come again beneath it.
        static KEPT: Mutex<BTreeSet<usize>> = Mutex::new(BTreeSet::new());
        let mut kept = KEPT.lock().unwrap_or_else(PoisonError::into_inner);
        if !kept.contains(&ordinal) && retain().is_ok() {
            kept.insert(ordinal);
        }
        Ok(Arc::new(Self { handle, context, name, compute_capability, multiprocessors, max_shared_bytes }))
    }

    /// Makes the context that of the calling thread, as every other call wants it.
    pub(crate) fn bind(&self) -> Result<()> {
        // SAFETY: the context lives as long as `self`.
        check("the context cannot be made current", unsafe { result::ctx::set_current(self.context) })
    }

    /// Free and total memory, in bytes.
    pub(crate) fn memory(&self) -> Result<(usize, usize)> {
        self.bind()?;
        check("the card's memory", result::mem_get_info())
    }
}

impl Drop for Device {
    fn drop(&mut self) {
        // SAFETY: retained once in `open`; everything made in it holds an `Arc` of this.
        let _ = unsafe { result::primary_ctx::release(self.handle) };
    }
}

/// A queue of work on a card, in order.
pub(crate) struct Stream {
    device: Arc<Device>,
    handle: sys::CUstream,
}

// SAFETY: the driver locks streams itself.
unsafe impl Send for Stream {}
// SAFETY: see above.
unsafe impl Sync for Stream {}

impl Stream {
    /// A stream that does not wait for the null stream.
    pub(crate) fn new(device: Arc<Device>) -> Result<Arc<Self>> {
        device.bind()?;
        let handle = check("no stream", result::stream::create(result::stream::StreamKind::NonBlocking))?;
        Ok(Arc::new(Self { device, handle }))
    }

    pub(crate) fn device(&self) -> &Arc<Device> {
        &self.device
    }

    pub(crate) fn handle(&self) -> sys::CUstream {
        self.handle
    }

    /// Whether what is queued is recorded instead of done.
    pub(crate) fn is_capturing(&self) -> Result<bool> {
        // SAFETY: the stream lives as long as `self`.
        let status = check("the state of a stream", unsafe { result::stream::is_capturing(self.handle) })?;
        Ok(status != sys::CUstreamCaptureStatus::CU_STREAM_CAPTURE_STATUS_NONE)
    }

    /// Lets what is queued from now on wait for where `event` stands now; for nothing if it was never recorded.
    pub(crate) fn wait(&self, event: &Event) -> Result<()> {
        let flags = sys::CUevent_wait_flags::CU_EVENT_WAIT_DEFAULT;
        // SAFETY: both handles live as long as their owners; the driver keeps what it needs of the event.
        check("a stream cannot wait for an event", unsafe { result::stream::wait_event(self.handle, event.handle, flags) })
    }

    /// Waits until everything queued is done. Faults of earlier work show here.
    pub(crate) fn synchronize(&self) -> Result<()> {
        // SAFETY: the stream lives as long as `self`.
        check("the card failed", unsafe { result::stream::synchronize(self.handle) })
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        if self.device.bind().is_ok() {
            // SAFETY: made in `new`, destroyed once; the driver finishes what is queued first.
            let _ = unsafe { result::stream::destroy(self.handle) };
        }
    }
}

/// A point in a stream.
pub(crate) struct Event {
    stream: Arc<Stream>,
    handle: sys::CUevent,
}

// SAFETY: the driver locks events itself.
unsafe impl Send for Event {}

impl Event {
    pub(crate) fn new(stream: Arc<Stream>) -> Result<Self> {
        stream.device.bind()?;
        let handle = check("no event", result::event::create(sys::CUevent_flags::CU_EVENT_DISABLE_TIMING))?;
        Ok(Self { stream, handle })
    }

    /// Stands behind what is queued now.
    pub(crate) fn record(&self) -> Result<()> {
        // SAFETY: both handles live as long as `self`.
        check("an event cannot be recorded", unsafe { result::event::record(self.handle, self.stream.handle) })
    }

    /// Waits until the stream has passed it; at once if it was never recorded. From any thread.
    pub(crate) fn wait(&self) -> Result<()> {
        self.stream.device.bind()?;
        // SAFETY: the event lives as long as `self`.
        check("the card failed", unsafe { result::event::synchronize(self.handle) })
    }
}

impl Drop for Event {
    fn drop(&mut self) {
        if self.stream.device.bind().is_ok() {
            // SAFETY: made in `new`, destroyed once.
            let _ = unsafe { result::event::destroy(self.handle) };
        }
    }
}

/// Memory on a card, or a part of it.
pub struct DeviceBuffer {
    allocation: Arc<Allocation>,
    pointer: DevicePtr,
}

/// What the driver gave.
struct Allocation {
    stream: Arc<Stream>,
    pointer: DevicePtr,
    bytes: usize,
    /// See [`DeviceBuffer::half`].
    half: AtomicUsize,
}

// SAFETY: an address; access is by work of streams alone.
unsafe impl Send for Allocation {}
// SAFETY: see above.
unsafe impl Sync for Allocation {}

impl DeviceBuffer {
    /// Zeros.
    pub(crate) fn zeroed(stream: &Arc<Stream>, bytes: usize) -> Result<Self> {
        let buffer = Self::uninit(stream, bytes)?;
        if bytes > 0 {
            // SAFETY: the memory is ours, and the work is ordered before all else that `stream` will do with it.
            check("memory cannot be cleared", unsafe { result::memset_d8_async(buffer.pointer, 0, bytes, stream.handle) })?;
        }
        Ok(buffer)
    }

    /// Whatever was there before; written before it is read by whoever asks for it.
    pub(crate) fn uninit(stream: &Arc<Stream>, bytes: usize) -> Result<Self> {
        stream.device.bind()?;
        let pointer = if bytes == 0 {
            0
        } else {
            // SAFETY: the memory is written before it is read.
            unsafe { result::malloc_sync(bytes) }.map_err(|error| {
                let free = result::mem_get_info().map_or(0, |(free, _)| free);
                let (needed, free) = (bytes >> 20, free >> 20);
                Error::Device(format!("{needed} MiB cannot be allocated on {}, {free} MiB are free: {error:?}", stream.device.name))
            })?
        };
        Ok(Self { allocation: Arc::new(Allocation { stream: Arc::clone(stream), pointer, bytes, half: AtomicUsize::new(0) }), pointer })
    }

    pub(crate) fn pointer(&self) -> DevicePtr {
        self.pointer
    }

    /// What lies from byte `start` of the whole allocation on, and lives as long as any part of it; `None` if fewer than `bytes`
    /// bytes do.
    pub(crate) fn part(&self, start: usize, bytes: usize) -> Option<Self> {
        let allocation = Arc::clone(&self.allocation);
        let pointer = allocation.pointer + start as u64;
        (start.checked_add(bytes)? <= allocation.bytes).then_some(Self { allocation, pointer })
    }

    /// Bytes of the whole allocation.
    pub(crate) fn len(&self) -> usize {
        self.allocation.bytes
    }

    /// All of the allocation that it is a part of.
    pub(crate) fn whole(&self) -> Self {
        Self { allocation: Arc::clone(&self.allocation), pointer: self.allocation.pointer }
    }

    /// Which half of the allocation has tensors that were uploaded together: 0 or 1.
    pub(super) fn half(&self) -> &AtomicUsize {
        &self.allocation.half
    }

    /// Whether both are parts of one allocation.
    pub(crate) fn is_beside(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.allocation, &other.allocation)
    }
}

impl Drop for Allocation {
    fn drop(&mut self) {
        if self.pointer != 0 && self.stream.device.bind().is_ok() {
            // SAFETY: allocated once, freed once; the driver waits for work that uses it.
            let _ = unsafe { result::free_sync(self.pointer) };
        }
    }
}

/// Host memory that the card reads and writes without a copy in between.
pub(crate) struct PinnedBuffer {
    device: Arc<Device>,
    pointer: *mut u8,
    bytes: usize,
}

// SAFETY: memory of this process, owned.
unsafe impl Send for PinnedBuffer {}

impl PinnedBuffer {
    pub(crate) fn new(device: &Arc<Device>, bytes: usize) -> Result<Self> {
        device.bind()?;
        // SAFETY: cleared below, before anyone reads it. Not write-combined: downloads are read from it.
        let pointer = check("no pinned host memory", unsafe { result::malloc_host(bytes, 0) })?.cast::<u8>();
        // SAFETY: as long as was asked for.
        unsafe { pointer.write_bytes(0, bytes) };
        Ok(Self { device: Arc::clone(device), pointer, bytes })
    }

    pub(crate) fn len(&self) -> usize {
        self.bytes
    }

    pub(crate) fn bytes_mut(&mut self) -> &mut [u8] {
        // SAFETY: allocated and initialised in `new`, borrowed mutably.
        unsafe { std::slice::from_raw_parts_mut(self.pointer, self.bytes) }
    }
}

impl Drop for PinnedBuffer {
    fn drop(&mut self) {
        if self.device.bind().is_ok() {
            // SAFETY: allocated in `new`, freed once.
            let _ = unsafe { result::free_host(self.pointer.cast()) };
        }
    }
}
