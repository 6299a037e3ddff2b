//! The step in the ratio code, block by block: one [`Pass`] finds the new values and the roots' new
//! ranges, a second encodes the roots and finds the ratios to them, and a third encodes those and
//! moves the parameters by what is lost.
//!
//! [`codec::ratio`](crate::codec::ratio) is the definition. Blocks with elements that are kept go to
//! the scalar kernel.

use super::lanes::{Lanes, VectorFloat, each_of_4};
use super::moments8::{BlockStep, Values};
use super::pass::{Coder, Pass, Passed, Sink};
use super::update::{Splat, canonical};
use crate::codec::ratio::{self, Grid, LARGEST_TOP, LIMIT, MOST, Ratios, SPREAD, STIR, TOP, ZERO};
use crate::codec::{BLOCK, Scale};
use crate::cpu::kernels::Coded8;
use crate::cpu::scalar;
use crate::rule::Coefficients;
use crate::tensor::{Moments8, RawCoded};

/// [`Grid`] in every lane.
#[derive(Clone, Copy)]
struct Roots<L: Lanes> {
    low: L::I,
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
                low: L::splat_i(grid.low),
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
    unsafe fn below(&self, down: L::I) -> L::F {
        // SAFETY: the caller enables the instruction set.
        unsafe {
            let bits = L::round(L::mul(L::to_float(down), self.step));
            L::from_bits(L::max_i(L::sub_i(self.high, bits), self.low))
        }
    }

    /// `Grid::decode`.
    #[inline(always)]
    unsafe fn decode(&self, code: L::I) -> L::F {
        // SAFETY: the caller enables the instruction set.
        unsafe {
            let down = L::sub_i(self.top, code);
            // as floats, bits of small integers are in order
            let positive = L::less(L::splat(0.0), L::from_bits(code));
            L::select(positive, self.below(down), L::splat(0.0))
        }
    }

    /// `Grid::encode`, and what the code decodes to.
    #[inline(always)]
    unsafe fn encode(&self, root: L::F, chance: L::I) -> (L::I, L::F) {
        // SAFETY: the caller enables the instruction set.
        unsafe {
            let zero = L::splat(0.0);
            let bits = L::sub_i(self.high, L::max_i(L::bits(root), self.low));
            let down = L::round(L::mul(L::to_float(bits), self.gain));
            let down = L::min_i(L::right::<16>(L::add_i(down, chance)), self.last);
            let positive = L::less(zero, root);
            let code = L::from_bits(L::sub_i(self.top, down));
            let code = L::bits(L::select(positive, code, zero));
            (code, L::select(positive, self.below(down), zero))
        }
    }
}

