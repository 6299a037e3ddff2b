//! The Adam update of one element: the definition that every back end reproduces bit for bit.
//!
//! With `c1 = 1 - beta1^t` and `c2 = 1 - beta2^t` (Kingma and Ba, *Adam: A Method for Stochastic
//! Optimization*, 2015; `torch.optim.Adam`):
//!
//! ```text
//! g' = factor * g + weight_decay * p             (Adam: coupled decay)
//! p' = p - lr * weight_decay * p                 (AdamW: decoupled decay)
//! m  = beta1 * m + (1 - beta1) * g'
//! v  = beta2 * v + (1 - beta2) * g'^2
//! d  = v, or the largest v so far                (AMSGrad)
//! p  = p' - lr / c1 * m / (sqrt(d) / sqrt(c2) + eps)
//! ```
//!
//! `factor` is -1 to maximize, else 1, divided by the scale of the loss (mixed precision), times what
//! clipping makes of it ([`clip`](crate::clip)), which may shrink the last line's step, too. AMSGrad is
//! that of Reddi, Kale and Kumar, *On the Convergence of Adam and Beyond*, 2018, as `torch.optim` has
//! it: the maximum is over second moments that are not corrected for their bias.
//!
//! Everything that does not depend on the element is computed once a step in f64 and rounded once
//! ([`Coefficients`]). Three rewritings keep the f32 arithmetic close to the real-number equation:
//!
//! * `beta * x + (1 - beta) * y` is `fma(w, y, fma(-w, x, x))` with `w = 1 - beta` rounded to f32.
//!   Rounding beta itself (0.999 is off by 1.3e-8) would bias a long average by 1.3e-5.
//! * The last line is multiplied through by `sqrt(c2)`: one division an element, not two.
//! * Decoupled decay is `fma(-lr * weight_decay, p, p)`, so `1 - lr * weight_decay` is not rounded.

use crate::codec::ratio::ALONG;
use crate::error::{Error, Result};
use crate::ieee;

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
    /// Whether to go up the gradient rather than down.
    pub maximize: bool,
    /// Whether elements whose gradient is zero, of either sign, are left as they are: parameter and
    /// state, without decay (bitsandbytes' `skip_zeros`).
    pub skip_zeros: bool,
    /// The largest norm of a parameter's update, before it is multiplied by `lr`, as a multiple of
    /// the parameter's norm; 0 for no limit (bitsandbytes' `max_unorm`): [`clip::update`].
    ///
    /// [`clip::update`]: crate::clip::update
    pub max_unorm: f64,
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
            maximize: false,
            skip_zeros: false,
            max_unorm: 0.0,
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
        rate("weight_decay", self.weight_decay)?;
        rate("max_unorm", self.max_unorm)
    }
}

/// What one step needs of the hyperparameters, for every element alike.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Coefficients {
    /// `1 - beta1`.
    pub w1: f32,
    /// `1 - beta2`.
    pub w2: f32,
    /// What the first moment will move the parameter by in all later steps, in units of the update
    /// that it makes in this one: `lr * beta1 / (1 - beta1)`, corrected as `step` is for the second
    /// moment. [`codec::ratio`](crate::codec::ratio) makes up for rounding with it.
    pub carry: f32,
    /// The step's part in rounding at random, in 2^32ths: its number times the golden ratio, modulo 1.
    pub dither: u32,
    /// `lr * sqrt(c2) / c1`.
    pub step: f32,
    /// `eps * sqrt(c2)`.
    pub eps: f32,
    /// Coupled decay, else 0.
    pub l2: f32,
    /// `lr * weight_decay` where the decay is decoupled, else 0.
    pub shrink: f32,
    /// What each gradient is multiplied by before anything else; non-finite is what then is.
    pub factor: f32,
    /// `sqrt(c2) / c1`: what `m / (sqrt(v) + eps)` is multiplied by to be the update that `lr`
    /// multiplies.
    pub correction: f64,
    /// [`Hyper::max_unorm`].
    pub max_unorm: f64,
    /// Whether non-finite gradients pass through.
    pub propagate: bool,
    /// Whether elements with zero gradients are left as they are.
    pub skip_zeros: bool,
}

