//! Compiles kernels at run time, for the card that is there, and keeps what was compiled on disk.

use super::source::{HEADERS, Source};
use crate::{Error, Result};
use cudarc::nvrtc::{result, sys};
use std::{
    ffi::{CStr, CString, c_char},
    fs,
    io::Write,
    path::{Path, PathBuf},
    sync::{
        OnceLock,
        atomic::{AtomicBool, Ordering},
    },
};

/// Flags besides the architecture. `--use_fast_math` is not among them: it would flush denormals and loosen divisions in the
/// norms, and the kernels name the fast forms where they want them.
const FLAGS: [&str; 4] = ["--std=c++17", "-default-device", "-lineinfo", "--ptxas-options=-v"];

/// Machine code of one source, and what the compiler said about it.
#[derive(Clone, Debug)]
pub struct Compiled {
    /// An ELF image for one architecture.
    pub cubin: Vec<u8>,
    /// Registers, shared memory and spills of each kernel, as ptxas prints them. Empty if it came from the cache.
    pub log: String,
}

fn fail(what: impl std::fmt::Display) -> Error {
    Error::Device(format!("kernels cannot be compiled: {what}"))
}

/// NVRTC's version.
///
/// # Errors
/// If the library is not there.
pub fn version() -> Result<(i32, i32)> {
    static PRESENT: OnceLock<bool> = OnceLock::new();
    // SAFETY: looking for a library runs its initialisers only.
    if !PRESENT.get_or_init(|| unsafe { sys::is_culib_present() }) {
        return Err(fail(
            "libnvrtc.so is not there; install the CUDA runtime compiler (PyPI: nvidia-cuda-nvrtc), or put it on LD_LIBRARY_PATH",
        ));
    }
    let (mut major, mut minor) = (0, 0);
    // SAFETY: both are written.
    unsafe { sys::nvrtcVersion(&mut major, &mut minor) }.result().map_err(|e| fail(format_args!("{e:?}")))?;
    Ok((major, minor))
}

/// NVRTC's name of the target for cards of a compute capability. Products of warpgroups are among what the plain target of 9.0 leaves
/// out for not being in its successors (PTX ISA, "PTX Module Directives: .target").
pub fn architecture(compute_capability: (i32, i32)) -> String {
    let (major, minor) = compute_capability;
    format!("sm_{major}{minor}{}", if compute_capability == (9, 0) { "a" } else { "" })
}

/// Compiles `source` for cards of this compute capability.
///
/// # Errors
/// [`Error::Device`] with the compiler's words.
pub fn compile(source: &Source, compute_capability: (i32, i32)) -> Result<Compiled> {
    version()?;
    let c = |text: &str| CString::new(text).map_err(fail);
    let (text, name) = (c(source.text)?, c(source.name)?);
    let headers: Vec<(CString, CString)> = HEADERS.iter().map(|h| Ok((c(h.text)?, c(h.name)?))).collect::<Result<_>>()?;
    let (texts, names): (Vec<*const c_char>, Vec<*const c_char>) = headers.iter().map(|(t, n)| (t.as_ptr(), n.as_ptr())).unzip();
    let mut program = std::ptr::null_mut();
    // SAFETY: every pointer is to a string that outlives the program.
    let created = unsafe {
        sys::nvrtcCreateProgram(&mut program, text.as_ptr(), name.as_ptr(), headers.len() as i32, texts.as_ptr(), names.as_ptr())
    };
    created.result().map_err(|e| fail(format_args!("{}: {e:?}", source.name)))?;
    let program = Program(program);
    let architecture = format!("--gpu-architecture={}", architecture(compute_capability));
    let flags: Vec<&str> = FLAGS.iter().copied().chain([architecture.as_str()]).collect();
    // SAFETY: the program was created above.
    let compiled = unsafe { result::compile_program(program.0, &flags) };
    let log = program.log();
    compiled.map_err(|e| fail(format_args!("{}: {e:?}\n{log}", source.name)))?;
    let mut bytes = 0;
    // SAFETY: the program was compiled, and `cubin` is as long as NVRTC says.
    let cubin = unsafe {
        sys::nvrtcGetCUBINSize(program.0, &mut bytes).result().map_err(|e| fail(format_args!("{e:?}")))?;
        let mut cubin = vec![0u8; bytes];
        sys::nvrtcGetCUBIN(program.0, cubin.as_mut_ptr().cast()).result().map_err(|e| fail(format_args!("{e:?}")))?;
        cubin
    };
    Ok(Compiled { cubin, log })
}

struct Program(sys::nvrtcProgram);

impl Program {
    fn log(&self) -> String {
        // SAFETY: the program lives; NVRTC ends the log with a zero.
        let log = unsafe { result::get_program_log(self.0) }.unwrap_or_default();
        let bytes: Vec<u8> = log.iter().map(|c| *c as u8).collect();
        CStr::from_bytes_until_nul(&bytes).map(|s| s.to_string_lossy().into_owned()).unwrap_or_default()
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        // SAFETY: created once, destroyed once.
        let _ = unsafe { result::destroy_program(self.0) };
    }
}

