//! The ratio code: the second moment's root on a logarithmic grid of its block, and the first moment
//! in units of the update.
//!
//! **Roots.** What is coded is `s = sqrt(v)`, by which an update divides. The bits of a positive float,
//! read as an integer, are its logarithm but for at most 0.09 of an octave; a grid puts 511 values
//! at equal distances between those of a block's smallest positive root and of its largest, and 0
//! besides. Every element so gets the same relative precision, whatever its size. A range is cut at
//! [`OCTAVES`] below its upper end: smaller roots are raised to there, through which an update can only
//! shrink. Roots are rounded up or down at random, with probabilities that leave the code's mean what
//! it should be; otherwise a moment that decays by a thousandth of itself a step would never leave
//! its code.
//!
//! **Chance.** What decides is a hash of the block's index, plus the element's index in the block times
//! one irrational number, plus the step's times another, the golden ratio, modulo 1
//! ([`Coefficients::dither`]): over the steps every element gets numbers that fill the interval as
//! evenly as any sequence does (Weyl 1916), so that a slow drift is rounded up the right number of
//! times, with less of the scatter that independent numbers would have; and they are the same on every
//! device.
//!
//! **Ratios.** The first moment is kept as `r = m / s`, `s` as it is decoded: that is the update, whose
//! magnitude is bounded by the betas (7.3 for the default ones, by Cauchy-Schwarz), so that one scale
//! suits a whole block. `r` takes one of 127 equidistant values, the nearest. The rounding error of a
//! first moment would move the parameter in every step to come, by `beta1 / (1 - beta1)` times itself
//! in all. The parameter is moved back by as much at once ([`Coefficients::carry`]): errors do not add
//! up, and what remains of each is its passage.
//!
//! A root has 9 bits and a ratio 7, in two bytes:
//!
//! ```text
//! exp_avg_code        rrrrrrrs   ratio + 64, lowest bit of the root's code
//! exp_avg_sq_code     ssssssss   upper bits of the root's code
//! max_exp_avg_sq_code ssssssss   a root of 8 bits; with AMSGrad it is this that divides
//! ```
//!
//! [`Coefficients::dither`]: crate::rule::Coefficients::dither
//! [`Coefficients::carry`]: crate::rule::Coefficients::carry

use super::{Scale, Scales};
use crate::codec::BLOCK;
use crate::ieee::Ieee;

/// How far a range of roots reaches below its upper end.
pub const OCTAVES: u32 = 24;

const SPAN: i32 = (OCTAVES << 23) as i32;

/// The code of the largest root of a block: of the second moment, and of the largest one so far.
pub(crate) const TOP: i32 = 511;
/// As [`TOP`], for the third moment, which has no bits besides its byte.
pub(crate) const LARGEST_TOP: i32 = 255;

/// The code of the largest ratio of a block, less that of 0.
pub(crate) const MOST: f32 = 63.0;
/// The code of a ratio of 0.
pub(crate) const ZERO: i32 = 64;

/// The byte of a ratio of 0, and of a root of 0.
pub const ZERO_RATIO: u8 = (ZERO as u8) << 1;
/// The byte of a root of 0.
pub const ZERO_ROOT: u8 = 0;

/// Positive roots are at least this: less than the root of the smallest positive second moment, and
/// large enough to have a reciprocal.
pub(crate) const LEAST: f32 = 1.0 / 37_778_931_862_957_161_709_568.0;
/// Roots are less than this, so that second moments are finite.
const BEYOND: f32 = 18_446_744_073_709_551_616.0;
/// Ratios are at most this, so that first moments are finite. No moments that belong together come
/// near it.
pub(crate) const LIMIT: f32 = 4_611_686_018_427_387_904.0;
/// Smaller scales of ratios are 0, so that others have a reciprocal.
pub(crate) const NEGLIGIBLE: f32 = 1.0 / 1_267_650_600_228_229_401_496_703_205_376.0;

/// How far in bits a range must reach below an old one that it is joined with to lower its end: more
/// than what rounding makes of the lowest code, or elements that are kept would widen it step by step.
const SLACK: u32 = 64;

/// Where a root lies between two codes when nothing is left to chance: it takes the nearest.
pub(crate) const HALF: u32 = 0x8000;

