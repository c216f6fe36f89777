use crate::{
    common::{Comparison, Rng},
    support::*,
};
use idefics_kernels::{Backend, DType, Draws, cuda::Cuda};

/// How a row is drawn.
#[derive(Clone, Copy)]
struct Draw {
    temperature: f32,
    top_k: i32,
    top_p: f32,
    random: u64,
}

const GREEDY: Draw = Draw { temperature: 0.0, top_k: 0, top_p: 1.0, random: 0 };

fn sample(cuda: &Cuda, logits: &[f32], vocab: usize, draws: &[Draw], banned: &[u32]) -> Vec<i32> {
    let n = draws.len();
    let mut mask = vec![0i32; vocab.div_ceil(32)];
    banned.iter().for_each(|id| mask[*id as usize / 32] |= 1 << (id % 32));
    let column = |value: fn(&Draw) -> f32| elements(cuda, n, 1, &draws.iter().map(value).collect::<Vec<f32>>());
    let random: Vec<i32> = draws.iter().flat_map(|d| [d.random as i32, (d.random >> 32) as i32]).collect();
    let mut out = poisoned(cuda, n, 1, DType::I32);
    let inputs = Draws {
        temperature: &column(|d| d.temperature),
        top_k: &indices(cuda, &draws.iter().map(|d| d.top_k).collect::<Vec<i32>>()),
        top_p: &column(|d| d.top_p),
        random: &elements(cuda, n, 2, &random),
        banned: &elements(cuda, 1, mask.len(), &mask),
    };
    cuda.sample(&elements(cuda, n, vocab, logits), &inputs, &mut out).unwrap();
    let mut ids = vec![0; n];
    cuda.download(&out, &mut ids).unwrap();
    ids
}

/// The kept ids and their probabilities relative to the most likely one, in f64.
fn kept(logits: &[f32], draw: Draw, banned: &[u32]) -> Vec<(i32, f64)> {
    let allowed = |id: usize| logits[id].is_finite() && !banned.contains(&(id as u32));
    let mut ids: Vec<usize> = (0..logits.len()).filter(|id| allowed(*id)).collect();
    ids.sort_by(|a, b| logits[*b].total_cmp(&logits[*a]).then(a.cmp(b)));
    if draw.top_k > 0 && (draw.top_k as usize) < ids.len() {
        let last = logits[ids[draw.top_k as usize - 1]];
        ids.retain(|id| logits[*id] >= last);
    }
    let weight = |id: usize| (f64::from(logits[id] - logits[ids[0]]) / f64::from(draw.temperature)).exp();
    let total: f64 = ids.iter().map(|id| weight(*id)).sum();
    let (mut sum, mut last) = (0.0, f32::INFINITY);
    let mut some: Vec<(i32, f64)> = Vec::new();
    for id in &ids {
        // Equals of the last one stay.
        if sum >= f64::from(draw.top_p) * total && logits[*id] < last {
            break;
        }
        (sum, last) = (sum + weight(*id), logits[*id]);
        some.push((*id as i32, weight(*id)));
    }
    some.sort_by_key(|(id, _)| *id);
    some
}

/// Ids that a draw may give: the one at its place, and its neighbours if the place is within the rounding of a border.
fn expected(logits: &[f32], draw: Draw, banned: &[u32]) -> Vec<i32> {
    let kept = kept(logits, draw, banned);
    let total: f64 = kept.iter().map(|(_, w)| w).sum();
    let place = draw.random as f64 / 2f64.powi(64) * total;
    // The fast path of expf is good to 2^-22; a weight is cut to a multiple of 2^-40 of the largest.
    let slack = total * 1e-6 + kept.len() as f64 * 2f64.powi(-40);
    let mut sum = 0.0;
    let mut near = Vec::new();
    for (id, weight) in kept {
        if place >= sum - slack && place < sum + weight + slack {
            near.push(id);
        }
        sum += weight;
    }
    near
}

