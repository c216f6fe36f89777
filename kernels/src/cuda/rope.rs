//! Rotary position embedding, and keys and values into the paged cache.

use super::{Cuda, pointer};
use crate::{AttentionShape, KvCache, Result, Rope, Tensor, check};

/// [`Backend::rope_cos_sin`](crate::Backend::rope_cos_sin)
pub(super) fn rope_cos_sin(cuda: &Cuda, positions: &Tensor<Cuda>, inv_freq: &Tensor<Cuda>, out: &mut Tensor<Cuda>) -> Result<()> {
    check::rope_cos_sin(positions, inv_freq, out)?;
    let half = inv_freq.cols();
    let launch = cuda.launch("rope_cos_sin")?.grid([positions.rows(), 1, 1]).threads(half.next_multiple_of(32).clamp(32, 128));
    let launch = launch.pointer(pointer(positions)).pointer(pointer(inv_freq)).pointer(pointer(out)).int(half);
    // SAFETY: shapes were checked.
    unsafe { launch.run() }
}

/// [`Backend::rope_and_store_kv`](crate::Backend::rope_and_store_kv)
pub(super) fn rope_and_store_kv(
    cuda: &Cuda,
    qkv: &mut Tensor<Cuda>,
    rope: Rope<'_, Cuda>,
    shape: AttentionShape,
    kv: &mut KvCache<Cuda>,
) -> Result<()> {
    check::rope_and_store_kv(cuda, qkv, rope, shape, kv)?;
    let pairs = (shape.num_heads + shape.num_kv_heads) * shape.head_dim / 2;
    let threads = pairs.next_multiple_of(32).min(256);
    // Few tokens are spread over as many blocks as run at once.
    let parts = (cuda.device().multiprocessors * 8).div_ceil(qkv.rows().max(1)).min(pairs.div_ceil(threads));
    let launch = cuda.launch("rope_and_store_kv")?.grid([qkv.rows(), parts, 1]).threads(threads);
    let launch = launch.pointer(pointer(qkv)).pointer(pointer(rope.cos_sin)).pointer(pointer(rope.slots));
    let launch = launch.pointer(pointer(&kv.k)).pointer(pointer(&kv.v));
    let launch = launch.int(shape.num_heads).int(shape.num_kv_heads).int(shape.head_dim).int(kv.k.rows());
    // SAFETY: shapes were checked, and the kernel stays below the cache's rows whatever the slots are.
    unsafe { launch.run() }
}
