//! Quantiles of measured times.

use serde::Serialize;

/// Quantiles of some values; every one of them is a value that was measured (nearest rank).
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Quantiles {
    /// The median.
    pub p50: f64,
    /// Nine of ten are at most this.
    pub p90: f64,
    /// 99 of 100 are at most this; the largest of fewer than 100.
    pub p99: f64,
    /// The mean.
    pub mean: f64,
}

impl Quantiles {
    /// Quantiles of `values`; none of none.
    pub fn of(mut values: Vec<f64>) -> Option<Self> {
        values.sort_by(f64::total_cmp);
        let rank = |q: f64| values.get(((q * values.len() as f64).ceil() as usize).saturating_sub(1)).copied();
        Some(Self { p50: rank(0.5)?, p90: rank(0.9)?, p99: rank(0.99)?, mean: values.iter().sum::<f64>() / values.len() as f64 })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantiles_are_nearest_ranks() {
        let values = (1..=100).rev().map(f64::from).collect();
        assert_eq!(Quantiles::of(values), Some(Quantiles { p50: 50.0, p90: 90.0, p99: 99.0, mean: 50.5 }));
        assert_eq!(Quantiles::of(vec![3.0]), Some(Quantiles { p50: 3.0, p90: 3.0, p99: 3.0, mean: 3.0 }));
        assert_eq!(Quantiles::of(vec![2.0, 1.0]).map(|q| (q.p50, q.p90)), Some((1.0, 2.0)));
        assert_eq!(Quantiles::of(vec![]), None);
    }
}
