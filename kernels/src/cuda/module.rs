//! Machine code on the card, and launches of its kernels.

use super::{
    driver::{DevicePtr, Stream, check},
    nvrtc::CubinCache,
    source::SOURCES,
};
use crate::{Error, Result};
use cudarc::driver::{result, sys};
use std::{
    collections::HashMap,
    ffi::{CString, c_void},
    ptr,
    sync::{Arc, Mutex, PoisonError},
    thread,
};

/// From this compute capability on a kernel can start while those ahead of it run: `griddepcontrol` of `cu/common.cuh`.
const EARLY_LAUNCH: (i32, i32) = (9, 0);

/// How much of a multiprocessor's memory the kernels of a decode step want as shared memory, in percent: all want the same, since one
/// that wants another division than the kernel ahead may have to wait for its end (CUDA C++ programming guide, "Asynchronous
/// Concurrent Execution"). Two blocks of attention take 72 of the 228 KiB of an H100, for which 100 is the next division; the rest is the
/// first-level cache, from which products read their input again for each row of weights.
const SHARED_PERCENT: i32 = 44;
/// Attention over many queries takes what it needs.
const FOR_MANY_QUERIES: [&str; 2] = ["attention_varlen", "paged_prefill"];

/// Most parameters of a kernel.
const MAX_PARAMETERS: usize = 24;

/// Every kernel that the card can run, compiled and loaded.
pub(crate) struct Modules {
    stream: Arc<Stream>,
    early_launch: bool,
    modules: Vec<sys::CUmodule>,
    functions: Mutex<HashMap<&'static str, sys::CUfunction>>,
}

// SAFETY: handles that the driver locks itself.
unsafe impl Send for Modules {}
// SAFETY: see above.
unsafe impl Sync for Modules {}

impl Modules {
    /// Compiles what the cache lacks, all sources for this card at once, and loads them. With `early_launch` a kernel may start while
    /// those ahead of it run, if the card can.
    pub(crate) fn load(stream: &Arc<Stream>, cache: &CubinCache, early_launch: bool) -> Result<Self> {
        let compute_capability = stream.device().compute_capability;
        let sources = || SOURCES.iter().filter(|source| source.is_for(compute_capability));
        let compiled = thread::scope(|scope| {
            let jobs: Vec<_> = sources().map(|source| scope.spawn(move || cache.get(source, compute_capability))).collect();
            let ended = |_| Err(Error::Device("a compiler thread panicked".into()));
            jobs.into_iter().map(|job| job.join().unwrap_or_else(ended)).collect::<Result<Vec<_>>>()
        })?;
        stream.device().bind()?;
        let early_launch = early_launch && compute_capability >= EARLY_LAUNCH;
        let mut loaded = Self { stream: Arc::clone(stream), early_launch, modules: Vec::new(), functions: Mutex::default() };
        for (source, compiled) in sources().zip(&compiled) {
            // SAFETY: NVRTC's image, which says itself how long it is.
            let module = unsafe { result::module::load_data(compiled.cubin.as_ptr().cast()) };
            loaded.modules.push(check(format_args!("kernels of {} cannot be loaded", source.name), module)?);
        }
        Ok(loaded)
    }

    /// A launch of the kernel `name`.
    pub(crate) fn launch(&self, name: &'static str) -> Result<Launch<'_>> {
        let function = self.function(name)?;
        Ok(Launch {
            stream: &self.stream,
            early: self.early_launch,
            name,
            function,
            grid: [1; 3],
            threads: 1,
            shared_bytes: 0,
            parameters: [0; MAX_PARAMETERS],
            len: 0,
        })
    }

    fn function(&self, name: &'static str) -> Result<sys::CUfunction> {
        let mut functions = self.functions.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(function) = functions.get(name) {
            return Ok(*function);
        }
        self.stream.device().bind()?;
        let c_name = CString::new(name).map_err(|e| Error::Device(e.to_string()))?;
        // SAFETY: the modules are loaded.
        let found = self.modules.iter().find_map(|module| unsafe { result::module::get_function(*module, c_name.clone()) }.ok());
        let function = found.ok_or_else(|| Error::Device(format!("no module has a kernel {name}")))?;
        let attribute = sys::CUfunction_attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
        // SAFETY: a function of a loaded module. No kernel has static shared memory, so the whole limit is there.
        let raised = unsafe { result::function::set_function_attribute(function, attribute, self.stream.device().max_shared_bytes as i32) };
        check(format_args!("shared memory of {name}"), raised)?;
        if !FOR_MANY_QUERIES.iter().any(|prefix| name.starts_with(prefix)) {
            let attribute = sys::CUfunction_attribute::CU_FUNC_ATTRIBUTE_PREFERRED_SHARED_MEMORY_CARVEOUT;
            // SAFETY: as above. A hint, which the driver may not take.
            let _ = unsafe { result::function::set_function_attribute(function, attribute, SHARED_PERCENT) };
        }
        functions.insert(name, function);
        Ok(function)
    }
}

impl Drop for Modules {
    fn drop(&mut self) {
        if self.stream.device().bind().is_ok() {
            for module in &self.modules {
                // SAFETY: loaded once, unloaded once; the driver waits for their kernels.
                let _ = unsafe { result::module::unload(*module) };
            }
        }
    }
}

/// One launch. Parameters are given in the kernel's order.
pub(crate) struct Launch<'a> {
    stream: &'a Stream,
    early: bool,
    name: &'static str,
    function: sys::CUfunction,
    grid: [usize; 3],
    threads: usize,
    shared_bytes: usize,
    parameters: [u64; MAX_PARAMETERS],
    len: usize,
}

