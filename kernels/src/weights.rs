//! Safetensors weights, mapped into memory: one file, shards with an index, or bytes embedded in the binary.
//!
//! Nothing is copied when a checkpoint is opened; a [`WeightView`] keeps its mapping alive.

use crate::{DType, Error, Result};
use memmap2::Mmap;
use rayon::{iter::ParallelIterator, slice::ParallelSlice};
use safetensors::{Dtype as StDtype, SafeTensors};
use std::{collections::BTreeMap, fs::File, ops::Range, path::Path, sync::Arc};

/// Where the bytes of a weight file are.
#[derive(Clone)]
enum Buffer {
    Mapped(Arc<Mmap>),
    Static(&'static [u8]),
    Owned(Arc<[u8]>),
}

impl Buffer {
    fn bytes(&self) -> &[u8] {
        match self {
            Self::Mapped(map) => map,
            Self::Static(bytes) => bytes,
            Self::Owned(bytes) => bytes,
        }
    }
}

/// One tensor of a checkpoint: its bytes stay where they are mapped.
#[derive(Clone)]
pub struct WeightView {
    buffer: Buffer,
    range: Range<usize>,
    /// Key in the checkpoint.
    pub name: String,
    /// Element type.
    pub dtype: DType,
    /// Sizes, outermost first.
    pub shape: Vec<usize>,
}

impl WeightView {
    /// `rows` rows of zeros that stack below this matrix.
    pub fn zeros_below(&self, rows: usize) -> Self {
        let bytes = rows * self.cols() * self.dtype.size();
        let shape = std::iter::once(rows).chain(self.shape.iter().skip(1).copied()).collect();
        Self { buffer: Buffer::Owned(vec![0; bytes].into()), range: 0..bytes, name: self.name.clone(), dtype: self.dtype, shape }
    }

    /// The elements, little-endian, row-major. Not necessarily aligned to the element type.
    pub fn bytes(&self) -> &[u8] {
        &self.buffer.bytes()[self.range.clone()]
    }

    /// Leading size; 1 for a vector.
    pub fn rows(&self) -> usize {
        if self.shape.len() < 2 { 1 } else { self.shape[0] }
    }

    /// Elements per row: the product of all sizes but the leading one.
    pub fn cols(&self) -> usize {
        if self.shape.len() < 2 { self.shape.iter().product() } else { self.shape[1..].iter().product() }
    }

    /// Reads the tensor into memory, so that it is there when it is needed. Blocks for as long as the disk takes.
    pub fn prefetch(&self) {
        // One read per page is enough to fault it in; many at once keep a disk busy.
        self.bytes().par_chunks(PREFETCH_BYTES).for_each(|part| {
            std::hint::black_box(part.iter().step_by(4096).fold(0u8, |sum, byte| sum.wrapping_add(*byte)));
        });
    }
}

/// What a thread reads in one go: several of the pieces in which a system reads ahead.
const PREFETCH_BYTES: usize = 1 << 20;

/// The tensors of a checkpoint by key.
#[derive(Clone, Default)]
pub struct Weights {
    tensors: Arc<BTreeMap<String, WeightView>>,
}

impl Weights {
    /// Maps the weights of a folder: `model.safetensors`, or the shards that `model.safetensors.index.json` names.
    ///
    /// # Errors
    /// [`Error::WeightFile`] if a file is missing, truncated or not safetensors, or the index names a tensor that its shard
    /// lacks.
    pub fn open(folder: &Path) -> Result<Self> {
        let single = folder.join("model.safetensors");
        let index = folder.join("model.safetensors.index.json");
        let mut tensors = BTreeMap::new();
        if single.is_file() {
            read_header(&single.display().to_string(), map(&single)?, &mut tensors)?;
        } else if index.is_file() {
            open_shards(folder, &index, &mut tensors)?;
        } else {
            let what = "no model.safetensors and no model.safetensors.index.json; point to a folder in the Hugging Face layout";
            return Err(Error::WeightFile { file: folder.display().to_string(), what: what.into() });
        }
        Ok(Self { tensors: Arc::new(tensors) })
    }

