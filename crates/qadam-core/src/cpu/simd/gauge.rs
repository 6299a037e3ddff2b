//! What a step would do, measured: the kernels of [`measure`](crate::cpu::measure).

use super::dynamic8::Coder8;
use super::lanes::{Lanes, VectorFloat};
use super::moments8::{Tail, three};
use super::padded::Padded;
use super::pass::{Coder, Pass, Passed, Sink};
use super::ratio8::CoderR;
use super::update::{Elements, Splat, direction, update};
use crate::codec::{BLOCK, Code};
use crate::cpu::measure::{Gauge, Reach};
use crate::norm::LANES;
use crate::rule::Coefficients;
use crate::tensor::{Moments8, Moments32, RawCoded};

/// [`Gauge`]s a step with 32-bit moments.
///
/// # Safety
/// As [`GaugeKernel`](crate::cpu::kernels) says, and the caller enables the instruction set of `L`.
#[inline(always)]
pub(in crate::cpu) unsafe fn gauge32<L: Lanes, P: VectorFloat, G: VectorFloat>(
    param: *const u8,
    grad: *const u8,
    moments: Moments32,
    len: usize,
    c: &Coefficients,
    gauge: &mut Gauge,
) {
    let (param, grad) = (param.cast::<P>(), grad.cast::<G>());
    // SAFETY: this function's contract; the rest goes through padded copies.
    unsafe {
        let c = Splat::<L>::new(c);
        let whole = len / LANES * LANES;
        for start in (0..whole).step_by(LANES) {
            let (p, g) = (param.add(start), grad.add(start));
            let Moments32 { m, v, max_v } = moments.skip(start);
            lanes32::<L, P, G>(p, g, (m, v, max_v.map(<*mut f32>::cast_const)), LANES, &c, gauge);
        }
        let rest = len - whole;
        if rest > 0 {
            let of = moments.skip(whole);
            let p = Padded::<P, LANES>::load(param.add(whole), rest, P::default());
            let g = Padded::<G, LANES>::load(grad.add(whole), rest, G::default());
            let m = Padded::<f32, LANES>::load(of.m, rest, 0.0);
            let v = Padded::<f32, LANES>::load(of.v, rest, 0.0);
            let max_v = of.max_v.map(|max_v| Padded::<f32, LANES>::load(max_v, rest, 0.0));
            let moments =
                (m.0.as_ptr(), v.0.as_ptr(), max_v.as_ref().map(|max_v| max_v.0.as_ptr()));
            lanes32::<L, P, G>(p.0.as_ptr(), g.0.as_ptr(), moments, rest, &c, gauge);
        }
    }
}

/// The first, the second and, with AMSGrad, the third moment, to be read.
type Read32 = (*const f32, *const f32, Option<*const f32>);

/// [`gauge32`] of up to [`LANES`] elements, padded to so many.
///
/// # Safety
/// The pointers are valid for [`LANES`] elements; the caller enables the instruction set.
#[inline(always)]
unsafe fn lanes32<L: Lanes, P: VectorFloat, G: VectorFloat>(
    p: *const P,
    g: *const G,
    (m, v, max_v): Read32,
    len: usize,
    c: &Splat<L>,
    gauge: &mut Gauge,
) {
    let mut squares = Squares::<LANES>::new();
    // SAFETY: this function's contract.
    unsafe {
        for at in (0..LANES).step_by(L::N) {
            let (p, g) = (P::load::<L>(p.add(at)), G::load::<L>(g.add(at)));
            let (m, v) = (L::load(m.add(at)), L::load(v.add(at)));
            match max_v {
                None => {
                    let e = Elements { p, m, v, max_v: v };
                    let (new, fate) = update::<L, P, false>(e, g, c);
                    squares.set::<L, false>(at, p, new, fate.moved, c);
                }
                Some(max_v) => {
                    let e = Elements { p, m, v, max_v: L::load(max_v.add(at)) };
                    let (new, fate) = update::<L, P, true>(e, g, c);
                    squares.set::<L, true>(at, p, new, fate.moved, c);
                }
            }
        }
    }
    squares.enter(len, gauge);
}

/// Parameters and updates whose squares are to be added, of up to `LEN` elements.
struct Squares<const LEN: usize> {
    params: [f32; LEN],
    updates: [f32; LEN],
}

impl<const LEN: usize> Squares<LEN> {
    #[inline(always)]
    const fn new() -> Self {
        Self { params: [0.0; LEN], updates: [0.0; LEN] }
    }

    /// Takes note of the `N` elements from `at` on.
    ///
    /// # Safety
    /// `at + N` is at most `LEN`; the caller enables the instruction set.
    #[inline(always)]
    unsafe fn set<L: Lanes, const AMSGRAD: bool>(
        &mut self,
        at: usize,
        p: L::F,
        new: Elements<L>,
        moved: L::M,
        c: &Splat<L>,
    ) {
        // SAFETY: this function's contract.
        unsafe {
            let by = direction::<L>(new.m, if AMSGRAD { new.max_v } else { new.v }, c);
            L::store(p, self.params.as_mut_ptr().add(at));
            L::store(L::select(moved, by, L::splat(0.0)), self.updates.as_mut_ptr().add(at));
        }
    }

