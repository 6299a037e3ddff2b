//! Blocks: 256 consecutive elements in memory share one f32 scale, their largest magnitude.
//!
//! A tail block is shorter. A block of zeros has scale 0 and decodes to zeros.

use super::dynamic::{self, Sign};
use crate::ieee::Ieee;

/// Elements a block.
pub const BLOCK: usize = 256;

/// What multiplies a value to bring it into the code's range, in two factors: where the scale is
/// so small (or large) that its reciprocal would be infinite (or subnormal), the first is a power
/// of two that brings both back into range.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Normalizer {
    pub power: f32,
    pub reciprocal: f32,
}

/// 2^80: scales between its reciprocal and itself need no help.
const FAR: f32 = 1_208_925_819_614_629_174_706_176.0;

impl Normalizer {
    pub(crate) fn new(scale: f32) -> Self {
        let power = if scale < 1.0 / FAR {
            FAR
        } else if scale > FAR {
            1.0 / FAR
        } else {
            1.0
        };
        let reciprocal = if scale == 0.0 { 0.0 } else { 1.0 / (scale * power) };
        Self { power, reciprocal }
    }

    fn apply(self, x: f32) -> f32 {
        x * self.power * self.reciprocal
    }
}

/// A scale that is not finite counts as 0: nothing that qadam writes has one, but state may come
/// from elsewhere, and the other elements of a step must stay finite.
pub(crate) const fn usable_scale(scale: f32) -> f32 {
    if scale.is_finite() { scale } else { 0.0 }
}

/// The value that a code and its block's scale stand for.
#[must_use]
pub fn decode(code: u8, scale: f32, sign: Sign) -> f32 {
    dynamic::decode(code, sign) * scale
}

/// The value itself, or 0 if it is not finite, so that it does not spoil its block.
const fn finite(x: f32) -> f32 {
    if x.is_finite() { x } else { 0.0 }
}

/// The largest magnitude among `values` that is finite, or `least` where that is larger.
pub(crate) fn largest(values: &[f32], least: f32) -> f32 {
    values.iter().fold(least.max(0.0), |max, &x| max.max(finite(x).abs()))
}

/// Encodes one block of at most [`BLOCK`] values and returns its scale: the largest magnitude, or
/// `least` where that is larger.
///
/// Non-finite values count as zero, so that one of them does not spoil its block. A positive value
/// of an unsigned block (a second moment) never takes the code of zero:
/// [`dynamic::encode_positive`].
///
/// # Panics
/// If the slices differ in length.
pub fn encode_block(values: &[f32], sign: Sign, least: f32, codes: &mut [u8]) -> f32 {
    let scale = largest(values, least);
    encode_scaled(values, sign, scale, codes);
    scale
}

/// [`encode_block`] for values of no larger magnitude than `scale`.
pub(crate) fn encode_scaled(values: &[f32], sign: Sign, scale: f32, codes: &mut [u8]) {
    assert_eq!(values.len(), codes.len(), "a code for each value");
    let normalizer = Normalizer::new(scale);
    for (code, &value) in codes.iter_mut().zip(values) {
        let value = finite(value);
        let x = normalizer.apply(value);
        *code = if sign == Sign::Unsigned && value > 0.0 {
            dynamic::encode_positive(x)
        } else {
            dynamic::encode(x, sign)
        };
    }
}

/// Encodes `values` block by block.
///
/// # Panics
/// If `codes` is not as long as `values`, or `scales` has not one element a block.
pub fn encode_blocks(values: &[f32], sign: Sign, codes: &mut [u8], scales: &mut [f32]) {
    assert_eq!(values.len(), codes.len(), "a code for each value");
    assert_eq!(values.len().div_ceil(BLOCK), scales.len(), "a scale for each block");
    let _ieee = Ieee::enter();
    let blocks = values.chunks(BLOCK).zip(codes.chunks_mut(BLOCK));
    for ((values, codes), scale) in blocks.zip(scales) {
        *scale = encode_block(values, sign, 0.0, codes);
    }
}

