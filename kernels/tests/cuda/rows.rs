use crate::{
    common::{Rng, weights},
    support::*,
};
use half::bf16;
use idefics_kernels::{Backend, DType, Element, Tensor, cuda::Cuda};

/// Gathers and scatters rows of `cols` elements; an index outside gives zeros, or writes nothing.
fn move_rows<T: Element + PartialEq + std::fmt::Debug>(cuda: &Cuda, cols: usize, value: fn(usize) -> T) {
    let name = format!("{} x {cols}", T::DTYPE);
    let src: Vec<T> = (0..6 * cols).map(value).collect();
    let zero: T = bytemuck::Zeroable::zeroed();
    let download = |tensor: &Tensor<Cuda>| {
        let mut out = vec![zero; tensor.rows() * cols];
        cuda.download(tensor, &mut out).unwrap();
        out
    };
    let table = elements(cuda, 6, cols, &src);
    let rows = [5, 0, 0, 3, -1, 6, i32::MAX, i32::MIN, 2];
    let mut out = poisoned(cuda, rows.len(), cols, T::DTYPE);
    cuda.gather_rows(&table, &indices(cuda, &rows), &mut out).unwrap();
    let row = |i: i32| usize::try_from(i).ok().filter(|i| *i < 6).map_or(vec![zero; cols], |i| src[i * cols..(i + 1) * cols].to_vec());
    assert_eq!(download(&out), rows.iter().flat_map(|i| row(*i)).collect::<Vec<T>>(), "gather {name}");

    let to = [4, 1, -1, 9, 7, 0];
    let mut out = elements(cuda, 8, cols, &vec![value(1000); 8 * cols]);
    let around = out.window();
    cuda.scatter_rows(&table, &indices(cuda, &to), &mut out).unwrap();
    let mut expected = vec![value(1000); 8 * cols];
    for (i, to) in to.iter().enumerate() {
        if let Some(to) = usize::try_from(*to).ok().filter(|to| *to < 8) {
            expected[to * cols..(to + 1) * cols].copy_from_slice(&src[i * cols..(i + 1) * cols]);
        }
    }
    assert_eq!(download(&out), expected, "scatter {name}");
    out.set_window(around.end..out.capacity()).unwrap();
    let first = download(&out);
    assert!(first.iter().all(|v| bytemuck::bytes_of(v) == bytemuck::bytes_of(&first[0])), "scatter {name}: wrote outside of the window");
}

#[test]
#[ignore = "needs a CUDA device or its emulation"]
fn rows_of_every_width_and_type_are_moved() {
    let cuda = open();
    for cols in [1, 3, 7, 8, 72, 257, 4096] {
        move_rows::<bf16>(&cuda, cols, |i| bf16::from_f32((i % 251) as f32));
        move_rows::<f32>(&cuda, cols, |i| i as f32 * 0.37);
        move_rows::<i32>(&cuda, cols, |i| i as i32 * 7 - 3);
        move_rows::<u8>(&cuda, cols, |i| (i % 255) as u8);
    }
}

#[test]
#[ignore = "needs a CUDA device or its emulation"]
fn embeddings_of_every_checkpoint_type_come_out_as_bf16() {
    let cuda = open();
    for dtype in [DType::F32, DType::F16, DType::Bf16] {
        let stored = weights(&mut Rng(1), dtype, &[&[5, 40], &[3, 40]]);
        let table = stored.load(&cuda);
        assert_eq!((table.rows, table.cols, table.dtype), (8, 40, DType::Bf16));
        let ids = [7, 0, 4, 5, -3, 8];
        let mut out = poisoned(&cuda, ids.len(), 40, DType::Bf16);
        cuda.embed(&table, &indices(&cuda, &ids), &mut out).unwrap();
        let value = |id: i32, j: usize| if (0..8).contains(&id) { round(stored.values[id as usize * 40 + j]) } else { 0.0 };
        let expected: Vec<f32> = ids.iter().flat_map(|id| (0..40).map(move |j| value(*id, j))).collect();
        assert_eq!(read(&cuda, &out), expected, "{dtype}");
        assert_untouched_around("embed", &cuda, &mut out);
    }
}

#[test]
#[ignore = "needs a CUDA device or its emulation"]
fn copies_larger_than_the_staging_memory_arrive_whole() {
    let cuda = open();
    // Three slots and a bit, at an odd place in the ring.
    let values: Vec<u8> = (0..25_000_001usize).map(|i| (i % 251) as u8).collect();
    let small = elements(&cuda, 1, 3, &[1u8, 2, 3]);
    let large = elements(&cuda, 1, values.len(), &values);
    let (mut back, mut few) = (vec![0u8; values.len()], [0u8; 3]);
    cuda.download(&large, &mut back).unwrap();
    cuda.download(&small, &mut few).unwrap();
    assert!(back == values && few == [1, 2, 3]);
}
