//! The step with 8-bit moments: a code's passes over blocks.

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

/// Elements that follow each other, from the beginning of a block on.
#[derive(Clone, Copy)]
pub(super) struct Run<P, G> {
    pub p: *mut P,
    pub g: *const G,
    pub coded: Coded8,
    pub len: usize,
}

impl<P, G> Run<P, G> {
    /// The block from element `start` on.
    ///
    /// # Safety
    /// `start` is a multiple of a block and less than the number of elements, for which the pointers
    /// are valid.
    #[inline(always)]
    pub(super) unsafe fn block(&self, start: usize) -> Self {
        // SAFETY: this function's contract.
        unsafe {
            let (p, g, coded) = (self.p.add(start), self.g.add(start), self.coded.skip(start));
            Self { p, g, coded, len: BLOCK.min(self.len - start) }
        }
    }

    /// The first moments, the second and the third, which is of no account without `AMSGrad`.
    pub(super) fn moments(&self) -> [RawCoded; 3] {
        three(self.coded.moments)
    }
}

/// A code's part of the step.
///
/// # Safety
/// Its method may be called as it says.
pub(super) unsafe trait BlockStep<L: Lanes> {
    /// Updates the elements of whole blocks, or of one that is padded with zeros to groups of four
    /// vectors, and returns how many gradients were not finite.
    ///
    /// # Safety
    /// The pointers are valid for the elements, padded, and for their scales, which are written unless
    /// new ones are told; `AMSGRAD` says whether there are third moments; the caller enables the
    /// instruction set.
    unsafe fn step<P: VectorFloat, G: VectorFloat, const AMSGRAD: bool>(
        run: Run<P, G>,
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
        let whole = len - len % BLOCK;
        for (start, len) in [(0, whole), (whole, len - whole)] {
            if len == 0 {
                continue;
            }
            let (p, g) = (param.add(start), grad.add(start));
            let mut run = Run { p, g, coded: coded.skip(start), len };
            let mut tail = (len < BLOCK).then(|| Tail::load(p, g, run.coded.moments, len));
            if let Some(tail) = &mut tail {
                (run.p, run.g, run.coded.moments) = tail.pointers();
            }
            // one call, so that there is one copy of its code
            nonfinite += C::step::<P, G, AMSGRAD>(run, (&splat, c));
            if let Some(tail) = tail {
                tail.store(p, len);
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
    pub(super) fn pointers(&mut self) -> (*mut P, *const G, Moments8) {
        let mut moments = self.of;
        let Moments8 { m, v, max_v, .. } = &mut moments;
        for (moment, codes) in [m, v].into_iter().chain(max_v).zip(&mut self.codes) {
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