/// The old scales, and the ends of the new roots' squares.
#[derive(Clone, Copy)]
pub(super) struct CoderR<L: Lanes> {
    cell: L::F,
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
            Self {
                cell: L::splat(Ratios::new(ratio::usable_ratio(*m.scale)).cell),
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
                let k = L::to_float(L::sub_i(L::right::<1>(first[I]), L::splat_i(ZERO)));
                let v = L::mul(root[I], root[I]);
                let max_v = if AMSGRAD { L::mul(largest[I], largest[I]) } else { v };
                [L::mul(L::mul(k, self.cell), largest[I]), v, max_v]
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

/// What a block's passes hand on: parameters, moments, then ratios and the inverses of roots in the
/// place of the first two, and the lowest bits of the roots' codes.
struct Stage {
    p: *mut f32,
    m: *mut f32,
    v: *mut f32,
    max_v: *mut f32,
    low: *mut i32,
}

// SAFETY: the pointers are valid for a block's elements.
unsafe impl<L: Lanes> Sink<L> for Stage {
    #[inline(always)]
    unsafe fn take<const AMSGRAD: bool>(&mut self, at: usize, _: L::F, passed: Passed<L>) {
        // SAFETY: the trait's contract.
        unsafe {
            L::store(passed.new.p, self.p.add(at));
            L::store(passed.stored[0], self.m.add(at));
            L::store(passed.stored[1], self.v.add(at));
            if AMSGRAD {
                L::store(passed.stored[2], self.max_v.add(at));
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
        let mut values = [const { Values::new() }; 5];
        let [v0, v1, v2, v3, v4] = values.each_mut().map(Values::pointer);
        let mut stage = Stage { p: v0, m: v1, v: v2, max_v: v3, low: v4.cast() };
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
            let mut scales = match coded.told {
                Some(told) => told,
                None => {
                    let third = if AMSGRAD { pass.coder.range(1) } else { Scale::default() };
                    [Scale::default(), pass.coder.range(0), third]
                }
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
            carry::<L, P>(&stage, p, first.code, padded, scales[0].high, c);
            pass.nonfinite
        }
    }
}

/// Encodes the roots of the stage's moments but for their lowest bits, which stay there, and puts the
/// ratios to them and their inverses in the place of the moments. Returns the largest ratio.
///
/// # Safety
/// The pointers are valid for `len` elements, groups of four vectors; the caller enables the
/// instruction set.
#[inline(always)]
unsafe fn divide<L: Lanes, const AMSGRAD: bool>(
    stage: &Stage,
    [_, second, third]: [RawCoded; 3],
    len: usize,
    [range, range_of_largest]: [Scale; 2],
    key: u32,
    dither: u32,
) -> f32 {
    // SAFETY: this function's contract.
    unsafe {
        let roots = Roots::<L>::new(Grid::new(range, TOP));
        let of_largest =
            if AMSGRAD { Roots::new(Grid::new(range_of_largest, LARGEST_TOP)) } else { roots };
        let (zero, one, limit) = (L::splat(0.0), L::splat(1.0), L::splat(LIMIT));
        let below = L::splat(-LIMIT);
        let (stir, dither) = (L::splat_i(STIR as i32), L::splat_i(dither as i32));
        let lanes = L::load_i(LANES.as_ptr());
        let mut most = zero;
        for at in (0..len).step_by(4 * L::N) {
            let spread = key.wrapping_add((at as u32).wrapping_mul(SPREAD));
            let first = L::add_i(lanes, L::splat_i(spread as i32));
            let chance = each_of_4!(I => {
                let after = ((I * L::N) as u32).wrapping_mul(SPREAD);
                let x = L::add_i(first, L::splat_i(after as i32));
                let x = L::mul_i(L::xor_i(x, L::right::<16>(x)), stir);
                let x = L::xor_i(x, L::right::<15>(x));
                L::right::<16>(L::add_i(x, dither))
            });
            let code = each_of_4!(I => {
                let at = at + I * L::N;
                let (code, root) = roots.encode(L::sqrt(L::load(stage.v.add(at))), chance[I]);
                L::store_i(L::and_i(code, L::splat_i(1)), stage.low.add(at));
                (code, root)
            });
            L::store_codes(each_of_4!(I => L::right::<1>(code[I].0)), second.code.add(at));
            let divisor = if AMSGRAD {
                let code = each_of_4!(I => {
                    let max_v = L::load(stage.max_v.add(at + I * L::N));
                    of_largest.encode(L::sqrt(max_v), chance[I])
                });
                L::store_codes(each_of_4!(I => code[I].0), third.code.add(at));
                each_of_4!(I => code[I].1)
            } else {
                each_of_4!(I => code[I].1)
            };
            let inverse = each_of_4!(I => {
                L::select(L::less(zero, divisor[I]), L::div(one, divisor[I]), zero)
            });
            for i in 0..4 {
                let at = at + i * L::N;
                let ratio = L::mul(L::load(stage.m.add(at)), inverse[i]);
                let ratio = L::max(L::min(ratio, limit), below);
                most = L::max_magnitude(most, ratio);
                L::store(ratio, stage.m.add(at));
                L::store(inverse[i], stage.v.add(at));
            }
        }
        L::reduce_max(most)
    }
}

/// What [`noise`](ratio::noise) adds for each lane.
static LANES: [i32; 16] = {
    let mut lanes = [0; 16];
    let mut i = 0;
    while i < 16 {
        lanes[i] = (i as u32).wrapping_mul(SPREAD) as i32;
        i += 1;
    }
    lanes
};

/// Encodes the ratios of the stage for their scale, and stores the parameters, moved by what the
/// ratios lose.
///
/// # Safety
/// As [`divide`].
#[inline(always)]
unsafe fn carry<L: Lanes, P: VectorFloat>(
    stage: &Stage,
    p: *mut P,
    first: *mut u8,
    len: usize,
    scale: f32,
    c: &Coefficients,
) {
    // SAFETY: this function's contract.
    unsafe {
        let Ratios { cell, gain } = Ratios::new(scale);
        let (cell, gain) = (L::splat(cell), L::splat(gain));
        let (zero, one) = (L::splat(0.0), L::splat(1.0));
        let (most, least) = (L::splat(MOST), L::splat(-MOST));
        let (eps, carry) = (L::splat(c.eps), L::splat(c.carry));
        let offset = L::splat_i(ZERO);
        for at in (0..len).step_by(4 * L::N) {
            let ratio = each_of_4!(I => L::load(stage.m.add(at + I * L::N)));
            let code = each_of_4!(I => {
                L::round(L::max(L::min(L::mul(ratio[I], gain), most), least))
            });
            for i in 0..4 {
                let at = at + i * L::N;
                let lost = L::fnma(L::to_float(code[i]), cell, ratio[i]);
                let inverse = L::load(stage.v.add(at));
                let share = L::max(L::fnma(eps, inverse, one), zero);
                let new = L::fnma(carry, L::mul(share, lost), L::load(stage.p.add(at)));
                P::store::<L>(canonical::<L>(new), p.add(at));
            }
            let bytes = each_of_4!(I => {
                let low = L::load_i(stage.low.add(at + I * L::N));
                L::or_i(L::left::<1>(L::add_i(code[I], offset)), low)
            });
            L::store_codes(bytes, first.add(at));
        }
    }
}