impl Coefficients {
    /// The coefficients of step `t`, counted from 1, for gradients as they are.
    #[must_use]
    pub fn new(hyper: &Hyper, t: u64) -> Self {
        ieee::compute(|| Self::computed(hyper, t)) // a subnormal coefficient stays one
    }

    fn computed(hyper: &Hyper, t: u64) -> Self {
        let c1 = 1.0 - power(hyper.beta1, t);
        let root_c2 = (1.0 - power(hyper.beta2, t)).sqrt();
        let (l2, shrink) = match hyper.decay {
            Decay::Coupled => (hyper.weight_decay, 0.0),
            Decay::Decoupled => (0.0, hyper.lr * hyper.weight_decay),
        };
        Self {
            w1: (1.0 - hyper.beta1) as f32,
            w2: (1.0 - hyper.beta2) as f32,
            carry: (hyper.lr * root_c2 * hyper.beta1 / (1.0 - hyper.beta1)) as f32,
            dither: (t as u32).wrapping_mul(ALONG),
            step: (hyper.lr * root_c2 / c1) as f32,
            eps: (hyper.eps * root_c2) as f32,
            l2: l2 as f32,
            shrink: shrink as f32,
            factor: if hyper.maximize { -1.0 } else { 1.0 },
            correction: root_c2 / c1,
            max_unorm: hyper.max_unorm,
            propagate: hyper.nonfinite == NonFinite::Propagate,
            skip_zeros: hyper.skip_zeros,
        }
    }

    /// The same for gradients of a loss that was multiplied by `scale`, as for mixed precision.
    ///
    /// They are multiplied by `1 / scale`, computed in f64 and rounded once, as
    /// `torch.amp.GradScaler` does; for a power of two that is exact. A scale that
    /// [`check_grad_scale`] refuses can make every gradient non-finite.
    #[must_use]
    pub fn with_grad_scale(self, scale: f32) -> Self {
        self.with_factor(ieee::compute(|| inverse(scale))) // a subnormal factor stays one
    }

    /// The same for gradients that are multiplied by `factor` besides, as clipping does.
    #[must_use]
    pub fn with_factor(self, factor: f32) -> Self {
        Self { factor: ieee::compute(|| self.factor * factor), ..self }
    }

    /// The same with updates multiplied by `scale`; decoupled decay is not.
    #[must_use]
    pub fn with_update_scale(self, scale: f32) -> Self {
        ieee::compute(|| Self { step: self.step * scale, carry: self.carry * scale, ..self })
    }
}

fn inverse(scale: f32) -> f32 {
    (1.0 / f64::from(scale)) as f32
}

/// Checks a scale that gradients are to be divided by.
///
/// # Errors
/// [`Error::Hyperparameter`] unless it and its inverse are finite and positive.
pub fn check_grad_scale(scale: f32) -> Result<()> {
    let is_usable = || {
        let inverse = inverse(scale);
        scale.is_finite() && inverse.is_finite() && inverse > 0.0
    };
    if ieee::compute(is_usable) {
        return Ok(());
    }
    let accepted = "a finite number greater than 0, and so its inverse";
    Err(Error::Hyperparameter { name: "grad_scale", value: scale.into(), accepted })
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
    /// Largest second moment so far (`max_exp_avg_sq`), which then divides in place of `v`.
    pub max_v: Option<f32>,
}

/// The gradient that enters the moments: `g` times the factor, plus the coupled decay.
#[must_use]
pub fn effective_gradient(p: f32, g: f32, c: &Coefficients) -> f32 {
    let g = g * c.factor;
    if c.l2 == 0.0 { g } else { c.l2.mul_add(p, g) }
}

/// What became of an element.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Outcome {
    /// Whether its effective gradient was finite; that of an element with a zero gradient is not
    /// looked at where these are skipped.
    pub finite: bool,
    /// Whether it came back as it was.
    pub kept: bool,
}

