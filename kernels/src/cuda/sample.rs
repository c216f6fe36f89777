//! Tokens and log-probabilities from logits.

use super::{Cuda, pointer};
use crate::{Draws, Result, Tensor, check};

/// As in `rank.cuh`.
const THREADS: usize = 512;
/// 256 bins, a value for each warp and two more, of 8 bytes: `Shared` in `sample.cu`.
const SHARED_BYTES: usize = (256 + THREADS / 32 + 2) * 8;

/// [`Backend::sample`](crate::Backend::sample)
pub(super) fn sample(cuda: &Cuda, logits: &Tensor<Cuda>, draws: &Draws<'_, Cuda>, out: &mut Tensor<Cuda>) -> Result<()> {
    check::sample(logits, draws, out)?;
    let launch = cuda.launch("sample")?.grid([logits.rows(), 1, 1]).threads(THREADS).shared_bytes(SHARED_BYTES);
    let launch = launch.pointer(pointer(logits)).pointer(pointer(draws.temperature)).pointer(pointer(draws.top_k));
    let launch = launch.pointer(pointer(draws.top_p)).pointer(pointer(draws.random)).pointer(pointer(draws.banned));
    // SAFETY: shapes were checked.
    unsafe { launch.pointer(pointer(out)).int(logits.cols()).run() }
}

/// [`Backend::logprobs`](crate::Backend::logprobs)
pub(super) fn logprobs(
    cuda: &Cuda,
    logits: &Tensor<Cuda>,
    vocab: usize,
    token_ids: &Tensor<Cuda>,
    top_ids: &mut Tensor<Cuda>,
    out: &mut Tensor<Cuda>,
) -> Result<()> {
    check::logprobs(logits, vocab, token_ids, top_ids, out)?;
    let launch = cuda.launch("logprobs")?.grid([logits.rows(), 1, 1]).threads(THREADS).shared_bytes(THREADS / 32 * size_of::<u64>());
    let launch = launch.pointer(pointer(logits)).pointer(pointer(token_ids)).pointer(pointer(top_ids)).pointer(pointer(out));
    // SAFETY: shapes were checked.
    unsafe { launch.int(logits.cols()).int(vocab).int(top_ids.cols()).run() }
}
