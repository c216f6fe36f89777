//! The CPU backend: f32 activations, weights in the checkpoint's own type where they are mapped.
//!
//! Every op is written once over a vector type and compiled for each instruction set; the best one is chosen when a
//! [`Cpu`] is made. Work is cut into tiles whose results depend on neither the number of threads nor on who takes them.

#[cfg(target_endian = "big")]
compile_error!("weights are read in place, as the little-endian bytes that safetensors holds");

mod attention;
mod decode;
mod elementwise;
mod gemm;
mod gemv;
mod linear;
mod math;
mod micro;
mod norm;
mod paged;
mod pool;
mod rope;
mod rows;
mod simd;
mod storage;

pub use simd::Isa;
pub use storage::{CpuStorage, CpuWeight};

use crate::{
    AttentionShape, Backend, DType, Element, Epilogue, KvCache, Matrix, PagedAttention, Pictures, Result, Rope, Tensor, VarlenAttention,
    check, weights::WeightView,
};
use pool::Pool;
use simd::Level;
use std::{num::NonZero, sync::Arc, thread::available_parallelism};

/// How a [`Cpu`] computes.
#[derive(Clone, Copy, Debug, Default)]
pub struct CpuOptions {
    /// Threads that work at an op, the calling one among them; `None` takes as many as this process may run on.
    pub threads: Option<usize>,
    /// Instruction set; `None` takes the best of this machine.
    pub isa: Option<Isa>,
}

/// The CPU as a [`Backend`]. A clone shares the threads: give one to each engine of a process.
#[derive(Clone)]
pub struct Cpu {
    pool: Arc<Pool>,
    level: Level,
}

impl Cpu {
    /// Starts the threads.
    ///
    /// # Errors
    /// [`Error::Device`](crate::Error::Device) if the machine lacks the instruction set or a thread cannot be started.
    pub fn new(options: CpuOptions) -> Result<Self> {
        let level = Level::new(options.isa.unwrap_or_else(Isa::detect))?;
        let threads = options.threads.unwrap_or_else(|| available_parallelism().map_or(1, NonZero::get));
        Ok(Self { pool: Arc::new(Pool::new(threads.max(1))?), level })
    }

    /// Threads that work at an op.
    pub fn threads(&self) -> usize {
        self.pool.threads()
    }

    /// The instruction set in use.
    pub fn isa(&self) -> Isa {
        self.level.isa()
    }

    fn pool(&self) -> &Pool {
        &self.pool
    }

    fn level(&self) -> Level {
        self.level
    }

    /// Runs `tile` for each of `0..tiles`; on this thread alone unless `parallel`.
    fn for_each(&self, parallel: bool, tiles: usize, tile: impl Fn(usize) + Sync) {
        if parallel { self.pool.for_each(tiles, tile) } else { (0..tiles).for_each(tile) }
    }
}

impl Backend for Cpu {
    type Storage = CpuStorage;
    type WeightStorage = CpuWeight;

    fn device_name(&self) -> String {
        "cpu".into()
    }

    fn step_tokens(&self) -> usize {
        512
    }

    fn activation_dtype(&self) -> DType {
        DType::F32
    }

    fn alloc(&self, rows: usize, cols: usize, dtype: DType) -> Result<Tensor<Self>> {
        Ok(Tensor::new(CpuStorage::zeroed(rows, cols, dtype)?, rows, cols, dtype))
    }

    fn load_weight(&self, parts: &[WeightView]) -> Result<Matrix<Self>> {
        CpuWeight::load(parts)
    }

    fn upload<T: Element>(&self, src: &[T], dst: &mut Tensor<Self>) -> Result<()> {
        check::copy("upload", dst, T::DTYPE, src.len())?;
        let elements = dst.elements();
        dst.storage.slice_mut(elements).copy_from_slice(src);
        Ok(())
    }

    fn download<T: Element>(&self, src: &Tensor<Self>, dst: &mut [T]) -> Result<()> {
        check::copy("download", src, T::DTYPE, dst.len())?;
        dst.copy_from_slice(src.storage.slice(src.elements()));
        Ok(())
    }

    fn embed(&self, table: &Matrix<Self>, ids: &Tensor<Self>, out: &mut Tensor<Self>) -> Result<()> {
        rows::embed(self, table, ids, out)
    }

    fn gather_rows(&self, src: &Tensor<Self>, rows: &Tensor<Self>, out: &mut Tensor<Self>) -> Result<()> {
        rows::gather(src, rows, out)
    }

    fn scatter_rows(&self, src: &Tensor<Self>, rows: &Tensor<Self>, out: &mut Tensor<Self>) -> Result<()> {
        rows::scatter(src, rows, out)
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
        linear::linear(self, x, weight, bias, epilogue, out)
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
        paged::paged_attention(self, qkv, kv, step, out)
    }

    fn attention_varlen(&self, attention: &VarlenAttention<'_, Self>, out: &mut Tensor<Self>) -> Result<()> {
        attention::attention_varlen(self, attention, out)
    }

    fn silu_and_mul(&self, x: &Tensor<Self>, out: &mut Tensor<Self>) -> Result<()> {
        elementwise::silu_and_mul(self, x, out)
    }
}
