use crate::{
    common::{Rng, Stored, assert_close, bits, weights},
    support::*,
};
use idefics_kernels::{Backend, DType, Epilogue, GraphKey, Tensor, cuda::Cuda};

/// Up to this many rows the weight is streamed; above, cuBLASLt multiplies.
const STREAMED_ROWS: usize = 16;

const EPILOGUES: [Epilogue; 3] = [Epilogue::Store, Epilogue::Accumulate, Epilogue::GeluTanh];

fn gelu(x: f64) -> f64 {
    0.5 * x * (1.0 + ((2.0 / std::f64::consts::PI).sqrt() * (x + 0.044715 * x * x * x)).tanh())
}

#[derive(Clone, Debug)]
struct Case {
    n: usize,
    k: usize,
    features: Vec<usize>,
    weight_dtype: DType,
    out_dtype: DType,
    epilogue: Epilogue,
    has_bias: bool,
}

impl Case {
    fn new(n: usize, k: usize, features: usize) -> Self {
        let (weight_dtype, out_dtype, epilogue) = (DType::Bf16, DType::Bf16, Epilogue::Store);
        Self { n, k, features: vec![features], weight_dtype, out_dtype, epilogue, has_bias: false }
    }

    fn m(&self) -> usize {
        self.features.iter().sum()
    }
}

/// Operands of a case, and what their product is.
struct Operands {
    case: Case,
    weight: Stored,
    bias: Stored,
    x: Vec<f32>,
    before: Vec<f32>,
}

impl Operands {
    fn new(case: &Case, seed: u64) -> Self {
        let rng = &mut Rng(seed);
        let shapes: Vec<[usize; 2]> = case.features.iter().map(|rows| [*rows, case.k]).collect();
        let weight = weights(rng, case.weight_dtype, &shapes.iter().map(|shape| &shape[..]).collect::<Vec<_>>());
        let bias = weights(rng, case.weight_dtype, &[&[case.m()]]);
        let (x, before) = (units(rng, case.n * case.k), units(rng, case.n * case.m()));
        Self { case: case.clone(), weight, bias, x, before }
    }

    /// A tensor to put the product in: what was there before, or poison.
    fn out(&self, cuda: &Cuda) -> Tensor<Cuda> {
        let mut out = poisoned(cuda, self.case.n, self.case.m(), self.case.out_dtype);
        match (self.case.epilogue, self.case.out_dtype) {
            (Epilogue::Accumulate, DType::F32) => cuda.upload(&self.before, &mut out).unwrap(),
            (Epilogue::Accumulate, _) => write(cuda, &self.before, &mut out),
            _ => (),
        }
        out
    }

    /// The product and what it may be off by.
    fn expected(&self) -> (Vec<f64>, Vec<f64>) {
        let Case { n, k, out_dtype, epilogue, has_bias, .. } = self.case;
        let m = self.case.m();
        let (mut expected, mut tolerance) = (Vec::new(), Vec::new());
        for i in 0..n {
            for j in 0..m {
                let terms = (0..k).map(|l| f64::from(self.x[i * k + l]) * f64::from(round(self.weight.values[j * k + l])));
                let (sum, size) = terms.fold((0.0, 0.0), |(sum, size), term| (sum + term, size + term.abs()));
                let bias = if has_bias { f64::from(round(self.bias.values[j])) } else { 0.0 };
                let kept = if epilogue == Epilogue::Accumulate { f64::from(self.before[i * m + j]) } else { 0.0 };
                let value = sum + bias + kept;
                // Tensor cores add 8 or 16 exact products at a time to a sum, and cut off what is below its last bit: 2^-23 of a
                // partial sum, which is at most the sum of magnitudes. A few additions more join the parts of a split k.
                let rounding = (k as f64 / 8.0 + 32.0) * f64::from(f32::EPSILON) * (size + bias.abs() + kept.abs());
                let (value, rounding) = match epilogue {
                    // Its slope is below 1.13; the exponential or tangent in it may be the card's approximation, good to 2^-11.
                    Epilogue::GeluTanh => (gelu(value), 1.13 * rounding + value.abs() / 2048.0),
                    _ => (value, rounding),
                };
                let stored = if out_dtype == DType::Bf16 { value.abs() * BF16_ROUNDING } else { 0.0 };
                expected.push(value);
                tolerance.push(stored + 1.01 * rounding + 1e-30);
            }
        }
        (expected, tolerance)
    }

