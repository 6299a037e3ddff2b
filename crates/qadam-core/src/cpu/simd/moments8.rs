//! The step with 8-bit moments, block by block: one [`Pass`] finds the new values and the new scales,
//! another encodes.

use std::mem::MaybeUninit;

use super::dynamic8;
use super::lanes::{Lanes, VectorFloat};
use super::padded::Padded;
use super::ratio8;
use super::update::Splat;
use crate::codec::{BLOCK, Code, Moment};
use crate::cpu::kernels::Coded8;
use crate::rule::Coefficients;
use crate::tensor::{Moments8, RawCoded};

/// A code's part of the step: all of a block.
///
/// # Safety
/// Its method may be called as it says.
pub(super) unsafe trait BlockStep<L: Lanes> {
    /// Updates a block of `len` elements, padded with zeros to groups of four vectors, and returns how
    /// many gradients were not finite. `moments` are the first, the second and, with `AMSGRAD`, the
    /// third; `coded` says the rest of them.
    ///
    /// # Safety
    /// The pointers are valid for so many elements, and their scales, which are written unless new ones
    /// are told; the caller enables the instruction set.
    unsafe fn step<P: VectorFloat, G: VectorFloat, const AMSGRAD: bool>(
        p: *mut P,
        g: *const G,
        moments: [RawCoded; 3],
        coded: &Coded8,
        len: usize,
        c: (&Splat<L>, &Coefficients),
    ) -> usize;
}

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
        match (coded.moments.code, coded.moments.max_v.is_some()) {
            (Code::Dynamic, false) => {
                all8::<L, dynamic8::Step, P, G, false>(param, grad, coded, len, c)
            }
            (Code::Dynamic, true) => {
                all8::<L, dynamic8::Step, P, G, true>(param, grad, coded, len, c)
            }
            (Code::Ratio, false) => {
                all8::<L, ratio8::Step, P, G, false>(param, grad, coded, len, c)
            }
            (Code::Ratio, true) => all8::<L, ratio8::Step, P, G, true>(param, grad, coded, len, c),
        }
    }
}

/// The first two, or with `AMSGRAD` all three of the moments.
///
/// # Safety
/// The pointers are valid for `len` elements and a scale for each block of them; the caller enables
/// the instruction set.
#[inline(always)]
unsafe fn all8<L: Lanes, C: BlockStep<L>, P: VectorFloat, G: VectorFloat, const AMSGRAD: bool>(
    param: *mut P,
    grad: *const G,
    coded: Coded8,
    len: usize,
    c: &Coefficients,
) -> usize {
    // SAFETY: the blocks lie within `len` valid elements, scales each or some for all; the last one's
    // elements and codes go through padded copies of a whole block if they are fewer.
    unsafe {
        let splat = Splat::<L>::new(c);
        let mut nonfinite = 0;
        for start in (0..len).step_by(BLOCK) {
            let len = BLOCK.min(len - start);
            let (param, grad, coded) = (param.add(start), grad.add(start), coded.skip(start));
            let mut tail = (len < BLOCK).then(|| Tail::load(param, grad, coded.moments, len));
            // one call, so that there is one copy of its code
            let (p, g, of) = match &mut tail {
                Some(tail) => tail.pointers(),
                None => (param, grad, three(coded.moments)),
            };
            nonfinite += C::step::<P, G, AMSGRAD>(p, g, of, &coded, len, (&splat, c));
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
        let [first, second, third] = Moment::ALL.map(|moment| of.code.zero(moment));
        // SAFETY: this function's contract.
        unsafe {
            Self {
                p: Padded::load(param, rest, P::default()),
                g: Padded::load(grad, rest, G::default()),
                codes: [
                    Padded::load(m.code, rest, first),
                    Padded::load(v.code, rest, second),
                    Padded::load(max_v.code, rest, third),
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

/// The new values of a moment of a block, between the pass that finds the scale and those that encode.
#[repr(align(64))]
pub(super) struct Values(MaybeUninit<[f32; BLOCK]>);

impl Values {
    pub(super) const fn new() -> Self {
        Self(MaybeUninit::uninit())
    }

    pub(super) const fn pointer(&mut self) -> *mut f32 {
        self.0.as_mut_ptr().cast()
    }
}
