//! 8-bit steps of parameters and gradients of different types: block by block through f32, by the
//! kernel for these. A kernel of its own for each pair would take long to compile and gain little.

use super::lanes::{Lanes, VectorFloat};
use super::moments8::Values;
use super::padded::Padded;
use crate::codec::BLOCK;
use crate::cpu::kernels::{Coded8, GaugeKernel, Kernel};
use crate::cpu::measure::Gauge;
use crate::rule::Coefficients;
use crate::tensor::Moments8;

/// [`step8`](super::step8) by `kernel`, which is that for f32.
///
/// # Safety
/// As [`Kernel`] says, and the caller enables the instruction set of `L`.
#[inline(always)]
pub(in crate::cpu) unsafe fn step8<L: Lanes, P: VectorFloat, G: VectorFloat>(
    param: *mut u8,
    grad: *const u8,
    coded: Coded8,
    len: usize,
    c: &Coefficients,
    kernel: Kernel<Coded8>,
) -> usize {
    let (param, grad) = (param.cast::<P>(), grad.cast::<G>());
    let (mut p, mut g) = (Values::new(), Values::new());
    let (p, g) = (p.pointer(), g.pointer());
    let mut nonfinite = 0;
    // SAFETY: blocks are within the elements, by this function's contract.
    unsafe {
        for start in (0..len).step_by(BLOCK) {
            let (param, len) = (param.add(start), BLOCK.min(len - start));
            widen::<L, P>(param, len, p);
            widen::<L, G>(grad.add(start), len, g);
            nonfinite += kernel(p.cast(), g.cast(), coded.skip(start), len, c);
            round::<L, P>(p, len, param);
        }
    }
    nonfinite
}

/// [`gauge8`](super::gauge8), likewise.
///
/// # Safety
/// As [`GaugeKernel`] says, and the caller enables the instruction set of `L`.
#[inline(always)]
pub(in crate::cpu) unsafe fn gauge8<L: Lanes, P: VectorFloat, G: VectorFloat>(
    param: *const u8,
    grad: *const u8,
    moments: Moments8,
    len: usize,
    c: &Coefficients,
    gauge: &mut Gauge,
    kernel: GaugeKernel<Moments8>,
) {
    let (param, grad) = (param.cast::<P>(), grad.cast::<G>());
    let (mut p, mut g) = (Values::new(), Values::new());
    let (p, g) = (p.pointer(), g.pointer());
    // SAFETY: as in `step8`.
    unsafe {
        for start in (0..len).step_by(BLOCK) {
            let len = BLOCK.min(len - start);
            widen::<L, P>(param.add(start), len, p);
            widen::<L, G>(grad.add(start), len, g);
            kernel(p.cast(), g.cast(), moments.skip(start), len, c, gauge);
        }
    }
}

/// # Safety
/// The pointers are valid for `len` elements, at most a block, and `to` for a whole one; the caller
/// enables the instruction set.
#[inline(always)]
unsafe fn widen<L: Lanes, T: VectorFloat>(from: *const T, len: usize, to: *mut f32) {
    // SAFETY: this function's contract; what is short goes through a padded copy.
    unsafe {
        if len < BLOCK {
            let padded = Padded::<T, BLOCK>::load(from, len, T::default());
            return widen_block::<L, T>(padded.0.as_ptr(), to);
        }
        widen_block::<L, T>(from, to);
    }
}

/// # Safety
/// The pointers are valid for a block; the caller enables the instruction set.
#[inline(always)]
unsafe fn widen_block<L: Lanes, T: VectorFloat>(from: *const T, to: *mut f32) {
    // SAFETY: this function's contract.
    unsafe {
        for at in (0..BLOCK).step_by(L::N) {
            L::store(T::kept::<L>(T::load::<L>(from.add(at))), to.add(at));
        }
    }
}

/// # Safety
/// As [`widen`], the other way round.
#[inline(always)]
unsafe fn round<L: Lanes, T: VectorFloat>(from: *const f32, len: usize, to: *mut T) {
    // SAFETY: this function's contract; what is short goes through a padded copy.
    unsafe {
        let mut padded = Padded::<T, BLOCK>::load(to, 0, T::default());
        let into = if len < BLOCK { padded.0.as_mut_ptr() } else { to };
        for at in (0..len).step_by(L::N) {
            T::store::<L>(L::load(from.add(at)), into.add(at));
        }
        if len < BLOCK {
            padded.store(to, len);
        }
    }
}
