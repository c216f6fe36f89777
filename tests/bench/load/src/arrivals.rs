//! When requests arrive in an open loop: a Poisson process, so that gaps between arrivals are exponential and independent of
//! how fast the server answers.

use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use std::time::Duration;

/// Where a run of arrivals ends.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Until {
    /// After this many arrivals.
    Count(usize),
    /// At the last arrival before this time.
    Time(Duration),
}

/// Arrival times since the start, ascending, of a Poisson process with `rate` arrivals per second. The same seed gives the same
/// gaps at every rate, scaled.
pub fn poisson(seed: u64, rate: f64, until: Until) -> Vec<Duration> {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    let mut at = 0.0;
    let mut arrivals = Vec::new();
    loop {
        // Inverse of the exponential distribution function; 1 - u is never 0.
        at -= (1.0 - rng.random::<f64>()).ln() / rate;
        let ended = match until {
            Until::Count(count) => arrivals.len() == count,
            Until::Time(time) => at >= time.as_secs_f64(),
        };
        if ended {
            return arrivals;
        }
        arrivals.push(Duration::from_secs_f64(at));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn arrivals_are_seeded() {
        let arrivals = |seed| poisson(seed, 10.0, Until::Count(100));
        assert_eq!(arrivals(1), arrivals(1));
        assert_ne!(arrivals(1), arrivals(2));
    }

    #[test]
    fn gaps_have_the_mean_and_the_spread_of_an_exponential_distribution() {
        let (rate, count) = (20.0, 40_000);
        let arrivals = poisson(7, rate, Until::Count(count));
        let gaps: Vec<f64> =
            std::iter::once(arrivals[0]).chain(arrivals.windows(2).map(|w| w[1] - w[0])).map(|gap| gap.as_secs_f64() * rate).collect();
        let mean = gaps.iter().sum::<f64>() / count as f64;
        let variance = gaps.iter().map(|gap| (gap - mean).powi(2)).sum::<f64>() / count as f64;
        // Both are 1 for gaps in units of their mean; four standard errors: 4 / sqrt(n), and 4 sqrt(8 / n) for the variance.
        assert!((mean - 1.0).abs() < 0.02, "{mean}");
        assert!((variance - 1.0).abs() < 0.06, "{variance}");
    }

    #[test]
    fn time_limits_the_arrivals_and_the_rate_scales_them() {
        let slow = poisson(3, 5.0, Until::Time(Duration::from_secs(20)));
        let fast = poisson(3, 10.0, Until::Time(Duration::from_secs(10)));
        assert!(slow.iter().all(|at| at.as_secs_f64() < 20.0));
        assert_eq!(slow.len(), fast.len());
        assert!(slow.is_sorted());
    }
}
