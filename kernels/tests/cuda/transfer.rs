use crate::support::*;
use idefics_kernels::{Backend, DType, GraphKey, Tensor, Upload, Values, cuda::Cuda};

fn i32s<'a>(values: &'a [i32], cols: usize, tensor: &'a mut Tensor<Cuda>) -> Upload<'a, Cuda> {
    Upload { values: Values::I32(values), cols, tensor }
}

fn f32s<'a>(values: &'a [f32], cols: usize, tensor: &'a mut Tensor<Cuda>) -> Upload<'a, Cuda> {
    Upload { values: Values::F32(values), cols, tensor }
}

fn ids(cuda: &Cuda, tensor: &Tensor<Cuda>) -> Vec<i32> {
    let mut out = vec![0; tensor.rows() * tensor.cols()];
    cuda.download(tensor, &mut out).unwrap();
    out
}

#[test]
#[ignore = "needs a CUDA device or its emulation"]
fn packed_tensors_get_their_own_values_and_shapes() {
    let cuda = open();
    // The last is larger than the staging memory's slots.
    let [mut a, mut b, mut c, mut d] =
        cuda.alloc_packed([(20, DType::I32), (7, DType::F32), (4, DType::I32), (5_000_000, DType::I32)]).unwrap();
    for (len_a, cols, len_b, len_d) in [(20, 5, 7, 3), (6, 3, 0, 5_000_000), (0, 1, 1, 1), (1, 1, 7, 64)] {
        let values = |len: usize, from: i32| (0..len as i32).map(|i| from + i).collect::<Vec<i32>>();
        let (of_a, of_c, of_d) = (values(len_a, 100), values(4, -7), values(len_d, 1 << 20));
        let of_b: Vec<f32> = (0..len_b).map(|i| i as f32 - 0.5).collect();
        let mut uploads = [i32s(&of_a, cols, &mut a), f32s(&of_b, 1, &mut b), i32s(&of_c, 2, &mut c), i32s(&of_d, 1, &mut d)];
        cuda.upload_packed(&mut uploads).unwrap();
        assert_eq!((a.rows(), a.cols(), b.rows(), c.rows()), (len_a / cols, cols, len_b, 2));
        assert!(ids(&cuda, &a) == of_a && read(&cuda, &b) == of_b && ids(&cuda, &c) == of_c && ids(&cuda, &d) == of_d);
    }
}

