//! The two passes of the resize, written for the vector unit without naming it.
//!
//! Both passes have the same inner loop, [`weighted_sum`]: a vector of 32-bit sums, and for each tap a vector of 8-bit values times one
//! weight. Vertically a vector is a stretch of one row. Horizontally it is one byte of each row of a band, for which the band is
//! transposed first; taking the three channels of a pixel as the vector would leave most of it empty. `pulp` picks the instruction set
//! when it runs, so that one binary serves every machine.

use std::ops::Range;

use rayon::prelude::*;

use super::RgbView;
use super::resize::PRECISION_BITS;

/// Values that are summed together: four AVX2 registers of sums. Of 16 or 24 the compiler makes a gather over the taps, and 48 it keeps
/// in memory; either is several times slower.
const LANES: usize = 32;
/// Edge of the squares that are transposed: the bytes of a `u64`.
const SQUARE: usize = 8;
/// Half a unit, so that the final shift rounds.
const ROUND: i32 = 1 << (PRECISION_BITS - 1);
/// Below this many multiplications a pass stays on its thread.
const PARALLEL_WORK: usize = 1 << 20;

/// The weighted sums of one axis: for each output position a run of input positions and their weights.
pub(super) struct Taps {
    /// Where the run starts in the input, and where its weights lie in `weights`.
    runs: Vec<(usize, Range<usize>)>,
    /// Fixed point, [`PRECISION_BITS`] fractional bits.
    weights: Vec<i32>,
}

impl Taps {
    pub(super) fn with_capacity(outputs: usize, taps_per_output: usize) -> Self {
        Self { runs: Vec::with_capacity(outputs), weights: Vec::with_capacity(outputs * taps_per_output) }
    }

    /// Adds the run of the next output position.
    pub(super) fn push(&mut self, first: usize, weights: impl Iterator<Item = i32>) {
        let start = self.weights.len();
        self.weights.extend(weights);
        self.runs.push((first, start..self.weights.len()));
    }

    fn len(&self) -> usize {
        self.runs.len()
    }

    /// First input position and weights of each output position, in order.
    fn iter(&self) -> impl Iterator<Item = (usize, &[i32])> {
        self.runs.iter().map(|(first, weights)| (*first, &self.weights[weights.clone()]))
    }

    fn get(&self, output: usize) -> (usize, &[i32]) {
        let (first, weights) = &self.runs[output];
        (*first, &self.weights[weights.clone()])
    }
}

/// `[height, taps.len(), 3]` u8: each row of `source` with its columns summed by `taps`.
pub(super) fn horizontal(source: RgbView<'_>, taps: &Taps) -> Vec<u8> {
    let height = source.height() as usize;
    let band_bytes = taps.len() * 3 * LANES;
    let mut output = vec![0; height * taps.len() * 3];
    let band = |scratch: &mut BandScratch, (index, output): (usize, &mut [u8])| {
        pulp::Arch::new().dispatch(HorizontalBand { source, first_row: index * LANES, taps, scratch, output });
    };
    let work = taps.weights.len() * 3 * height;
    if work < PARALLEL_WORK {
        let mut scratch = BandScratch::default();
        output.chunks_mut(band_bytes).enumerate().for_each(|item| band(&mut scratch, item));
    } else {
        output.par_chunks_mut(band_bytes).enumerate().for_each_init(BandScratch::default, band);
    }
    output
}

/// `[taps.len(), width, 3]` u8: the rows of `source` summed by `taps`.
pub(super) fn vertical(source: RgbView<'_>, taps: &Taps) -> Vec<u8> {
    let row_bytes = source.width() as usize * 3;
    let mut output = vec![0; taps.len() * row_bytes];
    let row = |(y, output): (usize, &mut [u8])| {
        let (first, weights) = taps.get(y);
        pulp::Arch::new().dispatch(VerticalRow { source, first, weights, output });
    };
    let work = taps.weights.len() * row_bytes;
    if work < PARALLEL_WORK {
        output.chunks_mut(row_bytes).enumerate().for_each(row);
    } else {
        output.par_chunks_mut(row_bytes).enumerate().for_each(row);
    }
    output
}

/// Transposed bands, kept between the bands of a thread.
#[derive(Default)]
struct BandScratch {
    /// `[width * 3, LANES]` u8, the length rounded up to a multiple of [`SQUARE`].
    input: Vec<Lanes>,
    /// `[taps.len() * 3, LANES]` u8, the length rounded up likewise.
    output: Vec<Lanes>,
}

/// One byte of each row of a band, or a stretch of one row.
type Lanes = [u8; LANES];

/// Up to [`LANES`] rows from `first_row` on, into as many rows of `output`.
struct HorizontalBand<'a> {
    source: RgbView<'a>,
    first_row: usize,
    taps: &'a Taps,
    scratch: &'a mut BandScratch,
    output: &'a mut [u8],
}

// What runs under `dispatch` must be inlined into it, or it is compiled for the oldest machine: hence no closure, and no `array::map`.
impl pulp::NullaryFnOnce for HorizontalBand<'_> {
    type Output = ();

    #[inline(always)]
    fn call(self) {
        let Self { source, first_row, taps, scratch, output } = self;
        let last_row = source.height() as usize - 1;
        let mut rows = [source.row(first_row); LANES];
        for (row, slot) in rows.iter_mut().enumerate() {
            *slot = source.row((first_row + row).min(last_row));
        }
        transpose_in(&rows, &mut scratch.input);

        let row_bytes = taps.len() * 3;
        scratch.output.resize(row_bytes.next_multiple_of(SQUARE), [0; LANES]);
        for ((first, weights), pixel) in taps.iter().zip(scratch.output.as_chunks_mut::<3>().0) {
            for (channel, target) in pixel.iter_mut().enumerate() {
                // The bounds check of each tap keeps the compiler from vectorising over the taps, which would gather single bytes and
                // take twice as long.
                let values = (first..first + weights.len()).map(|column| &scratch.input[column * 3 + channel]);
                *target = weighted_sum(values, weights);
            }
        }
        transpose_out(&scratch.output, row_bytes, output);
    }
}

