//! Ops that pass over rows, against f64 or exactly.

mod common;

use common::*;
use idefics_kernels::{AttentionShape, Backend, DType, KvCache, Pictures, Rope};

/// Rounding of f32: half of the distance of neighbours, relatively.
const ROUNDING: f64 = f32::EPSILON as f64 / 2.0;

/// Lengths around whole vectors of 4, 8 and 16 lanes, and around four of them.
const LENGTHS: [usize; 10] = [1, 3, 8, 15, 16, 17, 64, 67, 129, 1152];

#[test]
fn embedding_gives_the_rows_of_the_table_widened() {
    for dtype in [DType::F32, DType::F16, DType::Bf16] {
        for cols in LENGTHS {
            let table = weights(&mut Rng(1), dtype, &[&[3, cols], &[4, cols]]);
            let ids = [6, 0, 3, 3, 2];
            let expected: Vec<f32> = ids.iter().flat_map(|id| &table.values[id * cols..(id + 1) * cols]).copied().collect();
            for cpu in backends() {
                let mut out = poisoned(&cpu, ids.len(), cols);
                cpu.embed(&table.load(&cpu), &indices(&cpu, &ids.map(|id| id as i32)), &mut out).unwrap();
                assert_eq!(bits(&read::<f32>(&cpu, &out)), bits(&expected), "{dtype} {cols} on {}", describe(&cpu));
            }
        }
    }
}

#[test]
fn gather_and_scatter_stay_in_their_windows() {
    for cpu in backends() {
        let x = Rng(2).units(6 * 5);
        let src = tensor(&cpu, 6, 5, &x);
        let mut gathered = poisoned(&cpu, 3, 5);
        cpu.gather_rows(&src, &indices(&cpu, &[5, 0, 5]), &mut gathered).unwrap();
        let expected = [&x[25..30], &x[0..5], &x[25..30]].concat();
        assert_eq!(read::<f32>(&cpu, &gathered), expected);
        assert!(read_around(&cpu, &mut gathered).iter().all(|value| value.is_nan()));

        let mut scattered = tensor(&cpu, 6, 5, &[9.0; 30]);
        cpu.scatter_rows(&gathered, &indices(&cpu, &[4, 0, 1]), &mut scattered).unwrap();
        let nines = [9.0; 5];
        let expected = [&x[0..5], &x[25..30], &nines, &nines, &x[25..30], &nines].concat();
        assert_eq!(read::<f32>(&cpu, &scattered), expected);
    }
}

#[test]
fn rows_of_any_type_are_gathered() {
    let cpu = &backends()[0];
    let mut src = cpu.alloc(4, 3, DType::U8).unwrap();
    cpu.upload::<u8>(&(0..12).collect::<Vec<_>>(), &mut src).unwrap();
    let mut out = cpu.alloc(2, 3, DType::U8).unwrap();
    cpu.gather_rows(&src, &indices(cpu, &[3, 1]), &mut out).unwrap();
    assert_eq!(read::<u8>(cpu, &out), [9, 10, 11, 3, 4, 5]);
}

#[test]
fn pictures_become_patches_of_what_their_channels_table_says() {
    for cpu in backends() {
        let rng = &mut Rng(3);
        // Pixels a patch and a row of the picture; the first patch begins within a row.
        for (size, width, patches) in [(1, 1, 1), (14, 42, 3), (14, 140, 120)] {
            let table = rng.units(3 * 256);
            let count = (patches + size) * width;
            let bytes: Vec<u8> = (0..count * 3).map(|_| rng.next() as u8).collect();
            let mut pixels = cpu.alloc(count, 3, DType::U8).unwrap();
            cpu.upload(&bytes, &mut pixels).unwrap();
            let origins: Vec<i32> = (0..patches).map(|i| (i * width + (i * 5) % (width - size + 1)) as i32).collect();
            let mut out = poisoned(&cpu, patches, 3 * size * size);
            let pictures = Pictures {
                pixels: &pixels,
                origins: &indices(&cpu, &origins),
                widths: &indices(&cpu, &vec![width as i32; patches]),
                table: &tensor(&cpu, 3, 256, &table),
                patch_size: size,
            };
            cpu.patchify(&pictures, &mut out).unwrap();
            let found = read::<f32>(&cpu, &out);
            for (i, value) in found.iter().enumerate() {
                let (patch, channel, y, x) = (i / (3 * size * size), i / (size * size) % 3, i / size % size, i % size);
                let pixel = origins[patch] as usize + y * width + x;
                assert_eq!(*value, table[channel * 256 + usize::from(bytes[pixel * 3 + channel])]);
            }
        }
    }
}