/// A range of roots that state may have: 0 to 0 where it has none.
pub(crate) fn usable_range(range: Scale) -> Scale {
    if !(range.high >= LEAST && range.high < BEYOND) {
        return Scale::default();
    }
    // NaN is neither the larger nor the smaller of two
    Scale { low: range.low.max(LEAST).min(range.high), high: range.high }
}

/// A scale of ratios that state may have.
pub(crate) const fn usable_ratio(scale: f32) -> f32 {
    if scale > 0.0 && scale < f32::INFINITY { scale.min(LIMIT) } else { 0.0 }
}

/// The range for roots from `least`, the smallest that is positive, to `largest`; `old` is joined where
/// elements are kept.
pub(crate) fn range(least: f32, largest: f32, old: Option<Scale>) -> Scale {
    let (mut least, mut largest) = (least, largest);
    if let Some(old) = old.map(usable_range).filter(|old| old.high > 0.0) {
        // what the lowest code stands for may be a little below the range
        let is_below = least.to_bits() + SLACK < old.low.to_bits();
        (least, largest) = (if is_below { least } else { old.low }, largest.max(old.high));
    }
    if largest == 0.0 {
        return Scale::default();
    }
    let cut = f32::from_bits((largest.to_bits() as i32 - SPAN).max(0) as u32);
    Scale { low: least.max(cut), high: largest }
}

/// The scale for ratios of at most `largest`; `old` is joined where elements are kept.
pub(crate) fn scale(largest: f32, old: Option<f32>) -> f32 {
    let largest = largest.max(old.map_or(0.0, usable_ratio));
    if largest < NEGLIGIBLE { 0.0 } else { largest.min(LIMIT) }
}

/// The values of a range of roots: code 0 is 0, code `top` the upper end, and the bits of the others
/// are at equal distances.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Grid {
    /// The bits of the upper end.
    pub high: i32,
    /// The last code.
    pub top: i32,
    /// From one code to the next, in bits.
    pub step: f32,
    /// The other way round, in 65,536ths of a code.
    pub gain: f32,
}

impl Grid {
    /// For a range that is usable.
    pub(crate) fn new(range: Scale, top: i32) -> Self {
        let (low, high) = (range.low.to_bits() as i32, range.high.to_bits() as i32);
        let (span, cells) = ((high - low) as f32, (top - 1) as f32);
        let gain = if high == low { 0.0 } else { cells * 65536.0 / span };
        Self { high, top, step: span * (1.0 / cells), gain }
    }

    /// The root that a code stands for.
    pub(crate) fn decode(&self, code: i32) -> f32 {
        if code == 0 {
            return 0.0;
        }
        let down = ((self.top - code) as f32 * self.step).round_ties_even() as i32;
        f32::from_bits((self.high - down) as u32)
    }

    /// The code for a root, which is rounded up if its distance from the next lower one, in 65,536ths,
    /// is more than `chance`.
    pub(crate) fn encode(&self, root: f32, chance: u32) -> i32 {
        if root == 0.0 {
            return 0;
        }
        let down = (self.high - root.to_bits() as i32) as f32 * self.gain;
        let down = (down.round_ties_even() as i32 + chance as i32) >> 16;
        self.top - down.min(self.top - 1)
    }
}

/// The values of a block's ratios.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Ratios {
    /// From one to the next.
    pub cell: f32,
    /// The other way round.
    pub gain: f32,
}

impl Ratios {
    /// For a scale that is [usable](usable_ratio).
    pub(crate) fn new(scale: f32) -> Self {
        let gain = if scale < NEGLIGIBLE { 0.0 } else { MOST / scale };
        Self { cell: scale * (1.0 / MOST), gain }
    }

    /// The ratio of a code less that of 0.
    fn decode(self, code: i32) -> f32 {
        code as f32 * self.cell
    }

    /// The nearest code less that of 0.
    fn encode(self, ratio: f32) -> i32 {
        (ratio * self.gain).clamp(-MOST, MOST).round_ties_even() as i32
    }

    /// What is lost where this code stands for `ratio`.
    fn lost(self, code: i32, ratio: f32) -> f32 {
        (-(code as f32)).mul_add(self.cell, ratio)
    }
}

/// One over a root, 0 for 0.
pub(crate) fn inverse(root: f32) -> f32 {
    if root > 0.0 { 1.0 / root } else { 0.0 }
}