impl Launch<'_> {
    /// Blocks in x, y and z. None at all launches nothing.
    pub(crate) fn grid(self, grid: [usize; 3]) -> Self {
        Self { grid, ..self }
    }

    /// Threads of a block.
    pub(crate) fn threads(self, threads: usize) -> Self {
        Self { threads, ..self }
    }

    /// Dynamic shared memory of a block.
    pub(crate) fn shared_bytes(self, shared_bytes: usize) -> Self {
        Self { shared_bytes, ..self }
    }

    /// A parameter that is a pointer.
    pub(crate) fn pointer(self, pointer: DevicePtr) -> Self {
        self.parameter(pointer)
    }

    /// A parameter that is an `int`. Sizes above `i32::MAX` saturate: no tensor is as large in one dimension.
    pub(crate) fn int(self, value: usize) -> Self {
        self.parameter(u64::from(i32::try_from(value).unwrap_or(i32::MAX) as u32))
    }

    /// A parameter that is a `float`.
    pub(crate) fn float(self, value: f32) -> Self {
        self.parameter(u64::from(value.to_bits()))
    }

    fn parameter(mut self, bits: u64) -> Self {
        self.parameters[self.len] = bits;
        self.len += 1;
        self
    }

    /// Queues it. If it may be early, its blocks start before the kernels ahead have ended, and wait for those themselves (programmatic
    /// dependent launch); a capture makes a programmatic edge of that. Behind a copy or the wait for an event, or ahead of
    /// them, the stream's order is as ever.
    ///
    /// # Safety
    /// Number, order and types of the parameters are those of the kernel, and every pointer is to as much memory as the kernel
    /// reads or writes with them.
    pub(crate) unsafe fn run(mut self) -> Result<()> {
        if self.grid.contains(&0) {
            return Ok(());
        }
        // x may have 2^31 - 1 blocks, y and z 65,535 (CUDA C++ programming guide, compute capabilities).
        if self.grid[0] > i32::MAX as usize || self.grid[1..].iter().any(|n| *n > 65_535) {
            return Err(Error::Device(format!("{} would be launched on a grid of {:?}", self.name, self.grid)));
        }
        self.stream.device().bind()?;
        // A slot holds an `int` or `float` in its lower bytes, which come first on every host that CUDA has.
        let slots = self.parameters.as_mut_ptr();
        let mut pointers: [*mut c_void; MAX_PARAMETERS] = std::array::from_fn(|i| slots.wrapping_add(i).cast());
        let mut early = sys::CUlaunchAttribute {
            id: sys::CUlaunchAttributeID::CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION,
            pad: [0; 4],
            value: sys::CUlaunchAttributeValue { programmaticStreamSerializationAllowed: 1 },
        };
        let [x, y, z] = self.grid.map(|n| n as u32);
        let config = sys::CUlaunchConfig {
            gridDimX: x,
            gridDimY: y,
            gridDimZ: z,
            blockDimX: self.threads as u32,
            blockDimY: 1,
            blockDimZ: 1,
            sharedMemBytes: self.shared_bytes as u32,
            hStream: self.stream.handle(),
            attrs: &mut early,
            numAttrs: u32::from(self.early),
        };
        // SAFETY: the caller's promise; the function belongs to a module that lives as long as `self`; every kernel waits for what is
        // ahead of it before it touches what others write.
        let launched = unsafe { sys::cuLaunchKernelEx(&config, self.function, pointers.as_mut_ptr(), ptr::null_mut()) };
        check(format_args!("{} cannot be launched", self.name), launched.result())
    }
}