    /// Adds the squares of the first `len`.
    #[inline(always)]
    fn enter(&mut self, len: usize, gauge: &mut Gauge) {
        let of = len.next_multiple_of(LANES);
        for (values, squares) in
            [(&mut self.params, &mut gauge.params), (&mut self.updates, &mut gauge.updates)]
        {
            values[len..of].fill(0.0);
            for lanes in values[..of].as_chunks::<LANES>().0 {
                squares.add_squares(lanes);
            }
        }
    }
}

/// [`Gauge`]s a step with 8-bit moments.
///
/// # Safety
/// As [`GaugeKernel`](crate::cpu::kernels) says, and the caller enables the instruction set of `L`.
#[inline(always)]
pub(in crate::cpu) unsafe fn gauge8<L: Lanes, P: VectorFloat, G: VectorFloat>(
    param: *const u8,
    grad: *const u8,
    moments: Moments8,
    len: usize,
    c: &Coefficients,
    gauge: &mut Gauge,
) {
    let (param, grad) = (param.cast::<P>(), grad.cast::<G>());
    // SAFETY: this function's contract.
    unsafe {
        if moments.max_v.is_none() {
            gauge_all8::<L, P, G, false>(param, grad, moments, len, c, gauge);
        } else {
            gauge_all8::<L, P, G, true>(param, grad, moments, len, c, gauge);
        }
    }
}

/// # Safety
/// As [`gauge8`]; `AMSGRAD` says whether there is a third moment.
#[inline(always)]
unsafe fn gauge_all8<L: Lanes, P: VectorFloat, G: VectorFloat, const AMSGRAD: bool>(
    param: *const P,
    grad: *const G,
    moments: Moments8,
    len: usize,
    c: &Coefficients,
    gauge: &mut Gauge,
) {
    // SAFETY: this function's contract; the last block goes through a padded copy if it is shorter.
    unsafe {
        let c = Splat::<L>::new(c);
        for start in (0..len).step_by(BLOCK) {
            let len = BLOCK.min(len - start);
            let (param, grad, moments) = (param.add(start), grad.add(start), moments.skip(start));
            let mut tail = (len < BLOCK).then(|| Tail::load(param, grad, moments, len));
            let (p, g, of) = match &mut tail {
                Some(tail) => {
                    let (p, g, of) = tail.pointers();
                    (p.cast_const(), g, three(of))
                }
                None => (param, grad, three(moments)),
            };
            match moments.code {
                Code::Dynamic => {
                    let pass =
                        gauge_block8::<L, Coder8<L>, P, G, AMSGRAD>(p, g, of, None, len, &c, gauge);
                    let largest = pass.coder.largest();
                    gauge.reach = gauge.reach.join(Reach { largest, ..Reach::default() });
                }
                Code::Ratio => {
                    let mut values = [[0.0; BLOCK]; 3];
                    let to = (!moments.block_wise).then_some(&mut values);
                    gauge_block8::<L, CoderR<L>, P, G, AMSGRAD>(p, g, of, to, len, &c, gauge);
                    if !moments.block_wise {
                        let [m, v, max_v] = values.each_ref().map(|values| &values[..len]);
                        gauge.extend(Code::Ratio, [m, v, if AMSGRAD { max_v } else { &[] }]);
                    }
                }
            }
        }
    }
}

/// Gauges a block but for how far its moments reach, which `values` get.
///
/// # Safety
/// The pointers are valid for a block and its scales; the caller enables the instruction set.
#[inline(always)]
unsafe fn gauge_block8<
    L: Lanes,
    C: Coder<L>,
    P: VectorFloat,
    G: VectorFloat,
    const AMSGRAD: bool,
>(
    p: *const P,
    g: *const G,
    moments: [RawCoded; 3],
    values: Option<&mut [[f32; BLOCK]; 3]>,
    len: usize,
    c: &Splat<L>,
    gauge: &mut Gauge,
) -> Pass<L, C> {
    let mut measures = Measures { squares: Squares::new(), values, c };
    // SAFETY: this function's contract.
    let pass =
        unsafe { Pass::<L, C>::over::<P, G, _, AMSGRAD>(p, g, moments, len, c, &mut measures) };
    gauge.keeps |= pass.kept > 0;
    if c.is_limited {
        measures.squares.enter(len, gauge);
    }
    pass
}

/// Takes note of parameters and updates where the updates are limited, and of moments where these are
/// asked for.
struct Measures<'a, L: Lanes> {
    squares: Squares<BLOCK>,
    values: Option<&'a mut [[f32; BLOCK]; 3]>,
    c: &'a Splat<L>,
}

// SAFETY: there is room for a block.
unsafe impl<L: Lanes> Sink<L> for Measures<'_, L> {
    #[inline(always)]
    unsafe fn take<const AMSGRAD: bool>(
        &mut self,
        at: usize,
        old_p: [L::F; 4],
        passed: [Passed<L>; 4],
    ) {
        for (i, (old_p, passed)) in old_p.into_iter().zip(passed).enumerate() {
            let at = at + i * L::N;
            if let Some(values) = &mut self.values {
                for (values, stored) in values.iter_mut().zip(passed.stored) {
                    // SAFETY: there is room for a block.
                    unsafe { L::store(stored, values.as_mut_ptr().add(at)) };
                }
            }
            if self.c.is_limited {
                let Passed { new, moved, .. } = passed;
                // SAFETY: the trait's contract.
                unsafe { self.squares.set::<L, AMSGRAD>(at, old_p, new, moved, self.c) };
            }
        }
    }
}
