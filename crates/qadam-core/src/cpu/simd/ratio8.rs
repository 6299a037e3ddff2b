//! The step in the ratio code, block by block: one [`Pass`] finds the new values and the roots' new
//! ranges, a second encodes the roots and finds the ratios to them, and a third encodes those and
//! moves the parameters by what is lost.
//!
//! [`codec::ratio`](crate::codec::ratio) is the definition. Blocks with elements that are kept go to
//! the scalar kernel.

use super::lanes::{Lanes, VectorFloat, each_of_4};
use super::moments8::{BlockStep, Values};
use super::pass::{Coder, Pass, Passed, Sink};
use super::update::{Splat, canonicalize};
use crate::codec::ratio::{self, Grid, LARGEST_TOP, LIMIT, MOST, Ratios, TOP, ZERO};
use crate::codec::{BLOCK, Scale};
use crate::cpu::kernels::Coded8;
use crate::cpu::scalar;
use crate::rule::Coefficients;
use crate::tensor::{Moments8, RawCoded};

/// [`Grid`] in every lane.
#[derive(Clone, Copy)]
struct Roots<L: Lanes> {
    high: L::I,
    top: L::I,
    last: L::I,
    step: L::F,
    gain: L::F,
}

impl<L: Lanes> Roots<L> {
    #[inline(always)]
    unsafe fn new(grid: Grid) -> Self {
        // SAFETY: the caller enables the instruction set.
        unsafe {
            Self {
                high: L::splat_i(grid.high),
                top: L::splat_i(grid.top),
                last: L::splat_i(grid.top - 1),
                step: L::splat(grid.step),
                gain: L::splat(grid.gain),
            }
        }
    }

    /// The root so many codes below the largest, if not 0.
    #[inline(always)]
    unsafe fn below(&self, down: L::F) -> L::F {
        // SAFETY: the caller enables the instruction set.
        unsafe {
            let bits = L::round(L::mul(down, self.step));
            L::from_bits(L::sub_i(self.high, bits))
        }
    }

    /// `Grid::decode`.
    #[inline(always)]
    unsafe fn decode(&self, code: L::I) -> L::F {
        // SAFETY: the caller enables the instruction set.
        unsafe {
            let down = L::to_float(L::sub_i(self.top, code));
            let positive = L::less(down, L::to_float(self.top));
            L::select(positive, self.below(down), L::splat(0.0))
        }
    }

    /// `Grid::encode`, and the inverse of what the code decodes to.
    #[inline(always)]
    unsafe fn encode(&self, root: L::F, chance: L::I) -> (L::I, L::F) {
        // SAFETY: the caller enables the instruction set.
        unsafe {
            let (zero, one) = (L::splat(0.0), L::splat(1.0));
            let bits = L::sub_i(self.high, L::bits(root));
            let down = L::round(L::mul(L::to_float(bits), self.gain));
            let down = L::min_i(L::right::<16>(L::add_i(down, chance)), self.last);
            let positive = L::less(zero, root);
            let code = L::from_bits(L::sub_i(self.top, down));
            let code = L::bits(L::select(positive, code, zero));
            (code, L::select(positive, L::div(one, self.below(L::to_float(down))), zero))
        }
    }
}

/// The old scales, and the ends of the new roots' squares.
#[derive(Clone, Copy)]
pub(super) struct CoderR<L: Lanes> {
    cell: L::F,
    /// Of a code of 0.
    offset: L::F,
    roots: Roots<L>,
    largest: Roots<L>,
    /// Of the second moments and the third: the bits of the negative of the smallest that is positive,
    /// which is the largest of these as unsigned integers, and the largest.
    least: [L::I; 2],
    most: [L::F; 2],
}

impl<L: Lanes> CoderR<L> {
    /// The new range of the second moment, or the third.
    #[inline(always)]
    unsafe fn range(&self, index: usize) -> Scale {
        // SAFETY: the caller enables the instruction set.
        let (least, most) = unsafe {
            (L::reduce_max_u(self.least[index]).wrapping_neg(), L::reduce_max(self.most[index]))
        };
        ratio::range(f32::from_bits(least).sqrt(), most.sqrt(), None)
    }
}