/// Encodes `values`, however many, with one scale for them all, and returns it: their largest finite
/// magnitude, 0 if there are none.
///
/// # Panics
/// If `codes` is not as long as `values`.
pub fn encode_tensor(values: &[f32], sign: Sign, codes: &mut [u8]) -> f32 {
    let _ieee = Ieee::enter();
    let scale = largest(values, 0.0);
    encode_scaled(values, sign, scale, codes);
    scale
}

/// Decodes `codes` block by block.
///
/// # Panics
/// If `values` is not as long as `codes`, or `scales` has not one element a block.
pub fn decode_blocks(codes: &[u8], scales: &[f32], sign: Sign, values: &mut [f32]) {
    assert_eq!(values.len(), codes.len(), "a code for each value");
    assert_eq!(values.len().div_ceil(BLOCK), scales.len(), "a scale for each block");
    let _ieee = Ieee::enter();
    let blocks = codes.chunks(BLOCK).zip(values.chunks_mut(BLOCK));
    for ((codes, values), &scale) in blocks.zip(scales) {
        for (value, &code) in values.iter_mut().zip(codes) {
            *value = decode(code, scale, sign);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn round_trip(values: &[f32], sign: Sign) -> (Vec<f32>, Vec<f32>) {
        let mut codes = vec![0; values.len()];
        let mut scales = vec![0.0; values.len().div_ceil(BLOCK)];
        encode_blocks(values, sign, &mut codes, &mut scales);
        let mut decoded = vec![0.0; values.len()];
        decode_blocks(&codes, &scales, sign, &mut decoded);
        (decoded, scales)
    }

    #[test]
    fn the_largest_magnitude_is_the_scale_and_survives() {
        for scale in [f32::from_bits(1), 1e-40, 1e-30, 1.0, 3e30, f32::MAX] {
            let (decoded, scales) = round_trip(&[scale, scale / 2.0, 0.0], Sign::Unsigned);
            assert_eq!((decoded[0], scales[0], decoded[2]), (scale, scale, 0.0), "{scale:e}");
            let error = (decoded[1] - scale / 2.0).abs();
            assert!(error <= scale * 0.004 + f32::from_bits(1), "{scale:e}: {}", decoded[1]);
        }
    }

    #[test]
    fn blocks_are_independent_and_the_tail_is_short() {
        let mut values = vec![1.0_f32; 257];
        values[256] = 1e-20;
        let (decoded, scales) = round_trip(&values, Sign::Signed);
        assert_eq!(scales, [1.0, 1e-20]);
        assert_eq!(decoded, values);
    }

    #[test]
    fn one_scale_serves_values_of_any_number() {
        let mut values: Vec<f32> = (0..1000_u16).map(|i| f32::from(i) - 300.0).collect();
        values.extend([f32::NAN, f32::INFINITY, -f32::INFINITY]);
        for sign in [Sign::Signed, Sign::Unsigned] {
            let mut codes = vec![99; values.len()];
            assert_eq!(encode_tensor(&values, sign, &mut codes), 699.0);
            let mut beside_the_largest = [0; 2];
            for (&value, &code) in values.iter().zip(&codes) {
                let scale = encode_block(&[value, 699.0], sign, 0.0, &mut beside_the_largest);
                assert_eq!((scale, beside_the_largest[0]), (699.0, code), "{sign:?} {value}");
            }
        }
        assert_eq!(encode_tensor(&[], Sign::Signed, &mut []), 0.0);
        assert_eq!(encode_tensor(&[f32::NAN], Sign::Signed, &mut [0]), 0.0);
    }

    #[test]
    fn nan_does_not_spoil_its_block() {
        let (decoded, scales) = round_trip(&[f32::NAN, 0.5, f32::INFINITY, 1.0], Sign::Signed);
        assert_eq!((decoded[0], decoded[2], decoded[3], scales[0]), (0.0, 0.0, 1.0, 1.0));
    }

    #[test]
    fn a_tiny_second_moment_stays_positive() {
        let (decoded, _) = round_trip(&[1.0, 1e-30, 0.0], Sign::Unsigned);
        assert!(decoded[1] > 0.0 && decoded[2] == 0.0);
    }
}