#[test]
#[ignore = "needs a CUDA device or its emulation"]
fn packed_uploads_that_do_not_fit_are_refused() {
    let cuda = open();
    let [mut a, mut b] = cuda.alloc_packed([(16, DType::I32), (16, DType::F32)]).unwrap();
    let [mut other] = cuda.alloc_packed([(16, DType::I32)]).unwrap();
    let refused = |uploads: &mut [Upload<'_, Cuda>]| cuda.upload_packed(uploads).unwrap_err().to_string();
    assert!(refused(&mut [i32s(&[1; 33], 1, &mut a)]).contains("no more elements than were allocated"));
    assert!(refused(&mut [i32s(&[1; 9], 2, &mut a)]).contains("whole rows of 2"));
    assert!(refused(&mut [i32s(&[1; 9], 0, &mut a)]).contains("whole rows of 0"));
    assert!(refused(&mut [i32s(&[1], 1, &mut b)]).contains("expected tensor in i32, found f32"));
    assert!(refused(&mut [i32s(&[1], 1, &mut a), i32s(&[1], 1, &mut other)]).contains("allocated together"));
    cuda.upload_packed(&mut []).unwrap();
    cuda.upload_packed(&mut [i32s(&[1, 2], 1, &mut a), f32s(&[3.0], 1, &mut b)]).unwrap();
    assert_eq!((ids(&cuda, &a), read(&cuda, &b)), (vec![1, 2], vec![3.0]));
}

/// As a decode step does it: the same shapes, other values, a graph recorded at the second sight.
#[test]
#[ignore = "needs a CUDA device or its emulation"]
fn graphs_read_what_was_packed_last() {
    let cuda = open();
    let table = elements(&cuda, 50, 3, &(0..150).collect::<Vec<i32>>());
    let [mut rows, mut unused] = cuda.alloc_packed([(8, DType::I32), (100, DType::I32)]).unwrap();
    let mut out = poisoned(&cuda, 8, 3, DType::I32);
    for turn in 0..12 {
        let count = [2usize, 8, 5][turn % 3];
        let of_rows: Vec<i32> = (0..count).map(|i| ((turn * 7 + i * 11) % 50) as i32).collect();
        let mut uploads = [i32s(&of_rows, 1, &mut rows), i32s(&[-1; 100], 10, &mut unused)];
        let place = cuda.upload_packed(&mut uploads).unwrap();
        out.set_rows(count).unwrap();
        let key = GraphKey { name: "packed", sizes: [count, place, 0] };
        cuda.graphed(key, &mut || cuda.gather_rows(&table, &rows, &mut out)).unwrap();
        let expected: Vec<i32> = of_rows.iter().flat_map(|row| (0..3).map(move |i| 3 * row + i)).collect();
        assert_eq!(ids(&cuda, &out), expected, "turn {turn}");
    }
}

/// An upload does not reach what ops ahead of it have yet to read, and ops behind it wait for it, whether it takes long or not.
#[test]
#[ignore = "needs a CUDA device or its emulation"]
fn uploads_overlap_ops_that_read_the_one_before() {
    let cuda = open();
    let table = elements(&cuda, 50, 1, &(0..50).collect::<Vec<i32>>());
    let [mut rows, mut more] = cuda.alloc_packed([(4, DType::I32), (400_000, DType::I32)]).unwrap();
    let turns: Vec<[i32; 4]> = (0..9).map(|turn| [turn, 49 - turn, 2 * turn, 7]).collect();
    let mut outs: Vec<[Tensor<Cuda>; 2]> = turns.iter().map(|_| [(); 2].map(|()| poisoned(&cuda, 4, 1, DType::I32))).collect();
    for (turn, [out, out_of_more]) in turns.iter().zip(&mut outs) {
        // In some turns larger than a slot.
        let mut values = vec![0; if turn[0] % 3 == 2 { 400_000 } else { 8 }];
        values[..4].copy_from_slice(turn);
        cuda.upload_packed(&mut [i32s(turn, 1, &mut rows), i32s(&values, 1, &mut more)]).unwrap();
        cuda.gather_rows(&table, &rows, out).unwrap();
        more.set_window(0..4).unwrap();
        cuda.gather_rows(&table, &more, out_of_more).unwrap();
    }
    for (turn, [out, out_of_more]) in turns.iter().zip(&outs) {
        assert_eq!((ids(&cuda, out), ids(&cuda, out_of_more)), (turn.to_vec(), turn.to_vec()));
    }
}

#[test]
#[ignore = "needs a CUDA device or its emulation"]
fn uploads_of_some_of_the_tensors_leave_those_of_others_to_ops_ahead() {
    let cuda = open();
    let table = elements(&cuda, 50, 1, &(0..50).collect::<Vec<i32>>());
    let mut tensors = cuda.alloc_packed([(4, DType::I32), (4, DType::I32), (4, DType::I32)]).unwrap();
    let turns: Vec<[i32; 4]> = (0..16).map(|turn| [turn, 49 - turn, 2 * turn, 7]).collect();
    let mut outs: Vec<Tensor<Cuda>> = turns.iter().map(|_| poisoned(&cuda, 4, 1, DType::I32)).collect();
    for ((turn, out), which) in turns.iter().zip(&mut outs).zip([0, 1, 0, 2, 2, 1].into_iter().cycle()) {
        cuda.upload_packed(&mut [i32s(turn, 1, &mut tensors[which])]).unwrap();
        cuda.gather_rows(&table, &tensors[which], out).unwrap();
    }
    for (turn, out) in turns.iter().zip(&outs) {
        assert_eq!(ids(&cuda, out), turn);
    }
}

#[test]
#[ignore = "needs a CUDA device or its emulation"]
fn downloads_have_what_was_there_when_they_were_begun() {
    let cuda = open();
    let table = elements(&cuda, 100, 1, &(0..100).collect::<Vec<i32>>());
    let mut out = poisoned(&cuda, 4, 1, DType::I32);
    let begin = |out: &mut Tensor<Cuda>, rows: &[i32]| {
        let rows = indices(&cuda, rows);
        cuda.gather_rows(&table, &rows, out).unwrap();
        cuda.begin_download::<i32>(out).unwrap()
    };
    let first = begin(&mut out, &[1, 2, 3, 4]);
    let second = begin(&mut out, &[50, 60, 70, 80]);
    // One that nobody waits for, whose memory the next gets while it is on its way.
    drop(begin(&mut out, &[5, 5, 5, 5]));
    let third = begin(&mut out, &[9, 8, 7, 6]);
    let mut found = [[0; 4]; 3];
    third.wait(&mut found[2]).unwrap();
    first.wait(&mut found[0]).unwrap();
    second.wait(&mut found[1]).unwrap();
    assert_eq!(found, [[1, 2, 3, 4], [50, 60, 70, 80], [9, 8, 7, 6]]);

    let nothing = cuda.alloc(0, 1, DType::I32).unwrap();
    cuda.begin_download::<i32>(&nothing).unwrap().wait(&mut []).unwrap();

    let error = |download: idefics_kernels::Download<i32>| download.wait(&mut [0; 3]).unwrap_err().to_string();
    assert!(error(begin(&mut out, &[0; 4])).contains("expected 4 elements on the host, found 3"));
    assert!(cuda.begin_download::<f32>(&out).is_err());
    // Whoever still has a download when the backend is gone gets it.
    let last = begin(&mut out, &[11, 22, 33, 44]);
    drop((table, out, cuda));
    last.wait(&mut found[0]).unwrap();
    assert_eq!(found[0], [11, 22, 33, 44]);
}

/// A thread has no context of the card until somebody makes it current there.
#[test]
#[ignore = "needs a CUDA device or its emulation"]
fn downloads_arrive_on_other_threads() {
    let cuda = open();
    let tensor = elements(&cuda, 4, 1, &[1, 2, 3, 4]);
    let download = cuda.begin_download::<i32>(&tensor).unwrap();
    let wait = || {
        let mut found = [0; 4];
        download.wait(&mut found).map(|()| found)
    };
    let found = std::thread::scope(|scope| scope.spawn(wait).join().unwrap());
    assert_eq!(found.unwrap(), [1, 2, 3, 4]);
}
