//! The step with 32-bit moments.

use super::lanes::{Lanes, VectorFloat};
use super::padded::Padded;
use super::update::{Elements, Splat, canonical, update};
use crate::cpu::prefetch::prefetch;
use crate::rule::Coefficients;
use crate::tensor::Moments32;

/// How many elements ahead memory is asked for, as measured. Fewer can be worse than none.
const AHEAD: usize = 512;

/// 32-bit moments.
///
/// # Safety
/// As [`Kernel`](crate::cpu::kernels) says, and the caller enables the instruction set of `L`.
#[inline(always)]
pub(in crate::cpu) unsafe fn step32<L: Lanes, P: VectorFloat, G: VectorFloat>(
    param: *mut u8,
    grad: *const u8,
    Moments32 { m, v, max_v }: Moments32,
    len: usize,
    c: &Coefficients,
) -> usize {
    let (param, grad) = (param.cast::<P>(), grad.cast::<G>());
    // SAFETY: this function's contract.
    unsafe {
        match max_v {
            None => all32::<L, P, G, false>(param, grad, [m, v, v], len, c),
            Some(max_v) => all32::<L, P, G, true>(param, grad, [m, v, max_v], len, c),
        }
    }
}

/// The first two, or with `AMSGRAD` all three of the moments.
///
/// # Safety
/// The pointers are valid for `len` elements; the caller enables the instruction set.
#[inline(always)]
unsafe fn all32<L: Lanes, P: VectorFloat, G: VectorFloat, const AMSGRAD: bool>(
    param: *mut P,
    grad: *const G,
    [m, v, max_v]: [*mut f32; 3],
    len: usize,
    c: &Coefficients,
) -> usize {
    // SAFETY: whole vectors lie within `len` valid elements; the rest goes through padded copies.
    unsafe {
        let c = Splat::<L>::new(c);
        let vectors = len / L::N;
        let mut finite = 0;
        for i in 0..vectors {
            let at = i * L::N;
            prefetch(param.wrapping_add(at + AHEAD), L::N);
            prefetch(grad.wrapping_add(at + AHEAD), L::N);
            for moment in [m, v, max_v].iter().take(if AMSGRAD { 3 } else { 2 }) {
                prefetch(moment.wrapping_add(at + AHEAD), L::N);
            }
            let moments = [m.add(at), v.add(at), max_v.add(at)];
            finite += vector32::<L, P, G, AMSGRAD>(param.add(at), grad.add(at), moments, &c);
        }
        let (at, rest) = (vectors * L::N, len % L::N);
        if rest > 0 {
            let mut p = Padded::<_, 16>::load(param.add(at), rest, P::default());
            let g = Padded::<_, 16>::load(grad.add(at), rest, G::default());
            let tails = [m.add(at), v.add(at), max_v.add(at)];
            let mut padded = [
                Padded::<_, 16>::load(tails[0], rest, 0.0),
                Padded::<_, 16>::load(tails[1], rest, 0.0),
                Padded::<_, 16>::load(tails[2], rest, 0.0),
            ];
            let moments = padded.each_mut().map(|padded| padded.0.as_mut_ptr());
            let (p_at, g_at) = (p.0.as_mut_ptr(), g.0.as_ptr());
            let of_tail = vector32::<L, P, G, AMSGRAD>(p_at, g_at, moments, &c);
            // The padding's zeros are finite, unless a coefficient is infinite: then nothing is.
            finite += of_tail.saturating_sub(L::N - rest);
            p.store(param.add(at), rest);
            padded[0].store(tails[0], rest);
            padded[1].store(tails[1], rest);
            if AMSGRAD {
                padded[2].store(tails[2], rest);
            }
        }
        len - finite
    }
}

/// Updates `N` elements and returns how many gradients were finite.
///
/// # Safety
/// The pointers are valid for `N` elements; the caller enables the instruction set.
#[inline(always)]
unsafe fn vector32<L: Lanes, P: VectorFloat, G: VectorFloat, const AMSGRAD: bool>(
    p: *mut P,
    g: *const G,
    [m, v, max_v]: [*mut f32; 3],
    c: &Splat<L>,
) -> usize {
    // SAFETY: this function's contract.
    unsafe {
        let third = if AMSGRAD { L::load(max_v) } else { L::splat(0.0) };
        let e = Elements { p: P::load::<L>(p), m: L::load(m), v: L::load(v), max_v: third };
        let (e, fate) = update::<L, P, AMSGRAD>(e, G::load::<L>(g), c);
        P::store::<L>(e.p, p);
        L::store(canonical::<L>(e.m), m);
        L::store(canonical::<L>(e.v), v);
        if AMSGRAD {
            L::store(canonical::<L>(e.max_v), max_v);
        }
        fate.finite
    }
}
