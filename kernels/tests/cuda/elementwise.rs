use crate::{
    common::{Rng, assert_close},
    support::*,
};
use idefics_kernels::{Backend, DType, GraphKey, Pictures};

#[test]
#[ignore = "needs a CUDA device or its emulation"]
fn pictures_are_cut_into_patches_and_normalised() {
    let cuda = open();
    // Rows and columns of patches of each picture.
    for (size, channels, grids) in
        [(1, 1, vec![(1, 1)]), (14, 3, vec![(2, 3)]), (14, 3, vec![(1, 1), (3, 2), (4, 4)]), (5, 2, vec![(1, 7), (6, 1)])]
    {
        let rng = &mut Rng(size as u64);
        let table: Vec<f32> = rng.units(channels * 256);
        let (mut pixels, mut origins, mut widths, mut expected) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
        for (rows, cols) in grids {
            let (first, width) = (pixels.len() / channels, cols * size);
            pixels.extend((0..rows * size * width * channels).map(|_| rng.below(256) as u8));
            for (row, col) in (0..rows).flat_map(|row| (0..cols).map(move |col| (row, col))) {
                let origin = first + row * size * width + col * size;
                origins.push(origin as i32);
                widths.push(width as i32);
                for (channel, y, x) in (0..channels).flat_map(|c| (0..size).flat_map(move |y| (0..size).map(move |x| (c, y, x)))) {
                    expected.push(round(table[channel * 256 + pixels[(origin + y * width + x) * channels + channel] as usize]));
                }
            }
        }
        let mut out = poisoned(&cuda, origins.len(), channels * size * size, DType::Bf16);
        let pictures = Pictures {
            pixels: &elements(&cuda, pixels.len() / channels, channels, &pixels),
            origins: &indices(&cuda, &origins),
            widths: &indices(&cuda, &widths),
            table: &elements(&cuda, channels, 256, &table),
            patch_size: size,
        };
        cuda.patchify(&pictures, &mut out).unwrap();
        assert_eq!(read(&cuda, &out), expected, "{} patches of {size}", origins.len());
        assert_untouched_around("patchify", &cuda, &mut out);
        // Places that make no sense read some pixel and harm nothing.
        let wrong: Vec<i32> = (0..origins.len()).map(|i| [i32::MIN, i32::MAX, -1][i % 3]).collect();
        cuda.patchify(&Pictures { origins: &indices(&cuda, &wrong), ..pictures }, &mut out).unwrap();
        cuda.patchify(&Pictures { widths: &indices(&cuda, &wrong), ..pictures }, &mut out).unwrap();
        assert!(read(&cuda, &out).iter().all(|value| table.iter().any(|entry| round(*entry) == *value)));
    }
}

#[test]
#[ignore = "needs a CUDA device or its emulation"]
fn gate_and_up_are_multiplied() {
    let cuda = open();
    for (rows, n) in [(1, 1), (1, 8), (5, 24), (3, 29), (40, 512)] {
        let x: Vec<f32> = units(&mut Rng(n as u64), rows * 2 * n).iter().map(|v| round(v * 20.0)).collect();
        let mut out = poisoned(&cuda, rows, n, DType::Bf16);
        cuda.silu_and_mul(&tensor(&cuda, rows, 2 * n, &x), &mut out).unwrap();
        let expected: Vec<f64> = (0..rows * n)
            .map(|i| {
                let (gate, up) = (f64::from(x[i / n * 2 * n + i % n]), f64::from(x[i / n * 2 * n + n + i % n]));
                gate / (1.0 + (-gate).exp()) * up
            })
            .collect();
        // The fast exponential is good to 2^-21 (CUDA C++ programming guide, mathematical functions), far below bf16.
        let tolerance = |i: usize| expected[i].abs() * (BF16_ROUNDING + 1e-5) + 1e-30;
        assert_close(&format!("silu_and_mul {rows} x {n}"), &read(&cuda, &out), &expected, tolerance);
        assert_untouched_around("silu_and_mul", &cuda, &mut out);
    }
}

#[test]
#[ignore = "needs a CUDA device or its emulation"]
fn recorded_ops_read_what_their_tensors_hold_then() {
    let cuda = open();
    let mut x = tensor(&cuda, 2, 16, &[0.0; 32]);
    let mut out = poisoned(&cuda, 2, 8, DType::Bf16);
    // At first sight the ops run, at the second they are recorded, from the third on they are replayed.
    for (turn, value) in [1.0f32, 2.0, -3.0, 4.0].into_iter().enumerate() {
        write(&cuda, &[value; 32], &mut x);
        let mut called = false;
        cuda.graphed(GraphKey { name: "test", sizes: [2, 0, 0] }, &mut || {
            called = true;
            cuda.silu_and_mul(&x, &mut out)
        })
        .unwrap();
        assert_eq!(called, turn < 2);
        let expected = f64::from(value).powi(2) / (1.0 + f64::from(-value).exp());
        assert_close(&format!("graph, turn {turn}"), &read(&cuda, &out), &[expected; 16], |_| expected.abs() * (BF16_ROUNDING + 1e-5));
    }
}

