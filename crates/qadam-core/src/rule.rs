//! The Adam update of one element: the definition that every back end reproduces bit for bit.
//!
//! With `c1 = 1 - beta1^t` and `c2 = 1 - beta2^t` (Kingma and Ba, *Adam: A Method for Stochastic
//! Optimization*, 2015; `torch.optim.Adam`):
//!
//! ```text
//! g' = g + weight_decay * p                      (Adam: coupled decay)
//! p' = p - lr * weight_decay * p                 (AdamW: decoupled decay)
//! m  = beta1 * m + (1 - beta1) * g'
//! v  = beta2 * v + (1 - beta2) * g'^2
//! p  = p' - lr / c1 * m / (sqrt(v) / sqrt(c2) + eps)
//! ```
//!
//! Everything that does not depend on the element is computed once a step in f64 and rounded once
//! ([`Coefficients`]). Three rewritings keep the f32 arithmetic close to the real-number equation:
//!
//! * `beta * x + (1 - beta) * y` is `fma(w, y, fma(-w, x, x))` with `w = 1 - beta` rounded to f32.
//!   Rounding beta itself (0.999 is off by 1.3e-8) would bias a long average by 1.3e-5.
//! * The last line is multiplied through by `sqrt(c2)`: one division an element, not two.
//! * Decoupled decay is `fma(-lr * weight_decay, p, p)`, so `1 - lr * weight_decay` is not rounded.

use crate::error::{Error, Result};
use crate::ieee::Ieee;

/// How weight decay enters the update.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Decay {
    /// Added to the gradient (L2 regularisation), as `torch.optim.Adam`.
    Coupled,
    /// Shrinks the parameter before the update, as `torch.optim.AdamW`.
    Decoupled,
}

/// What to do with an element whose gradient is NaN or infinite.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum NonFinite {
    /// Leave the element's parameter and state as they are, and count it.
    #[default]
    Skip,
    /// Let it through, as `torch.optim` does: the parameter becomes NaN.
    Propagate,
    /// Refuse the whole step before anything is written.
    Raise,
}

/// Hyperparameters, as the user gives them.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Hyper {
    /// Learning rate, finite and at least 0.
    pub lr: f64,
    /// Decay rate of the first moment, in `[0, 1)`.
    pub beta1: f64,
    /// Decay rate of the second moment, in `[0, 1)`.
    pub beta2: f64,
    /// Added to the denominator, finite and at least 0.
    pub eps: f64,
    /// Weight decay, finite and at least 0.
    pub weight_decay: f64,
    /// How the decay enters.
    pub decay: Decay,
    /// What happens to non-finite gradients.
    pub nonfinite: NonFinite,
}

impl Hyper {
    /// `torch.optim.Adam`'s defaults: `lr` 1e-3, betas (0.9, 0.999), `eps` 1e-8, no decay.
    #[must_use]
    pub const fn adam() -> Self {
        Self {
            lr: 1e-3,
            beta1: 0.9,
            beta2: 0.999,
            eps: 1e-8,
            weight_decay: 0.0,
            decay: Decay::Coupled,
            nonfinite: NonFinite::Skip,
        }
    }

    /// `torch.optim.AdamW`'s defaults: those of Adam with a decoupled decay of 1e-2.
    #[must_use]
    pub const fn adamw() -> Self {
        Self { weight_decay: 1e-2, decay: Decay::Decoupled, ..Self::adam() }
    }

    /// Checks every field.
    ///
    /// # Errors
    /// [`Error::Hyperparameter`], naming the first field that is out of range.
    pub fn validate(&self) -> Result<()> {
        let rate = |name, value: f64| {
            let ok = value.is_finite() && value >= 0.0;
            let accepted = "a finite number of at least 0";
            if ok { Ok(()) } else { Err(Error::Hyperparameter { name, value, accepted }) }
        };
        let beta = |name, value: f64| {
            let ok = (0.0..1.0).contains(&value);
            let accepted = "at least 0 and less than 1";
            if ok { Ok(()) } else { Err(Error::Hyperparameter { name, value, accepted }) }
        };
        rate("lr", self.lr)?;
        beta("betas[0]", self.beta1)?;
        beta("betas[1]", self.beta2)?;
        rate("eps", self.eps)?;
        rate("weight_decay", self.weight_decay)
    }
}

