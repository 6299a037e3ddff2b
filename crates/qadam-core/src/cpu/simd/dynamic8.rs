//! The step in the dynamic code, block by block: one [`Pass`] finds the new values and the new scales,
//! another encodes.

use super::lanes::{Lanes, VectorFloat, each_of_4};
use super::moments8::{BlockStep, Run, Values};
use super::pass::{Coder, Pass, Passed, Sink};
use super::update::{Splat, canonicalize};
use crate::codec::BLOCK;
use crate::codec::block::{self, Normalizer};
use crate::rule::Coefficients;
use crate::tensor::RawCoded;

/// The old scale of a moment of a block, and the largest magnitudes among its new values.
#[derive(Clone, Copy)]
struct Range<L: Lanes> {
    scale: L::F,
    max: L::F,
}

impl<L: Lanes> Range<L> {
    #[inline(always)]
    unsafe fn new(scale: f32) -> Self {
        // SAFETY: the caller enables the instruction set.
        unsafe { Self { scale: L::splat(scale), max: L::splat(0.0) } }
    }

    /// Takes note of new values, none of which is NaN.
    #[inline(always)]
    unsafe fn extend(&mut self, values: L::F) {
        // SAFETY: the caller enables the instruction set.
        unsafe { self.max = L::max_magnitude(self.max, values) };
    }

    /// Writes the new scale, which with `keep` does not fall, and returns it.
    ///
    /// # Safety
    /// The pointer is valid; the caller enables the instruction set.
    #[inline(always)]
    unsafe fn renew(&self, scale: *mut f32, keep: bool) -> f32 {
        // SAFETY: this function's contract.
        unsafe {
            let mut max = L::reduce_max(self.max);
            if keep {
                max = max.max(block::usable_scale(*scale));
            }
            *scale = max;
            max
        }
    }
}

/// The moments' scales, old and new.
#[derive(Clone, Copy)]
pub(super) struct Coder8<L: Lanes>([Range<L>; 3]);

impl<L: Lanes> Coder8<L> {
    /// The largest magnitude of each moment.
    #[inline(always)]
    pub(super) unsafe fn largest(&self) -> [f32; 3] {
        // SAFETY: the caller enables the instruction set.
        unsafe {
            [
                L::reduce_max(self.0[0].max),
                L::reduce_max(self.0[1].max),
                L::reduce_max(self.0[2].max),
            ]
        }
    }
}

// SAFETY: the methods ask for no more than the trait's.
unsafe impl<L: Lanes> Coder<L> for Coder8<L> {
    #[inline(always)]
    unsafe fn new<const AMSGRAD: bool>(moments: [RawCoded; 3]) -> Self {
        // SAFETY: the trait's contract.
        unsafe {
            let [m, v, max_v] = moments.map(|moment| block::usable_scale(*moment.scale));
            Self([Range::new(m), Range::new(v), Range::new(max_v)])
        }
    }

    #[inline(always)]
    unsafe fn decode<const AMSGRAD: bool>(
        &self,
        moments: [RawCoded; 3],
        at: usize,
    ) -> [[L::F; 3]; 4] {
        // SAFETY: the trait's contract.
        unsafe {
            let [m, v, max_v] = moments.map(|moment| moment.code.add(at));
            let (m, v) = (L::decode_signed(m), L::decode_unsigned(v));
            let max_v = if AMSGRAD { L::decode_unsigned(max_v) } else { v };
            each_of_4!(I => {
                let v = L::mul(v[I], self.0[1].scale);
                let max_v = if AMSGRAD { L::mul(max_v[I], self.0[2].scale) } else { v };
                [L::mul(m[I], self.0[0].scale), v, max_v]
            })
        }
    }

    #[inline(always)]
    unsafe fn extend<const AMSGRAD: bool>(&mut self, [m, v, max_v]: [L::F; 3]) {
        // SAFETY: the trait's contract.
        unsafe {
            self.0[0].extend(m);
            self.0[1].extend(v);
            if AMSGRAD {
                self.0[2].extend(max_v);
            }
        }
    }
}

/// The step of some blocks.
pub(super) struct Step;

