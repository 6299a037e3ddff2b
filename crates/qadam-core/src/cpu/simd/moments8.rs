//! The step with 8-bit moments, block by block: one [`Pass`] finds the new values and the new scales,
//! another encodes.

use std::mem::MaybeUninit;

use super::lanes::{Lanes, VectorFloat, each_of_4};
use super::padded::Padded;
use super::pass::{Pass, Passed, Sink};
use super::update::{Splat, canonical};
use crate::codec::BLOCK;
use crate::codec::block::Normalizer;
use crate::codec::dynamic::{self, Sign};
use crate::cpu::kernels::Coded8;
use crate::rule::Coefficients;
use crate::tensor::{Moments8, RawCoded};

/// 8-bit moments.
///
/// # Safety
/// As [`Kernel`](crate::cpu::kernels) says, and the caller enables the instruction set of `L`.
#[inline(always)]
pub(in crate::cpu) unsafe fn step8<L: Lanes, P: VectorFloat, G: VectorFloat>(
    param: *mut u8,
    grad: *const u8,
    coded: Coded8,
    len: usize,
    c: &Coefficients,
) -> usize {
    let (param, grad) = (param.cast::<P>(), grad.cast::<G>());
    // SAFETY: this function's contract.
    unsafe {
        if coded.moments.max_v.is_none() {
            all8::<L, P, G, false>(param, grad, coded, len, c)
        } else {
            all8::<L, P, G, true>(param, grad, coded, len, c)
        }
    }
}

/// The first two, or with `AMSGRAD` all three of the moments.
///
/// # Safety
/// The pointers are valid for `len` elements and a scale for each block of them; the caller enables
/// the instruction set.
#[inline(always)]
unsafe fn all8<L: Lanes, P: VectorFloat, G: VectorFloat, const AMSGRAD: bool>(
    param: *mut P,
    grad: *const G,
    Coded8 { moments, new_scales }: Coded8,
    len: usize,
    c: &Coefficients,
) -> usize {
    // SAFETY: the blocks lie within `len` valid elements, a scale each or one for all; the last one's
    // elements and codes go through padded copies of a whole block if they are fewer.
    unsafe {
        let c = Splat::<L>::new(c);
        let mut nonfinite = 0;
        for start in (0..len).step_by(BLOCK) {
            let len = BLOCK.min(len - start);
            let (param, grad, moments) = (param.add(start), grad.add(start), moments.skip(start));
            let mut tail = (len < BLOCK).then(|| Tail::load(param, grad, moments, len));
            // one call, so that there is one copy of its code
            let (p, g, of) = match &mut tail {
                Some(tail) => tail.pointers(),
                None => (param, grad, three(moments)),
            };
            nonfinite += block8::<L, P, G, AMSGRAD>(p, g, of, new_scales, len, &c);
            if let Some(tail) = tail {
                tail.store(param, len);
            }
        }
        nonfinite
    }
}

/// The moments of a kernel, of which the third is of no account without `AMSGRAD`.
pub(super) fn three(moments: Moments8) -> [RawCoded; 3] {
    [moments.m, moments.v, moments.max_v.unwrap_or(moments.v)]
}

/// The last elements, padded to a whole block with zeros.
pub(super) struct Tail<P, G> {
    p: Padded<P, BLOCK>,
    g: Padded<G, BLOCK>,
    codes: [Padded<u8, BLOCK>; 3],
    /// Where the moments are.
    of: Moments8,
}

impl<P: VectorFloat, G: VectorFloat> Tail<P, G> {
    /// # Safety
    /// The pointers are valid for `rest` elements, less than a block.
    #[inline(never)]
    pub(super) unsafe fn load(param: *const P, grad: *const G, of: Moments8, rest: usize) -> Self {
        let [m, v, max_v] = three(of);
        let (signed, unsigned) =
            (dynamic::zero_code(Sign::Signed), dynamic::zero_code(Sign::Unsigned));
        // SAFETY: this function's contract.
        unsafe {
            Self {
                p: Padded::load(param, rest, P::default()),
                g: Padded::load(grad, rest, G::default()),
                codes: [
                    Padded::load(m.code, rest, signed),
                    Padded::load(v.code, rest, unsigned),
                    Padded::load(max_v.code, rest, unsigned),
                ],
                of,
            }
        }
    }

    /// The padded elements and codes, with the scales that the moments have.
    pub(super) fn pointers(&mut self) -> (*mut P, *const G, [RawCoded; 3]) {
        let mut moments = three(self.of);
        for (moment, codes) in moments.iter_mut().zip(&mut self.codes) {
            moment.code = codes.0.as_mut_ptr();
        }
        (self.p.0.as_mut_ptr(), self.g.0.as_ptr(), moments)
    }