#[test]
fn norms_match_f64() {
    for cols in LENGTHS {
        for rows in [1, 9, 70] {
            let rng = &mut Rng((cols + rows) as u64);
            // A mean far from 0, where a variance from sums of squares would lose its digits.
            let x: Vec<f32> = rng.units(rows * cols).iter().map(|x| 8.0 + x).collect();
            let (weight, bias) = (weights(rng, DType::Bf16, &[&[cols]]), weights(rng, DType::F16, &[&[cols]]));
            let eps = 1e-5f32;
            let (mut rms, mut layer) = (Vec::new(), Vec::new());
            for row in x.chunks(cols) {
                let wide: Vec<f64> = row.iter().map(|x| f64::from(*x)).collect();
                let mean = wide.iter().sum::<f64>() / cols as f64;
                let power = |shift: f64| wide.iter().map(|x| (x - shift) * (x - shift)).sum::<f64>() / cols as f64 + f64::from(eps);
                for (j, x) in wide.iter().enumerate() {
                    rms.push(x / power(0.0).sqrt() * f64::from(weight.values[j]));
                    layer.push((x - mean) / power(mean).sqrt() * f64::from(weight.values[j]) + f64::from(bias.values[j]));
                }
            }
            for cpu in backends() {
                let name = format!("{rows} x {cols} on {}", describe(&cpu));
                let (weight, bias, x) = (weight.load(&cpu), bias.load(&cpu), tensor(&cpu, rows, cols, &x));
                let mut out = poisoned(&cpu, rows, cols);
                cpu.rms_norm(&x, &weight, eps, &mut out).unwrap();
                // The mean of squares is off by at most the roundings of a sum of cols / 4 terms, halved by the root; six more
                // roundings follow.
                let sum = (cols as f64 / 8.0 + 8.0) * ROUNDING;
                assert_close(&format!("rms {name}"), &read::<f32>(&cpu, &out), &rms, |i| sum * rms[i].abs() + 1e-12);
                cpu.layer_norm(&x, &weight, &bias, eps, &mut out).unwrap();
                // The mean, at most 9, is off by as much; deviations are divided by their root mean square, about 0.6, or by that of
                // eps where there is but one.
                let spread = if cols < 8 { f64::from(eps).sqrt() } else { 0.4 };
                let shift = 9.0 * (cols as f64 / 4.0 + 4.0) * ROUNDING / spread;
                assert_close(&format!("layer {name}"), &read::<f32>(&cpu, &out), &layer, |i| shift + 2.0 * sum * (layer[i].abs() + 2.0));
            }
        }
    }
}

#[test]
fn gate_is_silu_of_the_first_half_times_the_second() {
    for cols in LENGTHS.into_iter().chain([9000]) {
        for rows in [1, 5, 40] {
            let rng = &mut Rng((cols * rows) as u64);
            // From where the exponential underflows to where it overflows.
            let scale = |i: usize| [1.0, 10.0, 120.0][i % 3];
            let x: Vec<f32> = rng.units(rows * 2 * cols).iter().enumerate().map(|(i, x)| scale(i) * x).collect();
            let silu = |x: f64| x / (1.0 + (-x).exp());
            let row = |i: usize| &x[i / cols * 2 * cols..];
            let term = |i: usize| (silu(f64::from(row(i)[i % cols])), f64::from(row(i)[cols + i % cols]));
            let expected: Vec<f64> = (0..rows * cols).map(|i| term(i).0 * term(i).1).collect();
            for cpu in backends() {
                let mut out = poisoned(&cpu, rows, cols);
                cpu.silu_and_mul(&tensor(&cpu, rows, 2 * cols, &x), &mut out).unwrap();
                // The accuracy that `cpu::math` states, and the rounding of the product; where the exponential
                // overflows, silu is 0 instead of 3e-37, times up to 120.
                let name = format!("{rows} x {cols} on {}", describe(&cpu));
                assert_close(&name, &read::<f32>(&cpu, &out), &expected, |i| 7e-7 * expected[i].abs() + 4e-35);
            }
        }
    }
}

