//! The pass over a block of 8-bit moments that works out its new values, and what the scales are to
//! be.

use std::marker::PhantomData;

use super::lanes::{Lanes, VectorFloat, each_of_4};
use super::update::{Elements, Splat, are_usual, effective, update, updated, zero_unless_finite};
use crate::codec::BLOCK;
use crate::cpu::prefetch::prefetch;
use crate::tensor::RawCoded;

/// How many elements ahead memory is asked for: three blocks, as measured. Two are a little slower, and so
/// are four, most likely as float elements then share sets of the first cache with those that are in use.
const AHEAD: usize = 3 * BLOCK;

/// What takes the new values of a pass.
///
/// # Safety
/// Its methods may be called for elements that it has room for, by callers that enable the
/// instruction set.
pub(super) unsafe trait Sink<L: Lanes> {
    /// Takes the `4 N` elements from `at` on.
    unsafe fn take<const AMSGRAD: bool>(
        &mut self,
        at: usize,
        old_p: [L::F; 4],
        passed: [Passed<L>; 4],
    );
}

/// What a pass makes of `N` elements.
#[derive(Clone, Copy)]
pub(super) struct Passed<L: Lanes> {
    /// The parameter may be any NaN in a pass that is [usual](Pass::usual).
    pub new: Elements<L>,
    /// The moments as they are to be stored.
    pub stored: [L::F; 3],
    /// The root of the last of them that there is, which divides.
    pub root: L::F,
    pub moved: L::M,
}

/// A code's part of the pass: old moments from their codes, and what the new scales must reach.
///
/// # Safety
/// Its methods may be called by callers that enable the instruction set.
pub(super) unsafe trait Coder<L: Lanes>: Copy {
    /// Reads the old scales of a block's moments, the third of which is of no account without
    /// `AMSGRAD`.
    ///
    /// # Safety
    /// They are valid.
    unsafe fn new<const AMSGRAD: bool>(moments: [RawCoded; 3]) -> Self;

    /// The moments of the four vectors of elements from `at` on.
    ///
    /// # Safety
    /// They are within the block.
    unsafe fn decode<const AMSGRAD: bool>(
        &self,
        moments: [RawCoded; 3],
        at: usize,
    ) -> [[L::F; 3]; 4];

    /// Takes note of new moments, all of them finite.
    unsafe fn extend<const AMSGRAD: bool>(&mut self, stored: [L::F; 3]);
}

/// What the pass finds.
pub(super) struct Pass<L, C> {
    pub coder: C,
    /// Whether no gradient needed a second look: then the sink may have been given any NaN.
    pub usual: bool,
    /// How many of the block's gradients are not finite.
    pub nonfinite: usize,
    /// How many of its elements are kept as they are.
    pub kept: usize,
    lanes: PhantomData<L>,
}

impl<L: Lanes, C: Coder<L>> Pass<L, C> {
    /// Passes over a block of `len` elements, padded with zeros to groups of four vectors. `moments`
    /// are the first, the second and, with `AMSGRAD`, the third.
    ///
    /// # Safety
    /// The pointers are valid for so many elements, and a scale each, and the sink has room for them;
    /// the caller enables the instruction set.
    #[inline(always)]
    pub(super) unsafe fn over<P: VectorFloat, G: VectorFloat, S: Sink<L>, const AMSGRAD: bool>(
        p: *const P,
        g: *const G,
        moments: [RawCoded; 3],
        len: usize,
        c: &Splat<L>,
        sink: &mut S,
    ) -> Self {
        let padded = len.next_multiple_of(4 * L::N);
        // SAFETY: this function's contract; groups start at multiples of `4 N` below `padded`.
        unsafe {
            let mut pass = Self {
                coder: C::new::<AMSGRAD>(moments),
                usual: are_usual::<L, P, G>(p, g, padded, c),
                nonfinite: 0,
                kept: 0,
                lanes: PhantomData,
            };
            if pass.usual {
                // AMSGrad is rare, and every copy of the loop takes long to compile
                let common = |has_shrink| if AMSGRAD { None } else { c.common(has_shrink) };
                if let Some(c) = common(true) {
                    pass.all_usual::<P, G, S, AMSGRAD>(p, g, moments, padded, &c, sink);
                } else if let Some(c) = common(false) {
                    pass.all_usual::<P, G, S, AMSGRAD>(p, g, moments, padded, &c, sink);
                } else {
                    pass.all_usual::<P, G, S, AMSGRAD>(p, g, moments, padded, c, sink);
                }
                return pass;
            }
            let mut finite = 0;
            for at in (0..padded).step_by(4 * L::N) {
                finite += pass.unusual::<P, G, S, AMSGRAD>(p, g, moments, at, c, sink);
            }
            // The padding's zeros are finite, unless a coefficient is infinite: then nothing is.
            // Where zeros are skipped, they are kept.
            pass.nonfinite = (padded - finite).min(len);
            pass.kept = match (c.skip_zeros, c.propagate) {
                (true, _) => pass.kept - (padded - len),
                (false, true) => 0,
                (false, false) => pass.nonfinite,
            };
            pass
        }
    }