// SAFETY: the pointers are those of the trait's contract.
unsafe impl<L: Lanes> BlockStep<L> for Step {
    #[inline(always)]
    unsafe fn step<P: VectorFloat, G: VectorFloat, const AMSGRAD: bool>(
        run: Run<P, G>,
        (c, _): (&Splat<L>, &Coefficients),
    ) -> usize {
        let mut values = [const { Values::new() }; 3];
        let values = values.each_mut().map(Values::pointer);
        let mut nonfinite = 0;
        // SAFETY: this function's contract; the new values hold a whole block, of which the second pass
        // reads what the first wrote.
        unsafe {
            for start in (0..run.len).step_by(BLOCK) {
                let block = run.block(start);
                let (Run { p, g, len, .. }, moments) = (block, block.moments());
                let mut stores = Stores::<L, P> { p, values, nan: L::splat(0.0) };
                let pass = Pass::<L, Coder8<L>>::over::<P, G, _, AMSGRAD>(
                    p,
                    g,
                    moments,
                    len,
                    c,
                    &mut stores,
                );
                if pass.usual {
                    canonicalize::<L, P>(stores.nan, p, len);
                }
                nonfinite += pass.nonfinite;
                let Some(scales) = block.scales::<L, AMSGRAD>(&pass) else { continue };
                let encoders = [
                    Encoder::<L>::new(scales[0]),
                    Encoder::<L>::new(scales[1]),
                    Encoder::<L>::new(scales[2]),
                ];
                let [m, v, max_v] = moments;
                for at in (0..len).step_by(4 * L::N) {
                    encoders[0].signed(values[0].add(at), m.code.add(at));
                    encoders[1].unsigned(values[1].add(at), v.code.add(at));
                    if AMSGRAD {
                        encoders[2].unsigned(values[2].add(at), max_v.code.add(at));
                    }
                }
            }
        }
        nonfinite
    }
}

impl<P, G> Run<P, G> {
    /// The scales that the block's new moments are to be encoded for, which are written unless they were
    /// told; none if all moments stay as they are.
    ///
    /// # Safety
    /// This is one block, the pass was over it, and its scales are valid; the caller enables the instruction set.
    #[inline(always)]
    unsafe fn scales<L: Lanes, const AMSGRAD: bool>(
        &self,
        pass: &Pass<L, Coder8<L>>,
    ) -> Option<[f32; 3]> {
        if let Some(told) = &self.coded.told {
            return Some(told.map(|scale| scale.high));
        }
        if pass.kept == self.len {
            return None;
        }
        let keep = pass.kept > 0;
        let [m, v, max_v] = self.moments();
        let [of_m, of_v, of_max] = pass.coder.0;
        // SAFETY: this function's contract.
        unsafe {
            let third = if AMSGRAD { of_max.renew(max_v.scale, keep) } else { 0.0 };
            Some([of_m.renew(m.scale, keep), of_v.renew(v.scale, keep), third])
        }
    }
}

/// Writes the parameters, and keeps the moments for the pass that encodes.
struct Stores<L: Lanes, P> {
    p: *mut P,
    values: [*mut f32; 3],
    /// NaN where a parameter is or may be.
    nan: L::F,
}

// SAFETY: the pointers are valid for a block's elements.
unsafe impl<L: Lanes, P: VectorFloat> Sink<L> for Stores<L, P> {
    #[inline(always)]
    unsafe fn take<const AMSGRAD: bool>(
        &mut self,
        at: usize,
        _: [L::F; 4],
        passed: [Passed<L>; 4],
    ) {
        // SAFETY: the trait's contract.
        unsafe {
            P::store_4::<L>(each_of_4!(I => passed[I].new.p), self.p.add(at));
            for (i, passed) in passed.iter().enumerate() {
                let at = at + i * L::N;
                self.nan = L::fma(passed.new.p, L::splat(0.0), self.nan);
                L::store(passed.stored[0], self.values[0].add(at));
                L::store(passed.stored[1], self.values[1].add(at));
                if AMSGRAD {
                    L::store(passed.stored[2], self.values[2].add(at));
                }
            }
        }
    }
}

/// [`encode_block`](crate::codec::block::encode_block) for finite values whose scale is known.
#[derive(Clone, Copy)]
struct Encoder<L: Lanes> {
    power: L::F,
    reciprocal: L::F,
    has_power: bool,
}

impl<L: Lanes> Encoder<L> {
    #[inline(always)]
    unsafe fn new(scale: f32) -> Self {
        let Normalizer { power, reciprocal } = Normalizer::new(scale);
        let has_power = power != 1.0;
        // SAFETY: the caller enables the instruction set.
        unsafe { Self { power: L::splat(power), reciprocal: L::splat(reciprocal), has_power } }
    }

    #[inline(always)]
    unsafe fn normalize(&self, value: L::F) -> L::F {
        // SAFETY: the caller enables the instruction set.
        unsafe {
            let value = if self.has_power { L::mul(value, self.power) } else { value };
            L::mul(value, self.reciprocal)
        }
    }

    /// Encodes `4 N` values with a sign.
    ///
    /// # Safety
    /// The pointers are valid for so many elements; the caller enables the instruction set.
    #[inline(always)]
    unsafe fn signed(&self, values: *const f32, to: *mut u8) {
        // SAFETY: this function's contract.
        unsafe {
            let x = each_of_4!(I => self.normalize(L::load(values.add(I * L::N))));
            L::encode_signed(x, to);
        }
    }

    /// Encodes `4 N` second moments.
    ///
    /// # Safety
    /// As [`Encoder::signed`].
    #[inline(always)]
    unsafe fn unsigned(&self, values: *const f32, to: *mut u8) {
        // SAFETY: this function's contract.
        unsafe {
            let values = each_of_4!(I => L::load(values.add(I * L::N)));
            let x = each_of_4!(I => self.normalize(values[I]));
            L::encode_unsigned(x, values, to);
        }
    }
}