/// # Safety
/// The moment has a range.
unsafe fn range_of(moment: RawCoded) -> Scale {
    // SAFETY: this function's contract.
    unsafe { Scale { low: *moment.scale, high: *moment.scale.add(1) } }
}

// SAFETY: the methods ask for no more than the trait's.
unsafe impl<L: Lanes> Coder<L> for CoderR<L> {
    #[inline(always)]
    unsafe fn new<const AMSGRAD: bool>([m, v, max_v]: [RawCoded; 3]) -> Self {
        // SAFETY: the trait's contract.
        unsafe {
            let grid = |moment, top| Grid::new(ratio::usable_range(range_of(moment)), top);
            let roots = Roots::new(grid(v, TOP));
            let cell = Ratios::new(ratio::usable_ratio(*m.scale)).cell;
            Self {
                cell: L::splat(cell),
                offset: L::splat(-(ZERO as f32) * cell),
                roots,
                largest: if AMSGRAD { Roots::new(grid(max_v, LARGEST_TOP)) } else { roots },
                least: [L::splat_i(0); 2],
                most: [L::splat(0.0); 2],
            }
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
            let [first, second, third] = moments.map(|moment| moment.code.add(at));
            let one = L::splat_i(1);
            let first = each_of_4!(I => L::load_codes(first.add(I * L::N)));
            let root = each_of_4!(I => {
                let upper = L::left::<1>(L::load_codes(second.add(I * L::N)));
                self.roots.decode(L::or_i(upper, L::and_i(first[I], one)))
            });
            let largest = if AMSGRAD {
                each_of_4!(I => self.largest.decode(L::load_codes(third.add(I * L::N))))
            } else {
                root
            };
            each_of_4!(I => {
                // rounded once, as the product of the difference
                let ratio = L::fma(L::to_float(L::right::<1>(first[I])), self.cell, self.offset);
                let v = L::mul(root[I], root[I]);
                let max_v = if AMSGRAD { L::mul(largest[I], largest[I]) } else { v };
                [L::mul(ratio, largest[I]), v, max_v]
            })
        }
    }

    #[inline(always)]
    unsafe fn extend<const AMSGRAD: bool>(&mut self, [_, v, max_v]: [L::F; 3]) {
        // SAFETY: the trait's contract.
        unsafe {
            let zero = L::splat_i(0);
            self.least[0] = L::max_u(self.least[0], L::sub_i(zero, L::bits(v)));
            self.most[0] = L::max(self.most[0], v);
            if AMSGRAD {
                self.least[1] = L::max_u(self.least[1], L::sub_i(zero, L::bits(max_v)));
                self.most[1] = L::max(self.most[1], max_v);
            }
        }
    }
}

/// The step of a block.
pub(super) struct Step;

/// What a block's passes hand on: parameters, first moments, the roots that divide, and with AMSGrad
/// second moments; then the inverses of what the roots' codes stand for in the place of roots.
struct Stage {
    p: *mut f32,
    m: *mut f32,
    root: *mut f32,
    v: *mut f32,
}

// SAFETY: the pointers are valid for a block's elements.
unsafe impl<L: Lanes> Sink<L> for Stage {
    #[inline(always)]
    unsafe fn take<const AMSGRAD: bool>(&mut self, at: usize, _: L::F, passed: Passed<L>) {
        // SAFETY: the trait's contract.
        unsafe {
            L::store(passed.new.p, self.p.add(at));
            L::store(passed.stored[0], self.m.add(at));
            L::store(passed.root, self.root.add(at));
            if AMSGRAD {
                L::store(passed.stored[1], self.v.add(at));
            }
        }
    }
}

