//! The step in the ratio code, block by block: one [`Pass`] finds the new values and the roots' new
//! ranges, a second encodes the roots and finds the ratios to them, and a third encodes those and
//! moves the parameters by what is lost.
//!
//! [`codec::ratio`](crate::codec::ratio) is the definition. Blocks with elements that are kept go to
//! the scalar kernel.

use super::lanes::{Lanes, VectorFloat, each_of_4};
use super::moments8::{BlockStep, Run, Values};
use super::pass::{Coder, Pass, Passed, Sink};
use super::update::{Splat, canonicalize};
use crate::codec::ratio::{self, Grid, LARGEST_TOP, LIMIT, MOST, Ratios, TOP, ZERO};
use crate::codec::{BLOCK, Scale, Scales};
use crate::cpu::scalar;
use crate::rule::Coefficients;
use crate::tensor::RawCoded;

/// [`Grid`] in every lane.
#[derive(Clone, Copy)]
struct Roots<L: Lanes> {
    high: L::I,
    top: L::I,
    last: L::I,
    step: L::F,
    /// What a code of -1 is below the largest, in bits.
    most: L::F,
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
                most: L::splat((grid.top + 1) as f32 * grid.step),
                gain: L::splat(grid.gain),
            }
        }
    }

    /// `Grid::decode`.
    #[inline(always)]
    unsafe fn decode(&self, code: L::I) -> L::F {
        // SAFETY: the caller enables the instruction set.
        unsafe {
            let not_code = L::to_float(L::not_i(code)); // -1 - code
            // the product of the step and of `top - code`, rounded once: `top + 1` steps are exact
            let down = L::round(L::fma(not_code, self.step, self.most));
            let root = L::from_bits(L::sub_i(self.high, down));
            L::select(L::less(not_code, L::splat(-1.0)), root, L::splat(0.0))
        }
    }

    /// How far below the largest the code of `Grid::encode` is, and the inverse of what it decodes to.
    /// `ZEROS` says whether roots may be 0.
    #[inline(always)]
    unsafe fn encode<const ZEROS: bool>(&self, root: L::F, chance: L::I) -> (L::I, L::F) {
        // SAFETY: the caller enables the instruction set.
        unsafe {
            let bits = L::sub_i(self.high, L::bits(root));
            let down = L::round(L::mul(L::to_float(bits), self.gain));
            let down = L::min_i(L::right::<16>(L::add_i(down, chance)), self.last);
            let below = L::round(L::mul(L::to_float(down), self.step));
            let inverse = L::div(L::splat(1.0), L::from_bits(L::sub_i(self.high, below)));
            if !ZEROS {
                return (down, inverse);
            }
            let positive = L::less(L::splat(0.0), root);
            let down = L::select(positive, L::from_bits(down), L::from_bits(self.top));
            (L::bits(down), L::select(positive, inverse, L::splat(0.0)))
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
    /// Of the second moments and the third: the bits of the smallest, which are in order, and the largest.
    least: [L::I; 2],
    most: [L::F; 2],
}

impl<L: Lanes> CoderR<L> {
    /// The smallest second moment, or third.
    #[inline(always)]
    unsafe fn least(&self, index: usize) -> f32 {
        // SAFETY: the caller enables the instruction set.
        f32::from_bits(unsafe { L::reduce_min_i(self.least[index]) } as u32)
    }

    /// The new range of the second moment's roots, or of the third's. Its `len` values, or their roots,
    /// are looked at again where some are 0.
    ///
    /// # Safety
    /// So many are valid, whole vectors; the caller enables the instruction set.
    #[inline(always)]
    unsafe fn range(&self, index: usize, values: *const f32, are_roots: bool, len: usize) -> Scale {
        // SAFETY: this function's contract.
        let (mut least, most) = unsafe { (self.least(index), L::reduce_max(self.most[index])) };
        let mut is_root = false;
        if least == 0.0 {
            // SAFETY: as above.
            least = unsafe { least_positive::<L>(values, len) };
            is_root = are_roots;
        }
        ratio::range(if is_root { least } else { least.sqrt() }, most.sqrt(), None)
    }
}

/// The smallest of `len` values that is positive, infinite if there is none.
///
/// # Safety
/// So many are valid, whole vectors; the caller enables the instruction set.
#[inline(always)]
unsafe fn least_positive<L: Lanes>(values: *const f32, len: usize) -> f32 {
    // SAFETY: this function's contract.
    unsafe {
        let mut least = L::splat(f32::INFINITY);
        for at in (0..len).step_by(L::N) {
            let value = L::load(values.add(at));
            let positive = L::less(L::splat(0.0), value);
            least = L::min(least, L::select(positive, value, L::splat(f32::INFINITY)));
        }
        f32::from_bits(L::reduce_min_i(L::bits(least)) as u32)
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
                least: [L::splat_i(i32::MAX); 2],
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
            self.least[0] = L::min_i(self.least[0], L::bits(v));
            self.most[0] = L::max(self.most[0], v);
            if AMSGRAD {
                self.least[1] = L::min_i(self.least[1], L::bits(max_v));
                self.most[1] = L::max(self.most[1], max_v);
            }
        }
    }
}