    fn check(&self, name: &str, cuda: &Cuda, out: &mut Tensor<Cuda>) {
        let name = format!("{name} {:?}", self.case);
        let (expected, tolerance) = self.expected();
        assert_close(&name, &read(cuda, out), &expected, |i| tolerance[i]);
        assert_untouched_around(&name, cuda, out);
    }
}

fn run(cuda: &Cuda, case: &Case, seed: u64) {
    let operands = Operands::new(case, seed);
    let (weight, bias) = (operands.weight.load(cuda), operands.bias.load(cuda));
    let x = tensor(cuda, case.n, case.k, &operands.x);
    let mut out = operands.out(cuda);
    cuda.linear(&x, &weight, case.has_bias.then_some(&bias), case.epilogue, &mut out).unwrap();
    operands.check("linear", cuda, &mut out);
}

#[test]
#[ignore = "needs a CUDA device or its emulation"]
fn products_match_f64_for_all_numbers_of_rows_and_all_tails() {
    let cuda = open();
    // No vector divides 1, 7, 75, 588; 200 ends within a batch of a warp, 1,152 within a turn of all.
    let shapes = [(1, 1), (7, 5), (8, 16), (75, 33), (200, 17), (588, 9), (1152, 31)];
    for n in (1..=20).chain([31, 67]) {
        for (i, (k, m)) in shapes.into_iter().enumerate() {
            let out_dtype = if (n + i) % 2 == 0 { DType::F32 } else { DType::Bf16 };
            run(&cuda, &Case { out_dtype, has_bias: (n + i) % 3 == 0, ..Case::new(n, k, m) }, (n * 100 + i) as u64);
        }
    }
}

#[test]
#[ignore = "needs a CUDA device or its emulation"]
fn every_epilogue_goes_with_and_without_bias_into_either_type() {
    let cuda = open();
    for epilogue in EPILOGUES {
        for has_bias in [false, true] {
            for out_dtype in [DType::Bf16, DType::F32] {
                for (n, k, m) in [(1, 72, 33), (3, 75, 16), (8, 80, 40), (9, 72, 33), (16, 75, 40), (17, 72, 33), (40, 75, 18)] {
                    run(&cuda, &Case { epilogue, has_bias, out_dtype, ..Case::new(n, k, m) }, (n + k) as u64);
                }
            }
        }
    }
}

#[test]
#[ignore = "needs a CUDA device or its emulation"]
fn long_rows_go_through_whole_and_partial_turns() {
    let cuda = open();
    // Widths of SigLIP and Mistral: 4,096 and 14,336 fill every turn of the pipeline but the last, 4,304 and 14,344 do not.
    for (n, k) in [(1, 4096), (8, 4096), (5, 4304), (16, 4304), (1, 14336), (8, 14344), (9, 14336), (2, 4101), (18, 4096)] {
        run(&cuda, &Case { out_dtype: DType::F32, ..Case::new(n, k, 19) }, k as u64);
    }
}

#[test]
#[ignore = "needs a CUDA device or its emulation"]
fn stacked_weights_of_every_checkpoint_type_are_one_range_of_rows() {
    let cuda = open();
    for weight_dtype in [DType::F32, DType::F16, DType::Bf16] {
        for n in [1, 3, 20] {
            for (k, features) in [(75, vec![1, 1, 1]), (72, vec![5, 40, 3]), (64, vec![64, 64]), (75, vec![70, 1, 130])] {
                run(&cuda, &Case { weight_dtype, features, has_bias: true, ..Case::new(n, k, 0) }, 11);
            }
        }
    }
}