// SAFETY: the pointers are those of the trait's contract.
unsafe impl<L: Lanes> BlockStep<L> for Step {
    #[inline(always)]
    unsafe fn step<P: VectorFloat, G: VectorFloat, const AMSGRAD: bool>(
        p: *mut P,
        g: *const G,
        moments: [RawCoded; 3],
        coded: &Coded8,
        len: usize,
        (splat, c): (&Splat<L>, &Coefficients),
    ) -> usize {
        let mut values = [const { Values::new() }; 4];
        let [new, m, root, v] = values.each_mut().map(Values::pointer);
        let mut stage = Stage { p: new, m, root, v };
        // SAFETY: this function's contract; the stage holds a whole block, of which a pass reads what an
        // earlier one wrote.
        unsafe {
            let pass = Pass::<L, CoderR<L>>::over::<P, G, _, AMSGRAD>(
                p, g, moments, len, splat, &mut stage,
            );
            if pass.kept > 0 {
                // nothing has been written yet
                let [m, v, max_v] = moments;
                let max_v = AMSGRAD.then_some(max_v);
                let moments = Moments8 { m, v, max_v, ..coded.moments };
                return scalar::block8(p, g, Coded8 { moments, ..*coded }, len, c);
            }
            let [first, second, third] = moments;
            let padded = len.next_multiple_of(4 * L::N);
            let mut scales = if let Some(told) = coded.told {
                told
            } else {
                let third = if AMSGRAD { pass.coder.range(1) } else { Scale::default() };
                [Scale::default(), pass.coder.range(0), third]
            };
            let key = ratio::key(coded.start / BLOCK as u64);
            let largest = divide::<L, AMSGRAD>(
                &stage,
                moments,
                padded,
                [scales[1], scales[2]],
                key,
                c.dither,
            );
            if coded.told.is_none() {
                scales[0].high = ratio::scale(largest, None);
                *first.scale = scales[0].high;
                (*second.scale, *second.scale.add(1)) = (scales[1].low, scales[1].high);
                if AMSGRAD {
                    (*third.scale, *third.scale.add(1)) = (scales[2].low, scales[2].high);
                }
            }
            let mut carry = Carry::<L>::new(scales[0].high, c);
            // new scales are reached by no more than a rounding
            if coded.told.is_none() && largest < LIMIT {
                carry.all::<P, false>(&stage, p, first.code, padded);
            } else {
                carry.all::<P, true>(&stage, p, first.code, padded);
            }
            carry.canonicalize(p, padded);
            pass.nonfinite
        }
    }
}

/// Encodes the roots of the stage's moments, with nothing but their lowest bits in the first moments'
/// bytes, and puts the inverses in the place of the roots that divide. Returns the largest ratio.
///
/// # Safety
/// The pointers are valid for `len` elements, groups of four vectors; the caller enables the
/// instruction set.
#[inline(always)]
unsafe fn divide<L: Lanes, const AMSGRAD: bool>(
    stage: &Stage,
    [first, second, third]: [RawCoded; 3],
    len: usize,
    [range, range_of_largest]: [Scale; 2],
    key: u32,
    dither: u32,
) -> f32 {
    // SAFETY: this function's contract.
    unsafe {
        let roots = Roots::<L>::new(Grid::new(range, TOP));
        let largest =
            if AMSGRAD { Roots::new(Grid::new(range_of_largest, LARGEST_TOP)) } else { roots };
        let lanes = each_of_4!(I => L::load_i(LANES.as_ptr().add(I * L::N)));
        let mut most = L::splat(0.0);
        for at in (0..len).step_by(4 * L::N) {
            let noise = ratio::noise(key, at as u32).wrapping_add(dither);
            let noise = L::splat_i(noise as i32);
            let chance = each_of_4!(I => L::right::<16>(L::add_i(noise, lanes[I])));
            let of_v = each_of_4!(I => {
                let at = at + I * L::N;
                let root = if AMSGRAD { L::sqrt(L::load(stage.v.add(at))) } else { L::load(stage.root.add(at)) };
                let (code, inverse) = roots.encode(root, chance[I]);
                (code, inverse)
            });
            L::split_codes(each_of_4!(I => of_v[I].0), second.code.add(at), first.code.add(at));
            let divisor = if AMSGRAD {
                let of_largest = each_of_4!(I => {
                    largest.encode(L::load(stage.root.add(at + I * L::N)), chance[I])
                });
                L::store_codes(each_of_4!(I => of_largest[I].0), third.code.add(at));
                of_largest
            } else {
                of_v
            };
            for (i, (_, inverse)) in divisor.into_iter().enumerate() {
                let at = at + i * L::N;
                let ratio = L::mul(L::load(stage.m.add(at)), inverse);
                most = L::max_magnitude(most, ratio);
                L::store(inverse, stage.root.add(at));
            }
        }
        L::reduce_max(most)
    }
}