/// Updates one element with gradient `g`. It comes back as it was where the effective gradient is
/// not finite and `c.propagate` is unset, or where `g` is zero and `c.skip_zeros` is set.
#[must_use]
pub fn update(e: Element, g: f32, c: &Coefficients) -> (Element, Outcome) {
    if c.skip_zeros && g == 0.0 {
        return (e, Outcome { finite: true, kept: true });
    }
    let g = effective_gradient(e.p, g, c);
    let finite = g.is_finite();
    if !finite && !c.propagate {
        return (e, Outcome { finite, kept: true });
    }
    let g = if finite { g.clamp(-GRADIENT_LIMIT, GRADIENT_LIMIT) } else { g };
    let m = c.w1.mul_add(g, (-c.w1).mul_add(e.m, e.m));
    let v = c.w2.mul_add(g * g, (-c.w2).mul_add(e.v, e.v));
    let p = if c.shrink == 0.0 { e.p } else { (-c.shrink).mul_add(e.p, e.p) };
    let max_v = e.max_v.map(|old| maximum(old, v));
    let p = (-c.step).mul_add(direction(m, max_v.unwrap_or(v), c), p);
    let max_v = max_v.map(canonical);
    let e = Element { p: canonical(p), m: canonical(m), v: canonical(v), max_v };
    (e, Outcome { finite, kept: false })
}

/// What `c.step` multiplies, of the new first moment and the second moment that divides it.
#[must_use]
pub fn direction(m: f32, v: f32, c: &Coefficients) -> f32 {
    m / (v.sqrt() + c.eps)
}

/// Makes up for a first moment that was stored as so much less than it is, in units of the root that
/// divides, whose inverse is given: the parameter is moved by what that would have moved it in later
/// steps. `eps` keeps updates of small roots from their full size: to first order, and at most to 0.
#[must_use]
pub fn carried(p: f32, lost: f32, inverse: f32, c: &Coefficients) -> f32 {
    let share = (-c.eps).mul_add(inverse, 1.0).max(0.0);
    canonical((-c.carry).mul_add(share * lost, p))
}