/// The step of some blocks.
pub(super) struct Step;

/// How many blocks take each pass one after the other. A pass needs what the pass before it found in all
/// of the block; while that is worked out, the other block keeps the processor busy.
const GROUP: usize = 2;

/// What a block's passes hand on: parameters, first moments, the roots that divide, and with AMSGrad
/// second moments; then the inverses of what the roots' codes stand for in the place of roots, and the
/// lowest bits of these codes.
#[derive(Clone, Copy)]
struct Stage {
    p: *mut f32,
    m: *mut f32,
    root: *mut f32,
    v: *mut f32,
    lowest: *mut u8,
}

/// Room for a [`Stage`].
struct Room {
    values: [Values; 4],
    lowest: Values,
}

impl Room {
    const fn new() -> Self {
        Self { values: [const { Values::new() }; 4], lowest: Values::new() }
    }

    fn stage(&mut self) -> Stage {
        let [p, m, root, v] = self.values.each_mut().map(Values::pointer);
        Stage { p, m, root, v, lowest: self.lowest.pointer().cast() }
    }
}

// SAFETY: the pointers are valid for a block's elements.
unsafe impl<L: Lanes> Sink<L> for Stage {
    #[inline(always)]
    unsafe fn take<const AMSGRAD: bool>(
        &mut self,
        at: usize,
        _: [L::F; 4],
        passed: [Passed<L>; 4],
    ) {
        // SAFETY: the trait's contract.
        unsafe {
            for (i, passed) in passed.iter().enumerate() {
                let at = at + i * L::N;
                L::store(passed.new.p, self.p.add(at));
                L::store(passed.stored[0], self.m.add(at));
                L::store(passed.root, self.root.add(at));
                if AMSGRAD {
                    L::store(passed.stored[1], self.v.add(at));
                }
            }
        }
    }
}

// SAFETY: the pointers are those of the trait's contract.
unsafe impl<L: Lanes> BlockStep<L> for Step {
    #[inline(always)]
    unsafe fn step<P: VectorFloat, G: VectorFloat, const AMSGRAD: bool>(
        run: Run<P, G>,
        (splat, c): (&Splat<L>, &Coefficients),
    ) -> usize {
        let mut rooms = [const { Room::new() }; GROUP];
        let mut nonfinite = 0;
        // SAFETY: this function's contract; a stage holds a whole block, of which a pass reads what an
        // earlier one wrote.
        unsafe {
            for start in (0..run.len).step_by(GROUP * BLOCK) {
                let starts = (start..run.len).step_by(BLOCK);
                let mut group = [None; GROUP];
                for ((start, room), found) in starts.zip(&mut rooms).zip(&mut group) {
                    let block = run.block(start);
                    let mut stage = room.stage();
                    let (Run { p, g, len, .. }, moments) = (block, block.moments());
                    let pass = Pass::<L, CoderR<L>>::over::<P, G, _, AMSGRAD>(
                        p, g, moments, len, splat, &mut stage,
                    );
                    if pass.kept > 0 {
                        // nothing has been written yet
                        nonfinite += scalar::block8(p, g, block.coded, len, c);
                        continue;
                    }
                    nonfinite += pass.nonfinite;
                    *found = Some(Found::new::<L, AMSGRAD>(&pass.coder, stage, block));
                }
                for found in group.iter_mut().flatten() {
                    found.divide::<L, AMSGRAD>(c);
                }
                for found in group.iter().flatten() {
                    found.carry::<L>(c);
                }
            }
        }
        nonfinite
    }
}

/// What the passes over a block have found.
#[derive(Clone, Copy)]
struct Found<P, G> {
    block: Run<P, G>,
    stage: Stage,
    scales: Scales,
    /// Whether second moments may be 0.
    has_zeros: bool,
    /// Whether neither ratios are beyond their scale, by more than a rounding, nor roots as small as
    /// `eps`.
    is_plain: bool,
}