#[test]
#[ignore = "needs a CUDA device or its emulation"]
fn greedy_takes_the_first_of_the_largest_that_is_allowed() {
    let cuda = open();
    for vocab in [1, 5, 33, 600, 2051] {
        let mut logits: Vec<f32> = Rng(vocab as u64).units(3 * vocab).iter().map(|v| v - 3.0).collect();
        let at = |row: usize, id: usize| row * vocab + id % vocab;
        // Two equals, one banned above them; a row of nothing; infinities and NaN are passed over.
        (logits[at(0, 2)], logits[at(0, 4)], logits[at(0, 0)]) = (7.0, 7.0, 9.0);
        logits[vocab..2 * vocab].fill(f32::NAN);
        logits[at(1, 0)] = 100.0;
        (logits[at(2, 1)], logits[at(2, 2)], logits[at(2, 3)]) = (f32::NAN, f32::INFINITY, f32::NEG_INFINITY);
        let banned = [0];
        let found = sample(&cuda, &logits, vocab, &[GREEDY; 3], &banned);
        let best = |row: usize| {
            let row = &logits[row * vocab..(row + 1) * vocab];
            let allowed = (1..vocab).filter(|id| row[*id].is_finite());
            allowed.reduce(|a, b| if row[b] > row[a] { b } else { a }).map_or(-1, |id| id as i32)
        };
        assert_eq!(found, [best(0), -1, best(2)], "vocab {vocab}");
    }
}

#[test]
#[ignore = "needs a CUDA device or its emulation"]
fn draws_are_those_of_the_kept_distribution() {
    let cuda = open();
    let rng = &mut Rng(9);
    for (vocab, spread) in [(7, 2.0f32), (603, 8.0), (3001, 12.0)] {
        let banned = [1, 5, (vocab - 1) as u32];
        let mut draws = Vec::new();
        for temperature in [0.3, 1.0, 2.0] {
            // The last but one is more than are allowed.
            for (top_k, top_p) in
                [(0, 1.0), (3, 1.0), (0, 0.7), (50, 0.9), (1, 1.0), (0, 1e-6), (100_000, 0.999), (vocab as i32 - 1, 1.0), (2, 0.5)]
            {
                draws.push(Draw { temperature, top_k, top_p, random: rng.next() });
            }
        }
        // The ends of the distribution.
        draws.push(Draw { temperature: 1.0, top_k: 0, top_p: 1.0, random: 0 });
        draws.push(Draw { temperature: 1.0, top_k: 0, top_p: 1.0, random: u64::MAX });
        let logits: Vec<f32> = rng.units(draws.len() * vocab).iter().map(|v| v * spread).collect();
        let found = sample(&cuda, &logits, vocab, &draws, &banned);
        for (i, (id, draw)) in found.iter().zip(&draws).enumerate() {
            let near = expected(&logits[i * vocab..(i + 1) * vocab], *draw, &banned);
            let Draw { temperature, top_k, top_p, .. } = draw;
            assert!(
                near.contains(id),
                "vocab {vocab}, temperature {temperature}, top-k {top_k}, top-p {top_p}: {id}, expected of {near:?}"
            );
        }
    }
}

#[test]
#[ignore = "needs a CUDA device or its emulation"]
fn equals_at_the_border_stay_and_coldest_is_greedy() {
    let cuda = open();
    let logits = [1.0f32, 3.0, 3.0, 3.0, 0.0, 2.0].repeat(64);
    let draw = |i: u64, top_k, top_p, temperature| Draw { temperature, top_k, top_p, random: i << 58 };
    let ids = |top_k, top_p, temperature| {
        let draws: Vec<Draw> = (0..64).map(|i| draw(i, top_k, top_p, temperature)).collect();
        let mut ids = sample(&cuda, &logits, 6, &draws, &[]);
        ids.dedup();
        ids
    };
    assert_eq!(ids(2, 1.0, 1.0), [1, 2, 3]);
    assert_eq!(ids(0, 0.1, 1.0), [1, 2, 3]);
    assert_eq!(ids(0, 1.0, 1e4), [0, 1, 2, 3, 4, 5]);
    assert_eq!(ids(0, 1.0, f32::MIN_POSITIVE), [1, 2, 3]);
}