/// The larger number; NaN if either is (`torch.maximum`).
fn maximum(old: f32, new: f32) -> f32 {
    if new > old || new.is_nan() { new } else { old }
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

    const fn element(p: f32, m: f32, v: f32) -> Element {
        Element { p, m, v, max_v: None }
    }

    fn step(e: Element, g: f32, hyper: &Hyper, t: u64) -> Element {
        update(e, g, &Coefficients::new(hyper, t)).0
    }

    #[test]
    fn first_step_moves_by_lr_against_the_sign_of_the_gradient() {
        let e = element(1.0, 0.0, 0.0);
        for g in [1e-3_f32, -1e-3, 7.0, -1e8] {
            let p = step(e, g, &Hyper::adam(), 1).p;
            let want = 1.0 - 1e-3 * f64::from(g) / (f64::from(g).abs() + 1e-8);
            assert!((f64::from(p) - want).abs() < 1e-7, "g {g}: {p} {want}");
        }
    }

    #[test]
    fn adamw_decays_before_the_update_and_adam_through_the_gradient() {
        let e = element(2.0, 0.0, 0.0);
        let adamw = Hyper { lr: 0.1, weight_decay: 0.5, ..Hyper::adamw() };
        assert_eq!(step(e, 0.0, &adamw, 1), element(1.9, 0.0, 0.0));
        let adam = Hyper { lr: 0.1, weight_decay: 0.5, ..Hyper::adam() };
        let coupled = step(e, 0.0, &adam, 1);
        assert_eq!((coupled.m, coupled.p), (0.1, 1.9));
    }

    #[test]
    fn nonfinite_gradients_leave_the_element_or_make_it_nan() {
        let e = element(1.0, 0.5, 0.25);
        for g in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            let skip = Coefficients::new(&Hyper::adam(), 3);
            assert_eq!(update(e, g, &skip), (e, Outcome { finite: false, kept: true }));
            let hyper = Hyper { nonfinite: NonFinite::Propagate, ..Hyper::adam() };
            let (out, outcome) = update(e, g, &Coefficients::new(&hyper, 3));
            assert!(out.p.is_nan() && outcome == Outcome { finite: false, kept: false });
        }
    }

    #[test]
    fn largest_finite_gradients_keep_the_moments_finite_and_recover() {
        let c = Coefficients::new(&Hyper::adam(), 1);
        let (mut e, _) = update(element(0.0, 0.0, 0.0), f32::MAX, &c);
        assert!(e.m.is_finite() && e.v.is_finite());
        for _ in 0..10 {
            e = update(e, -f32::MAX, &c).0;
            assert!(e.p.is_finite() && e.m.is_finite() && e.v.is_finite());
        }
    }

    #[test]
    fn the_average_is_exact_at_both_ends_of_beta() {
        let rms = Hyper { beta1: 0.0, beta2: 0.0, ..Hyper::adam() };
        let out = step(element(0.0, 1.0, 1.0), 1e-6, &rms, 5);
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

    #[test]
    fn zero_gradients_leave_the_element_where_that_is_asked_for() {
        let hyper = Hyper { skip_zeros: true, weight_decay: 0.5, ..Hyper::adam() };
        let e = Element { max_v: Some(0.5), ..element(1.0, 0.5, 0.25) };
        for decay in [Decay::Coupled, Decay::Decoupled] {
            let c = Coefficients::new(&Hyper { decay, ..hyper }, 3);
            for g in [0.0, -0.0] {
                assert_eq!(update(e, g, &c), (e, Outcome { finite: true, kept: true }));
            }
            let plain = Coefficients::new(&Hyper { decay, skip_zeros: false, ..hyper }, 3);
            assert_ne!(update(e, 0.0, &plain).0, e);
            assert_eq!(update(e, 1e-45, &c), update(e, 1e-45, &plain));
        }
    }

    #[test]
    fn amsgrad_divides_by_the_largest_second_moment() {
        let c = Coefficients::new(&Hyper { eps: 0.0, ..Hyper::adam() }, 1);
        let (low, high) = (Some(1e-9), Some(4.0));
        let e = Element { max_v: low, ..element(1.0, 0.5, 0.25) };
        let plain = update(element(1.0, 0.5, 0.25), 0.5, &c).0;
        let exceeded = update(e, 0.5, &c).0;
        assert_eq!((exceeded.p, exceeded.max_v), (plain.p, Some(plain.v)));
        let kept = update(Element { max_v: high, ..e }, 0.5, &c).0;
        assert_eq!((kept.m, kept.v, kept.max_v), (plain.m, plain.v, high));
        assert_eq!(kept.p, (-c.step).mul_add(kept.m / 2.0, 1.0));
        assert_eq!(update(e, f32::NAN, &c).0, e);
    }

    /// `torch.optim.Adam`'s equation with `amsgrad`, in f64.
    #[test]
    fn amsgrad_follows_torch_over_many_steps() {
        for hyper in [Hyper::adamw(), Hyper { weight_decay: 0.1, maximize: true, ..Hyper::adam() }]
        {
            for seed in 0..20_u32 {
                let mut e = Element { max_v: Some(0.0), ..element(0.5, 0.0, 0.0) };
                let (mut p, mut m, mut v, mut max_v) = (0.5_f64, 0.0, 0.0, 0.0_f64);
                let mut steps_that_remember = 0;
                for t in 1..=500_u32 {
                    // large gradients now and then, which the maximum remembers
                    let random = t.wrapping_mul(2_654_435_761).wrapping_add(seed * 40_503) >> 8;
                    let g = (random % 2001) as f32 / 1000.0 - 1.0;
                    let g = if random.is_multiple_of(50) { g * 30.0 } else { g * 0.1 };
                    e = step(e, g, &hyper, t.into());

                    let mut g = f64::from(if hyper.maximize { -g } else { g });
                    match hyper.decay {
                        Decay::Coupled => g += hyper.weight_decay * p,
                        Decay::Decoupled => p *= 1.0 - hyper.lr * hyper.weight_decay,
                    }
                    m = hyper.beta1 * m + (1.0 - hyper.beta1) * g;
                    v = hyper.beta2 * v + (1.0 - hyper.beta2) * g * g;
                    max_v = max_v.max(v);
                    steps_that_remember += u32::from(max_v > v);
                    let c1 = 1.0 - hyper.beta1.powf(t.into());
                    let c2 = 1.0 - hyper.beta2.powf(t.into());
                    p -= hyper.lr / c1 * m / (max_v.sqrt() / c2.sqrt() + hyper.eps);
                }
                let got = e.max_v.map(f64::from).unwrap();
                assert!((got / max_v - 1.0).abs() < 1e-5, "seed {seed}: {got} {max_v}");
                assert!((f64::from(e.p) - p).abs() < 1e-5, "seed {seed}: {} {p}", e.p);
                assert!(steps_that_remember > 100, "seed {seed}: {steps_that_remember}");
            }
        }
    }

    #[test]
    fn the_maximum_is_nan_if_either_number_is() {
        assert_eq!((maximum(1.0, 2.0), maximum(2.0, 1.0)), (2.0, 2.0));
        assert_eq!(maximum(1.0, f32::INFINITY), f32::INFINITY);
        assert!(maximum(f32::NAN, 1.0).is_nan() && maximum(1.0, f32::NAN).is_nan());
        assert_eq!(maximum(0.0, -0.0).to_bits(), 0);
    }

    #[test]
    fn maximizing_negates_the_gradient_before_coupled_decay() {
        let down = Hyper { weight_decay: 0.1, ..Hyper::adam() };
        let up = Hyper { maximize: true, ..down };
        let e = element(2.0, 0.5, 0.25);
        for g in [0.3_f32, -0.0, 0.0, 1e-45, f32::MAX, f32::INFINITY] {
            assert_eq!(step(e, g, &up, 3), step(e, -g, &down, 3), "{g}");
        }
        assert_ne!(step(e, 0.3, &up, 3), step(e, 0.3, &down, 3));
    }

    #[test]
    fn gradients_are_divided_by_their_scale_before_anything_else() {
        let hyper = Hyper { weight_decay: 0.1, ..Hyper::adam() };
        let e = element(2.0, 0.5, 0.25);
        let plain = Coefficients::new(&hyper, 3);
        for scale in [65_536.0_f32, 0.5, 1.0, f32::MIN_POSITIVE] {
            let c = plain.with_grad_scale(scale);
            assert_eq!(update(e, 0.375 * scale, &c), update(e, 0.375, &plain), "{scale}");
        }
        // What overflows was too large, and what the division makes finite is not.
        let small = plain.with_grad_scale(0.5);
        assert_eq!(update(e, f32::MAX, &small), (e, Outcome { finite: false, kept: true }));
        assert!(update(e, f32::MAX, &plain.with_grad_scale(2.0)).1.finite);
        // Rounded once, from f64; and the sign stays.
        assert_eq!(plain.with_grad_scale(3.0).factor, (1.0_f64 / 3.0) as f32);
        let up = Coefficients::new(&Hyper { maximize: true, ..hyper }, 3);
        assert_eq!(up.with_grad_scale(4.0).factor, -0.25);
        assert_eq!(plain.with_grad_scale(f32::MAX).factor, f32::from_bits(0x0020_0000));
    }

    #[test]
    fn a_scale_that_cannot_be_undone_is_refused() {
        for scale in [0.0, -1.0, f32::NAN, f32::INFINITY, f32::from_bits(1)] {
            let text = check_grad_scale(scale).unwrap_err().to_string();
            assert!(text.starts_with("grad_scale must be a finite number greater"), "{text}");
        }
        for scale in [1.0, f32::MAX, 3e-39] {
            assert_eq!(check_grad_scale(scale), Ok(()));
        }
    }
}
