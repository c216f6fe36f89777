//! Where compiled kernels are kept.

use crate::support::*;
use idefics_kernels::{
    Backend, DType,
    cuda::{Cuda, CudaOptions},
};
use std::{collections::BTreeMap, fs, path::Path};

/// That a card opens with this folder, and computes.
fn opens(folder: &Path) {
    let cuda = Cuda::open(&CudaOptions { cache_folder: Some(folder.into()), ..CudaOptions::default() }).unwrap();
    let mut out = poisoned(&cuda, 1, 8, DType::Bf16);
    cuda.silu_and_mul(&tensor(&cuda, 1, 16, &[0.0; 16]), &mut out).unwrap();
    assert_eq!(read(&cuda, &out), [0.0; 8]);
}

fn files(folder: &Path) -> BTreeMap<String, (Vec<u8>, std::time::SystemTime)> {
    let entry = |entry: std::io::Result<fs::DirEntry>| {
        let entry = entry.unwrap();
        let changed = entry.metadata().unwrap().modified().unwrap();
        (entry.file_name().into_string().unwrap(), (fs::read(entry.path()).unwrap(), changed))
    };
    fs::read_dir(folder).unwrap().map(entry).collect()
}

#[test]
#[ignore = "needs a CUDA device or its emulation"]
fn kernels_are_kept_and_what_is_damaged_is_compiled_again() {
    let folder = tempfile::tempdir().unwrap();
    let folder = &folder.path().join("kernels");
    opens(folder);
    let kept = files(folder);
    assert!(kept.len() > 5 && kept.keys().all(|name| name.ends_with(".cubin")), "{:?}", kept.keys());
    opens(folder);
    assert!(files(folder) == kept, "what was kept was written again");
    let mut names = kept.keys();
    fs::write(folder.join(names.next().unwrap()), b"torn").unwrap();
    fs::remove_file(folder.join(names.next().unwrap())).unwrap();
    opens(folder);
    let contents = |files: BTreeMap<String, (Vec<u8>, _)>| files.into_iter().map(|(name, (bytes, _))| (name, bytes)).collect::<Vec<_>>();
    assert!(contents(files(folder)) == contents(kept));
}

#[test]
#[ignore = "needs a CUDA device or its emulation"]
fn cache_that_cannot_be_written_is_done_without() {
    let file = tempfile::NamedTempFile::new().unwrap();
    opens(&file.path().join("kernels"));
}