    /// Writes the parameter's elements and the codes back.
    ///
    /// # Safety
    /// `param` is valid for `rest` elements, as many as were loaded, and so are the moments.
    #[inline(never)]
    unsafe fn store(&self, param: *mut P, rest: usize) {
        // SAFETY: this function's contract.
        unsafe {
            self.p.store(param, rest);
            for (codes, coded) in self.codes.iter().zip(self.of.each()) {
                codes.store(coded.code, rest);
            }
        }
    }
}

/// The new values of a moment of a block, between the pass that finds the scale and the pass that
/// encodes.
#[repr(align(64))]
struct Values(MaybeUninit<[f32; BLOCK]>);

impl Values {
    const fn new() -> Self {
        Self(MaybeUninit::uninit())
    }

    const fn pointer(&mut self) -> *mut f32 {
        self.0.as_mut_ptr().cast()
    }
}

/// Updates a block of `len` elements, padded with zeros to groups of four vectors, and returns how
/// many gradients were not finite. `moments` are the first, the second and, with `AMSGRAD`, the third.
///
/// # Safety
/// The pointers are valid for so many elements, and a scale each, which is written unless there are
/// `new_scales`; the caller enables the instruction set.
#[inline(always)]
unsafe fn block8<L: Lanes, P: VectorFloat, G: VectorFloat, const AMSGRAD: bool>(
    p: *mut P,
    g: *const G,
    moments: [RawCoded; 3],
    new_scales: Option<[f32; 3]>,
    len: usize,
    c: &Splat<L>,
) -> usize {
    let mut values = [const { Values::new() }; 3];
    let values = values.each_mut().map(Values::pointer);
    // SAFETY: this function's contract; the new values hold a whole block, of which the second pass
    // reads what the first wrote.
    unsafe {
        let mut stores = Stores::<L, P> { p, values, nan: L::splat(0.0) };
        let pass = Pass::over::<P, G, _, AMSGRAD>(p, g, moments, len, c, &mut stores);
        if pass.usual {
            stores.canonicalize(len);
        }
        let [m, v, max_v] = moments;
        let scales = match new_scales {
            Some(scales) => scales,
            None if pass.kept == len => return pass.nonfinite,
            None => {
                let keep = pass.kept > 0;
                let third = if AMSGRAD { pass.max_v.renew(max_v.scale, keep) } else { 0.0 };
                [pass.m.renew(m.scale, keep), pass.v.renew(v.scale, keep), third]
            }
        };
        let encoders = [
            Encoder::<L>::new(scales[0]),
            Encoder::<L>::new(scales[1]),
            Encoder::<L>::new(scales[2]),
        ];
        for at in (0..len).step_by(4 * L::N) {
            encoders[0].signed(values[0].add(at), m.code.add(at));
            encoders[1].unsigned(values[1].add(at), v.code.add(at));
            if AMSGRAD {
                encoders[2].unsigned(values[2].add(at), max_v.code.add(at));
            }
        }
        pass.nonfinite
    }
}

/// Writes the parameters, and keeps the moments for the pass that encodes.
struct Stores<L: Lanes, P> {
    p: *mut P,
    values: [*mut f32; 3],
    /// NaN where a parameter is or may be.
    nan: L::F,
}

// SAFETY: the pointers are valid for a block's elements, by `block8`.
unsafe impl<L: Lanes, P: VectorFloat> Sink<L> for Stores<L, P> {
    #[inline(always)]
    unsafe fn take<const AMSGRAD: bool>(&mut self, at: usize, _: L::F, passed: Passed<L>) {
        // SAFETY: the trait's contract.
        unsafe {
            P::store::<L>(passed.new.p, self.p.add(at));
            self.nan = L::fma(passed.new.p, L::splat(0.0), self.nan);
            L::store(passed.stored[0], self.values[0].add(at));
            L::store(passed.stored[1], self.values[1].add(at));
            if AMSGRAD {
                L::store(passed.stored[2], self.values[2].add(at));
            }
        }
    }
}

impl<L: Lanes, P: VectorFloat> Stores<L, P> {
    /// Makes every NaN among `len` parameters the canonical one.
    ///
    /// # Safety
    /// So many are valid, padded to whole vectors; the caller enables the instruction set.
    #[inline(always)]
    unsafe fn canonicalize(&self, len: usize) {
        // SAFETY: this function's contract.
        unsafe {
            // a product of 0 and anything but a number is NaN
            if L::all(L::at_most(self.nan, L::splat(0.0))) {
                return;
            }
            for at in (0..len).step_by(L::N) {
                let p = self.p.add(at);
                P::store::<L>(canonical::<L>(P::load::<L>(p)), p);
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
