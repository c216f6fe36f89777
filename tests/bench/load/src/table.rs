//! Reports as short tables.

use crate::{
    bench::RunReport,
    observer::{RoleReports, increase},
    quantiles::Quantiles,
    summary::Summary,
};

/// The columns of [`row`], after a label.
pub(crate) const HEADER: &str = "                sent    ok refused errors   req/s goodput   tok/s |  ttft p50    p90    p99 |  itl p50    p99 | \
    total p50    p99 | refusal p50  p99 (ms)";

/// A line about some requests.
pub(crate) fn row(label: &str, summary: &Summary) -> String {
    let ms = |value: Option<f64>| value.map_or("-".to_owned(), |ms| format!("{ms:.1}"));
    let [p50, p90, p99] = [|q: Quantiles| q.p50, |q: Quantiles| q.p90, |q: Quantiles| q.p99];
    format!(
        "{label:<14} {:>5} {:>5} {:>7} {:>6} {:>7.2} {:>7.2} {:>7.1} | {:>9} {:>6} {:>6} | {:>8} {:>6} | {:>9} {:>6} | {:>11} {:>4}",
        summary.sent,
        summary.answered,
        summary.refused,
        summary.num_errors(),
        summary.requests_per_s,
        summary.goodput_per_s,
        summary.output_tokens_per_s,
        ms(summary.ttft_ms.map(p50)),
        ms(summary.ttft_ms.map(p90)),
        ms(summary.ttft_ms.map(p99)),
        ms(summary.inter_token_ms.map(p50)),
        ms(summary.inter_token_ms.map(p99)),
        ms(summary.total_ms.map(p50)),
        ms(summary.total_ms.map(p99)),
        ms(summary.refusal_ms.map(p50)),
        ms(summary.refusal_ms.map(p99)),
    )
}

/// A run by kind of request, and what the servers say.
pub(crate) fn details(run: &RunReport) -> String {
    let mut lines = vec![HEADER.to_owned(), row("all", &run.total)];
    for (kind, summary) in &run.by_kind {
        lines.push(row(&format!("{kind:?}"), summary));
    }
    for (kind, summary) in run.by_kind.iter().filter(|(_, summary)| summary.answered > 0) {
        let per_request = |tokens: u64| tokens as f64 / summary.answered as f64;
        lines.push(format!(
            "{:<14} prompt {:.1} tokens, {:.1} of them cached, prefill p50 {:.1} ms, added to the first token p50 {:.1} ms",
            format!("{kind:?}"),
            per_request(summary.prompt_tokens),
            per_request(summary.cached_prompt_tokens),
            summary.prefill_ms.map_or(0.0, |prefill| prefill.p50),
            summary.added_ttft_ms.map_or(0.0, |added| added.p50),
        ));
    }
    lines.extend(servers(&run.roles));
    if let Some(blocks) = run.leaked_kv_blocks {
        lines.push(format!("leaked KV blocks: {blocks}"));
    }
    lines.join("\n")
}

/// What the servers say that is worth a glance; the report has the rest.
pub(crate) fn servers(roles: &RoleReports) -> Vec<String> {
    const MIB: f64 = (1 << 20) as f64;
    let mut lines = Vec::new();
    for (name, role) in roles {
        if let Some(rss) = role.rss_bytes {
            let [before, peak, after] = [rss.before, rss.peak, rss.after].map(|bytes| bytes / MIB);
            let cpu_s = role.cpu_s.unwrap_or(0.0);
            lines.push(format!(
                "{name:<14} resident {before:.1} MiB before, {peak:.1} at most, {after:.1} after; {cpu_s:.1} s of processor"
            ));
        }
    }
    let [cached, prompt, drafted, accepted, preemptions] = [
        "idefics_decoder_cached_prompt_tokens_total",
        "idefics_decoder_prompt_tokens_total",
        "idefics_decoder_draft_tokens_total",
        "idefics_decoder_accepted_draft_tokens_total",
        "idefics_decoder_preemptions_total",
    ]
    .map(|counter| increase(roles, counter));
    lines.push(format!(
        "prefix cache {cached} of {prompt} prompt tokens, drafts {accepted} of {drafted} accepted, {preemptions} preemptions"
    ));
    lines
}
