//! What is said about a handful of samples: a median and how far it can be trusted.
//!
//! Knows numbers only.

use serde::{Deserialize, Serialize};

/// The coverage that an [`Estimate`] aims at.
const CONFIDENCE: f64 = 0.95;

/// A median with the interval that covers the true median.
///
/// The bounds are order statistics of the sample, so they assume nothing about
/// the distribution. That needs six samples for 95 %; with fewer, the interval
/// is the range of the sample and [`Self::coverage`] says what it is worth.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Estimate {
    /// The median of the sample.
    pub median: f64,
    /// Lower end of the interval.
    pub low: f64,
    /// Upper end of the interval.
    pub high: f64,
    /// Probability that the interval covers the true median, 0 to 1.
    pub coverage: f64,
}

impl Estimate {
    /// Describes a sample; `None` if it is empty or holds a NaN.
    pub fn of(sample: &[f64]) -> Option<Self> {
        if sample.is_empty() || sample.iter().any(|x| x.is_nan()) {
            return None;
        }
        let mut sorted = sample.to_vec();
        sorted.sort_by(f64::total_cmp);
        let n = sorted.len();
        let (rank, coverage) = interval_rank(n);
        Some(Self {
            median: f64::midpoint(sorted[(n - 1) / 2], sorted[n / 2]),
            low: sorted[rank],
            high: sorted[n - 1 - rank],
            coverage,
        })
    }

    /// Describes the ratios of paired samples, `numerator[i] / denominator[i]`.
    /// `None` if there are no pairs or a ratio is not a number.
    pub fn of_ratio(numerator: &[f64], denominator: &[f64]) -> Option<Self> {
        let ratios: Vec<f64> = numerator
            .iter()
            .zip(denominator)
            .map(|(a, b)| a / b)
            .collect();
        Self::of(&ratios)
    }
}

/// How many samples to leave out at each end, and the coverage that is left: the
/// narrowest interval of order statistics that still covers the median with
/// [`CONFIDENCE`].
fn interval_rank(n: usize) -> (usize, f64) {
    // The number of samples below the median is binomial(n, 1/2), so
    // [x_k, x_(n-1-k)] misses it with twice the probability of at most k below.
    let mut probability = 0.5f64.powi(n as i32);
    let mut at_most = probability;
    let mut rank = 0;
    let mut coverage = 1.0 - 2.0 * at_most;
    for k in 1..=(n.saturating_sub(1)) / 2 {
        probability *= (n - k + 1) as f64 / k as f64;
        at_most += probability;
        let narrower = 1.0 - 2.0 * at_most;
        if narrower < CONFIDENCE {
            break;
        }
        (rank, coverage) = (k, narrower);
    }
    (rank, coverage.max(0.0))
}

/// The median of a sample; `None` if there is none.
pub fn median(sample: &[f64]) -> Option<f64> {
    Estimate::of(sample).map(|estimate| estimate.median)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn twenty_samples_leave_five_out_at_each_end() {
        let sample: Vec<f64> = (1..=20).rev().map(f64::from).collect();
        let estimate = Estimate::of(&sample).unwrap();
        assert_eq!(estimate.median, 10.5);
        assert_eq!((estimate.low, estimate.high), (6.0, 15.0));
        assert!((estimate.coverage - 0.9586).abs() < 1e-4);
    }

    #[test]
    fn few_samples_give_their_range_and_admit_it() {
        let estimate = Estimate::of(&[3.0, 1.0, 2.0]).unwrap();
        assert_eq!(
            (estimate.median, estimate.low, estimate.high),
            (2.0, 1.0, 3.0)
        );
        assert_eq!(estimate.coverage, 0.75);
        assert_eq!(Estimate::of(&[1.0]).unwrap().coverage, 0.0);
        assert_eq!(Estimate::of(&[]), None);
    }

    #[test]
    fn six_samples_are_enough() {
        let (rank, coverage) = interval_rank(6);
        assert_eq!(rank, 0);
        assert!(coverage > CONFIDENCE);
    }

    #[test]
    fn ratios_are_taken_pair_by_pair() {
        // The speed halves half-way for both: the ratio does not notice.
        let ours = [200.0, 200.0, 100.0, 100.0];
        let theirs = [100.0, 100.0, 50.0, 50.0];
        let ratio = Estimate::of_ratio(&ours, &theirs).unwrap();
        assert_eq!((ratio.median, ratio.low, ratio.high), (2.0, 2.0, 2.0));
        assert_eq!(Estimate::of_ratio(&[0.0], &[0.0]), None);
    }
}