    /// The old values of four vectors.
    #[inline(always)]
    unsafe fn old<P: VectorFloat, const AMSGRAD: bool>(
        &self,
        p: *const P,
        moments: [RawCoded; 3],
        at: usize,
    ) -> [Elements<L>; 4] {
        // SAFETY: the contract of `over`.
        unsafe {
            let old = self.coder.decode::<AMSGRAD>(moments, at);
            let p = P::load_4::<L>(p.add(at));
            each_of_4!(I => Elements {
                p: p[I],
                m: old[I][0],
                v: old[I][1],
                max_v: old[I][2],
            })
        }
    }

    /// Passes over elements whose gradients need no second look.
    #[inline(always)]
    unsafe fn all_usual<P: VectorFloat, G: VectorFloat, S: Sink<L>, const AMSGRAD: bool>(
        &mut self,
        p: *const P,
        g: *const G,
        moments: [RawCoded; 3],
        padded: usize,
        c: &Splat<L>,
        sink: &mut S,
    ) {
        // SAFETY: the contract of `over`.
        unsafe {
            for at in (0..padded).step_by(4 * L::N) {
                prefetch(p.wrapping_add(at + AHEAD), 4 * L::N);
                prefetch(g.wrapping_add(at + AHEAD), 4 * L::N);
                for moment in moments.iter().take(if AMSGRAD { 3 } else { 2 }) {
                    prefetch(moment.code.wrapping_add(at + AHEAD), 4 * L::N);
                }
                self.usual::<P, G, S, AMSGRAD>(p, g, moments, at, c, sink);
            }
        }
    }

    /// Passes over four vectors whose gradients need no second look.
    #[inline(always)]
    unsafe fn usual<P: VectorFloat, G: VectorFloat, S: Sink<L>, const AMSGRAD: bool>(
        &mut self,
        p: *const P,
        g: *const G,
        moments: [RawCoded; 3],
        at: usize,
        c: &Splat<L>,
        sink: &mut S,
    ) {
        // SAFETY: the contract of `over`.
        unsafe {
            let old = self.old::<P, AMSGRAD>(p, moments, at);
            let moved = L::at_most(L::splat(0.0), L::splat(0.0));
            let g = G::load_4::<L>(g.add(at));
            let g = each_of_4!(I => effective::<L>(old[I].p, g[I], c));
            let (new, root) = updated::<L, AMSGRAD, 4>(old, g, c);
            let passed = each_of_4!(I => {
                // usable scales and finite gradients make finite moments
                let stored = [new[I].m, new[I].v, new[I].max_v];
                Passed { new: new[I], stored, root: root[I], moved }
            });
            self.take::<S, AMSGRAD>(at, each_of_4!(I => old[I].p), passed, sink);
        }
    }

    /// Passes over four vectors and returns how many of the gradients are finite.
    #[inline(always)]
    unsafe fn unusual<P: VectorFloat, G: VectorFloat, S: Sink<L>, const AMSGRAD: bool>(
        &mut self,
        p: *const P,
        g: *const G,
        moments: [RawCoded; 3],
        at: usize,
        c: &Splat<L>,
        sink: &mut S,
    ) -> usize {
        let mut finite = 0;
        // SAFETY: the contract of `over`.
        unsafe {
            let old = self.old::<P, AMSGRAD>(p, moments, at);
            let g = G::load_4::<L>(g.add(at));
            let passed = each_of_4!(I => {
                let (new, fate) = update::<L, P, AMSGRAD>(old[I], g[I], c);
                finite += fate.finite;
                self.kept += fate.kept;
                let stored = [
                    zero_unless_finite::<L>(new.m),
                    zero_unless_finite::<L>(new.v),
                    zero_unless_finite::<L>(new.max_v),
                ];
                Passed { new, stored, root: L::sqrt(stored[2]), moved: fate.moved }
            });
            self.take::<S, AMSGRAD>(at, each_of_4!(I => old[I].p), passed, sink);
        }
        finite
    }

    #[inline(always)]
    unsafe fn take<S: Sink<L>, const AMSGRAD: bool>(
        &mut self,
        at: usize,
        old_p: [L::F; 4],
        passed: [Passed<L>; 4],
        sink: &mut S,
    ) {
        // SAFETY: the contract of `over`.
        unsafe {
            for passed in &passed {
                self.coder.extend::<AMSGRAD>(passed.stored);
            }
            sink.take::<AMSGRAD>(at, old_p, passed);
        }
    }
}