#[test]
#[ignore = "needs a CUDA device or its emulation"]
fn streamed_row_has_the_same_bits_whatever_else_is_in_the_batch() {
    let cuda = open();
    for (k, m) in [(1096, 40), (523, 33)] {
        for out_dtype in [DType::F32, DType::Bf16] {
            let operands = Operands::new(&Case { out_dtype, ..Case::new(STREAMED_ROWS, k, m) }, 5);
            let weight = operands.weight.load(&cuda);
            let product = |rows: std::ops::Range<usize>| {
                let x = tensor(&cuda, rows.len(), k, &operands.x[rows.start * k..rows.end * k]);
                let mut out = poisoned(&cuda, rows.len(), m, out_dtype);
                cuda.linear(&x, &weight, None, Epilogue::Store, &mut out).unwrap();
                bits(&read(&cuda, &out))
            };
            let alone: Vec<Vec<u32>> = (0..STREAMED_ROWS).map(|row| product(row..row + 1)).collect();
            for rows in (2..=STREAMED_ROWS).map(|n| 0..n).chain([3..7, 5..14, 1..16]) {
                assert!(product(rows.clone()) == alone[rows.clone()].concat(), "rows {rows:?} of {k} into {out_dtype}");
            }
        }
    }
}

/// While one engine records, another of the process multiplies what it never did, starts and ends, which cuBLASLt does not like.
#[test]
#[ignore = "needs a CUDA device or its emulation"]
fn products_are_planned_while_another_engine_records() {
    let (recording, multiplying) = (open(), open());
    let weight = weights(&mut Rng(3), DType::Bf16, &[&[24, 16]]).load(&multiplying);
    let x = tensor(&recording, 1, 16, &[1.0; 16]);
    let mut out = poisoned(&recording, 1, 8, DType::Bf16);
    for round in 0..4 {
        let (begin, begun) = std::sync::mpsc::channel();
        std::thread::scope(|scope| {
            let (multiplying, weight) = (&multiplying, &weight);
            let other = scope.spawn(move || {
                begun.recv().unwrap();
                let x = tensor(multiplying, 20 + round, 16, &vec![1.0; (20 + round) * 16]);
                let mut out = poisoned(multiplying, 20 + round, 24, DType::Bf16);
                multiplying.linear(&x, weight, None, Epilogue::Store, &mut out).unwrap();
                drop(open());
                read(multiplying, &out)
            });
            for turn in 0..2 {
                let f = &mut || {
                    if turn == 1 {
                        begin.send(()).unwrap();
                    }
                    // Long enough for the other to come into its way.
                    (0..5000).try_for_each(|_| recording.silu_and_mul(&x, &mut out))
                };
                recording.graphed(GraphKey { name: "beside", sizes: [round, 0, 0] }, f).unwrap();
            }
            let found = other.join().unwrap();
            assert!(found.chunks(24).all(|row| row == &found[..24]) && found.iter().all(|v| v.is_finite()));
        });
    }
}

#[test]
#[ignore = "needs a CUDA device or its emulation"]
fn recorded_graphs_multiply_what_is_there_when_they_are_replayed() {
    let cuda = open();
    // By the two kernels that stream, by cuBLASLt, and by a kernel where cuBLASLt does not take the types.
    for (bucket, (n, out_dtype)) in [(2, DType::Bf16), (12, DType::F32), (24, DType::Bf16), (25, DType::F32)].into_iter().enumerate() {
        for epilogue in EPILOGUES {
            let case = Case { epilogue, has_bias: true, out_dtype, ..Case::new(n, 136, 35) };
            let mut operands = Operands::new(&case, 1);
            let (weight, bias) = (operands.weight.load(&cuda), operands.bias.load(&cuda));
            let mut x = tensor(&cuda, n, case.k, &operands.x);
            let mut out = operands.out(&cuda);
            let name = ["store", "accumulate", "gelu"][epilogue as usize];
            for turn in 0..5 {
                let rng = &mut Rng(100 + turn);
                (operands.x, operands.before) = (units(rng, n * case.k), units(rng, n * case.m()));
                write(&cuda, &operands.x, &mut x);
                if out_dtype == DType::F32 {
                    cuda.upload(&operands.before, &mut out).unwrap();
                } else {
                    write(&cuda, &operands.before, &mut out);
                }
                cuda.graphed(GraphKey { name, sizes: [bucket, 0, 0] }, &mut || cuda.linear(&x, &weight, Some(&bias), epilogue, &mut out))
                    .unwrap();
                operands.check(&format!("linear, turn {turn}"), &cuda, &mut out);
            }
        }
    }
}