    /// Reads a safetensors file that is part of the binary.
    ///
    /// # Errors
    /// [`Error::WeightFile`] if it is not safetensors.
    pub fn from_static(name: &str, bytes: &'static [u8]) -> Result<Self> {
        let mut tensors = BTreeMap::new();
        read_header(name, Buffer::Static(bytes), &mut tensors)?;
        Ok(Self { tensors: Arc::new(tensors) })
    }

    /// The tensor with key `name` and exactly this shape.
    ///
    /// # Errors
    /// [`Error::MissingTensor`] or [`Error::TensorShape`].
    pub fn get(&self, name: &str, shape: &[usize]) -> Result<WeightView> {
        let view = self.tensors.get(name).ok_or_else(|| Error::MissingTensor { name: name.into() })?;
        if view.shape != shape {
            return Err(Error::TensorShape { name: name.into(), expected: shape.into(), found: view.shape.clone() });
        }
        Ok(view.clone())
    }

    /// All tensors, by key.
    pub fn iter(&self) -> impl Iterator<Item = &WeightView> {
        self.tensors.values()
    }
}

fn map(path: &Path) -> Result<Buffer> {
    let fail = |what: String| Error::WeightFile { file: path.display().to_string(), what };
    let file = File::open(path).map_err(|e| fail(format!("cannot be opened: {e}")))?;
    // SAFETY: the mapping is read-only and private to us; checkpoints are not written while they are served. A file that is
    // truncated under a running server raises SIGBUS, as with every program that maps its data.
    let map = unsafe { Mmap::map(&file) }.map_err(|e| fail(format!("cannot be mapped: {e}")))?;
    Ok(Buffer::Mapped(Arc::new(map)))
}

fn read_header(file: &str, buffer: Buffer, tensors: &mut BTreeMap<String, WeightView>) -> Result<()> {
    let bytes = buffer.bytes();
    let parsed = SafeTensors::deserialize(bytes).map_err(|e| {
        let what = format!("not a complete safetensors file of {} bytes: {e}; copy it again", bytes.len());
        Error::WeightFile { file: file.into(), what }
    })?;
    for (name, view) in parsed.iter() {
        let dtype = match view.dtype() {
            StDtype::F32 => DType::F32,
            StDtype::F16 => DType::F16,
            StDtype::BF16 => DType::Bf16,
            StDtype::I32 => DType::I32,
            other => return Err(Error::TensorDType { name: name.into(), found: format!("{other:?}") }),
        };
        let start = view.data().as_ptr() as usize - bytes.as_ptr() as usize;
        let view = WeightView {
            buffer: buffer.clone(),
            range: start..start + view.data().len(),
            name: name.into(),
            dtype,
            shape: view.shape().to_vec(),
        };
        tensors.insert(name.into(), view);
    }
    Ok(())
}

fn open_shards(folder: &Path, index: &Path, tensors: &mut BTreeMap<String, WeightView>) -> Result<()> {
    #[derive(serde::Deserialize)]
    struct Index {
        weight_map: BTreeMap<String, String>,
    }
    let fail = |what: String| Error::WeightFile { file: index.display().to_string(), what };
    let text = std::fs::read_to_string(index).map_err(|e| fail(format!("cannot be read: {e}")))?;
    let Index { weight_map } = serde_json::from_str(&text).map_err(|e| fail(format!("not a shard index: {e}")))?;
    let mut shards: Vec<&String> = weight_map.values().collect();
    shards.sort();
    shards.dedup();
    for shard in shards {
        if Path::new(shard).components().count() != 1 {
            return Err(fail(format!("shard {shard:?} is not a plain file name")));
        }
        let path = folder.join(shard);
        read_header(&path.display().to_string(), map(&path)?, tensors)?;
    }
    match weight_map.keys().find(|name| !tensors.contains_key(*name)) {
        Some(name) => Err(fail(format!("names tensor {name}, which its shard {} lacks", weight_map[name]))),
        None => Ok(()),
    }
}
