//! What is left of a distribution, against `transformers`: `tests/golden/make_golden.py` made the values.

use super::{Sampler, Scratch, draw, warpers};
use crate::sequence::SamplingParams;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use serde_json::Value;

struct Case {
    name: String,
    logits: Vec<f32>,
    sampler: Sampler,
    expected: Value,
}

struct Golden {
    stop: Vec<u32>,
    banned: Vec<u32>,
    cases: Vec<Case>,
}

fn golden() -> Golden {
    let json: Value = serde_json::from_str(include_str!("../../tests/golden/sampling.json")).unwrap();
    let cases = json["cases"].as_array().unwrap().iter().map(|case| {
        let mut sampler = Sampler::new(params(&case["params"]), &ids(&case["prompt"]));
        ids(&case["generated"]).into_iter().for_each(|id| sampler.history.push(id));
        Case { name: case["name"].as_str().unwrap().into(), logits: logits(&case["logits"]), sampler, expected: case.clone() }
    });
    Golden { stop: ids(&json["stop"]), banned: ids(&json["banned"]), cases: cases.collect() }
}

fn ids(json: &Value) -> Vec<u32> {
    json.as_array().into_iter().flatten().map(|id| id.as_u64().unwrap() as u32).collect()
}

/// The formula of `make_golden.py`.
fn logits(json: &Value) -> Vec<f32> {
    let [mut state, vocab, bits] = [0, 1, 2].map(|i| json[i].as_u64().unwrap());
    let next = |_| {
        state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        ((state >> (64 - bits)) as f32 - 2f32.powi(bits as i32 - 1)) * 2f32.powi(4 - bits as i32)
    };
    (0..vocab).map(next).collect()
}

fn params(json: &Value) -> SamplingParams {
    let none = SamplingParams::GREEDY;
    let number = |name: &str, default: f32| json[name].as_f64().map_or(default, |value| value as f32);
    let count = |name: &str| json[name].as_u64().unwrap_or(0) as u32;
    let biases = json["logit_bias"].as_array().into_iter().flatten();
    SamplingParams {
        temperature: number("temperature", none.temperature),
        top_k: count("top_k"),
        top_p: number("top_p", none.top_p),
        min_p: number("min_p", none.min_p),
        typical_p: number("typical_p", none.typical_p),
        repetition_penalty: number("repetition_penalty", none.repetition_penalty),
        presence_penalty: number("presence_penalty", none.presence_penalty),
        frequency_penalty: number("frequency_penalty", none.frequency_penalty),
        logit_bias: biases.map(|pair| (pair[0].as_u64().unwrap() as u32, pair[1].as_f64().unwrap() as f32)).collect(),
        stop_token_ids: ids(&json["stop_token_ids"]),
        min_new_tokens: count("min_new_tokens"),
        ignore_eos: json["ignore_eos"].as_bool().unwrap_or(false),
        ..none
    }
}

#[test]
fn distributions_are_those_of_transformers() {
    let Golden { stop, banned, cases } = golden();
    // One for all: nothing of a case may show in the next.
    let mut scratch = Scratch::default();
    for Case { name, logits, mut sampler, expected } in cases {
        if let Some(token_id) = expected["token_id"].as_u64() {
            let found = sampler.sample(&logits, &banned, &stop, &mut scratch).map(|(id, _)| id);
            assert_eq!(found, Some(token_id as u32), "{name}");
            continue;
        }
        sampler.score(&logits, &banned, &stop, &mut scratch);
        let total = warpers::distribution(&sampler.params, &mut scratch).unwrap();
        let kept: Vec<u32> = scratch.candidates.iter().map(|c| c.token_id).collect();
        assert_eq!(kept, ids(&expected["kept"]), "{name}");
        for (c, probability) in scratch.candidates.iter().zip(expected["probabilities"].as_array().unwrap()) {
            let (found, expected) = (f64::from(c.weight) / total, probability.as_f64().unwrap());
            // Scores and their differences stay below 32, where f32 rounds by 9.5e-7 at most; a score, the best score and their
            // difference are rounded, and the temperature divides what that adds up to.
            let tolerance = 3e-6 / f64::from(sampler.params.temperature.min(1.0));
            assert!((found / expected - 1.0).abs() <= tolerance, "{name}: {} has {found}, expected {expected}", c.token_id);
        }
    }
}

#[test]
fn draws_follow_the_distributions() {
    let Golden { stop, banned, cases } = golden();
    let (mut scratch, mut rng, draws) = (Scratch::default(), ChaCha8Rng::seed_from_u64(11), 10_000);
    for Case { name, logits, sampler, expected } in cases.into_iter().filter(|case| !case.expected["kept"].is_null()) {
        sampler.score(&logits, &banned, &stop, &mut scratch);
        let total = warpers::distribution(&sampler.params, &mut scratch).unwrap();
        let mut counts = vec![0u32; logits.len()];
        for _ in 0..draws {
            counts[draw(&scratch.candidates, total, rng.random()).unwrap() as usize] += 1;
        }
        let kept = ids(&expected["kept"]);
        for (id, probability) in kept.iter().zip(expected["probabilities"].as_array().unwrap()) {
            let (count, p) = (f64::from(std::mem::take(&mut counts[*id as usize])), probability.as_f64().unwrap());
            // Six standard deviations of a binomial count, and six draws for the rare ones, whose counts are Poisson's: some
            // thousand counts are looked at.
            let tolerance = 6.0 * (f64::from(draws) * p * (1.0 - p)).sqrt() + 6.0;
            assert!((count - f64::from(draws) * p).abs() <= tolerance, "{name}: {id} was drawn {count} times at {p}");
        }
        assert_eq!(counts.iter().sum::<u32>(), 0, "{name}: something else was drawn");
    }
}
