//! Guesses the next tokens of a sequence from its own text: where its last tokens stood before, what followed them then may
//! follow them now.
//!
//! Prompt lookup decoding (Saxena 2023, <https://github.com/apoorvumang/prompt-lookup-decoding>), a form of speculative decoding
//! (Leviathan et al. 2022, <https://arxiv.org/abs/2211.17192>) without a second model. Guesses are checked against what the
//! sampler chooses at each place, so they change when tokens come, never which.

/// Longest and shortest stretch of last tokens that is looked for; the longest that is found wins.
const NGRAM_TOKENS: std::ops::RangeInclusive<usize> = 2..=4;

/// Up to `limit` tokens that followed the latest earlier occurrence of the sequence's last tokens.
pub fn propose(token_ids: &[u32], limit: usize) -> &[u32] {
    let len = token_ids.len();
    for n in NGRAM_TOKENS.rev() {
        if len <= n {
            continue;
        }
        let (earlier, last) = (&token_ids[..len - 1], &token_ids[len - n..]);
        if let Some(at) = earlier.windows(n).rposition(|window| window == last) {
            let start = at + n;
            return &token_ids[start..len.min(start + limit)];
        }
    }
    &[]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn longest_and_latest_occurrence_wins() {
        assert_eq!(propose(&[1, 2, 3, 9, 2, 3, 8, 1, 2, 3], 2), [9, 2], "three tokens beat the later two");
        assert_eq!(propose(&[5, 6, 7, 5, 6, 8, 5, 6], 1), [8], "the later of equal ones");
        assert_eq!(propose(&[5, 6, 7, 5, 6], 9), [7, 5, 6], "up to the end");
        assert_eq!(propose(&[4, 4, 4, 4], 3), [4], "an occurrence may overlap the end");
    }

    #[test]
    fn nothing_is_proposed_without_an_occurrence() {
        for tokens in [&[][..], &[1], &[1, 2], &[1, 2, 3, 4], &[3, 1, 2, 3]] {
            assert!(propose(tokens, 4).is_empty(), "{tokens:?}");
        }
        assert!(propose(&[1, 2, 1, 2], 0).is_empty());
    }
}
