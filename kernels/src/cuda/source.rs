//! The kernels' sources, embedded in the binary.

/// A file of kernels: one NVRTC program, one module on the card.
#[derive(Clone, Copy, Debug)]
pub struct Source {
    /// File name.
    pub name: &'static str,
    /// CUDA C++.
    pub text: &'static str,
    /// The one compute capability that has its instructions; `None` if every supported one has.
    pub only: Option<(i32, i32)>,
}

impl Source {
    const fn new(name: &'static str, text: &'static str) -> Self {
        Self { name, text, only: None }
    }

    const fn sm90(name: &'static str, text: &'static str) -> Self {
        Self { name, text, only: Some((9, 0)) }
    }

    /// Whether cards of this compute capability can run it.
    pub fn is_for(&self, compute_capability: (i32, i32)) -> bool {
        self.only.is_none_or(|only| only == compute_capability)
    }
}

/// What sources include, by name.
pub const HEADERS: &[Source] = &[
    Source::new("common.cuh", include_str!("../../cu/common.cuh")),
    Source::new("flash.cuh", include_str!("../../cu/flash.cuh")),
    Source::new("rope.cuh", include_str!("../../cu/rope.cuh")),
    Source::new("flash_sm90.cuh", include_str!("../../cu/flash_sm90.cuh")),
    Source::new("ptx_sm90.cuh", include_str!("../../cu/ptx_sm90.cuh")),
    Source::new("rank.cuh", include_str!("../../cu/rank.cuh")),
];

/// Every file of kernels.
pub const SOURCES: &[Source] = &[
    Source::new("attention_varlen.cu", include_str!("../../cu/attention_varlen.cu")),
    Source::sm90("attention_varlen_sm90.cu", include_str!("../../cu/attention_varlen_sm90.cu")),
    Source::new("elementwise.cu", include_str!("../../cu/elementwise.cu")),
    Source::new("gemv.cu", include_str!("../../cu/gemv.cu")),
    Source::new("logprobs.cu", include_str!("../../cu/logprobs.cu")),
    Source::new("norm.cu", include_str!("../../cu/norm.cu")),
    Source::new("paged_decode.cu", include_str!("../../cu/paged_decode.cu")),
    Source::new("paged_prefill.cu", include_str!("../../cu/paged_prefill.cu")),
    Source::sm90("paged_prefill_sm90.cu", include_str!("../../cu/paged_prefill_sm90.cu")),
    Source::new("rope.cu", include_str!("../../cu/rope.cu")),
    Source::new("sample.cu", include_str!("../../cu/sample.cu")),
];

#[cfg(test)]
mod tests {
    use super::*;

    /// The rule at the head of `common.cuh`, of which the emulation knows nothing.
    #[test]
    fn nothing_is_read_as_a_constant() {
        for source in HEADERS.iter().chain(SOURCES) {
            let code = source.text.lines().map(|line| line.split("//").next().unwrap_or_default());
            for (number, line) in code.enumerate() {
                for word in ["__restrict__", "ld.global.nc", "__ldg"] {
                    assert!(
                        !line.contains(word),
                        "{}:{}: {word} may be read before the kernels ahead have written it",
                        source.name,
                        number + 1
                    );
                }
            }
        }
    }
}
