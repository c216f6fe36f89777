//! Matrix products by cuBLASLt, with the epilogue fused, and the algorithm of each shape chosen once. The only place that names
//! `cudarc::cublaslt`.
//!
//! cuBLASLt is column-major: a row-major `[rows, cols]` is its `[cols, rows]` with `cols` as leading dimension. So `out = x W^T` becomes
//! `out^T = W x^T`, with `W^T` and `x^T` in memory: A = `[k, m]` transposed, B = `[k, n]`, C = D = `[m, n]`, and a bias over the rows of D
//! is one over output features. Types, layouts and the form of GELU are those of the cuBLAS documentation, sections `cublasLtMatmul()` and
//! `cublasLtEpilogue_t`.

use super::driver::{self, DeviceBuffer, DevicePtr, Stream};
use crate::{DType, Epilogue, Error, Result};
use cudarc::cublaslt::{
    result::{self, CublasError},
    sys::{
        self, cublasComputeType_t as Compute, cublasLtEpilogue_t as LtEpilogue, cublasLtMatmulDescAttributes_t as DescAttribute,
        cublasLtMatmulPreferenceAttributes_t as Preference, cublasLtReductionScheme_t as Reduction, cudaDataType_t as DataType,
    },
};
use std::{
    collections::{HashMap, hash_map::Entry},
    ffi::c_void,
    fmt,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

/// Device memory for algorithms that split k, in bytes: what NVIDIA recommends for Hopper (cuBLAS, section `cublasSetWorkspace()`).
const WORKSPACE_BYTES: usize = 32 << 20;

/// Most plans kept. Prefills have as many lengths as users have prompts; when this many were seen, all are forgotten, at the cost of
/// asking the heuristic again.
const MAX_PLANS: usize = 4096;

/// Largest alignment that is told apart, in bytes: the heuristic's own default.
const MAX_ALIGNMENT: u64 = 256;

/// `CUBLAS_OP_T`, of the enumeration `cublasOperation_t`.
const OP_T: i32 = 1;

/// One product: `out = epilogue(x W^T + bias)`.
#[derive(Clone, Copy)]
pub(super) struct Product {
    /// `[n, k]` bf16
    pub(super) x: DevicePtr,
    /// `[m, k]` bf16
    pub(super) weight: DevicePtr,
    /// `[m]` bf16, or 0 for none.
    pub(super) bias: DevicePtr,
    /// `[n, m]`
    pub(super) out: DevicePtr,
    pub(super) n: usize,
    pub(super) m: usize,
    pub(super) k: usize,
    pub(super) epilogue: Epilogue,
    pub(super) out_dtype: DType,
}

/// What an algorithm is chosen for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Problem {
    n: usize,
    m: usize,
    k: usize,
    epilogue: Epilogue,
    has_bias: bool,
    out_dtype: DType,
    /// Bytes to which x, weight and out are aligned.
    alignments: [u32; 3],
}

impl From<&Product> for Problem {
    fn from(product: &Product) -> Self {
        let Product { x, weight, bias, out, n, m, k, epilogue, out_dtype } = *product;
        let alignments = [x, weight, out].map(|pointer| 1 << (pointer | MAX_ALIGNMENT).trailing_zeros());
        Self { n, m, k, epilogue, has_bias: bias != 0, out_dtype, alignments }
    }
}

/// A cuBLASLt handle, its workspace, and the plans made so far.
pub(super) struct Blas {
    stream: Arc<Stream>,
    handle: sys::cublasLtHandle_t,
    workspace: DeviceBuffer,
    /// `None` where cuBLASLt has no algorithm.
    plans: Mutex<HashMap<Problem, Option<Plan>>>,
}

// SAFETY: cuBLASLt's handle may be used from every thread; plans are used under their lock.
unsafe impl Send for Blas {}
// SAFETY: see above.
unsafe impl Sync for Blas {}

fn check<T>(what: impl fmt::Display, answer: std::result::Result<T, CublasError>) -> Result<T> {
    answer.map_err(|error| Error::Device(format!("{what}: {error}")))
}

impl Blas {
    pub(super) fn new(stream: &Arc<Stream>) -> Result<Self> {
        // SAFETY: looking for a library runs its initialisers only.
        if !unsafe { sys::is_culib_present() } {
            return Err(Error::Device(
                "libcublasLt.so is not there; install cuBLAS (PyPI: nvidia-cublas, Debian: libcublas), or put it on LD_LIBRARY_PATH".into(),
            ));
        }
        let workspace = DeviceBuffer::uninit(stream, WORKSPACE_BYTES)?;
        stream.device().bind()?;
        let _alone = driver::without_captures();
        let handle = check("cuBLASLt cannot be initialised", result::create_handle())?;
        Ok(Self { stream: Arc::clone(stream), handle, workspace, plans: Mutex::default() })
    }

