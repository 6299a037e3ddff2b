//! By how much gradients and updates are cut: the definitions.
//!
//! All of it is f64, whose operations here are rounded correctly, and only the factor that comes out
//! is rounded to f32: devices compute the same. Sums of squares are those of [`norm`].

use crate::error::{Error, Result};
use crate::ieee;
use crate::norm;
use crate::rule::canonical;

/// How many gradient norms percentile clipping remembers.
pub const HISTORY: usize = 100;

/// The sum of squares of gradients after each has been multiplied by `factor`.
#[must_use]
pub fn scaled(squares: f64, factor: f32) -> f64 {
    ieee::compute(|| {
        let factor = f64::from(factor);
        squares * (factor * factor)
    })
}

/// What gradients whose squares add up to `squares` are multiplied by so that their norm is at most
/// `max_norm` (`torch.nn.utils.clip_grad_norm_`): `max_norm / (norm + 1e-6)`, or 1 if that is less.
/// NaN if the norm is. An infinite `max_norm` is no limit whatever the norm.
#[must_use]
pub fn global(squares: f64, max_norm: f64) -> f32 {
    ieee::compute(|| {
        let factor = max_norm / (squares.sqrt() + 1e-6);
        let is_limited = max_norm < f64::INFINITY;
        if factor > 1.0 || !is_limited { 1.0 } else { factor as f32 }
    })
}

/// Enters the squared norm of step `t`, counted from 1, into a parameter's history, and returns what
/// its gradient is multiplied by so that its norm is at most the `percentile`-th smallest of the last
/// [`HISTORY`], counted from 0 (bitsandbytes' `percentile_clipping`).
///
/// The history holds squared norms as f32, that of step `t` at `t % HISTORY`. As long as it is all
/// zero, the first norm takes every place. A norm that is zero (as f32), or not finite, is not entered,
/// and its gradient not clipped: it would cut later gradients to nothing. Squares beyond the largest
/// f32 count as that.
///
/// # Panics
/// If `percentile` is not less than [`HISTORY`].
#[must_use]
pub fn percentile(history: &mut [f32; HISTORY], t: u64, percentile: usize, squares: f64) -> f32 {
    let current = ieee::compute(|| squares.min(f32::MAX.into()) as f32);
    if !squares.is_finite() || current.to_bits() == 0 {
        return 1.0;
    }
    if history.iter().all(|old| old.to_bits() << 1 == 0) {
        *history = [current; HISTORY];
    } else {
        history[(t % HISTORY as u64) as usize] = current;
    }
    let mut sorted = *history;
    sorted.sort_unstable_by(f32::total_cmp);
    let limit = sorted[percentile];
    // By bits, in which no mode of the processor matters. A history from elsewhere may hold a -0, or
    // NaN, which is no limit.
    let is_below = current.to_bits() <= limit.to_bits() && limit.is_sign_positive();
    if is_below || limit.is_nan() {
        return 1.0;
    }
    ieee::compute(|| (f64::from(limit).sqrt() / f64::from(current).sqrt()) as f32)
}

/// The gradient norms of a parameter, and how they limit the next one.
#[derive(Debug)]
pub struct Percentile<'a> {
    /// Squared norms: those of the last [`HISTORY`] steps.
    pub history: &'a mut [f32; HISTORY],
    /// The number of the coming step, counted from 1.
    pub t: u64,
    /// Which of the sorted norms is the limit, counted from 0.
    pub percentile: usize,
}

/// One gradient of a step.
#[derive(Debug)]
pub struct Gradient<'a> {
    /// The sum of its squares, as it is.
    pub squares: f64,
    /// What it is multiplied by in any case: [`Coefficients::factor`](crate::rule::Coefficients).
    pub factor: f32,
    /// Where it is limited by those before it.
    pub percentile: Option<Percentile<'a>>,
}

