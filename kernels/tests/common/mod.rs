//! What the tests of the backends share: seeded numbers, weights as safetensors bytes, and every way to compute on the CPU.
#![allow(dead_code, reason = "each test program uses a part of it")]

use half::{bf16, f16};
use idefics_kernels::{
    Backend, DType, Element, Matrix, Tensor,
    cpu::{Cpu, CpuOptions, Isa},
    weights::{WeightView, Weights},
};

/// SplitMix64 (Steele et al. 2014).
pub(crate) struct Rng(pub(crate) u64);

impl Rng {
    pub(crate) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// In `-1.0 .. 1.0`.
    pub(crate) fn unit(&mut self) -> f32 {
        (self.next() >> 40) as f32 / (1u64 << 23) as f32 - 1.0
    }

    pub(crate) fn below(&mut self, limit: usize) -> usize {
        (self.next() % limit as u64) as usize
    }

    pub(crate) fn units(&mut self, len: usize) -> Vec<f32> {
        (0..len).map(|_| self.unit()).collect()
    }
}

/// The backend at every instruction set of this machine, with one thread and with two.
pub(crate) fn backends() -> Vec<Cpu> {
    let available = Isa::ALL.into_iter().filter(|isa| isa.is_available());
    let options = available.flat_map(|isa| [1, 2].map(|threads| CpuOptions { threads: Some(threads), isa: Some(isa) }));
    options.map(|options| Cpu::new(options).unwrap()).collect()
}

/// What a backend is, for messages.
pub(crate) fn describe(cpu: &Cpu) -> String {
    format!("{} with {} threads", cpu.isa(), cpu.threads())
}

/// A tensor with these elements in a window that does not begin at row 0, poisoned around it.
pub(crate) fn tensor(cpu: &Cpu, rows: usize, cols: usize, data: &[f32]) -> Tensor<Cpu> {
    assert_eq!(data.len(), rows * cols);
    let mut tensor = poisoned(cpu, rows, cols);
    cpu.upload(data, &mut tensor).unwrap();
    tensor
}

/// NaN everywhere, with a window of `rows` that does not begin at row 0.
pub(crate) fn poisoned(cpu: &Cpu, rows: usize, cols: usize) -> Tensor<Cpu> {
    let mut tensor = cpu.alloc(rows + 5, cols, DType::F32).unwrap();
    cpu.upload(&vec![f32::NAN; (rows + 5) * cols], &mut tensor).unwrap();
    tensor.set_window(3..3 + rows).unwrap();
    tensor
}

/// A column of indices.
pub(crate) fn indices(cpu: &Cpu, values: &[i32]) -> Tensor<Cpu> {
    table(cpu, values.len(), 1, values)
}

/// Indices, `[rows, cols]`.
pub(crate) fn table(cpu: &Cpu, rows: usize, cols: usize, values: &[i32]) -> Tensor<Cpu> {
    let mut tensor = cpu.alloc(rows, cols, DType::I32).unwrap();
    cpu.upload(values, &mut tensor).unwrap();
    tensor
}

/// The elements of the window.
pub(crate) fn read<T: Element>(cpu: &Cpu, tensor: &Tensor<Cpu>) -> Vec<T> {
    let mut out = vec![bytemuck::Zeroable::zeroed(); tensor.rows() * tensor.cols()];
    cpu.download(tensor, &mut out).unwrap();
    out
}

/// The elements around the window.
pub(crate) fn read_around(cpu: &Cpu, tensor: &mut Tensor<Cpu>) -> Vec<f32> {
    let window = tensor.window();
    let mut out = Vec::new();
    for rows in [0..window.start, window.end..tensor.capacity()] {
        tensor.set_window(rows).unwrap();
        out.extend(read::<f32>(cpu, tensor));
    }
    tensor.set_window(window).unwrap();
    out
}

/// A weight in bytes, and its elements after rounding to its type.
pub(crate) struct Stored {
    pub(crate) views: Vec<WeightView>,
    pub(crate) values: Vec<f32>,
}

impl Stored {
    pub(crate) fn load<B: Backend>(&self, backend: &B) -> Matrix<B> {
        backend.load_weight(&self.views).unwrap()
    }
}

