//! `linear` against products in f64: both paths, every element type, tails in all directions.

mod common;

use common::*;
use idefics_kernels::{Backend, DType, Epilogue, cpu::Cpu};

/// Up to this many rows the weight is streamed; above, it goes through packed blocks.
const STREAMED_ROWS: usize = 16;

const DTYPES: [DType; 3] = [DType::F32, DType::F16, DType::Bf16];

struct Case {
    n: usize,
    k: usize,
    features: Vec<usize>,
    dtype: DType,
    epilogue: Epilogue,
    has_bias: bool,
}

fn gelu(x: f64) -> f64 {
    0.5 * x * (1.0 + ((2.0 / std::f64::consts::PI).sqrt() * (x + 0.044715 * x * x * x)).tanh())
}

/// Runs the case at every level, compares with f64, and the thread counts bit for bit.
fn run(case: &Case, seed: u64) {
    let rng = &mut Rng(seed);
    let Case { n, k, dtype, epilogue, .. } = *case;
    let features: usize = case.features.iter().sum();
    let shapes: Vec<[usize; 2]> = case.features.iter().map(|rows| [*rows, k]).collect();
    let weight = weights(rng, dtype, &shapes.iter().map(|shape| &shape[..]).collect::<Vec<_>>());
    let bias = weights(rng, dtype, &[&[features]]);
    let (x, before) = (rng.units(n * k), rng.units(n * features));

    let mut expected = Vec::new();
    let mut tolerance = Vec::new();
    for i in 0..n {
        for j in 0..features {
            let terms = (0..k).map(|l| f64::from(x[i * k + l]) * f64::from(weight.values[j * k + l]));
            let (sum, size) = terms.fold((0.0, 0.0), |(sum, size), term| (sum + term, size + term.abs()));
            let bias = if case.has_bias { f64::from(bias.values[j]) } else { 0.0 };
            let kept = if epilogue == Epilogue::Accumulate { f64::from(before[i * features + j]) } else { 0.0 };
            let value = sum + bias + kept;
            // Each of the at most k / 4 + k / 256 + 8 additions to a sum rounds by half of 2^-23 of a partial sum, which is at
            // most the sum of magnitudes; a product that is not fused rounds once more. GELU's slope is below 1.13.
            let rounding = (k as f64 / 2.0 + 16.0) * f64::from(f32::EPSILON) / 2.0;
            tolerance.push(1.2 * rounding * (size + bias.abs() + kept.abs()) + 1e-30);
            expected.push(if epilogue == Epilogue::GeluTanh { gelu(value) } else { value });
        }
    }

    let mut previous: Option<(Cpu, Vec<f32>)> = None;
    for cpu in backends() {
        let name = format!("{n} x {k} x {features} {dtype} {epilogue:?} on {}", describe(&cpu));
        let (weight, bias) = (weight.load(&cpu), bias.load(&cpu));
        let x = tensor(&cpu, n, k, &x);
        let mut out = poisoned(&cpu, n, features);
        if epilogue == Epilogue::Accumulate {
            cpu.upload(&before, &mut out).unwrap();
        }
        cpu.linear(&x, &weight, case.has_bias.then_some(&bias), epilogue, &mut out).unwrap();
        let found = read::<f32>(&cpu, &out);
        assert_close(&name, &found, &expected, |i| tolerance[i]);
        assert!(read_around(&cpu, &mut out).iter().all(|value| value.is_nan()), "{name}: wrote outside of the window");
        if let Some((other, bits_of_other)) = &previous
            && other.isa() == cpu.isa()
        {
            assert_eq!(bits(bits_of_other), bits(&found), "{name}: bits depend on threads");
        }
        previous = Some((cpu, found));
    }
}

#[test]
fn products_match_f64_for_all_shapes_and_types() {
    let mut seed = 0;
    for dtype in DTYPES {
        for n in [1, 2, 3, 4, 5, 6, 7, 8, 9, 13, 16, 17, 28, 29, 67] {
            for (k, features) in [(1, 1), (7, 5), (64, 33), (131, 203), (300, 31)] {
                seed += 1;
                let case = Case { n, k, features: vec![features], dtype, epilogue: Epilogue::Store, has_bias: seed % 2 == 0 };
                run(&case, seed);
            }
        }
    }
}