#[test]
#[ignore = "needs a CUDA device or its emulation"]
fn graphs_that_were_forgotten_are_recorded_again() {
    let cuda = open();
    let mut x = tensor(&cuda, 1, 16, &[0.0; 16]);
    let mut out = poisoned(&cuda, 1, 8, DType::Bf16);
    // More keys than are remembered: when the first comes again, it is long forgotten, with the graph of which a launch may be queued.
    for round in 0..2 {
        for key in 0..600 {
            let mut called = 0;
            for turn in 0..3 {
                let value = (1 + key % 7 + turn) as f32;
                write(&cuda, &[value; 16], &mut x);
                let f = &mut || {
                    called += 1;
                    cuda.silu_and_mul(&x, &mut out)
                };
                cuda.graphed(GraphKey { name: "many", sizes: [key, 0, 0] }, f).unwrap();
                if key % 50 == 0 {
                    let expected = f64::from(value).powi(2) / (1.0 + f64::from(-value).exp());
                    assert_close("graph of many", &read(&cuda, &out), &[expected; 8], |_| expected.abs() * (BF16_ROUNDING + 1e-5));
                }
            }
            assert_eq!(called, 2, "key {key} in round {round}");
        }
    }
}

#[test]
#[ignore = "needs a CUDA device or its emulation"]
fn recording_that_fails_leaves_the_card_as_it_was() {
    let cuda = open();
    let x = tensor(&cuda, 2, 16, &[1.0; 32]);
    let (mut out, mut wrong) = (poisoned(&cuda, 2, 8, DType::Bf16), poisoned(&cuda, 2, 9, DType::Bf16));
    let key = GraphKey { name: "fails", sizes: [0; 3] };
    cuda.graphed(key, &mut || Ok(())).unwrap();
    // An op that is refused, a wait that a capture does not survive, a panic: each is the second sight of the key.
    let refused = cuda.graphed(key, &mut || cuda.silu_and_mul(&x, &mut out).and_then(|()| cuda.silu_and_mul(&x, &mut wrong)));
    assert!(refused.unwrap_err().to_string().contains("silu_and_mul"));
    let waits = &mut || {
        let _ = cuda.synchronize();
        Ok(())
    };
    cuda.graphed(key, waits).unwrap();
    let panicked = || cuda.graphed(key, &mut || panic!("an op that panics while it is recorded"));
    assert!(std::panic::catch_unwind(std::panic::AssertUnwindSafe(panicked)).is_err());
    for _ in 0..2 {
        cuda.graphed(key, &mut || cuda.silu_and_mul(&x, &mut out)).unwrap();
        let expected = 1.0 / (1.0 + (-1f64).exp());
        assert_close("graph, behind the failures", &read(&cuda, &out), &[expected; 16], |_| BF16_ROUNDING);
    }
}

#[test]
#[ignore = "needs a CUDA device or its emulation"]
fn ops_that_cannot_be_recorded_run() {
    let cuda = open();
    let mut x = tensor(&cuda, 2, 16, &[0.0; 32]);
    let mut out = poisoned(&cuda, 2, 8, DType::Bf16);
    for value in [1.0f32, 2.0, 3.0, 4.0] {
        write(&cuda, &[value; 32], &mut x);
        let waits = &mut || {
            cuda.silu_and_mul(&x, &mut out)?;
            let _ = cuda.synchronize();
            Ok(())
        };
        cuda.graphed(GraphKey { name: "waits", sizes: [0; 3] }, waits).unwrap();
        let expected = f64::from(value).powi(2) / (1.0 + f64::from(-value).exp());
        assert_close("graph, waits", &read(&cuda, &out), &[expected; 16], |_| expected.abs() * (BF16_ROUNDING + 1e-5));
    }
}

#[test]
#[ignore = "needs a CUDA device or its emulation"]
fn card_is_given_back_while_it_has_work() {
    let cuda = open();
    let x = tensor(&cuda, 2, 16, &[1.0; 32]);
    let mut out = poisoned(&cuda, 2, 8, DType::Bf16);
    for _ in 0..3 {
        cuda.graphed(GraphKey { name: "last", sizes: [0; 3] }, &mut || cuda.silu_and_mul(&x, &mut out)).unwrap();
    }
    drop(cuda);
    // Tensors may outlive the backend that they came from.
    drop((x, out));
}
