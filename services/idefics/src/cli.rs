//! The command line. Its names are a contract that scripts rely on.

use crate::device::Device;
use clap::{Args, Parser, Subcommand, ValueEnum};
use idefics_common::telemetry::LogFormat;
use std::path::PathBuf;

/// Serves the vision-language model Idefics2.
#[derive(Debug, Parser)]
#[command(name = "idefics", version, about, max_term_width = 120)]
pub(crate) struct Cli {
    #[command(subcommand)]
    pub(crate) command: Command,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Ask a question about pictures and print the answer
    Ask(Box<AskArgs>),
    /// Compute the image tokens of pictures and write them to a file
    Encode(EncodeArgs),
    /// Say what a checkpoint is and what memory it needs
    Inspect(InspectArgs),
    /// Serve all roles in one process
    Serve(ServeArgs),
    /// Serve the public API; needs a vision and a decoder role
    Gateway(ServeArgs),
    /// Serve image encoding
    Vision(ServeArgs),
    /// Serve text generation
    Decoder(ServeArgs),
}

/// Where the model is.
#[derive(Clone, Debug, Args)]
pub(crate) struct ModelArgs {
    /// Checkpoint folder in the Hugging Face layout of HuggingFaceM4/idefics2-8b [default: the embedded demo checkpoint]
    #[arg(long, value_name = "DIR", env = "IDEFICS_MODEL")]
    pub(crate) model: Option<PathBuf>,
    /// Talk to a running gateway instead of loading a model, as in http://127.0.0.1:50051
    #[arg(long, value_name = "URL")]
    pub(crate) endpoint: Option<String>,
    /// Configuration file (TOML) for the roles that are started
    #[arg(long, value_name = "FILE", conflicts_with = "endpoint")]
    pub(crate) config: Option<PathBuf>,
    /// What computes: auto, cpu or cuda:N [default: auto, the first card if it can be used]
    #[arg(long, value_name = "DEVICE", conflicts_with = "endpoint")]
    pub(crate) device: Option<Device>,
}

/// How pictures are cut and resized.
#[derive(Clone, Debug, Args)]
pub(crate) struct ImageArgs {
    /// Show each picture as four crops and a whole [default: the checkpoint's choice]
    #[arg(long, overrides_with = "no_split")]
    pub(crate) split: bool,
    /// Show each picture as a whole only
    #[arg(long, overrides_with = "split")]
    pub(crate) no_split: bool,
    /// Scale the longer edge down to at most N pixels [default: the checkpoint's]
    #[arg(long, value_name = "N")]
    pub(crate) longest_edge: Option<u32>,
    /// Scale each edge up to at least N pixels [default: the checkpoint's]
    #[arg(long, value_name = "N")]
    pub(crate) shortest_edge: Option<u32>,
}

