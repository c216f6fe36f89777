//! The CUDA backend: bf16 weights and activations, sums in f32, one stream of ops.
//!
//! Kernels are compiled by NVRTC when the backend is opened; the driver, NVRTC and cuBLASLt are loaded at run time, so that a binary
//! with this backend runs where they are missing. What an op does on the card stands in `cu/*.cu`; the files here check shapes
//! and launch.

mod attention;
mod blas;
mod driver;
mod elementwise;
mod graph;
mod linear;
mod module;
mod norm;
pub mod nvrtc;
mod packed;
mod rope;
mod rows;
mod sample;
pub mod source;
mod staging;
mod weight;

pub use attention::AttentionKernels;
pub use driver::DeviceBuffer;

use crate::{
    AttentionShape, Backend, DType, Download, Draws, Element, Epilogue, Error, GraphKey, KvCache, Matrix, PagedAttention, Pictures, Result,
    RmsNorm, Rope, SwigluScratch, Tensor, Upload, VarlenAttention, check, weights::WeightView,
};
use driver::{Device, DevicePtr, Stream};
use graph::Graphs;
use module::{Launch, Modules};
use nvrtc::CubinCache;
use packed::Uploads;
use staging::{Downloads, Staging};
use std::{
    path::PathBuf,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

/// How a [`Cuda`] is opened.
#[derive(Clone, Debug)]
pub struct CudaOptions {
    /// Which card, as the driver counts them (`CUDA_VISIBLE_DEVICES` renumbers them).
    pub ordinal: usize,
    /// Where compiled kernels are kept; `None` means below the user's cache folder.
    pub cache_folder: Option<PathBuf>,
    /// Which kernels compute attention over many queries.
    pub attention: AttentionKernels,
    /// Whether a kernel may start while those ahead of it still run (programmatic dependent launch, compute capability 9.0 and above),
    /// also in graphs. Without it results are the same; it is there to be measured, and to be ruled out as a cause.
    pub early_launch: bool,
}

impl Default for CudaOptions {
    /// The first card, with all that it can do.
    fn default() -> Self {
        Self { ordinal: 0, cache_folder: None, attention: AttentionKernels::default(), early_launch: true }
    }
}

/// One card as a [`Backend`]: a stream of ops, its kernels, and the memory that ops need besides their tensors. Engines in one process
/// open one each, so that neither waits for the other's work.
pub struct Cuda {
    // Dropped from here down: graphs before the code that they launch.
    graphs: Mutex<Graphs>,
    modules: Modules,
    linear: linear::Linear,
    attention: attention::Attention,
    staging: Mutex<Staging>,
    uploads: Mutex<Uploads>,
    downloads: Downloads,
    stream: Arc<Stream>,
}

impl Cuda {
    /// Opens a card, compiles and loads the kernels. Blocks: seconds where they are not in the cache.
    ///
    /// # Errors
    /// [`Error::Device`] that says what is missing: the driver, the card, a compute capability of 8.0, or what
    /// `options.attention` needs; NVRTC, cuBLASLt, memory.
    pub fn open(options: &CudaOptions) -> Result<Self> {
        let device = Device::open(options.ordinal)?;
        let (driver, nvrtc) = (driver::version()?, nvrtc::version()?);
        if nvrtc.0 > driver.0 {
            // CUDA compatibility, "Minor Version Compatibility".
            let what = format!(
                "the driver is for CUDA {}.{}, which cannot load what NVRTC {}.{} compiles; update the driver (CUDA 13 needs 580 or later), or put NVRTC {} on LD_LIBRARY_PATH",
                driver.0, driver.1, nvrtc.0, nvrtc.1, driver.0
            );
            return Err(Error::Device(what));
        }
        let stream = Stream::new(device)?;
        let modules = Modules::load(&stream, &CubinCache::new(options.cache_folder.clone()), options.early_launch)?;
        let linear = linear::Linear::new(&stream)?;
        let card = &stream.device().name;
        tracing::info!(ordinal = options.ordinal, card, ?driver, ?nvrtc, cublaslt = blas::version(), "opened a card");
        Ok(Self {
            linear,
            attention: attention::Attention::new(&stream, options.attention)?,
            staging: Mutex::new(Staging::new(&stream, staging::SLOT_BYTES)?),
            uploads: Mutex::new(Uploads::new(&stream)?),
            downloads: Downloads::new(&stream),
            graphs: Mutex::new(Graphs::new(&stream)),
            modules,
            stream,
        })
    }

    /// Whether there is an NVIDIA driver at all.
    pub fn has_driver() -> bool {
        driver::is_present()
    }

    /// Major and minor number of the card's compute capability.
    pub fn compute_capability(&self) -> (i32, i32) {
        self.device().compute_capability
    }

    /// Free and total memory of the card, in bytes.
    ///
    /// # Errors
    /// If the driver does not say.
    pub fn memory(&self) -> Result<(usize, usize)> {
        self.device().memory()
    }

    /// Waits until everything queued is done.
    ///
    /// # Errors
    /// If the card failed at it.
    pub fn synchronize(&self) -> Result<()> {
        self.device().bind()?;
        self.stream.synchronize()
    }

    fn device(&self) -> &Arc<Device> {
        self.stream.device()
    }

    fn staging(&self) -> MutexGuard<'_, Staging> {
        self.staging.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn uploads(&self) -> MutexGuard<'_, Uploads> {
        self.uploads.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn launch(&self, kernel: &'static str) -> Result<Launch<'_>> {
        self.modules.launch(kernel)
    }
}

/// Rows of a tile of a product and of attention: what fills up the last one costs next to nothing.
const PASS_ROWS: usize = 128;

/// Where the window of a tensor begins.
fn pointer(tensor: &Tensor<Cuda>) -> DevicePtr {
    tensor.storage.pointer() + (tensor.elements().start * tensor.dtype().size()) as u64
}

impl Drop for Cuda {
    /// Waits for what is queued: it uses the code, the pinned memory and the workspace that go next.
    fn drop(&mut self) {
        // A card that failed does no more work.
        let _ = self.synchronize();
        let _ = self.uploads().synchronize();
    }
}

impl Backend for Cuda {
    type Storage = DeviceBuffer;
    type WeightStorage = DeviceBuffer;

    const SAMPLES: bool = true;

    fn device_name(&self) -> String {
        self.device().name.clone()
    }

    fn free_memory(&self) -> Result<Option<usize>> {
        Ok(Some(self.memory()?.0))
    }

    fn step_tokens(&self) -> usize {
        4096
    }

    fn padded_rows(&self, rows: usize) -> usize {
        rows.next_multiple_of(PASS_ROWS)
    }

    fn padded_sequences(&self, sequences: usize) -> usize {
        // A step of up to 8 reads the weights once, whatever their number.
        if sequences > 4 { sequences.next_multiple_of(8) } else { sequences.next_power_of_two() }
    }

    fn padded_features(&self, features: usize) -> usize {
        // Rows of f32 and of bf16 then begin at 128 bytes: cuBLASLt has kernels that want 16.
        features.next_multiple_of(64)
    }

    fn activation_dtype(&self) -> DType {
        DType::Bf16
    }

    fn alloc(&self, rows: usize, cols: usize, dtype: DType) -> Result<Tensor<Self>> {
        Ok(Tensor::new(DeviceBuffer::zeroed(&self.stream, rows * cols * dtype.size())?, rows, cols, dtype))
    }

    fn load_weight(&self, parts: &[WeightView]) -> Result<Matrix<Self>> {
        weight::load(self, parts)
    }

    fn upload<T: Element>(&self, src: &[T], dst: &mut Tensor<Self>) -> Result<()> {
        check::copy("upload", dst, T::DTYPE, src.len())?;
        self.device().bind()?;
        let bytes: &[u8] = bytemuck::cast_slice(src);
        self.staging().upload(pointer(dst), bytes.len(), |offset, piece| piece.copy_from_slice(&bytes[offset..offset + piece.len()]))
    }

    fn download<T: Element>(&self, src: &Tensor<Self>, dst: &mut [T]) -> Result<()> {
        check::copy("download", src, T::DTYPE, dst.len())?;
        self.device().bind()?;
        self.staging().download(pointer(src), bytemuck::cast_slice_mut(dst))
    }

    fn begin_download<T: Element>(&self, src: &Tensor<Self>) -> Result<Download<T>> {
        check::element("begin_download", src, T::DTYPE)?;
        self.device().bind()?;
        let len = src.rows() * src.cols();
        let arriving = self.downloads.begin(pointer(src), len * size_of::<T>())?;
        Ok(Download::new(len, move |dst: &mut [T]| arriving.wait(bytemuck::cast_slice_mut(dst))))
    }

    fn alloc_packed<const N: usize>(&self, capacities: [(usize, DType); N]) -> Result<[Tensor<Self>; N]> {
        packed::alloc(self, capacities)
    }

    fn upload_packed(&self, uploads: &mut [Upload<'_, Self>]) -> Result<usize> {
        packed::upload(self, uploads)
    }

    fn graphed(&self, key: GraphKey, f: &mut dyn FnMut() -> Result<()>) -> Result<()> {
        self.graphs.lock().unwrap_or_else(PoisonError::into_inner).run(key, f)
    }

    fn embed(&self, table: &Matrix<Self>, ids: &Tensor<Self>, out: &mut Tensor<Self>) -> Result<()> {
        rows::embed(self, table, ids, out)
    }

    fn gather_rows(&self, src: &Tensor<Self>, rows: &Tensor<Self>, out: &mut Tensor<Self>) -> Result<()> {
        rows::gather(self, src, rows, out)
    }

    fn scatter_rows(&self, src: &Tensor<Self>, rows: &Tensor<Self>, out: &mut Tensor<Self>) -> Result<()> {
        rows::scatter(self, src, rows, out)
    }

    fn patchify(&self, pictures: &Pictures<'_, Self>, out: &mut Tensor<Self>) -> Result<()> {
        elementwise::patchify(self, pictures, out)
    }

    fn linear(
        &self,
        x: &Tensor<Self>,
        weight: &Matrix<Self>,
        bias: Option<&Matrix<Self>>,
        epilogue: Epilogue,
        out: &mut Tensor<Self>,
    ) -> Result<()> {
        self.linear.run(self, x, weight, bias, epilogue, out)
    }

    fn rms_norm_linear(
        &self,
        x: &Tensor<Self>,
        norm: RmsNorm<'_, Self>,
        weight: &Matrix<Self>,
        normed: &mut Tensor<Self>,
        out: &mut Tensor<Self>,
    ) -> Result<()> {
        linear::rms_norm_linear(self, x, norm, weight, normed, out)
    }

    fn rms_norm_swiglu(
        &self,
        x: &Tensor<Self>,
        norm: RmsNorm<'_, Self>,
        gate_up_proj: &Matrix<Self>,
        scratch: SwigluScratch<'_, Self>,
        out: &mut Tensor<Self>,
    ) -> Result<()> {
        linear::rms_norm_swiglu(self, x, norm, gate_up_proj, scratch, out)
    }

    fn rms_norm(&self, x: &Tensor<Self>, weight: &Matrix<Self>, eps: f32, out: &mut Tensor<Self>) -> Result<()> {
        norm::rms_norm(self, x, weight, eps, out)
    }

    fn layer_norm(&self, x: &Tensor<Self>, weight: &Matrix<Self>, bias: &Matrix<Self>, eps: f32, out: &mut Tensor<Self>) -> Result<()> {
        norm::layer_norm(self, x, weight, bias, eps, out)
    }

    fn rope_cos_sin(&self, positions: &Tensor<Self>, inv_freq: &Tensor<Self>, out: &mut Tensor<Self>) -> Result<()> {
        rope::rope_cos_sin(self, positions, inv_freq, out)
    }

    fn rope_and_store_kv(&self, qkv: &mut Tensor<Self>, rope: Rope<'_, Self>, shape: AttentionShape, kv: &mut KvCache<Self>) -> Result<()> {
        rope::rope_and_store_kv(self, qkv, rope, shape, kv)
    }

    fn paged_attention(
        &self,
        qkv: &Tensor<Self>,
        kv: &KvCache<Self>,
        step: &PagedAttention<'_, Self>,
        out: &mut Tensor<Self>,
    ) -> Result<()> {
        attention::paged(self, qkv, kv, step, out)
    }

    fn rope_and_paged_attention(
        &self,
        qkv: &mut Tensor<Self>,
        rope: Rope<'_, Self>,
        kv: &mut KvCache<Self>,
        step: &PagedAttention<'_, Self>,
        out: &mut Tensor<Self>,
    ) -> Result<()> {
        attention::rope_paged(self, qkv, rope, kv, step, out)
    }

    fn attention_varlen(&self, attention: &VarlenAttention<'_, Self>, out: &mut Tensor<Self>) -> Result<()> {
        attention::varlen(self, attention, out)
    }

    fn sample(&self, logits: &Tensor<Self>, draws: &Draws<'_, Self>, out: &mut Tensor<Self>) -> Result<()> {
        sample::sample(self, logits, draws, out)
    }

    fn logprobs(
        &self,
        logits: &Tensor<Self>,
        vocab: usize,
        token_ids: &Tensor<Self>,
        top_ids: &mut Tensor<Self>,
        out: &mut Tensor<Self>,
    ) -> Result<()> {
        sample::logprobs(self, logits, vocab, token_ids, top_ids, out)
    }

    fn silu_and_mul(&self, x: &Tensor<Self>, out: &mut Tensor<Self>) -> Result<()> {
        elementwise::silu_and_mul(self, x, out)
    }
}