/// What one step needs of the hyperparameters, for every element alike.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Coefficients {
    /// `1 - beta1`.
    pub w1: f32,
    /// `1 - beta2`.
    pub w2: f32,
    /// `lr * sqrt(c2) / c1`.
    pub step: f32,
    /// `eps * sqrt(c2)`.
    pub eps: f32,
    /// Coupled decay, else 0.
    pub l2: f32,
    /// `lr * weight_decay` where the decay is decoupled, else 0.
    pub shrink: f32,
    /// Whether non-finite gradients pass through.
    pub propagate: bool,
}

impl Coefficients {
    /// The coefficients of step `t`, counted from 1.
    #[must_use]
    pub fn new(hyper: &Hyper, t: u64) -> Self {
        let _ieee = Ieee::enter(); // a subnormal coefficient stays one
        let c1 = 1.0 - power(hyper.beta1, t);
        let root_c2 = (1.0 - power(hyper.beta2, t)).sqrt();
        let (l2, shrink) = match hyper.decay {
            Decay::Coupled => (hyper.weight_decay, 0.0),
            Decay::Decoupled => (0.0, hyper.lr * hyper.weight_decay),
        };
        Self {
            w1: (1.0 - hyper.beta1) as f32,
            w2: (1.0 - hyper.beta2) as f32,
            step: (hyper.lr * root_c2 / c1) as f32,
            eps: (hyper.eps * root_c2) as f32,
            l2: l2 as f32,
            shrink: shrink as f32,
            propagate: hyper.nonfinite == NonFinite::Propagate,
        }
    }
}

/// `base^exponent` by square-and-multiply: host libraries round `pow` differently, this does not.
#[must_use]
pub fn power(base: f64, mut exponent: u64) -> f64 {
    let (mut result, mut square) = (1.0, base);
    while exponent > 0 {
        if exponent & 1 == 1 {
            result *= square;
        }
        square *= square;
        exponent >>= 1;
    }
    result
}

/// Finite gradients are cut to this magnitude (2^63), whose square is finite in f32: no finite
/// gradient can make a moment infinite, and through it a block's scale.
pub const GRADIENT_LIMIT: f32 = 9_223_372_036_854_775_808.0;

/// One element: parameter and moments.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Element {
    /// Parameter.
    pub p: f32,
    /// First moment (`exp_avg`).
    pub m: f32,
    /// Second moment (`exp_avg_sq`).
    pub v: f32,
}

/// The gradient that enters the moments: `g`, plus the coupled decay.
#[must_use]
pub fn effective_gradient(p: f32, g: f32, c: &Coefficients) -> f32 {
    if c.l2 == 0.0 { g } else { c.l2.mul_add(p, g) }
}

/// Updates one element with gradient `g`; the flag says whether the effective gradient was finite.
/// Where it was not and `c.propagate` is unset, the element comes back as it was.
#[must_use]
pub fn update(e: Element, g: f32, c: &Coefficients) -> (Element, bool) {
    let g = effective_gradient(e.p, g, c);
    let finite = g.is_finite();
    if !finite && !c.propagate {
        return (e, false);
    }
    let g = if finite { g.clamp(-GRADIENT_LIMIT, GRADIENT_LIMIT) } else { g };
    let m = c.w1.mul_add(g, (-c.w1).mul_add(e.m, e.m));
    let v = c.w2.mul_add(g * g, (-c.w2).mul_add(e.v, e.v));
    let p = if c.shrink == 0.0 { e.p } else { (-c.shrink).mul_add(e.p, e.p) };
    let p = (-c.step).mul_add(m / (v.sqrt() + c.eps), p);
    (Element { p: canonical(p), m: canonical(m), v: canonical(v) }, finite)
}

