//! A progress bar on the terminal while a large checkpoint loads.

use idefics_kernels::weights::Weights;
use indicatif::{ProgressBar, ProgressStyle};
use std::{io::IsTerminal, time::Duration};

/// Below this the load is over before a bar could be read.
const WORTH_SHOWING_BYTES: u64 = 64 << 20;

/// A bar over the bytes of the tensors whose key starts with one of `prefixes`; invisible if they are few, or if standard error
/// is not a terminal.
pub(crate) fn bar(weights: &Weights, prefixes: &[&str]) -> ProgressBar {
    let total = weights.iter().filter(|view| prefixes.iter().any(|p| view.name.starts_with(p))).map(|view| view.bytes().len() as u64).sum();
    if total < WORTH_SHOWING_BYTES || !std::io::stderr().is_terminal() {
        return ProgressBar::hidden();
    }
    let bar = ProgressBar::new(total);
    if let Ok(style) = ProgressStyle::with_template("loading [{bar:40}] {bytes}/{total_bytes} {binary_bytes_per_sec}, {eta} left") {
        bar.set_style(style.progress_chars("=> "));
    }
    bar.enable_steady_tick(Duration::from_millis(200));
    bar
}

/// Keys of the vision role's tensors start with these.
pub(crate) const VISION_PREFIXES: [&str; 2] = ["model.vision_model.", "model.connector."];
/// Keys of the decoder role's tensors start with these.
pub(crate) const DECODER_PREFIXES: [&str; 2] = ["model.text_model.", "lm_head."];