#[derive(Debug, Args)]
pub(crate) struct AskArgs {
    #[command(flatten)]
    pub(crate) model: ModelArgs,
    /// A picture: JPEG, PNG, WebP, GIF, BMP or TIFF; may be repeated
    #[arg(long = "image", value_name = "FILE")]
    pub(crate) images: Vec<PathBuf>,
    /// A conversation: a JSON list of {role, content: [{type: "text", text}, {type: "image", path}]}
    #[arg(long, value_name = "FILE.json", conflicts_with_all = ["raw", "images", "prompt"])]
    pub(crate) messages: Option<PathBuf>,
    /// Send PROMPT as it is, without the chat template; <image> marks where a picture goes
    #[arg(long, requires = "prompt")]
    pub(crate) raw: bool,
    #[command(flatten)]
    pub(crate) image_options: ImageArgs,
    /// Generate at most N tokens
    #[arg(long, value_name = "N")]
    pub(crate) max_new_tokens: Option<u32>,
    /// 0 picks the most likely token [default: 0]
    #[arg(long, value_name = "T")]
    pub(crate) temperature: Option<f32>,
    /// Sample from the smallest set of tokens that reaches this probability [default: 1]
    #[arg(long, value_name = "P")]
    pub(crate) top_p: Option<f32>,
    /// Sample from the K most likely tokens; 0 means all [default: 0]
    #[arg(long, value_name = "K")]
    pub(crate) top_k: Option<u32>,
    /// Sample from tokens at least this likely, relative to the most likely one [default: 0]
    #[arg(long, value_name = "P")]
    pub(crate) min_p: Option<f32>,
    /// Sample from the most typical tokens that reach this probability [default: 1]
    #[arg(long, value_name = "P")]
    pub(crate) typical_p: Option<f32>,
    /// Divide the logits of tokens in prompt and answer, or multiply those below 0 [default: 1]
    #[arg(long, value_name = "R")]
    pub(crate) repetition_penalty: Option<f32>,
    /// Subtract this from the logits of tokens in the answer [default: 0]
    #[arg(long, value_name = "R", allow_negative_numbers = true)]
    pub(crate) presence_penalty: Option<f32>,
    /// Subtract this from the logit of a token for each time that it is in the answer [default: 0]
    #[arg(long, value_name = "R", allow_negative_numbers = true)]
    pub(crate) frequency_penalty: Option<f32>,
    /// Add V to the logit of token ID; may be repeated
    #[arg(long, value_name = "ID=V", value_parser = parse_logit_bias)]
    pub(crate) logit_bias: Vec<(u32, f32)>,
    /// Make sampling repeatable
    #[arg(long, value_name = "S")]
    pub(crate) seed: Option<u64>,
    /// Generate N answers, from 1 to 16 [default: 1]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=16))]
    pub(crate) n: Option<u32>,
    /// End before this text; may be repeated
    #[arg(long, value_name = "STR", allow_hyphen_values = true)]
    pub(crate) stop: Vec<String>,
    /// End after this token id too; may be repeated
    #[arg(long = "stop-token-id", value_name = "ID")]
    pub(crate) stop_token_ids: Vec<u32>,
    /// Do not end before N tokens, but for a stop text [default: 0]
    #[arg(long, value_name = "N")]
    pub(crate) min_new_tokens: Option<u32>,
    /// Go on when the model would end its turn
    #[arg(long)]
    pub(crate) ignore_eos: bool,
    /// Overtake requests of lower priority, from -10 to 10
    #[arg(long, value_name = "P", default_value_t = 0, allow_negative_numbers = true, value_parser = clap::value_parser!(i32).range(-10..=10))]
    pub(crate) priority: i32,
    /// Report log-probabilities of each token and of the N most likely ones
    #[arg(long, value_name = "N", requires = "json")]
    pub(crate) logprobs: Option<u32>,
    /// Report log-probabilities of each of the prompt's tokens but the first and of the N most likely ones
    #[arg(long, value_name = "N", requires = "json")]
    pub(crate) prompt_logprobs: Option<u32>,
    /// Print one JSON object instead of text
    #[arg(long)]
    pub(crate) json: bool,
    /// The question, or with --raw the prompt
    #[arg(value_name = "PROMPT", required_unless_present = "messages")]
    pub(crate) prompt: Option<String>,
}

#[derive(Debug, Args)]
pub(crate) struct EncodeArgs {
    #[command(flatten)]
    pub(crate) model: ModelArgs,
    /// Pictures; may be repeated
    #[arg(long = "image", value_name = "FILE", required = true, num_args(1..))]
    pub(crate) images: Vec<PathBuf>,
    #[command(flatten)]
    pub(crate) image_options: ImageArgs,
    /// Where the tensor `image_tokens`, [sub-images x tokens per image, hidden] f32, is written
    #[arg(long, value_name = "FILE.safetensors")]
    pub(crate) out: PathBuf,
}

#[derive(Debug, Args)]
pub(crate) struct InspectArgs {
    /// Checkpoint folder [default: the embedded demo checkpoint]
    #[arg(value_name = "DIR")]
    pub(crate) model: Option<PathBuf>,
}

