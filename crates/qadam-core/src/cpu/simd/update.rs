//! The update of `N` elements: [`rule`](crate::rule), vector by vector.

use super::lanes::{Lanes, VectorFloat};
use crate::rule::{Coefficients, GRADIENT_LIMIT};

/// What makes a gradient effective. Usually it is nothing, for which there is one test, not two.
#[derive(Clone, Copy)]
enum Gradient {
    AsItIs,
    Multiplied,
    MultipliedAndDecayed,
}

impl Gradient {
    const fn of(c: &Coefficients) -> Self {
        match (c.l2 == 0.0, c.factor == 1.0) {
            (true, true) => Self::AsItIs,
            (true, false) => Self::Multiplied,
            (false, _) => Self::MultipliedAndDecayed,
        }
    }
}

/// [`Coefficients`] in every lane.
#[expect(clippy::struct_excessive_bools, reason = "what a step asks for, not states")]
#[derive(Clone, Copy)]
pub(super) struct Splat<L: Lanes> {
    w1: L::F,
    w2: L::F,
    step: L::F,
    eps: L::F,
    l2: L::F,
    shrink: L::F,
    factor: L::F,
    /// Gradients of at most this magnitude need no second look.
    usual: L::F,
    gradient: Gradient,
    has_shrink: bool,
    pub propagate: bool,
    pub skip_zeros: bool,
    /// Whether the update's norm is limited.
    pub is_limited: bool,
}

impl<L: Lanes> Splat<L> {
    #[inline(always)]
    pub(super) unsafe fn new(c: &Coefficients) -> Self {
        // SAFETY: the caller enables the instruction set.
        unsafe {
            Self {
                w1: L::splat(c.w1),
                w2: L::splat(c.w2),
                step: L::splat(c.step),
                eps: L::splat(c.eps),
                l2: L::splat(c.l2),
                shrink: L::splat(c.shrink),
                factor: L::splat(c.factor),
                usual: L::splat(if c.skip_zeros { -1.0 } else { GRADIENT_LIMIT }),
                gradient: Gradient::of(c),
                has_shrink: c.shrink != 0.0,
                propagate: c.propagate,
                skip_zeros: c.skip_zeros,
                is_limited: c.max_unorm > 0.0,
            }
        }
    }

    /// The same, whose commonest options are constants to the compiler, where they are those.
    #[inline(always)]
    pub(super) const fn common(&self, has_shrink: bool) -> Option<Self> {
        if matches!(self.gradient, Gradient::AsItIs) && self.has_shrink == has_shrink {
            return Some(Self { gradient: Gradient::AsItIs, has_shrink, ..*self });
        }
        None
    }
}

/// Parameter and moments of `N` elements.
#[derive(Clone, Copy)]
pub(super) struct Elements<L: Lanes> {
    pub p: L::F,
    pub m: L::F,
    pub v: L::F,
    /// Of no account without `AMSGRAD`.
    pub max_v: L::F,
}

/// What became of `N` elements.
#[derive(Clone, Copy)]
pub(super) struct Fate<L: Lanes> {
    /// How many gradients were finite.
    pub finite: usize,
    /// How many elements came back as they were.
    pub kept: usize,
    /// Which did not.
    pub moved: L::M,
}

/// [`rule::update`](crate::rule::update), but for [`canonical`] moments. `AMSGRAD` says whether there
/// is a third moment.
#[inline(always)]
pub(super) unsafe fn update<L: Lanes, P: VectorFloat, const AMSGRAD: bool>(
    e: Elements<L>,
    given: L::F,
    c: &Splat<L>,
) -> (Elements<L>, Fate<L>) {
    // SAFETY: the caller enables the instruction set.
    unsafe {
        let g = effective::<L>(e.p, given, c);
        let (zero, one) = (L::splat(0.0), L::splat(1.0));
        if L::all(L::at_most(L::abs(g), c.usual)) {
            let fate = Fate { finite: L::N, kept: 0, moved: L::at_most(zero, zero) };
            let ([new], _) = updated::<L, AMSGRAD, 1>([e], [g], c);
            return (Elements { p: canonical::<L>(new.p), ..new }, fate);
        }
        let finite = L::is_finite(g);
        let limit = L::splat(GRADIENT_LIMIT);
        let clamped = L::max(L::min(g, limit), L::splat(-GRADIENT_LIMIT));
        let ([new], _) = updated::<L, AMSGRAD, 1>([e], [L::select(finite, clamped, g)], c);
        let new = Elements { p: canonical::<L>(new.p), ..new };
        // as numbers, 1 or 0, lane by lane
        let mut is_finite = L::select(finite, one, zero);
        let mut moving = if c.propagate { one } else { is_finite };
        if c.skip_zeros {
            let is_zero = L::at_most(L::abs(given), zero);
            is_finite = L::select(is_zero, one, is_finite);
            moving = L::select(is_zero, zero, moving);
        }
        let moved = L::less(zero, moving);
        let kept = Elements {
            p: L::select(moved, new.p, P::kept::<L>(e.p)),
            m: L::select(moved, new.m, e.m),
            v: L::select(moved, new.v, e.v),
            max_v: L::select(moved, new.max_v, e.max_v),
        };
        let finite = L::count(L::less(zero, is_finite));
        (kept, Fate { finite, kept: L::N - L::count(moved), moved })
    }
}