/// What each of a step's gradients is multiplied by besides, and their norm: first all are cut to the
/// norm `max_norm` together, then each by its own history.
///
/// The norm is that of all gradients, multiplied by their factors, before they are cut.
#[must_use]
pub fn gradients(gradients: &mut [Gradient<'_>], max_norm: Option<f64>) -> (f64, Vec<f32>) {
    let squares: Vec<f64> = gradients.iter().map(|g| scaled(g.squares, g.factor)).collect();
    let total = norm::total(&squares);
    let shared = max_norm.map_or(1.0, |max_norm| global(total, max_norm));
    let factors = gradients.iter_mut().zip(squares).map(|(gradient, squares)| {
        let own = gradient.percentile.as_mut().map_or(1.0, |own| {
            percentile(own.history, own.t, own.percentile, scaled(squares, shared))
        });
        ieee::compute(|| shared * own)
    });
    let factors = factors.collect();
    (total.sqrt(), factors)
}

/// A norm as f32.
#[must_use]
pub fn rounded(norm: f64) -> f32 {
    canonical(ieee::compute(|| norm as f32))
}

/// Checks the largest norm that gradients may have together.
///
/// # Errors
/// [`Error::Hyperparameter`] if it is negative or NaN; infinity is no limit.
pub fn check_max_grad_norm(max_norm: f64) -> Result<()> {
    let accepted = "at least 0";
    let error = Error::Hyperparameter { name: "max_grad_norm", value: max_norm, accepted };
    if max_norm >= 0.0 { Ok(()) } else { Err(error) }
}

/// What a parameter's update is multiplied by so that its norm is at most `max_unorm` times the
/// parameter's (bitsandbytes' `max_unorm`): `max_unorm * |p| / |u|`, or 1 if that is more.
///
/// `update_squares` are those of [`rule::direction`](crate::rule::direction), which `correction` turns
/// into the update `u`. A parameter that is zero everywhere is not held back: in bitsandbytes it would
/// stay zero for good. Norms that are not finite hold nothing back either.
#[must_use]
pub fn update(max_unorm: f64, param_squares: f64, update_squares: f64, correction: f64) -> f32 {
    ieee::compute(|| {
        let limit = max_unorm * param_squares.sqrt();
        let norm = update_squares.sqrt() * correction;
        if limit > 0.0 && limit < norm && norm.is_finite() { (limit / norm) as f32 } else { 1.0 }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_global_norm_is_cut_as_torch_cuts_it() {
        assert_eq!(global(25.0, 10.0), 1.0);
        assert_eq!(global(25.0, 1.0), (1.0 / 5.000_001_f64) as f32);
        for squares in [25.0, f64::INFINITY, f64::NAN] {
            assert_eq!(global(squares, f64::INFINITY), 1.0);
        }
        assert_eq!(global(0.0, 0.0), 0.0);
        assert!(global(f64::NAN, 1.0).is_nan());
        assert_eq!(global(f64::INFINITY, 1.0), 0.0);
    }

    #[test]
    fn the_first_norm_fills_the_history_and_later_ones_take_turns() {
        let mut history = [0.0; HISTORY];
        assert_eq!(percentile(&mut history, 1, 5, 4.0), 1.0);
        assert_eq!(history, [4.0; HISTORY]);
        assert_eq!(percentile(&mut history, 2, 5, 16.0), 0.5);
        assert_eq!((history[1], history[2], history[3]), (4.0, 16.0, 4.0));
        for t in 3..=7 {
            assert_eq!(percentile(&mut history, t, 5, 1.0), 1.0);
        }
        // five of 1, so index 5 is a 4
        assert_eq!(percentile(&mut history, 8, 5, 16.0), 0.5);
        assert_eq!(percentile(&mut history, 108, 5, 1.0), 1.0);
        assert_eq!(percentile(&mut history, 109, 5, 16.0), 0.25);
    }

    #[test]
    fn norms_that_are_no_numbers_are_not_remembered() {
        let mut history = [4.0; HISTORY];
        for squares in [f64::NAN, f64::INFINITY, 0.0, 1e-50] {
            assert_eq!(percentile(&mut history, 5, 99, squares), 1.0);
            assert_eq!(history, [4.0; HISTORY]);
        }
        assert_eq!(
            percentile(&mut history, 6, 10, 1e60),
            (2.0 / f64::from(f32::MAX).sqrt()) as f32
        );
        assert_eq!(history[6], f32::MAX);
    }

    #[test]
    fn gradients_are_cut_together_and_then_each_by_its_own() {
        let mut history = [1.0; HISTORY];
        let mut list = [
            Gradient { squares: 36.0, factor: -0.5, percentile: None },
            Gradient {
                squares: 64.0,
                factor: 0.5,
                percentile: Some(Percentile { history: &mut history, t: 7, percentile: 50 }),
            },
        ];
        let (norm, factors) = gradients(&mut list, Some(2.5));
        assert_eq!(norm, 5.0); // 3 and 4
        let half = global(25.0, 2.5);
        let norm = scaled(16.0, half) as f32; // 2, nearly
        assert_eq!(factors, [half, half * (1.0 / f64::from(norm).sqrt()) as f32]);
        assert_eq!((history[7], history[8]), (norm, 1.0));
        let (norm, factors) = gradients(&mut [], None);
        assert_eq!((norm, factors), (0.0, vec![]));
    }

    #[test]
    fn a_damaged_history_is_no_limit() {
        for damage in [f32::NAN, -f32::NAN] {
            let mut history = [damage; HISTORY];
            assert_eq!(percentile(&mut history, 3, 50, 4.0), 1.0);
            assert_eq!(history[3], 4.0);
        }
    }

    #[test]
    fn updates_are_held_to_a_multiple_of_the_parameter() {
        assert_eq!(update(0.5, 4.0, 16.0, 0.5), 0.5);
        assert_eq!(update(0.5, 4.0, 4.0, 0.5), 1.0, "at the limit");
        assert_eq!(update(0.5, 0.0, 4.0, 0.5), 1.0, "a parameter of zeros moves");
        assert_eq!(update(0.5, 4.0, f64::NAN, 0.5), 1.0);
        assert_eq!(update(0.5, f64::NAN, 4.0, 0.5), 1.0);
        assert_eq!(update(0.0, 4.0, 4.0, 0.5), 1.0, "no limit");
    }
}