#[test]
fn epilogues_apply_once_whatever_the_blocks() {
    for epilogue in [Epilogue::Store, Epilogue::Accumulate, Epilogue::GeluTanh] {
        for has_bias in [false, true] {
            // 1, 2 and 3 blocks of input features.
            for k in [384, 385, 800] {
                for n in [2, 17] {
                    run(&Case { n, k, features: vec![97], dtype: DType::Bf16, epilogue, has_bias }, (k + n) as u64);
                }
            }
        }
    }
}

#[test]
fn stacked_weights_are_one_range_of_rows() {
    for dtype in DTYPES {
        for n in [1, 3, 20] {
            for features in [vec![1, 1, 1], vec![5, 40, 3], vec![64, 64], vec![70, 1, 130]] {
                run(&Case { n, k: 75, features, dtype, epilogue: Epilogue::Store, has_bias: true }, 11);
            }
        }
    }
}

#[test]
fn shared_work_gives_the_same_bits() {
    // Large enough for several tasks of threads in both paths, several row blocks in one.
    run(&Case { n: 2, k: 800, features: vec![700], dtype: DType::Bf16, epilogue: Epilogue::Store, has_bias: true }, 1);
    run(&Case { n: 801, k: 70, features: vec![150], dtype: DType::Bf16, epilogue: Epilogue::GeluTanh, has_bias: true }, 2);
    run(&Case { n: 30, k: 300, features: vec![700], dtype: DType::F16, epilogue: Epilogue::Accumulate, has_bias: true }, 3);
}

#[test]
fn row_has_the_same_bits_whatever_else_is_in_the_batch() {
    let rng = &mut Rng(5);
    let (k, features) = (523, 75);
    let weight = weights(rng, DType::Bf16, &[&[features, k]]);
    let x = rng.units(40 * k);
    for cpu in backends() {
        let weight = weight.load(&cpu);
        let product = |rows: std::ops::Range<usize>| {
            let x = tensor(&cpu, rows.len(), k, &x[rows.start * k..rows.end * k]);
            let mut out = poisoned(&cpu, rows.len(), features);
            cpu.linear(&x, &weight, None, Epilogue::Store, &mut out).unwrap();
            bits(&read::<f32>(&cpu, &out))
        };
        let alone: Vec<Vec<u32>> = (0..STREAMED_ROWS).map(|row| product(row..row + 1)).collect();
        for n in 2..=STREAMED_ROWS {
            assert!(product(0..n) == alone[..n].concat(), "{n} rows on {}", describe(&cpu));
        }
        let all = product(0..40);
        for rows in [0..17, 3..23, 11..40] {
            let expected = &all[rows.start * features..rows.end * features];
            assert!(product(rows.clone()) == expected, "rows {rows:?} on {}", describe(&cpu));
        }
    }
}

#[test]
fn no_rows_are_no_work() {
    for cpu in backends() {
        let weight = weights(&mut Rng(1), DType::F32, &[&[3, 4]]).load(&cpu);
        let mut out = poisoned(&cpu, 0, 3);
        cpu.linear(&tensor(&cpu, 0, 4, &[]), &weight, None, Epilogue::Store, &mut out).unwrap();
        assert!(read_around(&cpu, &mut out).iter().all(|value| value.is_nan()));
    }
}

#[test]
fn no_input_features_leave_the_bias() {
    for cpu in backends() {
        let rng = &mut Rng(1);
        let bias = weights(rng, DType::F32, &[&[3]]);
        let empty = weights(rng, DType::F32, &[&[3, 0], &[1]]).views;
        let weight = cpu.load_weight(&empty[..1]).unwrap();
        for n in [2, 20] {
            let mut out = poisoned(&cpu, n, 3);
            cpu.linear(&tensor(&cpu, n, 0, &[]), &weight, Some(&bias.load(&cpu)), Epilogue::Store, &mut out).unwrap();
            assert_eq!(read::<f32>(&cpu, &out), bias.values.repeat(n));
        }
    }
}