    fn plans(&self) -> MutexGuard<'_, HashMap<Problem, Option<Plan>>> {
        self.plans.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Queues the product, unless cuBLASLt has no way to do it: then it says `false` and has done nothing.
    ///
    /// # Safety
    /// Every pointer is to as much memory as [`Product`] says, and `out` is apart from the others.
    pub(super) unsafe fn multiply(&self, product: &Product) -> Result<bool> {
        // A bias has the type of the output, and ours are bf16.
        if product.k == 0 || product.bias != 0 && product.out_dtype != DType::Bf16 {
            return Ok(false);
        }
        self.stream.device().bind()?;
        let problem = Problem::from(product);
        let is_known = self.plans().contains_key(&problem);
        // Versions of cuBLASLt differ in whether they answer, and a kernel that it loads at first use may not be captured.
        if !is_known && self.stream.is_capturing()? {
            return Err(Error::Device(format!("expected a product that ran before it is recorded, found {problem:?}")));
        }
        let _alone = (!is_known).then(driver::without_captures);
        let mut plans = self.plans();
        if plans.len() >= MAX_PLANS && !is_known {
            plans.clear();
        }
        let plan = match plans.entry(problem) {
            Entry::Occupied(entry) => entry.into_mut(),
            Entry::Vacant(entry) => entry.insert(Plan::new(self.handle, &problem, product.bias)?),
        };
        let Some(plan) = plan else { return Ok(false) };
        let (one, beta) = (1f32, if product.epilogue == Epilogue::Accumulate { 1f32 } else { 0f32 });
        let Descriptors { product: descriptor, weight, x, out } = &plan.descriptors;
        descriptor.set_bias(product.bias)?;
        // SAFETY: descriptors live in the plan; the operands are as large as they say, by the caller's promise. C is D, which is read if
        // beta is not 0. The workspace is used by this stream only.
        let queued = unsafe {
            result::matmul(
                self.handle,
                descriptor.0,
                (&raw const one).cast(),
                (&raw const beta).cast(),
                product.weight as *const c_void,
                weight.0,
                product.x as *const c_void,
                x.0,
                product.out as *const c_void,
                out.0,
                product.out as *mut c_void,
                out.0,
                &plan.algorithm,
                self.workspace.pointer() as *mut c_void,
                WORKSPACE_BYTES,
                self.stream.handle().cast(),
            )
        };
        check(format_args!("cuBLASLt cannot multiply {problem:?}"), queued)?;
        Ok(true)
    }
}

/// Its version, as it counts itself: 130100 is 13.1.0.
pub(super) fn version() -> usize {
    // SAFETY: asks the library, which is loaded.
    unsafe { sys::cublasLtGetVersion() }
}

impl Drop for Blas {
    fn drop(&mut self) {
        if self.stream.device().bind().is_ok() {
            let _alone = driver::without_captures();
            // SAFETY: created once, destroyed once.
            let _ = unsafe { result::destroy_handle(self.handle) };
        }
    }
}

/// The algorithm that cuBLASLt's heuristic ranks first for a problem.
struct Plan {
    descriptors: Descriptors,
    algorithm: sys::cublasLtMatmulAlgo_t,
}

impl Plan {
    /// `None` if there is no algorithm. Asks the library on the host only: nothing is queued, nothing waits.
    fn new(handle: sys::cublasLtHandle_t, problem: &Problem, bias: DevicePtr) -> Result<Option<Self>> {
        let descriptors = Descriptors::new(problem)?;
        descriptors.product.set_bias(bias)?;
        let preferences = Preferences::new()?;
        preferences.set(Preference::CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, &WORKSPACE_BYTES)?;
        // Sums of a split k are added in f32 as well; the other schemes would round them to the output's type in between.
        let reduction = Reduction::CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE as u32;
        preferences.set(Preference::CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK, &reduction)?;
        let [x_bytes, weight_bytes, out_bytes] = problem.alignments;
        preferences.set(Preference::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, &weight_bytes)?;
        preferences.set(Preference::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES, &x_bytes)?;
        preferences.set(Preference::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, &out_bytes)?;
        preferences.set(Preference::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES, &out_bytes)?;
        let Descriptors { product, weight, x, out } = &descriptors;
        // SAFETY: all descriptors live.
        let best = unsafe { result::get_matmul_algo_heuristic(handle, product.0, weight.0, x.0, out.0, out.0, preferences.0) };
        match best {
            Ok(best) => Ok(Some(Self { descriptors, algorithm: best.algo })),
            Err(CublasError(sys::cublasStatus_t::CUBLAS_STATUS_NOT_SUPPORTED)) => {
                tracing::warn!(?problem, "cuBLASLt has no algorithm for this product; a slower kernel does it");
                Ok(None)
            }
            Err(error) => check(format_args!("cuBLASLt cannot plan {problem:?}"), Err(error)),
        }
    }
}

