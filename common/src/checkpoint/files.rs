//! Where a checkpoint's files are: a folder, or bytes embedded in the binary.

use super::CheckpointError;
use std::{
    collections::HashMap,
    fs::File,
    io::{ErrorKind, Read, Seek, SeekFrom},
    path::{Path, PathBuf},
};

/// A file that is part of the binary.
#[derive(Clone, Copy, Debug)]
pub struct EmbeddedFile {
    /// Name in the folder.
    pub name: &'static str,
    /// Content.
    pub bytes: &'static [u8],
}

/// Where a checkpoint's files are.
#[derive(Clone, Debug)]
pub enum Source {
    /// A folder on disk.
    Folder(PathBuf),
    /// Files in the binary; the weights are one `model.safetensors`.
    Embedded {
        /// Name of the checkpoint.
        name: &'static str,
        /// Its files.
        files: &'static [EmbeddedFile],
    },
}

impl Source {
    /// The last part of the folder's name, or the embedded name.
    pub fn name(&self) -> String {
        match self {
            Self::Folder(path) => {
                let path = path.canonicalize().unwrap_or_else(|_| path.clone());
                path.file_name().map_or_else(|| path.display().to_string(), |name| name.to_string_lossy().into_owned())
            }
            Self::Embedded { name, .. } => (*name).to_owned(),
        }
    }

    /// A whole file; `None` if there is no such file.
    ///
    /// # Errors
    /// If it is there but cannot be read.
    pub fn read(&self, file: &str) -> Result<Option<Vec<u8>>, CheckpointError> {
        match self {
            Self::Folder(folder) => match std::fs::read(folder.join(file)) {
                Ok(bytes) => Ok(Some(bytes)),
                Err(e) if e.kind() == ErrorKind::NotFound => Ok(None),
                Err(e) => Err(self.unreadable(file, &e.to_string())),
            },
            Self::Embedded { files, .. } => Ok(files.iter().find(|f| f.name == file).map(|f| f.bytes.to_vec())),
        }
    }

    pub(super) fn missing(&self, file: &str) -> CheckpointError {
        self.unreadable(file, "no such file")
    }

    pub(super) fn content(&self, file: &str, what: String) -> CheckpointError {
        CheckpointError::Content { checkpoint: self.display(), file: file.into(), what }
    }

    fn unreadable(&self, file: &str, reason: &str) -> CheckpointError {
        CheckpointError::File { checkpoint: self.display(), file: file.into(), reason: reason.into() }
    }

    fn display(&self) -> String {
        match self {
            Self::Folder(path) => path.display().to_string(),
            Self::Embedded { name, .. } => format!("{name} (embedded)"),
        }
    }
}

/// Places in a weight file that the fingerprint reads, and how many bytes at each.
const SAMPLES: u64 = 64;
const SAMPLE_BYTES: u64 = 4096;

pub(super) fn fingerprint(source: &Source) -> Result<String, CheckpointError> {
    let mut hasher = blake3::Hasher::new();
    for file in ["config.json", "preprocessor_config.json"] {
        let bytes = source.read(file)?.ok_or_else(|| source.missing(file))?;
        hasher.update(&(bytes.len() as u64).to_le_bytes()).update(&bytes);
    }
    match source {
        Source::Embedded { files, .. } => {
            for file in files.iter().filter(|f| f.name.ends_with(".safetensors")) {
                sample(&mut hasher, std::io::Cursor::new(file.bytes)).map_err(|e| source.unreadable(file.name, &e.to_string()))?;
            }
        }
        Source::Folder(folder) => {
            for path in weight_files(folder).map_err(|e| source.unreadable("*.safetensors", &e.to_string()))? {
                let file = File::open(&path).and_then(|file| sample(&mut hasher, file));
                file.map_err(|e| source.unreadable(&path.display().to_string(), &e.to_string()))?;
            }
        }
    }
    Ok(hasher.finalize().to_hex().to_string())
}

pub(super) fn has_weights(source: &Source) -> bool {
    #[derive(serde::Deserialize)]
    struct Index {
        weight_map: HashMap<String, String>,
    }
    match source {
        Source::Embedded { files, .. } => files.iter().any(|file| file.name.ends_with(".safetensors")),
        Source::Folder(folder) => {
            let index = || serde_json::from_slice::<Index>(&std::fs::read(folder.join("model.safetensors.index.json")).ok()?).ok();
            let all_there =
                |index: Index| !index.weight_map.is_empty() && index.weight_map.values().all(|file| folder.join(file).is_file());
            folder.join("model.safetensors").is_file() || index().is_some_and(all_there)
        }
    }
}

fn weight_files(folder: &Path) -> std::io::Result<Vec<PathBuf>> {
    let single = folder.join("model.safetensors");
    if single.is_file() {
        return Ok(vec![single]);
    }
    let mut paths: Vec<PathBuf> = std::fs::read_dir(folder)?.map(|entry| entry.map(|e| e.path())).collect::<Result<_, _>>()?;
    paths.retain(|path| path.extension().is_some_and(|extension| extension == "safetensors"));
    paths.sort();
    Ok(paths)
}

/// Feeds length, header and evenly spread samples of one safetensors file.
fn sample(hasher: &mut blake3::Hasher, mut file: impl Read + Seek) -> std::io::Result<()> {
    let length = file.seek(SeekFrom::End(0))?;
    hasher.update(&length.to_le_bytes());
    file.rewind()?;
    let mut head = [0; 8];
    file.read_exact(&mut head)?;
    // A safetensors file starts with the length of its JSON header.
    let header = u64::from_le_bytes(head).min(length - 8);
    let mut buffer = Vec::new();
    file.by_ref().take(header).read_to_end(&mut buffer)?;
    hasher.update(&buffer);
    let data = length - 8 - header;
    for i in 0..SAMPLES {
        file.seek(SeekFrom::Start(8 + header + (u128::from(data) * u128::from(i) / u128::from(SAMPLES)) as u64))?;
        buffer.clear();
        file.by_ref().take(SAMPLE_BYTES).read_to_end(&mut buffer)?;
        hasher.update(&buffer);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn weights_are_there_when_all_shards_are() {
        let folder = tempfile::tempdir().unwrap();
        let source = Source::Folder(folder.path().to_owned());
        let write = |name: &str, text: &str| std::fs::write(folder.path().join(name), text).unwrap();
        assert!(!has_weights(&source));
        write("model.safetensors.index.json", r#"{"weight_map": {"a": "model-1-of-2.safetensors", "b": "model-2-of-2.safetensors"}}"#);
        write("model-1-of-2.safetensors", "");
        assert!(!has_weights(&source), "a download that is not finished");
        write("model-2-of-2.safetensors", "");
        assert!(has_weights(&source));
    }
}
