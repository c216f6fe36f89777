//! The binary under test as processes: one-shot commands and servers.

use crate::golden::Matrix;
use serde::Deserialize;
use serde_json::Value;
use std::{
    ffi::OsStr,
    io::{BufRead, BufReader},
    path::Path,
    process::{Child, Command, ExitStatus, Output, Stdio},
    sync::{Arc, Mutex, mpsc},
    thread,
    time::Duration,
};

/// How long anything may take before a test gives up on it. Only a hang takes this long.
pub const DEADLINE: Duration = Duration::from_secs(120);

/// What `ask --json` prints.
#[derive(Clone, Debug, Deserialize)]
pub struct Answer {
    /// The answer.
    pub text: String,
    /// Its tokens.
    pub token_ids: Vec<u32>,
    /// The prompt's tokens.
    pub prompt_token_ids: Vec<u32>,
    /// `stop` or `length`.
    pub finish_reason: String,
    /// What was consumed.
    pub usage: Usage,
    /// Where the time went.
    pub timings_ms: serde_json::Map<String, Value>,
    /// One per token, if asked for.
    #[serde(default)]
    pub logprobs: Vec<TokenLogprobs>,
    /// One per token of the prompt, none for the first, if asked for.
    #[serde(default)]
    pub prompt_logprobs: Vec<Option<TokenLogprobs>>,
    /// All choices, if more than one was asked for; the fields above are those of the first.
    #[serde(default)]
    pub choices: Vec<Choice>,
}

/// One of several answers.
#[derive(Clone, Debug, Deserialize)]
pub struct Choice {
    /// The answer.
    pub text: String,
    /// Its tokens.
    pub token_ids: Vec<u32>,
    /// `stop` or `length`.
    pub finish_reason: String,
}

/// Consumed tokens.
#[derive(Clone, Copy, Debug, Deserialize, PartialEq, Eq)]
pub struct Usage {
    /// In the prompt.
    pub prompt_tokens: u32,
    /// Of those, image tokens.
    pub image_tokens: u32,
    /// Generated.
    pub completion_tokens: u32,
}

/// Log-probabilities of one step.
#[derive(Clone, Debug, Deserialize)]
pub struct TokenLogprobs {
    /// The token that is there.
    pub token_id: u32,
    /// Its log-probability.
    pub logprob: f64,
    /// The most likely tokens.
    pub top: Vec<TopLogprob>,
}

/// A likely token.
#[derive(Clone, Debug, Deserialize)]
pub struct TopLogprob {
    /// The token.
    pub token_id: u32,
    /// Its log-probability.
    pub logprob: f64,
}