/// A problem in cuBLASLt's terms.
struct Descriptors {
    product: ProductDescriptor,
    weight: Layout,
    x: Layout,
    out: Layout,
}

impl Descriptors {
    fn new(problem: &Problem) -> Result<Self> {
        let Problem { n, m, k, epilogue, has_bias, out_dtype, .. } = *problem;
        let out_type = if out_dtype == DType::F32 { DataType::CUDA_R_32F } else { DataType::CUDA_R_16BF };
        Ok(Self {
            product: ProductDescriptor::new(epilogue, has_bias)?,
            weight: Layout::new(DataType::CUDA_R_16BF, k, m)?,
            x: Layout::new(DataType::CUDA_R_16BF, k, n)?,
            out: Layout::new(out_type, m, n)?,
        })
    }
}

/// What is multiplied how.
struct ProductDescriptor(sys::cublasLtMatmulDesc_t);

// SAFETY: memory that cuBLASLt owns for us, without ties to a thread.
unsafe impl Send for ProductDescriptor {}

impl ProductDescriptor {
    fn new(epilogue: Epilogue, has_bias: bool) -> Result<Self> {
        let created = result::create_matmul_desc(Compute::CUBLAS_COMPUTE_32F, DataType::CUDA_R_32F);
        let descriptor = Self(check("no cuBLASLt descriptor", created)?);
        descriptor.set(DescAttribute::CUBLASLT_MATMUL_DESC_TRANSA, &OP_T)?;
        let fused = match (epilogue, has_bias) {
            (Epilogue::Store | Epilogue::Accumulate, false) => LtEpilogue::CUBLASLT_EPILOGUE_DEFAULT,
            (Epilogue::Store | Epilogue::Accumulate, true) => LtEpilogue::CUBLASLT_EPILOGUE_BIAS,
            (Epilogue::GeluTanh, false) => LtEpilogue::CUBLASLT_EPILOGUE_GELU,
            (Epilogue::GeluTanh, true) => LtEpilogue::CUBLASLT_EPILOGUE_GELU_BIAS,
        };
        descriptor.set(DescAttribute::CUBLASLT_MATMUL_DESC_EPILOGUE, &fused)?;
        Ok(descriptor)
    }

    /// 0 is none.
    fn set_bias(&self, bias: DevicePtr) -> Result<()> {
        if bias == 0 { Ok(()) } else { self.set(DescAttribute::CUBLASLT_MATMUL_DESC_BIAS_POINTER, &bias) }
    }

    fn set<T: Copy>(&self, attribute: DescAttribute, value: &T) -> Result<()> {
        // SAFETY: the descriptor lives, and cuBLASLt copies the value, which is of the attribute's type and as long as is said.
        let set = unsafe { result::set_matmul_desc_attribute(self.0, attribute, (&raw const *value).cast(), size_of::<T>()) };
        check(format_args!("{attribute:?}"), set)
    }
}

impl Drop for ProductDescriptor {
    fn drop(&mut self) {
        // SAFETY: created once, destroyed once.
        let _ = unsafe { result::destroy_matmul_desc(self.0) };
    }
}

/// A column-major `[rows, cols]` without gaps.
struct Layout(sys::cublasLtMatrixLayout_t);

// SAFETY: memory that cuBLASLt owns for us, without ties to a thread.
unsafe impl Send for Layout {}

impl Layout {
    fn new(data_type: DataType, rows: usize, cols: usize) -> Result<Self> {
        let created = result::create_matrix_layout(data_type, rows as u64, cols as u64, rows as i64);
        check("no cuBLASLt layout", created).map(Self)
    }
}

impl Drop for Layout {
    fn drop(&mut self) {
        // SAFETY: created once, destroyed once.
        let _ = unsafe { result::destroy_matrix_layout(self.0) };
    }
}

/// What an algorithm may need.
struct Preferences(sys::cublasLtMatmulPreference_t);

impl Preferences {
    fn new() -> Result<Self> {
        check("no cuBLASLt preferences", result::create_matmul_pref()).map(Self)
    }

    fn set<T: Copy>(&self, attribute: Preference, value: &T) -> Result<()> {
        // SAFETY: the preferences live, and cuBLASLt copies the value, which is of the attribute's type and as long as is said.
        let set = unsafe { result::set_matmul_pref_attribute(self.0, attribute, (&raw const *value).cast(), size_of::<T>()) };
        check(format_args!("{attribute:?}"), set)
    }
}

impl Drop for Preferences {
    fn drop(&mut self) {
        // SAFETY: created once, destroyed once.
        let _ = unsafe { result::destroy_matmul_pref(self.0) };
    }
}