#[derive(Debug, Args)]
pub(crate) struct ServeArgs {
    /// Checkpoint folder in the Hugging Face layout of HuggingFaceM4/idefics2-8b [default: the embedded demo checkpoint]
    #[arg(long, value_name = "DIR", env = "IDEFICS_MODEL")]
    pub(crate) model: Option<PathBuf>,
    /// Host name or IP address, and port, to listen on; port 0 takes a free one [default: 127.0.0.1:50051]
    #[arg(long, value_name = "HOST:PORT")]
    pub(crate) grpc_addr: Option<String>,
    /// Host name or IP address, and port, of Prometheus metrics at /metrics; port 0 takes a free one [default: none]
    #[arg(long, value_name = "HOST:PORT")]
    pub(crate) metrics_addr: Option<String>,
    /// Configuration file (TOML)
    #[arg(long, value_name = "FILE")]
    pub(crate) config: Option<PathBuf>,
    /// What computes: auto, cpu or cuda:N [default: auto, the first card if it can be used]
    #[arg(long, value_name = "DEVICE")]
    pub(crate) device: Option<Device>,
    /// How log lines look [default: text]
    #[arg(long, value_name = "FORMAT", value_enum)]
    pub(crate) log_format: Option<LogFormatArg>,
    /// What is logged, as in info or info,h2=warn [default: info]
    #[arg(long, value_name = "FILTER")]
    pub(crate) log_filter: Option<String>,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
pub(crate) enum LogFormatArg {
    Text,
    Json,
}

impl From<LogFormatArg> for LogFormat {
    fn from(arg: LogFormatArg) -> Self {
        match arg {
            LogFormatArg::Text => Self::Text,
            LogFormatArg::Json => Self::Json,
        }
    }
}

impl ImageArgs {
    /// Whether pictures are split, if the caller said so.
    pub(crate) fn split(&self) -> Option<bool> {
        if self.split {
            Some(true)
        } else if self.no_split {
            Some(false)
        } else {
            None
        }
    }
}

fn parse_logit_bias(text: &str) -> Result<(u32, f32), String> {
    let parsed = text.split_once('=').and_then(|(id, bias)| Some((id.trim().parse().ok()?, bias.trim().parse().ok()?)));
    parsed.ok_or_else(|| "expected a token id and a number, as in 42=-1.5".into())
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn command_line_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn sampling_options_take_negative_numbers_and_pairs() {
        let parse = |args: &[&str]| Cli::try_parse_from([&["idefics", "ask", "x"], args].concat());
        let parsed = parse(&[
            "--presence-penalty",
            "-0.5",
            "--priority",
            "-3",
            "--logit-bias",
            "5=-3",
            "--logit-bias=7=2.5",
            "--stop-token-id",
            "9",
        ]);
        let Command::Ask(args) = parsed.unwrap().command else { unreachable!("the command is ask") };
        assert_eq!((args.presence_penalty, args.logit_bias, args.stop_token_ids), (Some(-0.5), vec![(5, -3.0), (7, 2.5)], vec![9]));
        assert_eq!(args.priority, -3);
        for bad in ["5", "5=", "=1", "-1=2", "5=x"] {
            assert!(parse(&[&format!("--logit-bias={bad}")]).unwrap_err().to_string().contains("as in 42=-1.5"), "{bad}");
        }
    }

    #[test]
    fn later_of_split_and_no_split_wins() {
        let parse = |args: &[&str]| match Cli::parse_from([&["idefics", "ask", "x"], args].concat()).command {
            Command::Ask(args) => args.image_options.split(),
            _ => unreachable!("the command is ask"),
        };
        assert_eq!(parse(&[]), None);
        assert_eq!(parse(&["--split", "--no-split"]), Some(false));
        assert_eq!(parse(&["--no-split", "--split"]), Some(true));
    }
}