/// The effective gradient.
#[inline(always)]
pub(super) unsafe fn effective<L: Lanes>(p: L::F, given: L::F, c: &Splat<L>) -> L::F {
    // SAFETY: the caller enables the instruction set.
    unsafe {
        match c.gradient {
            Gradient::AsItIs => given,
            Gradient::Multiplied => L::mul(given, c.factor),
            Gradient::MultipliedAndDecayed => L::fma(c.l2, p, L::mul(given, c.factor)),
        }
    }
}

/// Whether none of the effective gradients of `len` elements needs a second look.
///
/// # Safety
/// The pointers are valid for so many elements, a multiple of `2 N`; the caller enables the
/// instruction set.
#[inline(always)]
pub(super) unsafe fn are_usual<L: Lanes, P: VectorFloat, G: VectorFloat>(
    p: *const P,
    g: *const G,
    len: usize,
    c: &Splat<L>,
) -> bool {
    // SAFETY: this function's contract.
    unsafe {
        let largest = match c.gradient {
            // a factor keeps the order of magnitudes
            Gradient::AsItIs | Gradient::Multiplied => L::mul(G::largest::<L>(g, len), c.factor),
            Gradient::MultipliedAndDecayed => {
                // as integers, NaN is the largest
                let mut largest = L::splat_i(0);
                for at in (0..len).step_by(L::N) {
                    let (p, g) = (P::load::<L>(p.add(at)), G::load::<L>(g.add(at)));
                    largest = L::max_i(largest, L::bits(L::abs(effective::<L>(p, g, c))));
                }
                L::from_bits(largest)
            }
        };
        L::all(L::at_most(L::abs(largest), c.usual))
    }
}

/// The update itself, for gradients that pass, and the roots that divide; the parameter's NaN is any.
///
/// Step by step for all `K` vectors, so that their chains of operations, which wait for square roots
/// and divisions, overlap: a processor does not look far enough ahead to do that by itself.
#[inline(always)]
pub(super) unsafe fn updated<L: Lanes, const AMSGRAD: bool, const K: usize>(
    mut e: [Elements<L>; K],
    g: [L::F; K],
    c: &Splat<L>,
) -> ([Elements<L>; K], [L::F; K]) {
    let (mut root, mut by) = (g, g);
    // SAFETY: the caller enables the instruction set.
    unsafe {
        for e in &mut e {
            e.m = L::fnma(c.w1, e.m, e.m);
            e.v = L::fnma(c.w2, e.v, e.v);
        }
        for (e, g) in e.iter_mut().zip(g) {
            e.v = L::fma(c.w2, L::mul(g, g), e.v);
            e.max_v = if AMSGRAD { maximum::<L>(e.max_v, e.v) } else { e.v };
        }
        for (e, g) in e.iter_mut().zip(g) {
            e.m = L::fma(c.w1, g, e.m);
        }
        for (root, e) in root.iter_mut().zip(&e) {
            *root = L::sqrt(e.max_v);
        }
        for ((by, root), e) in by.iter_mut().zip(root).zip(&e) {
            *by = L::div(e.m, L::add(root, c.eps));
        }
        for (e, by) in e.iter_mut().zip(by) {
            let p = if c.has_shrink { L::fnma(c.shrink, e.p, e.p) } else { e.p };
            e.p = L::fnma(c.step, by, p);
        }
    }
    (e, root)
}

/// [`rule::direction`](crate::rule::direction).
#[inline(always)]
pub(super) unsafe fn direction<L: Lanes>(m: L::F, v: L::F, c: &Splat<L>) -> L::F {
    // SAFETY: the caller enables the instruction set.
    unsafe { L::div(m, L::add(L::sqrt(v), c.eps)) }
}

/// `rule::maximum`.
#[inline(always)]
pub(super) unsafe fn maximum<L: Lanes>(old: L::F, new: L::F) -> L::F {
    // SAFETY: the caller enables the instruction set.
    unsafe { L::select(L::is_nan(new), new, L::select(L::less(old, new), new, old)) }
}

/// [`rule::canonical`](crate::rule::canonical).
#[inline(always)]
pub(super) unsafe fn canonical<L: Lanes>(x: L::F) -> L::F {
    // SAFETY: the caller enables the instruction set.
    unsafe { L::select(L::is_nan(x), L::splat(f32::from_bits(0x7FC0_0000)), x) }
}

/// Makes every NaN among `len` parameters the canonical one, of which there is none if none of `nan` is:
/// the sum of all products with 0.
///
/// # Safety
/// So many are valid, padded to whole vectors; the caller enables the instruction set.
#[inline(always)]
pub(super) unsafe fn canonicalize<L: Lanes, P: VectorFloat>(nan: L::F, p: *mut P, len: usize) {
    // SAFETY: this function's contract.
    unsafe {
        if L::all(L::at_most(nan, L::splat(0.0))) {
            return;
        }
        for at in (0..len).step_by(L::N) {
            let p = p.add(at);
            P::store::<L>(canonical::<L>(P::load::<L>(p)), p);
        }
    }
}

/// 0 where the number is not finite.
#[inline(always)]
pub(super) unsafe fn zero_unless_finite<L: Lanes>(x: L::F) -> L::F {
    // SAFETY: the caller enables the instruction set.
    unsafe { L::select(L::is_finite(x), x, L::splat(0.0)) }
}