/// Random weights of these shapes, to be stacked; their bytes are not aligned to the element.
pub(crate) fn weights(rng: &mut Rng, dtype: DType, shapes: &[&[usize]]) -> Stored {
    let mut tensors = Vec::new();
    let mut values = Vec::new();
    for (i, shape) in shapes.iter().enumerate() {
        let (bytes, rounded) = encode(dtype, &rng.units(shape.iter().product()));
        values.extend(rounded);
        tensors.push((format!("part{i}"), dtype, shape.to_vec(), bytes));
    }
    let file: &'static [u8] = safetensors(&tensors).leak();
    let weights = Weights::from_static("test", file).unwrap();
    let views: Vec<_> = tensors.iter().map(|(name, _, shape, _)| weights.get(name, shape).unwrap()).collect();
    assert!(dtype == DType::U8 || !(views[0].bytes().as_ptr() as usize).is_multiple_of(dtype.size()), "aligned by accident");
    Stored { views, values }
}

/// Rounds to `dtype`: the bytes, and the values that they stand for.
pub(crate) fn encode(dtype: DType, values: &[f32]) -> (Vec<u8>, Vec<f32>) {
    let bytes_of = |value: &f32| match dtype {
        DType::Bf16 => bf16::from_f32(*value).to_le_bytes().to_vec(),
        DType::F16 => f16::from_f32(*value).to_le_bytes().to_vec(),
        _ => value.to_le_bytes().to_vec(),
    };
    let round = |value: &f32| match dtype {
        DType::Bf16 => bf16::from_f32(*value).to_f32(),
        DType::F16 => f16::from_f32(*value).to_f32(),
        _ => *value,
    };
    (values.iter().flat_map(bytes_of).collect(), values.iter().map(round).collect())
}

/// A safetensors file whose data begin at an odd address offset.
pub(crate) fn safetensors(tensors: &[(String, DType, Vec<usize>, Vec<u8>)]) -> Vec<u8> {
    let mut header = Vec::new();
    let mut offset = 0;
    for (name, dtype, shape, bytes) in tensors {
        let dtype = dtype.to_string().to_uppercase();
        header.push(format!(r#""{name}":{{"dtype":"{dtype}","shape":{shape:?},"data_offsets":[{offset},{}]}}"#, offset + bytes.len()));
        offset += bytes.len();
    }
    let mut header = format!("{{{}}}", header.join(","));
    while header.len() % 2 == 0 {
        header.push(' ');
    }
    let mut file = (header.len() as u64).to_le_bytes().to_vec();
    file.extend(header.bytes());
    tensors.iter().for_each(|(_, _, _, bytes)| file.extend(bytes));
    file
}

/// Compares results with exact ones, and says at the end how far the worst was off (`--no-capture` shows it).
pub(crate) struct Comparison {
    name: String,
    error: f64,
    share: f64,
}

impl Comparison {
    /// `name` has the op and its shapes.
    pub(crate) fn new(name: &str) -> Self {
        Self { name: name.to_owned(), error: 0.0, share: 0.0 }
    }

    /// That `found`, which stands at `place`, differs from `expected` by at most `allowed`, and is a number.
    pub(crate) fn add(&mut self, place: std::fmt::Arguments<'_>, found: f32, expected: f64, allowed: f64) {
        let error = (f64::from(found) - expected).abs();
        assert!(error <= allowed, "{}: {place} is {found}, expected {expected}: off by {error:e}, allowed {allowed:e}", self.name);
        self.error = self.error.max(error);
        if error > 0.0 {
            self.share = self.share.max(error / allowed);
        }
    }
}

impl Drop for Comparison {
    fn drop(&mut self) {
        if !std::thread::panicking() {
            println!("{}: off by at most {:.1e}, {:.0} % of what is allowed", self.name, self.error, 100.0 * self.share);
        }
    }
}

/// That `found` differs from `expected` by at most `tolerance(i)`, and is a number.
pub(crate) fn assert_close(name: &str, found: &[f32], expected: &[f64], tolerance: impl Fn(usize) -> f64) {
    assert_eq!(found.len(), expected.len(), "{name}");
    let mut comparison = Comparison::new(name);
    for (i, (found, expected)) in found.iter().zip(expected).enumerate() {
        comparison.add(format_args!("element {i}"), *found, *expected, tolerance(i));
    }
}

/// The bits, so that NaN equals NaN.
pub(crate) fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|value| value.to_bits()).collect()
}