/// The binary under test: `Idefics(env!("CARGO_BIN_EXE_idefics-under-test"))`.
#[derive(Clone, Copy, Debug)]
pub struct Idefics(pub &'static str);

impl Idefics {
    /// A command of the binary, free of this process' `IDEFICS_*` settings, that computes on the CPU unless it is told otherwise.
    pub fn command(self) -> Command {
        let mut command = Command::new(self.0);
        for (name, _) in std::env::vars_os() {
            if name.to_str().is_some_and(|name| name.starts_with("IDEFICS_") || name == "RUST_LOG") {
                command.env_remove(name);
            }
        }
        // Expectations are those of f32: a card, where there is one, would compute in bf16.
        command.env("IDEFICS_BACKEND__DEVICE", "cpu").stdin(Stdio::null());
        command
    }

    /// Runs a command to its end.
    ///
    /// # Panics
    /// If it does not end in time.
    pub fn run<S: AsRef<OsStr>>(self, args: impl IntoIterator<Item = S>) -> Output {
        let child = self.command().args(args).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("the binary starts");
        let pid = child.id();
        let (done, output) = mpsc::channel();
        thread::spawn(move || done.send(child.wait_with_output()));
        output
            .recv_timeout(DEADLINE)
            .unwrap_or_else(|_| {
                signal(pid, "KILL");
                panic!("a command did not end within {DEADLINE:?}")
            })
            .expect("the output is read")
    }

    /// `ask --json` with these arguments.
    ///
    /// # Panics
    /// If it fails, with what it said.
    pub fn ask<S: AsRef<OsStr>>(self, args: impl IntoIterator<Item = S>) -> Answer {
        let output =
            self.run([OsStr::new("ask").to_owned(), "--json".into()].into_iter().chain(args.into_iter().map(|a| a.as_ref().to_owned())));
        assert!(output.status.success(), "ask ended with {}: {}", output.status, String::from_utf8_lossy(&output.stderr));
        serde_json::from_slice(&output.stdout)
            .unwrap_or_else(|e| panic!("ask printed no answer: {e}: {}", String::from_utf8_lossy(&output.stdout)))
    }

    /// `encode` with these arguments, and what it wrote.
    ///
    /// # Panics
    /// If it fails, with what it said.
    pub fn encode<S: AsRef<OsStr>>(self, args: impl IntoIterator<Item = S>) -> Matrix {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let out = folder.path().join("tokens.safetensors");
        let args = args.into_iter().map(|a| a.as_ref().to_owned());
        let output = self.run([OsStr::new("encode").to_owned(), "--out".into(), out.clone().into()].into_iter().chain(args));
        assert!(output.status.success(), "encode ended with {}: {}", output.status, String::from_utf8_lossy(&output.stderr));
        Matrix::from_safetensors(&std::fs::read(out).expect("encode wrote its file"), "image_tokens")
    }

    /// Starts all roles in one process and waits until they are ready.
    pub fn serve(self, model: Option<&Path>) -> Server {
        Server::start(self, "serve", model, &[]).ready()
    }

    /// Starts one role, with settings from the environment, and waits until it is ready.
    pub fn role(self, role: &str, model: Option<&Path>, env: &[(&str, &str)]) -> Server {
        Server::start(self, role, model, env).ready()
    }
}

/// A process that serves until it is told to end; killed when dropped.
pub struct Server {
    child: Child,
    role: String,
    address: String,
    ready: mpsc::Receiver<String>,
    log: Arc<Mutex<Vec<String>>>,
}

impl Server {
    /// Starts a role on a port that the system chooses, and does not wait; [`Server::ready`] does.
    pub fn start(idefics: Idefics, role: &str, model: Option<&Path>, env: &[(&str, &str)]) -> Self {
        Self::start_at(idefics, role, "127.0.0.1:0", model, env)
    }

    /// Starts a role on the given address, and does not wait.
    pub fn start_at(idefics: Idefics, role: &str, address: &str, model: Option<&Path>, env: &[(&str, &str)]) -> Self {
        let mut command = idefics.command();
        command.args([role, "--grpc-addr", address, "--log-format", "json"]).envs(env.iter().copied());
        if let Some(model) = model {
            command.arg("--model").arg(model);
        }
        let mut child = command.stdout(Stdio::null()).stderr(Stdio::piped()).spawn().expect("the binary starts");
        let stderr = BufReader::new(child.stderr.take().expect("stderr is a pipe"));
        let log = Arc::new(Mutex::new(Vec::new()));
        let (announce, ready) = mpsc::channel();
        let lines = log.clone();
        thread::spawn(move || {
            for line in stderr.lines().map_while(Result::ok) {
                if let Some(address) = bound_address(&line) {
                    announce.send(address).ok();
                }
                lines.lock().expect("no reader panics").push(line);
            }
        });
        Self { child, role: role.to_owned(), address: address.to_owned(), ready, log }
    }

    /// Waits until the process says that it is ready.
    ///
    /// # Panics
    /// If it ends or takes too long, with its log.
    pub fn ready(mut self) -> Self {
        match self.ready.recv_timeout(DEADLINE) {
            Ok(address) => self.address = address,
            Err(e) => panic!("{} is not ready ({e}):\n{}", self.role, self.log()),
        }
        self
    }

    /// `http://HOST:PORT`.
    pub fn endpoint(&self) -> String {
        format!("http://{}", self.address)
    }

    /// `HOST:PORT`.
    pub fn address(&self) -> &str {
        &self.address
    }

    /// What the process has logged so far.
    pub fn log(&self) -> String {
        self.log.lock().expect("no reader panics").join("\n")
    }

    /// Sends SIGTERM.
    pub fn terminate(&self) {
        signal(self.child.id(), "TERM");
    }

    /// Waits for the end of the process.
    ///
    /// # Panics
    /// If it does not end in time, with its log.
    pub fn wait(mut self) -> ExitStatus {
        // Its stderr ends when the process does, and the sender goes with it.
        loop {
            match self.ready.recv_timeout(DEADLINE) {
                Ok(_) => {}
                Err(mpsc::RecvTimeoutError::Disconnected) => return self.child.wait().expect("the process can be waited for"),
                Err(mpsc::RecvTimeoutError::Timeout) => panic!("{} did not end within {DEADLINE:?}", self.role),
            }
        }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.child.kill().ok();
        self.child.wait().ok();
        if thread::panicking() {
            let log = self.log.lock().map(|lines| lines[lines.len().saturating_sub(30)..].join("\n")).unwrap_or_default();
            eprintln!("--- the last that {} at {} said:\n{log}", self.role, self.address);
        }
    }
}

/// The address in a line like `{"fields":{"message":"ready","role":"serve","grpc_addr":"127.0.0.1:4711"}}`.
fn bound_address(line: &str) -> Option<String> {
    let line: Value = serde_json::from_str(line).ok()?;
    let fields = &line["fields"];
    if fields["message"] != "ready" {
        return None;
    }
    Some(fields["grpc_addr"].as_str()?.to_owned())
}

fn signal(pid: u32, name: &str) {
    Command::new("sh").args(["-c", &format!("kill -{name} {pid}")]).status().expect("a shell sends the signal");
}