/// Log-probabilities of `token_ids` and of the `top` most likely of each row: ids, and values as the op lays them out. Behind the logits
/// of each row are a few that do not count.
fn logprobs(cuda: &Cuda, logits: &[f32], vocab: usize, token_ids: &[i32], top: usize) -> (Vec<i32>, Vec<f32>) {
    let n = token_ids.len();
    let (mut top_ids, mut out) = (poisoned(cuda, n, top, DType::I32), poisoned(cuda, n, 1 + top, DType::F32));
    let rows = logits.chunks(vocab).flat_map(|row| [row, &[f32::NAN, f32::INFINITY, 1e30]].concat()).collect::<Vec<f32>>();
    let logits = elements(cuda, n, vocab + 3, &rows);
    cuda.logprobs(&logits, vocab, &indices(cuda, token_ids), &mut top_ids, &mut out).unwrap();
    let mut ids = vec![0; n * top];
    cuda.download(&top_ids, &mut ids).unwrap();
    (ids, read(cuda, &out))
}

#[test]
#[ignore = "needs a CUDA device or its emulation"]
fn logprobs_are_the_log_softmax_of_the_token_and_of_the_likeliest() {
    let cuda = open();
    let rng = &mut Rng(21);
    for (vocab, top, spread) in [(1, 1, 1.0f32), (7, 7, 3.0), (603, 0, 8.0), (3001, 20, 30.0), (2048, 5, 0.0)] {
        let rows = 3;
        let logits: Vec<f32> = rng.units(rows * vocab).iter().map(|v| (v * spread * 4.0).round() / 4.0).collect();
        let token_ids: Vec<i32> = (0..rows).map(|row| ((row * 997) % vocab) as i32).collect();
        let (ids, values) = logprobs(&cuda, &logits, vocab, &token_ids, top);
        for row in 0..rows {
            let logits = &logits[row * vocab..(row + 1) * vocab];
            let max = logits.iter().copied().fold(f32::MIN, f32::max);
            let log_sum = logits.iter().map(|l| f64::from(l - max).exp()).sum::<f64>().ln();
            // Rounding to multiples of a quarter gives many equals.
            let mut likeliest: Vec<usize> = (0..vocab).collect();
            likeliest.sort_by(|a, b| logits[*b].total_cmp(&logits[*a]).then(a.cmp(b)));
            let expected: Vec<i32> = likeliest[..top].iter().map(|id| *id as i32).collect();
            assert_eq!(ids[row * top..(row + 1) * top], expected, "vocab {vocab}");
            let wanted = std::iter::once(token_ids[row]).chain(expected);
            let mut comparison = Comparison::new(&format!("logprobs, {top} of {vocab}"));
            for (id, value) in wanted.zip(&values[row * (1 + top)..]) {
                let exact = f64::from(logits[id as usize] - max) - log_sum;
                // A thread adds up to 6 terms of at most 1 in f32, expf is good to 2^-22, and the result is rounded.
                let tolerance = 1e-6 + exact.abs() * 2f64.powi(-23);
                comparison.add(format_args!("id {id}"), *value, exact, tolerance);
            }
        }
    }
}

#[test]
#[ignore = "needs a CUDA device or its emulation"]
fn logprobs_of_what_is_no_distribution_or_no_token_are_nan() {
    let (cuda, vocab) = (open(), 700);
    let mut logits = vec![0.5f32; 5 * vocab];
    (logits[3], logits[vocab + 699], logits[2 * vocab + 600]) = (f32::NAN, -f32::NAN, f32::INFINITY);
    logits[3 * vocab + 1..4 * vocab].fill(f32::NEG_INFINITY);
    let (_, values) = logprobs(&cuda, &logits, vocab, &[1, 1, 1, 0, -1], 2);
    assert!(values[..9].iter().all(|v| v.is_nan()), "{values:?}");
    assert_eq!((values[9], values[10], values[11]), (0.0, 0.0, f32::NEG_INFINITY), "one token has it all");
    let one = -(vocab as f32).ln();
    assert!(values[12].is_nan() && (values[13] - one).abs() < 1e-6 && values[13] == values[14], "{values:?}");
}