/// Where machine code is kept between starts.
#[derive(Debug)]
pub struct CubinCache {
    folder: Option<PathBuf>,
    /// That it is not was said already.
    has_warned: AtomicBool,
}

impl CubinCache {
    /// Keeps it in `folder`; without one, below `$XDG_CACHE_HOME` or `$HOME/.cache`, if one of these is set.
    pub fn new(folder: Option<PathBuf>) -> Self {
        let base = || {
            let variable = |name| std::env::var_os(name).filter(|v| !v.is_empty()).map(PathBuf::from);
            variable("XDG_CACHE_HOME").or_else(|| variable("HOME").map(|home| home.join(".cache")))
        };
        let folder = folder.or_else(|| base().map(|base| base.join("idefics-serve").join("kernels")));
        Self { folder, has_warned: AtomicBool::new(false) }
    }

    /// The machine code of `source`: from disk, or compiled and kept. A cache that cannot be written is a warning.
    ///
    /// # Errors
    /// Those of [`compile`].
    pub fn get(&self, source: &Source, compute_capability: (i32, i32)) -> Result<Compiled> {
        let Some(folder) = &self.folder else { return compile(source, compute_capability) };
        let path = folder.join(format!("{}.cubin", key(source, compute_capability, version()?)));
        if let Some(cubin) = kept(&path) {
            return Ok(Compiled { cubin, log: String::new() });
        }
        let compiled = compile(source, compute_capability)?;
        if let Err(error) = keep(folder, &path, &compiled.cubin)
            && !self.has_warned.swap(true, Ordering::Relaxed)
        {
            tracing::warn!(folder = %folder.display(), %error, "compiled kernels cannot be kept; every start compiles them anew");
        }
        Ok(compiled)
    }
}

/// Names machine code by everything that it is made of.
fn key(source: &Source, compute_capability: (i32, i32), version: (i32, i32)) -> String {
    let mut hasher = blake3::Hasher::new_derive_key("idefics-serve cubin v1");
    let mut part = |bytes: &[u8]| {
        hasher.update(&(bytes.len() as u64).to_le_bytes()).update(bytes);
    };
    HEADERS.iter().chain([source]).for_each(|s| {
        part(s.name.as_bytes());
        part(s.text.as_bytes());
    });
    FLAGS.iter().for_each(|flag| part(flag.as_bytes()));
    part(format!("{} {version:?}", architecture(compute_capability)).as_bytes());
    hasher.finalize().to_hex().to_string()
}

/// The machine code in a file of [`keep`]; `None` if it is not there, or is not what was written: a driver believes what an image
/// says about its own length.
fn kept(path: &Path) -> Option<Vec<u8>> {
    let mut file = fs::read(path).ok()?;
    let cubin = if file.len() < blake3::OUT_LEN { return None } else { file.split_off(blake3::OUT_LEN) };
    (blake3::hash(&cubin).as_bytes()[..] == file).then_some(cubin)
}

/// Writes a file that is there as a whole or not at all: a hash of the machine code, then the code.
fn keep(folder: &Path, path: &Path, cubin: &[u8]) -> std::io::Result<()> {
    fs::create_dir_all(folder)?;
    let mut file = tempfile::NamedTempFile::new_in(folder)?;
    file.write_all(blake3::hash(cubin).as_bytes())?;
    file.write_all(cubin)?;
    file.persist(path).map_err(|e| e.error)?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn everything_that_changes_the_code_changes_its_key() {
        let source = |name, text| Source { name, text, only: None };
        let all = [
            key(&source("a.cu", "x"), (9, 0), (13, 0)),
            key(&source("b.cu", "x"), (9, 0), (13, 0)),
            key(&source("a.cu", "y"), (9, 0), (13, 0)),
            key(&source("a.cu", "x"), (8, 0), (13, 0)),
            key(&source("a.cu", "x"), (9, 0), (13, 1)),
        ];
        let distinct: std::collections::BTreeSet<&String> = all.iter().collect();
        assert_eq!(distinct.len(), all.len());
    }

    #[test]
    fn kept_files_are_whole_or_do_not_count() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("sub").join("a.cubin");
        keep(path.parent().unwrap(), &path, b"code").unwrap();
        keep(path.parent().unwrap(), &path, b"code").unwrap();
        assert_eq!(kept(&path).as_deref(), Some(&b"code"[..]));
        assert_eq!(fs::read_dir(path.parent().unwrap()).unwrap().count(), 1, "nothing half-written stays");
        let whole = fs::read(&path).unwrap();
        let mut changed = whole.clone();
        changed[33] ^= 1;
        for damaged in [&whole[..whole.len() - 1], &whole[..20], &[], &changed] {
            fs::write(&path, damaged).unwrap();
            assert_eq!(kept(&path), None);
        }
        assert_eq!(kept(folder.path()), None);
    }
}
