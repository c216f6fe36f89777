//! Plots of reports as SVG.

use crate::{bench::RunReport, overload::OverloadReport, quantiles::Quantiles, sweep::SweepReport};
use anyhow::{Result, anyhow};
use plotters::{
    coord::{
        Shift,
        ranged1d::{AsRangedCoord, ValueFormatter},
    },
    prelude::*,
};
use std::{ops::Range, path::Path};

/// Pixels of one chart.
const CHART: (u32, u32) = (640, 400);
/// Room for labels and legends, in pixels.
const MARGIN: u32 = 16;
const LABELS: u32 = 56;
const FONT: &str = "sans-serif";
const FONT_PIXELS: u32 = 16;
/// Room above and below what a chart shows.
const SLACK: f64 = 1.15;
const COLORS: [RGBColor; 3] = [RGBColor(31, 119, 180), RGBColor(214, 39, 40), RGBColor(120, 120, 120)];

/// A line of a chart: its legend, and its points.
type Line<'a> = (&'a str, Vec<(f64, f64)>);
type SvgArea<'a> = DrawingArea<SVGBackend<'a>, Shift>;

struct Labels<'a> {
    title: &'a str,
    x: &'a str,
    y: &'a str,
    /// A corner that the lines leave free.
    legend: SeriesLabelPosition,
}

/// Throughput and time to first token over concurrency.
///
/// # Errors
/// If the file cannot be written.
pub(crate) fn sweep(report: &SweepReport, file: &Path) -> Result<()> {
    let points = |value: &dyn Fn(&RunReport) -> Option<f64>| {
        report.levels.iter().filter_map(|level| Some((level.concurrency as f64, value(&level.run)?))).collect::<Vec<_>>()
    };
    let ttft = |quantile: fn(Quantiles) -> f64| points(&|run| run.total.ttft_ms.map(quantile));
    let throughput = vec![("answers per second", points(&|run| Some(run.total.requests_per_s)))];
    let latency = vec![("p50", ttft(|q| q.p50)), ("p99", ttft(|q| q.p99))];
    draw(file, 2, |areas| {
        let labels =
            Labels { title: "Throughput", x: "concurrent clients", y: "answers per second", legend: SeriesLabelPosition::LowerRight };
        let (xs, ys) = (span(&throughput, 0), span(&throughput, 1));
        chart(&areas[0], &labels, &throughput, xs.log_scale().base(2.0), 0.0..ys.end)?;
        let labels = Labels { title: "Time to first token", x: "concurrent clients", y: "ms", legend: SeriesLabelPosition::UpperLeft };
        let (xs, ys) = (span(&latency, 0), span(&latency, 1));
        chart(&areas[1], &labels, &latency, xs.log_scale().base(2.0), ys.log_scale())
    })
}

/// Goodput over the rate at which conversations begin.
///
/// # Errors
/// If the file cannot be written.
pub(crate) fn overload(report: &OverloadReport, file: &Path) -> Result<()> {
    let mut goodput: Vec<_> = report.steps().map(|step| (step.rate, step.goodput())).collect();
    goodput.sort_by(|a, b| a.0.total_cmp(&b.0));
    // A rate that ran several times is one point, at the mean.
    let mean = |runs: &[(f64, f64)]| (runs[0].0, runs.iter().map(|run| run.1).sum::<f64>() / runs.len() as f64);
    let goodput: Vec<(f64, f64)> = goodput.chunk_by(|a, b| a.0 == b.0).map(mean).collect();
    let last = goodput.last().map_or(1.0, |(rate, _)| *rate);
    let peak = vec![(0.0, report.peak_goodput_per_s), (last, report.peak_goodput_per_s)];
    let lines = vec![("goodput", goodput), ("peak", peak)];
    draw(file, 1, |areas| {
        let labels = Labels {
            title: "Goodput",
            x: "conversations begun per second",
            y: "answers per second",
            legend: SeriesLabelPosition::LowerRight,
        };
        chart(&areas[0], &labels, &lines, 0.0..span(&lines, 0).end, 0.0..span(&lines, 1).end)
    })
}

fn draw(file: &Path, charts: usize, paint: impl FnOnce(&[SvgArea<'_>]) -> Result<()>) -> Result<()> {
    let mut svg = String::new();
    {
        let area = SVGBackend::with_string(&mut svg, (CHART.0 * charts as u32, CHART.1)).into_drawing_area();
        area.fill(&WHITE).map_err(failed)?;
        paint(&area.split_evenly((1, charts)))?;
        area.present().map_err(failed)?;
    }
    Ok(std::fs::write(file, svg)?)
}

fn chart<X, Y>(
    area: &SvgArea<'_>,
    labels: &Labels<'_>,
    lines: &[Line<'_>],
    xs: impl AsRangedCoord<CoordDescType = X, Value = f64>,
    ys: impl AsRangedCoord<CoordDescType = Y, Value = f64>,
) -> Result<()>
where
    X: Ranged<ValueType = f64> + ValueFormatter<f64>,
    Y: Ranged<ValueType = f64> + ValueFormatter<f64>,
{
    let mut chart = ChartBuilder::on(area)
        .caption(labels.title, (FONT, FONT_PIXELS + 4))
        .margin(MARGIN)
        .x_label_area_size(LABELS)
        .y_label_area_size(LABELS)
        .build_cartesian_2d(xs, ys)
        .map_err(failed)?;
    let mesh = &mut chart.configure_mesh();
    mesh.max_light_lines(1).x_desc(labels.x).y_desc(labels.y).axis_desc_style((FONT, FONT_PIXELS)).label_style((FONT, FONT_PIXELS - 2));
    mesh.x_label_formatter(&number).y_label_formatter(&number).draw().map_err(failed)?;
    for ((name, points), color) in lines.iter().zip(COLORS) {
        let drawn = chart.draw_series(LineSeries::new(points.clone(), color.stroke_width(2)).point_size(3)).map_err(failed)?;
        drawn.label(*name).legend(move |(x, y)| PathElement::new([(x, y), (x + 16, y)], color.stroke_width(2)));
    }
    let series = &mut chart.configure_series_labels();
    series.position(labels.legend.clone()).background_style(WHITE).label_font((FONT, FONT_PIXELS - 2)).draw().map_err(failed)
}

/// From the least to the most of a coordinate, with slack, never empty.
fn span(lines: &[Line<'_>], axis: usize) -> Range<f64> {
    let values = lines.iter().flat_map(|(_, points)| points).map(|(x, y)| if axis == 0 { *x } else { *y });
    let (least, most) = values.fold((f64::MAX, 0.0), |(least, most): (f64, f64), value| (least.min(value), most.max(value)));
    if most > 0.0 { least.max(most * 1e-6) / SLACK..most * SLACK } else { 0.5..1.0 }
}

fn number(value: &f64) -> String {
    if *value >= 10.0 || value.fract() == 0.0 { format!("{value:.0}") } else { format!("{value:.2}") }
}

fn failed<E: std::error::Error + Send + Sync>(error: DrawingAreaErrorKind<E>) -> anyhow::Error {
    anyhow!("a plot cannot be drawn: {error}")
}