impl<P: VectorFloat, G: VectorFloat> Found<P, G> {
    /// What the first pass found.
    ///
    /// # Safety
    /// The stage is that of the block; the caller enables the instruction set.
    #[inline(always)]
    unsafe fn new<L: Lanes, const AMSGRAD: bool>(
        coder: &CoderR<L>,
        stage: Stage,
        block: Run<P, G>,
    ) -> Self {
        let len = block.len.next_multiple_of(4 * L::N);
        // SAFETY: this function's contract.
        unsafe {
            let none = Scale::default();
            let scales = if let Some(told) = block.coded.told {
                told
            } else if AMSGRAD {
                let second = coder.range(0, stage.v, false, len);
                [none, second, coder.range(1, stage.root, true, len)]
            } else {
                [none, coder.range(0, stage.root, true, len), none]
            };
            // AMSGrad is rare, and every copy of the second pass takes long to compile
            let has_zeros = AMSGRAD || coder.least(0) == 0.0;
            Self { block, stage, scales, has_zeros, is_plain: false }
        }
    }

    /// The second pass.
    ///
    /// # Safety
    /// The contract of [`BlockStep::step`].
    #[inline(always)]
    unsafe fn divide<L: Lanes, const AMSGRAD: bool>(&mut self, c: &Coefficients) {
        let Self { block, stage, scales: [_, second, third], .. } = *self;
        let len = block.len.next_multiple_of(4 * L::N);
        let moments = block.moments();
        let chance = (ratio::key(block.coded.start / BLOCK as u64), c.dither);
        // SAFETY: this function's contract.
        unsafe {
            let ranges = [second, third];
            let largest = if self.has_zeros {
                divide::<L, AMSGRAD, true>(&stage, moments, len, ranges, chance)
            } else {
                divide::<L, AMSGRAD, false>(&stage, moments, len, ranges, chance)
            };
            if block.coded.told.is_some() {
                return;
            }
            self.scales[0].high = ratio::scale(largest, None);
            block.coded.moments.set_scales(&self.scales);
            // decoded, the lowest root is below its range by no more than a rounding
            let divisor = if AMSGRAD { third } else { second };
            self.is_plain = largest < LIMIT && divisor.low > 2.0 * c.eps;
        }
    }

    /// The third pass.
    ///
    /// # Safety
    /// As [`Found::divide`].
    #[inline(always)]
    unsafe fn carry<L: Lanes>(&self, c: &Coefficients) {
        let Self { block, stage, scales, is_plain, .. } = self;
        let len = block.len.next_multiple_of(4 * L::N);
        let (p, first) = (block.p, block.coded.moments.m.code);
        // SAFETY: this function's contract.
        unsafe {
            let mut carry = Carry::<L>::new(scales[0].high, c);
            if *is_plain {
                carry.all::<P, false>(stage, p, first, len);
            } else {
                carry.all::<P, true>(stage, p, first, len);
            }
            canonicalize::<L, P>(carry.nan, p, len);
        }
    }
}

/// Encodes the roots of the stage's moments, all but their lowest bits, which the stage keeps, and puts
/// the inverses in the place of the roots that divide. `ZEROS` says whether roots may be 0. Returns the
/// largest ratio.
///
/// # Safety
/// The pointers are valid for `len` elements, groups of four vectors; the caller enables the
/// instruction set.
#[inline(always)]
unsafe fn divide<L: Lanes, const AMSGRAD: bool, const ZEROS: bool>(
    stage: &Stage,
    [_, second, third]: [RawCoded; 3],
    len: usize,
    [range, range_of_largest]: [Scale; 2],
    (key, dither): (u32, u32),
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
                roots.encode::<ZEROS>(root, chance[I])
            });
            let down = each_of_4!(I => of_v[I].0);
            L::split_codes(down, second.code.add(at), stage.lowest.add(at));
            let divisor = if AMSGRAD {
                let of_largest = each_of_4!(I => {
                    largest.encode::<ZEROS>(L::load(stage.root.add(at + I * L::N)), chance[I])
                });
                let code = each_of_4!(I => L::sub_i(largest.top, of_largest[I].0));
                L::store_codes(code, third.code.add(at));
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

    /// `CLAMP` says whether ratios may be beyond their scale, or `eps` larger than roots.
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
                let new = each_of_4!(I => {
                    let lost = L::fnma(L::to_float(code[I]), self.cell, ratio[I]);
                    let share = L::fnma(self.eps, inverse[I], one);
                    let share = if CLAMP { L::max(share, zero) } else { share };
                    let old = L::load(stage.p.add(at + I * L::N));
                    let new = L::fnma(self.by, L::mul(share, lost), old);
                    self.nan = L::fma(new, zero, self.nan);
                    new
                });
                P::store_4::<L>(new, p.add(at));
                L::join_codes(code, stage.lowest.add(at), first.add(at));
            }
        }
    }
}