#[test]
fn not_a_number_stays_one() {
    for cpu in backends() {
        let mut out = tensor(&cpu, 1, 20, &[0.0; 20]);
        cpu.silu_and_mul(&tensor(&cpu, 1, 40, &[f32::NAN; 40]), &mut out).unwrap();
        assert!(read::<f32>(&cpu, &out).iter().all(|value| value.is_nan()));
    }
}

#[test]
fn rotation_turns_pairs_by_their_angle_and_stores_k_and_v() {
    for (head_dim, rows) in [(2, 1), (72, 3), (128, 3), (128, 40)] {
        let shape = AttentionShape { num_heads: 4, num_kv_heads: 2, head_dim };
        let (half, kv_size) = (head_dim / 2, shape.kv_size());
        let cols = shape.q_size() + 2 * kv_size;
        let rng = &mut Rng(9);
        let x = rng.units(rows * cols);
        let inv_freq: Vec<f32> = (0..half).map(|i| 10000f32.powf(-(i as f32) / half as f32)).collect();
        let positions: Vec<i32> = (0..rows).map(|_| rng.below(32768) as i32).collect();
        let slots: Vec<i32> = (0..rows).map(|row| if row % 3 == 1 { -1 } else { 63 - row as i32 }).collect();
        let mut expected = vec![0.0; rows * cols];
        for row in 0..rows {
            for j in 0..cols {
                let at = |j: usize| f64::from(x[row * cols + j]);
                expected[row * cols + j] = at(j);
                if j < shape.q_size() + kv_size {
                    // The angle is a product in f32, as in the reference.
                    let angle = f64::from(positions[row] as f32 * inv_freq[j % half]);
                    let is_first = j % head_dim < half;
                    expected[row * cols + j] = if is_first {
                        at(j) * angle.cos() - at(j + half) * angle.sin()
                    } else {
                        at(j) * angle.cos() + at(j - half) * angle.sin()
                    };
                }
            }
        }
        for cpu in backends() {
            let mut qkv = tensor(&cpu, rows, cols, &x);
            let cache = || poisoned(&cpu, 64, kv_size);
            let mut kv = KvCache { k: cache(), v: cache(), block_size: 16 };
            let (positions, slots_t) = (indices(&cpu, &positions), indices(&cpu, &slots));
            let mut cos_sin = poisoned(&cpu, rows, head_dim);
            cpu.rope_cos_sin(&positions, &tensor(&cpu, 1, half, &inv_freq), &mut cos_sin).unwrap();
            cpu.rope_and_store_kv(&mut qkv, Rope { cos_sin: &cos_sin, slots: &slots_t }, shape, &mut kv).unwrap();
            let found = read::<f32>(&cpu, &qkv);
            // Two products and a sum of magnitudes up to 1, with cosine and sine off by an ulp.
            assert_close(&format!("{head_dim} on {}", describe(&cpu)), &found, &expected, |_| 6.0 * ROUNDING);
            let (k, v) = (read::<f32>(&cpu, &kv.k), read::<f32>(&cpu, &kv.v));
            let mut stored = vec![f32::NAN; 64 * kv_size];
            let mut stored_v = stored.clone();
            for (row, slot) in slots.iter().enumerate().filter(|(_, slot)| **slot >= 0) {
                let at = row * cols + shape.q_size();
                stored[*slot as usize * kv_size..][..kv_size].copy_from_slice(&found[at..at + kv_size]);
                stored_v[*slot as usize * kv_size..][..kv_size].copy_from_slice(&found[at + kv_size..at + 2 * kv_size]);
            }
            assert_eq!((bits(&k), bits(&v)), (bits(&stored), bits(&stored_v)));
        }
    }
}

#[test]
fn upload_and_download_move_the_window() {
    let cpu = &backends()[0];
    let mut t = cpu.alloc(4, 2, DType::I32).unwrap();
    assert_eq!(read::<i32>(cpu, &t), [0; 8]);
    t.set_window(1..3).unwrap();
    cpu.upload(&[1, 2, 3, 4], &mut t).unwrap();
    t.set_rows(4).unwrap();
    assert_eq!(read::<i32>(cpu, &t), [0, 0, 1, 2, 3, 4, 0, 0]);
}
