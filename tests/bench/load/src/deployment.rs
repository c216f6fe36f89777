//! The three roles as processes of their own, started for a measurement and ended with it.

use anyhow::{Context, Result, bail};
use serde_json::Value;
use std::{
    collections::VecDeque,
    fs::{self, File},
    io::{BufRead, BufReader, Write},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::{Arc, Mutex, PoisonError, mpsc},
    thread,
    time::Duration,
};

/// How long a role may take to load its model.
const READY_TIMEOUT: Duration = Duration::from_secs(600);
/// Lines of a role's log that are kept for when it fails.
const LOG_LINES: usize = 30;
/// Unit of processor times in `/proc`: `USER_HZ`, which is 100 on every architecture that Linux still supports.
const TICKS_PER_SECOND: f64 = 100.0;

/// What to start.
#[derive(Clone, Debug)]
pub struct DeploymentConfig {
    /// The `idefics` binary.
    pub bin: PathBuf,
    /// The checkpoint's folder; none is the embedded demo.
    pub model: Option<PathBuf>,
    /// Settings of every role, as `("decoder.prompt_lookup_tokens", "4")`.
    pub settings: Vec<(String, String)>,
    /// Where each role's log is written, as `decoder.log`; nowhere if absent.
    pub log_folder: Option<PathBuf>,
}

/// A gateway, a vision and a decoder role, ready.
pub struct Deployment {
    /// `http://HOST:PORT` of the gateway.
    pub endpoint: String,
    /// Decoder, vision and gateway.
    pub roles: Vec<Role>,
}

/// One role's process; killed when dropped.
pub struct Role {
    /// `gateway`, `vision` or `decoder`.
    pub name: &'static str,
    /// `HOST:PORT` of its metrics.
    pub metrics_addr: String,
    address: String,
    child: Child,
}

impl Deployment {
    /// Starts the roles on ports that the system chooses and waits until they are ready. Blocks.
    ///
    /// # Errors
    /// If a role does not start, with the end of its log.
    pub fn start(config: &DeploymentConfig) -> Result<Self> {
        let decoder = Role::start(config, "decoder", &[])?;
        let vision = Role::start(config, "vision", &[("vision.allowed_decoders", &decoder.as_list())])?;
        let peers = [("gateway.decoders", decoder.as_list()), ("gateway.visions", vision.as_list())];
        let gateway = Role::start(config, "gateway", &peers.each_ref().map(|(key, value)| (*key, value.as_str())))?;
        Ok(Self { endpoint: format!("http://{}", gateway.address), roles: vec![decoder, vision, gateway] })
    }
}

impl Role {
    fn start(config: &DeploymentConfig, name: &'static str, peers: &[(&str, &str)]) -> Result<Self> {
        let mut command = Command::new(&config.bin);
        // Only what the command line of the driver says counts, so that its report says all.
        for (variable, _) in std::env::vars_os() {
            if variable.to_str().is_some_and(|variable| variable.starts_with("IDEFICS_")) {
                command.env_remove(variable);
            }
        }
        command.args([name, "--grpc-addr", "127.0.0.1:0", "--metrics-addr", "127.0.0.1:0", "--log-format", "json"]);
        if let Some(model) = &config.model {
            command.arg("--model").arg(model);
        }
        let settings = config.settings.iter().map(|(key, value)| (key.as_str(), value.as_str()));
        command.envs(settings.chain(peers.iter().copied()).map(|(key, value)| (variable(key), value)));
        let spawned = command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped()).spawn();
        let mut child = spawned.with_context(|| format!("{} does not start; name the idefics binary with --bin", config.bin.display()))?;
        let Some(stderr) = child.stderr.take() else { bail!("the {name} role has no stderr") };
        let (announce, announced) = mpsc::channel();
        let log = Arc::new(Mutex::new(VecDeque::new()));
        let mut file = config.log_folder.as_deref().map(|folder| log_file(folder, name)).transpose()?;
        let lines = Arc::clone(&log);
        thread::spawn(move || {
            for line in BufReader::new(stderr).lines().map_while(Result::ok) {
                drop(announced_address(&line).map(|found| announce.send(found)));
                // A disk that is full must not stop the role, which waits for its log to be read.
                drop(file.as_mut().map(|file| writeln!(file, "{line}")));
                let mut lines = lines.lock().unwrap_or_else(PoisonError::into_inner);
                lines.truncate(LOG_LINES - 1);
                lines.push_front(line);
            }
        });
        let mut role = Self { name, metrics_addr: String::new(), address: String::new(), child };
        while role.address.is_empty() {
            match announced.recv_timeout(READY_TIMEOUT) {
                Ok(Announced::Metrics(address)) => role.metrics_addr = address,
                Ok(Announced::Ready(address)) => role.address = address,
                Err(error) => {
                    let lines = log.lock().unwrap_or_else(PoisonError::into_inner);
                    let lines: Vec<&str> = lines.iter().rev().map(String::as_str).collect();
                    bail!("the {name} role is not ready ({error}):\n{}", lines.join("\n"));
                }
            }
        }
        Ok(role)
    }

    /// What the process takes now; none if it has ended.
    pub fn resources(&self) -> Option<Resources> {
        Resources::of(&Path::new("/proc").join(self.child.id().to_string()))
    }

    /// A list of one, as configuration is written.
    fn as_list(&self) -> String {
        format!("[\"http://{}\"]", self.address)
    }
}

