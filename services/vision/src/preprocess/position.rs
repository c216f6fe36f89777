//! Position ids of a patch grid: where each patch lies on the square grid of positions that the tower was trained with.

/// One id per patch, row-major: `[rows * cols]`, each below `side * side`.
///
/// `side` is the number of trained positions per axis (`image_size / patch_size`, 70). A grid of any shape is stretched over all of
/// them: patch `i` of `n` falls into the bucket of `i / n`, and its id is row bucket x `side` + column bucket.
///
/// # Panics
/// If `side` is 0.
#[must_use]
pub fn position_ids(rows: usize, cols: usize, side: usize) -> Vec<i32> {
    let (row_buckets, col_buckets) = (buckets(rows, side), buckets(cols, side));
    row_buckets.iter().flat_map(|&row| col_buckets.iter().map(move |&col| (row * side + col) as i32)).collect()
}

/// `bucketize(f32(i) * f32(1 / n), boundaries, right=True)` for each `i` of `n`.
///
/// The roundings decide: an exact `i * side / n` in integers is wrong at n = 25, 49, 50 and 55 of 70, and boundaries summed up in f32
/// at many more.
fn buckets(n: usize, side: usize) -> Vec<usize> {
    assert!(side > 0, "side is 0, expected image_size / patch_size");
    let boundaries: Vec<f32> = (1..side).map(|k| (k as f64 / side as f64) as f32).collect();
    let reciprocal = 1.0 / n as f32;
    (0..n)
        .map(|i| {
            let fraction = i as f32 * reciprocal;
            boundaries.partition_point(|&boundary| boundary <= fraction)
        })
        .collect()
}