/// What all elements of a block have in common: [`noise`]'s first argument.
pub(crate) const fn key(block: u64) -> u32 {
    mix((block as u32) ^ mix((block >> 32) as u32))
}

/// A number for element `i` of a block, in 2^32ths.
pub(crate) const fn noise(key: u32, i: u32) -> u32 {
    key.wrapping_add(i.wrapping_mul(ACROSS))
}

/// From one element to the next: 2^32 over the plastic ratio, the root of `x^3 = x + 1`, which has
/// nothing to do with the golden one: no element repeats its neighbour's numbers a step later.
pub(crate) const ACROSS: u32 = 0xC13F_A9A9;
/// From one step to the next: 2^32 over the golden ratio.
pub(crate) const ALONG: u32 = 0x9E37_79B1;

/// A bijection that leaves no pattern (Wellons 2018, `lowbias32`).
const fn mix(x: u32) -> u32 {
    let x = (x ^ (x >> 16)).wrapping_mul(0x7FEB_352D);
    let x = (x ^ (x >> 15)).wrapping_mul(0x846C_A68B);
    x ^ (x >> 16)
}

/// The byte of a first moment.
pub(crate) const fn first_byte(ratio: i32, root: i32) -> u8 {
    (((ratio + ZERO) << 1) | (root & 1)) as u8
}

/// The code of a root, from its byte and that of the first moment.
pub(crate) const fn root_code(first: u8, second: u8) -> i32 {
    ((second as i32) << 1) | (first as i32 & 1)
}

/// The code of a ratio less that of 0.
pub(crate) const fn ratio_code(first: u8) -> i32 {
    (first >> 1) as i32 - ZERO
}

/// The smallest of `roots` that is positive, infinite if there is none, and the largest; those that
/// are not finite count as 0.
pub(crate) fn ends(roots: &[f32]) -> (f32, f32) {
    let positive = roots.iter().filter(|&&root| root > 0.0 && root < f32::INFINITY);
    positive
        .fold((f32::INFINITY, 0.0), |(least, largest), &root| (least.min(root), largest.max(root)))
}

/// The codes of a block, or of a tensor: bytes of the first, the second and, if there is one, the third
/// moment.
pub type Codes<'a> = [&'a [u8]; 3];

/// The values that codes stand for: the first, the second and, if there are codes of it, the third
/// moment of each element.
pub(crate) fn decode(codes: Codes<'_>, scales: &Scales) -> impl Iterator<Item = [f32; 3]> {
    let [first, second, third] = codes;
    assert_eq!(first.len(), second.len(), "two bytes for each element");
    assert!(third.is_empty() || third.len() == first.len(), "three bytes for each element");
    let ratios = Ratios::new(usable_ratio(scales[0].high));
    let roots = Grid::new(usable_range(scales[1]), TOP);
    let largest = Grid::new(usable_range(scales[2]), LARGEST_TOP);
    (0..first.len()).map(move |i| {
        let root = roots.decode(root_code(first[i], second[i]));
        let third = third.get(i).map(|&code| largest.decode(code.into()));
        let m = ratios.decode(ratio_code(first[i])) * third.unwrap_or(root);
        [m, root * root, third.map_or(0.0, |root| root * root)]
    })
}

/// The values that the codes of a block, or of a tensor with one scale, stand for: the first, the second
/// and, if there are codes of it, the third moment of each element.
///
/// # Panics
/// If the codes of the first two moments differ in number, or those of the third if it has any.
#[must_use]
pub fn decode_block(codes: Codes<'_>, scales: &Scales) -> Vec<[f32; 3]> {
    let _ieee = Ieee::enter();
    decode(codes, scales).collect()
}

/// The moments of some elements as values: first, second and, if there is one, third.
pub type Values<'a> = [&'a [f32]; 3];