#[test]
#[ignore = "needs a CUDA device or its emulation"]
fn product_that_is_new_when_a_graph_is_recorded_is_in_the_next() {
    let cuda = open();
    let case = Case { has_bias: true, ..Case::new(30, 64, 48) };
    let operands = Operands::new(&case, 1);
    let (weight, bias) = (operands.weight.load(&cuda), operands.bias.load(&cuda));
    let x = tensor(&cuda, case.n, case.k, &operands.x);
    let mut out = operands.out(&cuda);
    let mut calls = 0;
    for _ in 0..5 {
        let mut step = || {
            calls += 1;
            // Nothing in the first call, so that the recording is the first to ask for this product. cuBLASLt cannot be asked then.
            if calls == 1 { Ok(()) } else { cuda.linear(&x, &weight, Some(&bias), Epilogue::Store, &mut out) }
        };
        cuda.graphed(GraphKey { name: "late", sizes: [0; 3] }, &mut step).unwrap();
    }
    assert_eq!(calls, 4, "run, not recorded but run, recorded; then replayed");
    operands.check("linear, late plan", &cuda, &mut out);
}

#[test]
#[ignore = "needs a CUDA device or its emulation"]
fn no_rows_are_no_work() {
    let cuda = open();
    let weight = weights(&mut Rng(1), DType::Bf16, &[&[3, 4]]).load(&cuda);
    let mut out = poisoned(&cuda, 0, 3, DType::Bf16);
    cuda.linear(&tensor(&cuda, 0, 4, &[]), &weight, None, Epilogue::Store, &mut out).unwrap();
    assert_untouched_around("no rows", &cuda, &mut out);
}

#[test]
#[ignore = "needs a CUDA device or its emulation"]
fn no_input_features_leave_the_bias() {
    let cuda = open();
    let rng = &mut Rng(1);
    let bias = weights(rng, DType::Bf16, &[&[3]]);
    let empty = weights(rng, DType::Bf16, &[&[3, 0], &[1]]).views;
    let weight = cuda.load_weight(&empty[..1]).unwrap();
    for n in [2, 20] {
        let mut out = poisoned(&cuda, n, 3, DType::F32);
        cuda.linear(&tensor(&cuda, n, 0, &[]), &weight, Some(&bias.load(&cuda)), Epilogue::Store, &mut out).unwrap();
        assert_eq!(read(&cuda, &out), bias.values.repeat(n));
    }
}

#[test]
#[ignore = "needs a CUDA device or its emulation"]
fn more_shapes_than_are_remembered_are_multiplied_right() {
    let cuda = open();
    let case = Case::new(4200, 8, 2);
    let operands = Operands::new(&case, 1);
    let weight = operands.weight.load(&cuda);
    let mut x = tensor(&cuda, case.n, case.k, &operands.x);
    let mut out = operands.out(&cuda);
    let (all_x, all_out) = (x.window(), out.window());
    // The last was forgotten long ago; it writes the first rows anew.
    for rows in (STREAMED_ROWS + 1..=case.n).chain([20]) {
        x.set_window(all_x.start..all_x.start + rows).unwrap();
        out.set_window(all_out.start..all_out.start + rows).unwrap();
        cuda.linear(&x, &weight, None, Epilogue::Store, &mut out).unwrap();
    }
    out.set_window(all_out).unwrap();
    operands.check("linear, 4,184 shapes", &cuda, &mut out);
}