/// Any NaN becomes the one quiet NaN 0x7FC00000: which payload an operation returns differs between
/// processors, and the bits of a result must not.
#[must_use]
pub fn canonical(x: f32) -> f32 {
    if x.is_nan() { f32::from_bits(0x7FC0_0000) } else { x }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn step(e: Element, g: f32, hyper: &Hyper, t: u64) -> Element {
        update(e, g, &Coefficients::new(hyper, t)).0
    }

    #[test]
    fn first_step_moves_by_lr_against_the_sign_of_the_gradient() {
        let e = Element { p: 1.0, m: 0.0, v: 0.0 };
        for g in [1e-3_f32, -1e-3, 7.0, -1e8] {
            let p = step(e, g, &Hyper::adam(), 1).p;
            let want = 1.0 - 1e-3 * f64::from(g) / (f64::from(g).abs() + 1e-8);
            assert!((f64::from(p) - want).abs() < 1e-7, "g {g}: {p} {want}");
        }
    }

    #[test]
    fn adamw_decays_before_the_update_and_adam_through_the_gradient() {
        let e = Element { p: 2.0, m: 0.0, v: 0.0 };
        let adamw = Hyper { lr: 0.1, weight_decay: 0.5, ..Hyper::adamw() };
        assert_eq!(step(e, 0.0, &adamw, 1), Element { p: 1.9, m: 0.0, v: 0.0 });
        let adam = Hyper { lr: 0.1, weight_decay: 0.5, ..Hyper::adam() };
        let coupled = step(e, 0.0, &adam, 1);
        assert_eq!((coupled.m, coupled.p), (0.1, 1.9));
    }

    #[test]
    fn nonfinite_gradients_leave_the_element_or_make_it_nan() {
        let e = Element { p: 1.0, m: 0.5, v: 0.25 };
        for g in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            let skip = Coefficients::new(&Hyper::adam(), 3);
            assert_eq!(update(e, g, &skip), (e, false));
            let hyper = Hyper { nonfinite: NonFinite::Propagate, ..Hyper::adam() };
            let (out, finite) = update(e, g, &Coefficients::new(&hyper, 3));
            assert!(out.p.is_nan() && !finite);
        }
    }

    #[test]
    fn largest_finite_gradients_keep_the_moments_finite_and_recover() {
        let c = Coefficients::new(&Hyper::adam(), 1);
        let (mut e, _) = update(Element { p: 0.0, m: 0.0, v: 0.0 }, f32::MAX, &c);
        assert!(e.m.is_finite() && e.v.is_finite());
        for _ in 0..10 {
            e = update(e, -f32::MAX, &c).0;
            assert!(e.p.is_finite() && e.m.is_finite() && e.v.is_finite());
        }
    }

    #[test]
    fn the_average_is_exact_at_both_ends_of_beta() {
        let rms = Hyper { beta1: 0.0, beta2: 0.0, ..Hyper::adam() };
        let out = step(Element { p: 0.0, m: 1.0, v: 1.0 }, 1e-6, &rms, 5);
        assert_eq!((out.m, out.v), (1e-6, 1e-6 * 1e-6));
    }

    #[test]
    fn power_is_repeated_multiplication() {
        assert_eq!(power(0.5, 10), 1.0 / 1024.0);
        assert_eq!(power(0.9, 0), 1.0);
        assert_eq!(power(0.0, 3), 0.0);
        assert!((power(0.999, 1000) / (1000.0 * 0.999_f64.ln()).exp() - 1.0).abs() < 1e-12);
    }

    #[test]
    fn validation_names_the_argument_and_its_value() {
        let bad = Hyper { beta2: 1.0, ..Hyper::adam() };
        let text = bad.validate().unwrap_err().to_string();
        assert_eq!(text, "betas[1] must be at least 0 and less than 1, got 1");
        assert!(Hyper { lr: f64::NAN, ..Hyper::adam() }.validate().is_err());
        assert!(Hyper { eps: -1.0, ..Hyper::adam() }.validate().is_err());
        assert!(Hyper::adamw().validate().is_ok());
    }
}