/// Encodes one block, or a tensor with one scale, and returns the scales. Nothing is left to chance:
/// roots take the nearest code. What is not finite, and what has no root to be relative to, counts as
/// 0.
///
/// # Panics
/// If the slices differ in length; those of a third moment may be empty.
pub fn encode(values: Values<'_>, codes: [&mut [u8]; 3]) -> Scales {
    let _ieee = Ieee::enter();
    let [m, v, third] = values;
    let root = |v: &f32| if v.is_finite() { v.sqrt() } else { 0.0 };
    let roots: Vec<f32> = v.iter().map(root).collect();
    let largest: Vec<f32> = third.iter().map(root).collect();
    let of = |roots: &[f32]| {
        let (least, largest) = ends(roots);
        range(least, largest, None)
    };
    let mut scales = [Scale::default(), of(&roots), of(&largest)];
    let found = Found { m, roots: &roots, largest: &largest };
    let ratios = found.encode_roots(&scales, |_| HALF, codes);
    let most = ratios.ratios.iter().fold(0.0_f32, |most, ratio| most.max(ratio.abs()));
    scales[0].high = scale(most, None);
    ratios.encode(scales[0].high, |_, _, _| {});
    scales
}

/// [`encode`], block by block; `scales` gets those of each.
///
/// # Panics
/// As [`encode`].
pub fn encode_blocks(values: Values<'_>, codes: [&mut [u8]; 3], mut scales: impl FnMut(Scales)) {
    let [first, second, third] = codes;
    let blocks = first.chunks_mut(BLOCK).zip(second.chunks_mut(BLOCK));
    let mut third = third.chunks_mut(BLOCK);
    for (index, (first, second)) in blocks.enumerate() {
        let of = |values: &[f32]| {
            let values = values.get(index * BLOCK..).unwrap_or_default();
            values[..values.len().min(BLOCK)].to_vec()
        };
        let values = values.map(of);
        let codes = [first, second, third.next().unwrap_or_default()];
        scales(encode(values.each_ref().map(Vec::as_slice), codes));
    }
}

/// What is to be encoded: first moments, and roots of the second and third.
pub(crate) struct Found<'a> {
    pub m: &'a [f32],
    pub roots: &'a [f32],
    /// Empty if there is no third moment.
    pub largest: &'a [f32],
}

impl Found<'_> {
    /// Encodes the roots for their ranges, all but the bit that goes to the first moment's byte, and
    /// finds what the ratios are to the roots that the codes stand for.
    pub(crate) fn encode_roots<'a>(
        &self,
        scales: &Scales,
        chance: impl Fn(usize) -> u32,
        [first, second, third]: [&'a mut [u8]; 3],
    ) -> Divided<'a> {
        let lengths = [self.m, self.roots, self.largest].map(<[f32]>::len);
        assert_eq!([first.len(), second.len(), third.len()], lengths, "a byte for each value");
        let roots = Grid::new(scales[1], TOP);
        let largest = Grid::new(scales[2], LARGEST_TOP);
        let (mut ratios, mut inverses) = (Vec::new(), Vec::new());
        for (i, &m) in self.m.iter().enumerate() {
            let code = roots.encode(self.roots[i], chance(i));
            second[i] = (code >> 1) as u8;
            first[i] = code as u8 & 1;
            let mut divisor = roots.decode(code);
            if let Some(&root) = self.largest.get(i) {
                let code = largest.encode(root, chance(i));
                third[i] = code as u8;
                divisor = largest.decode(code);
            }
            let inverse = inverse(divisor);
            ratios.push(if m.is_finite() { m * inverse } else { 0.0 });
            inverses.push(inverse);
        }
        Divided { ratios, inverses, first }
    }
}

/// First moments that are yet to be encoded.
pub(crate) struct Divided<'a> {
    pub ratios: Vec<f32>,
    /// Of the roots that they are relative to.
    inverses: Vec<f32>,
    first: &'a mut [u8],
}

