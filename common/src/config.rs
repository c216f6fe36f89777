//! Layered configuration: defaults, then a TOML file, then `IDEFICS_SECTION__KEY` from the environment, then flags.

use figment::{
    Figment,
    providers::{Env, Format, Serialized, Toml},
};
use serde::{Serialize, de::DeserializeOwned};
use std::path::Path;

/// Prefix of environment variables; `__` separates sections: `IDEFICS_GATEWAY__MAX_CONCURRENT_REQUESTS=64`.
pub const ENV_PREFIX: &str = "IDEFICS_";

/// Why a configuration is refused.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// A value cannot be read, or a key is unknown.
    #[error("configuration: {0}")]
    Invalid(String),
    /// Values were read but do not make sense; all of them at once.
    #[error("configuration: {}", .0.join("; "))]
    Problems(Vec<String>),
    /// The file that was asked for is not there.
    #[error("configuration file {0} does not exist; name another with --config")]
    NoFile(String),
}

/// A configuration that can say what is wrong with it.
pub trait Validate {
    /// Adds a line per problem: key, what was expected, what was found.
    fn problems(&self, problems: &mut Vec<String>);
}

/// Loads a `T` whose fields are the sections: defaults, `file`, environment, then `flags` (a partial `T`, serialised; pass
/// `serde_json::json!({})` for none).
///
/// # Errors
/// [`ConfigError`]; unknown keys name the file or variable that they come from.
pub fn load<T>(file: Option<&Path>, flags: serde_json::Value) -> Result<T, ConfigError>
where
    T: Default + Serialize + DeserializeOwned + Validate,
{
    let mut figment = Figment::from(Serialized::defaults(T::default()));
    if let Some(file) = file {
        if !file.is_file() {
            return Err(ConfigError::NoFile(file.display().to_string()));
        }
        figment = figment.merge(Toml::file_exact(file));
    }
    let figment =
        figment.merge(Env::prefixed(ENV_PREFIX).filter(|key| key.as_str().contains("__")).split("__")).merge(Serialized::defaults(flags));
    let config: T = figment.extract().map_err(|e| ConfigError::Invalid(describe(e)))?;
    let mut problems = Vec::new();
    config.problems(&mut problems);
    if problems.is_empty() { Ok(config) } else { Err(ConfigError::Problems(problems)) }
}

fn describe(error: figment::Error) -> String {
    let lines: Vec<String> = error
        .into_iter()
        .map(|e| {
            let source = e.metadata.as_ref().map_or_else(String::new, |m| {
                m.source.as_ref().map_or_else(|| format!(" in {}", m.name), |source| format!(" in {} ({source})", m.name))
            });
            let key = if e.path.is_empty() { String::new() } else { format!("{}: ", e.path.join(".")) };
            format!("{key}{}{source}", e.kind)
        })
        .collect();
    lines.join("; ")
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde::Deserialize;
    use std::io::Write;

    #[derive(Serialize, Deserialize, Debug, Default)]
    #[serde(default, deny_unknown_fields)]
    struct Root {
        gateway: Section,
    }
    #[derive(Serialize, Deserialize, Debug)]
    #[serde(default, deny_unknown_fields)]
    struct Section {
        queue_ms: u64,
        peers: Vec<String>,
    }
    impl Default for Section {
        fn default() -> Self {
            Self { queue_ms: 5, peers: vec![] }
        }
    }
    impl Validate for Root {
        fn problems(&self, problems: &mut Vec<String>) {
            if self.gateway.queue_ms == 0 {
                problems.push("gateway.queue_ms is 0, expected 1 or more".into());
            }
        }
    }

    fn file(text: &str) -> tempfile::NamedTempFile {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        file.write_all(text.as_bytes()).unwrap();
        file
    }

    #[test]
    fn flags_win_over_the_file_and_the_file_over_defaults() {
        let file = file("[gateway]\nqueue_ms = 7\npeers = [\"a\"]\n");
        let config: Root = load(Some(file.path()), serde_json::json!({"gateway": {"queue_ms": 9}})).unwrap();
        assert_eq!((config.gateway.queue_ms, config.gateway.peers), (9, vec!["a".to_owned()]));
    }

    #[test]
    fn unknown_key_names_itself_and_its_file() {
        let file = file("[gateway]\nqueue = 7\n");
        let error = load::<Root>(Some(file.path()), serde_json::json!({})).unwrap_err().to_string();
        assert!(error.contains("queue") && error.contains(&file.path().file_name().unwrap().to_string_lossy().into_owned()), "{error}");
    }

    #[test]
    fn senseless_values_are_reported() {
        let error = load::<Root>(None, serde_json::json!({"gateway": {"queue_ms": 0}})).unwrap_err().to_string();
        assert!(error.contains("gateway.queue_ms is 0"), "{error}");
    }
}