impl Drop for Role {
    fn drop(&mut self) {
        drop(self.child.kill());
        drop(self.child.wait());
    }
}

fn log_file(folder: &Path, role: &str) -> Result<File> {
    let path = folder.join(format!("{role}.log"));
    fs::create_dir_all(folder).and_then(|()| File::create(&path)).with_context(|| format!("{} cannot be written", path.display()))
}

/// `decoder.max_requests` as an environment variable.
fn variable(key: &str) -> String {
    format!("IDEFICS_{}", key.to_uppercase().replace('.', "__"))
}

/// Resources of a process at one time.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Resources {
    /// Resident memory, in bytes.
    pub rss_bytes: u64,
    /// Processor time since the process started, all threads, in seconds.
    pub cpu_s: f64,
}

impl Resources {
    /// What this process takes.
    pub fn of_driver() -> Option<Self> {
        Self::of(Path::new("/proc/self"))
    }

    /// Reads a folder of `/proc`; see proc(5).
    fn of(process: &Path) -> Option<Self> {
        let status = std::fs::read_to_string(process.join("status")).ok()?;
        let rss = status.lines().find_map(|line| line.strip_prefix("VmRSS:"))?;
        let rss_kib: u64 = rss.trim().strip_suffix("kB")?.trim().parse().ok()?;
        let stat = std::fs::read_to_string(process.join("stat")).ok()?;
        // The name in parentheses may have spaces; behind it, user and system time are the 12th and 13th fields.
        let mut times = stat.rsplit_once(')')?.1.split_whitespace().skip(11).map(str::parse::<u64>);
        let (user, system) = (times.next()?.ok()?, times.next()?.ok()?);
        Some(Self { rss_bytes: rss_kib << 10, cpu_s: (user + system) as f64 / TICKS_PER_SECOND })
    }
}

enum Announced {
    Metrics(String),
    Ready(String),
}

/// The address in a line of the log, such as `{"fields":{"message":"ready","grpc_addr":"127.0.0.1:4711"}}`.
fn announced_address(line: &str) -> Option<Announced> {
    let line: Value = serde_json::from_str(line).ok()?;
    let fields = &line["fields"];
    match fields["message"].as_str()? {
        "metrics" => Some(Announced::Metrics(fields["metrics_addr"].as_str()?.to_owned())),
        "ready" => Some(Announced::Ready(fields["grpc_addr"].as_str()?.to_owned())),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn settings_become_environment_variables() {
        assert_eq!(variable("decoder.prompt_lookup_tokens"), "IDEFICS_DECODER__PROMPT_LOOKUP_TOKENS");
    }

    #[test]
    fn own_resources_are_read_from_proc() {
        assert!(Resources::of_driver().is_some_and(|own| own.rss_bytes > 1 << 20 && own.cpu_s >= 0.0));
        assert_eq!(Resources::of(Path::new("/proc/no process")), None);
    }

    #[test]
    fn binary_that_does_not_exist_is_named() {
        let config = DeploymentConfig { bin: "/no/idefics".into(), model: None, settings: vec![], log_folder: None };
        let error = Deployment::start(&config).err().expect("it cannot be started").to_string();
        assert!(error.contains("/no/idefics") && error.contains("--bin"), "{error}");
    }
}