impl Divided<'_> {
    /// Encodes the ratios for their scale. `lost` is told what each element's ratio loses, and
    /// the inverse of the root.
    pub(crate) fn encode(self, scale: f32, mut lost: impl FnMut(usize, f32, f32)) {
        let coder = Ratios::new(scale);
        for (i, (&ratio, &inverse)) in self.ratios.iter().zip(&self.inverses).enumerate() {
            let code = coder.encode(ratio);
            self.first[i] = first_byte(code, self.first[i].into());
            lost(i, coder.lost(code, ratio), inverse);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const RANGES: [(f32, f32); 7] = [
        (1e-3, 1.0),
        (1e-8, 3e-4),
        (0.7, 0.75),
        (1e-23, 1e-17),
        (1e3, 1e10),
        (0.25, 0.25),
        (1.0, 1.000_1),
    ];

    fn grids() -> impl Iterator<Item = (Scale, Grid)> {
        let grid = |(low, high)| {
            let range = range(low, high, None);
            [TOP, LARGEST_TOP].map(|top| (range, Grid::new(range, top)))
        };
        RANGES.into_iter().flat_map(grid)
    }

    #[test]
    fn codes_ascend_from_one_end_to_the_other() {
        for (range, grid) in grids() {
            assert_eq!((grid.decode(0), grid.decode(grid.top)), (0.0, range.high));
            let first = grid.decode(1).to_bits().cast_signed();
            assert!((first - range.low.to_bits().cast_signed()).abs() <= 24, "{range:?}");
            for code in 1..grid.top {
                assert!(grid.decode(code) <= grid.decode(code + 1), "{range:?} {code}");
            }
        }
    }

    #[test]
    fn what_a_code_stands_for_is_encoded_as_it() {
        for (range, grid) in grids() {
            for code in 0..=grid.top {
                let root = grid.decode(code);
                assert_eq!(grid.decode(grid.encode(root, HALF)), root, "{range:?} {code}");
            }
        }
    }

    #[test]
    fn every_root_goes_to_a_neighbour_and_on_the_average_to_itself() {
        for (range, grid) in grids() {
            for i in 0..100 {
                let span = range.high.to_bits() - range.low.to_bits();
                let root = f32::from_bits(range.low.to_bits() + (u64::from(span) * i / 99) as u32);
                let mut sum = 0.0;
                for chance in 0..1 << 16 {
                    let bits = grid.decode(grid.encode(root, chance)).to_bits();
                    let distance = f64::from(bits) - f64::from(root.to_bits());
                    assert!(distance.abs() <= f64::from(grid.step) + 24.0, "{range:?} {root}");
                    sum += distance;
                }
                let mean = sum / 65536.0;
                // by the rounding of f32 numbers of this size, to integers and of chances
                let slack = f64::from(span) / f64::from(1 << 23) + f64::from(grid.step) / 65536.0;
                assert!(mean.abs() <= slack + 1.0, "{range:?} {root}: {mean}, {slack}");
            }
        }
    }

    #[test]
    fn roots_far_below_the_largest_are_raised_never_to_zero() {
        let range = range(1e-20, 1.0, None);
        assert_eq!(range, Scale { low: 2_f32.powi(-24), high: 1.0 });
        let grid = Grid::new(range, TOP);
        for chance in [0, HALF, 0xFFFF] {
            assert_eq!(grid.encode(1e-20, chance), 1);
            assert_eq!(grid.encode(0.0, chance), 0);
        }
    }

    #[test]
    fn ranges_and_scales_from_elsewhere_are_made_usable() {
        let none = Scale::default();
        let of = |low, high| usable_range(Scale { low, high });
        for high in [0.0, -1.0, f32::NAN, f32::INFINITY, f32::MAX, 1e-30] {
            assert_eq!(of(0.5, high), none, "{high}");
        }
        for low in [0.0, -1.0, f32::NAN, f32::NEG_INFINITY, 1e-40] {
            assert_eq!(of(low, 1.0), Scale { low: LEAST, high: 1.0 }, "{low}");
        }
        assert_eq!(of(2.0, 1.0), Scale { low: 1.0, high: 1.0 });
        for scale in [f32::NAN, f32::INFINITY, -1.0, 0.0] {
            assert_eq!(usable_ratio(scale), 0.0);
        }
        assert_eq!((usable_ratio(f32::MAX), scale(f32::INFINITY, None)), (LIMIT, LIMIT));
        assert_eq!((scale(1e-31, None), scale(1e-31, Some(2.0))), (0.0, 2.0));
    }

    /// Moments of elements that a few gradients have made.
    fn moments(len: usize) -> [Vec<f32>; 3] {
        let hash = |i: usize| (i.wrapping_mul(2_654_435_761) >> 8) % 1000;
        let v: Vec<f32> = (0..len).map(|i| (hash(i) as f32 / -50.0).exp2()).collect();
        let ratio = |i: usize| hash(7 * i + 1) as f32 / 500.0 - 1.0;
        let m = (0..len).map(|i| ratio(i) * v[i].sqrt()).collect();
        let third = v.iter().enumerate().map(|(i, v)| v * (1 + i % 3) as f32).collect();
        [m, v, third]
    }

    #[test]
    fn encoded_moments_decode_within_their_bounds() {
        for len in [1, 255, 256, 1000] {
            let values = moments(len);
            for amsgrad in [false, true] {
                let third: &[f32] = if amsgrad { &values[2] } else { &[] };
                let mut codes = [vec![0; len], vec![0; len], vec![0; third.len()]];
                let [a, b, c] = codes.each_mut().map(Vec::as_mut_slice);
                let scales = encode([&values[0], &values[1], third], [a, b, c]);
                let codes = codes.each_ref().map(Vec::as_slice);
                for (i, [m, v, max_v]) in decode_block(codes, &scales).into_iter().enumerate() {
                    // half a cell of 2^23 bits an octave, squared
                    let octaves = |cells: f64, scale: Scale| {
                        let bits = scale.high.to_bits() - scale.low.to_bits();
                        let root = f64::from(bits) / f64::from(1 << 23) / cells / 2.0;
                        (1.0 + root) * (1.0 + root) - 1.0 + 1e-5
                    };
                    let near = |got: f32, want: f32, octaves: f64| {
                        let ratio = f64::from(got) / f64::from(want);
                        assert!((ratio - 1.0).abs() <= octaves, "{i}: {got} {want}");
                    };
                    near(v, values[1][i], octaves(510.0, scales[1]));
                    let mut divisor = v;
                    if amsgrad {
                        near(max_v, third[i], octaves(254.0, scales[2]));
                        divisor = max_v;
                    }
                    let cell = scales[0].high / MOST * 0.501 * divisor.sqrt();
                    assert!((m - values[0][i]).abs() <= cell, "{i}: {m} {}", values[0][i]);
                }
            }
        }
    }

    #[test]
    fn blocks_have_scales_of_their_own() {
        let [m, v, _] = moments(300);
        let (mut first, mut second) = (vec![0; 300], vec![0; 300]);
        let mut scales = Vec::new();
        encode_blocks([&m, &v, &[]], [&mut first, &mut second, &mut []], |s| scales.push(s));
        let (mut a, mut b) = ([0; 44], [0; 44]);
        let tail = encode([&m[256..], &v[256..], &[]], [&mut a, &mut b, &mut []]);
        assert_eq!((scales.len(), scales[1]), (2, tail));
        assert_eq!((&first[256..], &second[256..]), (&a[..], &b[..]));
    }

    #[test]
    fn what_is_not_finite_or_has_no_root_counts_as_zero() {
        let (m, v) = ([f32::NAN, 1.0, 0.5, f32::INFINITY], [1.0, f32::NAN, 0.0, 4.0]);
        let (mut first, mut second) = ([9; 4], [9; 4]);
        let scales = encode([&m, &v, &[]], [&mut first, &mut second, &mut []]);
        assert_eq!((scales[0].high, scales[1]), (0.0, Scale { low: 1.0, high: 2.0 }));
        let decoded = decode_block([&first, &second, &[]], &scales);
        assert_eq!(decoded, [[0.0, 1.0, 0.0], [0.0; 3], [0.0; 3], [0.0, 4.0, 0.0]]);
        assert_eq!((first[2], second[2]), (ZERO_RATIO, ZERO_ROOT));
    }

    /// An element is rounded up in so many of any run of steps as its distance says, give or take a few.
    #[test]
    fn chances_are_even_along_steps_and_across_elements() {
        for block in [0, 1, 1 << 40] {
            let key = key(block);
            for share in [0.001, 0.01, 0.3] {
                let below = |number: u32| f64::from(number) < share * 4_294_967_296.0;
                for i in [0, 1, 17, 255] {
                    for start in [0_u32, 999] {
                        let up = |t: &u32| below(noise(key, i).wrapping_add(t.wrapping_mul(ALONG)));
                        let count = (start..start + 3000).filter(up).count() as f64;
                        assert!((count - 3000.0 * share).abs() <= 4.0, "{block} {i}: {count}");
                    }
                }
                let count = (0..256).filter(|&i| below(noise(key, i))).count() as f64;
                assert!((count - 256.0 * share).abs() <= 4.0, "{block}: {count}");
            }
        }
    }
}
