use crate::{
    common::{Rng, assert_close},
    support::*,
};
use idefics_kernels::{AttentionShape, Backend, DType, KvCache, Rope};

#[test]
#[ignore = "needs a CUDA device or its emulation"]
fn heads_are_rotated_and_keys_and_values_stored() {
    let cuda = open();
    for (num_heads, num_kv_heads, head_dim) in [(32, 8, 128), (2, 1, 128), (4, 4, 6), (3, 1, 2)] {
        let shape = AttentionShape { num_heads, num_kv_heads, head_dim };
        let (q_size, kv_size, half) = (shape.q_size(), shape.kv_size(), head_dim / 2);
        let cols = q_size + 2 * kv_size;
        // One that is stored nowhere, two that lie outside of the cache.
        let (positions, slots) = ([0, 1, 700, 32_767, 31, 2], [11, 0, 4, -1, 12, i32::MIN]);
        let rows = positions.len();
        let values = units(&mut Rng(head_dim as u64), rows * cols);
        let inv_freq: Vec<f32> = (0..half).map(|j| 1.0 / 10_000f32.powf((2 * j) as f32 / head_dim as f32)).collect();
        let mut qkv = tensor(&cuda, rows, cols, &values);
        let mut kv = KvCache { k: poisoned(&cuda, 12, kv_size, DType::Bf16), v: poisoned(&cuda, 12, kv_size, DType::Bf16), block_size: 4 };
        let mut cos_sin = poisoned(&cuda, rows, head_dim, DType::F32);
        cuda.rope_cos_sin(&indices(&cuda, &positions), &elements(&cuda, 1, half, &inv_freq), &mut cos_sin).unwrap();
        let rope = Rope { cos_sin: &cos_sin, slots: &indices(&cuda, &slots) };
        cuda.rope_and_store_kv(&mut qkv, rope, shape, &mut kv).unwrap();
        assert_untouched_around("cos_sin", &cuda, &mut cos_sin);
        // The angle is a product in f32, as in the reference; sincosf is good to 2 units in the last place (CUDA C++ programming guide).
        let angle = |row: usize, j: usize| f64::from(positions[row] as f32 * inv_freq[j]);
        for (row, found) in read(&cuda, &cos_sin).chunks(head_dim).enumerate() {
            let expected: Vec<f64> =
                (0..head_dim).map(|j| if j < half { angle(row, j).cos() } else { angle(row, j - half).sin() }).collect();
            assert_close(&format!("rope_cos_sin of {}", positions[row]), found, &expected, |_| 2.0 * f64::from(f32::EPSILON));
        }

        let rotated = |row: usize, head: usize| -> Vec<f64> {
            let x = &values[row * cols + head * head_dim..][..head_dim];
            let turn = |j: usize, a: f32, b: f32| f64::from(a) * angle(row, j).cos() + f64::from(b) * angle(row, j).sin();
            (0..head_dim).map(|j| if j < half { turn(j, x[j], -x[j + half]) } else { turn(j - half, x[j], x[j - half]) }).collect()
        };
        // The angles' errors are nothing beside that of rounding the result.
        let tolerance = |_: usize| 1.5 * BF16_ROUNDING;
        let found = read(&cuda, &qkv);
        for row in 0..rows {
            let expected: Vec<f64> = (0..num_heads).flat_map(|head| rotated(row, head)).collect();
            assert_close(&format!("rope q {shape:?} row {row}"), &found[row * cols..][..q_size], &expected, tolerance);
        }
        let (k, v) = (read(&cuda, &kv.k), read(&cuda, &kv.v));
        for slot in 0..12 {
            let (k, v) = (&k[slot * kv_size..][..kv_size], &v[slot * kv_size..][..kv_size]);
            let Some(row) = slots.iter().position(|s| *s == slot as i32) else {
                assert!(k.iter().chain(v).all(|v| v.is_nan()), "slot {slot} was not named");
                continue;
            };
            let expected: Vec<f64> = (0..num_kv_heads).flat_map(|head| rotated(row, num_heads + head)).collect();
            assert_close(&format!("rope k {shape:?} slot {slot}"), k, &expected, tolerance);
            assert_eq!(v, &values[row * cols + q_size + kv_size..][..kv_size], "v {shape:?} slot {slot}");
        }
        assert_untouched_around("k", &cuda, &mut kv.k);
        assert_untouched_around("v", &cuda, &mut kv.v);
        assert_untouched_around("qkv", &cuda, &mut qkv);
    }
}