/// One output row: `weights.len()` rows of `source` from `first` on.
struct VerticalRow<'a> {
    source: RgbView<'a>,
    first: usize,
    weights: &'a [i32],
    output: &'a mut [u8],
}

impl pulp::NullaryFnOnce for VerticalRow<'_> {
    type Output = ();

    #[inline(always)]
    fn call(self) {
        let Self { source, first, weights, output } = self;
        let (blocks, rest) = output.as_chunks_mut::<LANES>();
        let rest_start = blocks.len() * LANES;
        for (block, target) in blocks.iter_mut().enumerate() {
            let rows = (first..first + weights.len()).map(|row| &source.row(row).as_chunks::<LANES>().0[block]);
            *target = weighted_sum(rows, weights);
        }
        for (x, target) in rest.iter_mut().enumerate() {
            let mut sum = ROUND;
            for (tap, &weight) in weights.iter().enumerate() {
                sum += i32::from(source.row(first + tap)[rest_start + x]) * weight;
            }
            *target = to_u8(sum);
        }
    }
}

/// The sum of each lane over the taps, as 8-bit values.
#[inline(always)]
fn weighted_sum<'a>(values: impl Iterator<Item = &'a Lanes>, weights: &[i32]) -> Lanes {
    let mut sums = [ROUND; LANES];
    for (values, &weight) in values.zip(weights) {
        for lane in 0..LANES {
            sums[lane] += i32::from(values[lane]) * weight;
        }
    }
    let mut output = [0; LANES];
    for lane in 0..LANES {
        output[lane] = to_u8(sums[lane]);
    }
    output
}

/// The rounded 8-bit value of a fixed-point sum. Weights are never negative, so neither is the sum.
#[inline(always)]
fn to_u8(sum: i32) -> u8 {
    (sum >> PRECISION_BITS).min(255) as u8
}

/// One lane for each byte of the rows, which are equally long; then zeros up to a multiple of [`SQUARE`].
#[inline(always)]
fn transpose_in(rows: &[&[u8]; LANES], output: &mut Vec<Lanes>) {
    let bytes = rows[0].len();
    output.resize(bytes.next_multiple_of(SQUARE), [0; LANES]);
    // Eight rows at a time: a machine follows that many streams through memory, not 32.
    for (group, rows) in rows.as_chunks::<SQUARE>().0.iter().enumerate() {
        for (block, lanes) in output.as_chunks_mut::<SQUARE>().0.iter_mut().enumerate() {
            let start = block * SQUARE;
            let mut square = [[0; SQUARE]; SQUARE];
            for (line, row) in square.iter_mut().zip(rows) {
                match row[start..].first_chunk() {
                    Some(whole) => *line = *whole,
                    None => line[..bytes - start].copy_from_slice(&row[start..]),
                }
            }
            for (lane, line) in lanes.iter_mut().zip(transpose(square)) {
                lane.as_chunks_mut::<SQUARE>().0[group] = line;
            }
        }
    }
}

/// Rows of `row_bytes` from as many lanes; as many rows as `output` holds.
#[inline(always)]
fn transpose_out(lanes: &[Lanes], row_bytes: usize, output: &mut [u8]) {
    for (group, rows) in output.chunks_mut(SQUARE * row_bytes).enumerate() {
        for (block, lanes) in lanes.as_chunks::<SQUARE>().0.iter().enumerate() {
            let start = block * SQUARE;
            let mut square = [[0; SQUARE]; SQUARE];
            for (line, lane) in square.iter_mut().zip(lanes) {
                *line = lane.as_chunks::<SQUARE>().0[group];
            }
            for (line, row) in transpose(square).iter().zip(rows.chunks_exact_mut(row_bytes)) {
                match row[start..].first_chunk_mut() {
                    Some(whole) => *whole = *line,
                    None => row[start..].copy_from_slice(&line[..row_bytes - start]),
                }
            }
        }
    }
}

/// Exchanges rows and columns, by swapping ever larger squares between 64-bit words.
#[inline(always)]
fn transpose(mut square: [[u8; SQUARE]; SQUARE]) -> [[u8; SQUARE]; SQUARE] {
    let mut words = [0; SQUARE];
    for (word, line) in words.iter_mut().zip(square) {
        *word = u64::from_le_bytes(line);
    }
    swap::<1>(&mut words, 0x00ff_00ff_00ff_00ff);
    swap::<2>(&mut words, 0x0000_ffff_0000_ffff);
    swap::<4>(&mut words, 0x0000_0000_ffff_ffff);
    for (line, word) in square.iter_mut().zip(words) {
        *line = word.to_le_bytes();
    }
    square
}

/// Between each two words `DISTANCE` apart, exchanges what the mask selects in the one with what lies above it in the other.
#[inline(always)]
fn swap<const DISTANCE: usize>(words: &mut [u64; SQUARE], mask: u64) {
    for low in 0..SQUARE {
        if low & DISTANCE == 0 {
            let high = low + DISTANCE;
            let difference = ((words[low] >> (DISTANCE * 8)) ^ words[high]) & mask;
            words[high] ^= difference;
            words[low] ^= difference << (DISTANCE * 8);
        }
    }
}