/// What [`noise`](ratio::noise) adds for each element of four vectors.
static LANES: [i32; 64] = {
    let mut lanes = [0; 64];
    let mut i = 0;
    while i < 64 {
        lanes[i] = ratio::noise(0, i as u32) as i32;
        i += 1;
    }
    lanes
};

/// The last pass: encodes the ratios of the stage for their scale, and stores the parameters, moved by
/// what the ratios lose.
struct Carry<L: Lanes> {
    cell: L::F,
    gain: L::F,
    eps: L::F,
    by: L::F,
    /// NaN where a parameter is or may be.
    nan: L::F,
}

impl<L: Lanes> Carry<L> {
    #[inline(always)]
    unsafe fn new(scale: f32, c: &Coefficients) -> Self {
        let Ratios { cell, gain } = Ratios::new(scale);
        // SAFETY: the caller enables the instruction set.
        unsafe {
            Self {
                cell: L::splat(cell),
                gain: L::splat(gain),
                eps: L::splat(c.eps),
                by: L::splat(c.carry),
                nan: L::splat(0.0),
            }
        }
    }

    /// `CLAMP` says whether ratios may be beyond their scale.
    ///
    /// # Safety
    /// The pointers are valid for `len` elements, groups of four vectors; the caller enables the
    /// instruction set.
    #[inline(always)]
    unsafe fn all<P: VectorFloat, const CLAMP: bool>(
        &mut self,
        stage: &Stage,
        p: *mut P,
        first: *mut u8,
        len: usize,
    ) {
        // SAFETY: this function's contract.
        unsafe {
            let (zero, one) = (L::splat(0.0), L::splat(1.0));
            for at in (0..len).step_by(4 * L::N) {
                let inverse = each_of_4!(I => L::load(stage.root.add(at + I * L::N)));
                let ratio =
                    each_of_4!(I => L::mul(L::load(stage.m.add(at + I * L::N)), inverse[I]));
                let code = each_of_4!(I => {
                    let k = L::mul(ratio[I], self.gain);
                    let most = L::splat(MOST);
                    L::round(if CLAMP { L::max(L::min(k, most), L::splat(-MOST)) } else { k })
                });
                for i in 0..4 {
                    let at = at + i * L::N;
                    let lost = L::fnma(L::to_float(code[i]), self.cell, ratio[i]);
                    let share = L::max(L::fnma(self.eps, inverse[i], one), zero);
                    let old = L::load(stage.p.add(at));
                    let new = L::fnma(self.by, L::mul(share, lost), old);
                    self.nan = L::fma(new, zero, self.nan);
                    P::store::<L>(new, p.add(at));
                }
                L::join_codes(code, first.add(at));
            }
        }
    }

    /// Makes every NaN among the parameters the canonical one.
    ///
    /// # Safety
    /// As [`Carry::all`].
    #[inline(always)]
    unsafe fn canonicalize<P: VectorFloat>(&self, p: *mut P, len: usize) {
        // SAFETY: this function's contract.
        unsafe { canonicalize::<L, P>(self.nan, p, len) }
    }
}
