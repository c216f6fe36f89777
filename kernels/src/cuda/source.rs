//! The kernels' sources, embedded in the binary.

/// A file of kernels: one NVRTC program, one module on the card.
#[derive(Clone, Copy, Debug)]
pub struct Source {
    /// File name.
    pub name: &'static str,
    /// CUDA C++.
    pub text: &'static str,
}

/// What every source includes, by name.
pub const HEADERS: &[Source] = &[
    Source { name: "common.cuh", text: include_str!("../../cu/common.cuh") },
    Source { name: "flash.cuh", text: include_str!("../../cu/flash.cuh") },
    Source { name: "rank.cuh", text: include_str!("../../cu/rank.cuh") },
];

/// Every file of kernels.
pub const SOURCES: &[Source] = &[
    Source { name: "attention_varlen.cu", text: include_str!("../../cu/attention_varlen.cu") },
    Source { name: "elementwise.cu", text: include_str!("../../cu/elementwise.cu") },
    Source { name: "gemv.cu", text: include_str!("../../cu/gemv.cu") },
    Source { name: "logprobs.cu", text: include_str!("../../cu/logprobs.cu") },
    Source { name: "norm.cu", text: include_str!("../../cu/norm.cu") },
    Source { name: "paged_decode.cu", text: include_str!("../../cu/paged_decode.cu") },
    Source { name: "paged_prefill.cu", text: include_str!("../../cu/paged_prefill.cu") },
    Source { name: "rope.cu", text: include_str!("../../cu/rope.cu") },
    Source { name: "sample.cu", text: include_str!("../../cu/sample.cu") },
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
