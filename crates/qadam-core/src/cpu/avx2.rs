//! 8 lanes by AVX2, FMA and F16C.

use std::arch::x86_64::*;

use half::{bf16, f16};

use super::kernels::Coded8;
use super::measure::Gauge;
use super::simd::{self, Lanes, VectorFloat, lanes};
use crate::rule::Coefficients;
use crate::tensor::{Moments8, Moments32};

#[derive(Clone, Copy)]
struct Avx2;

// SAFETY: every method is one or a few intrinsics of the instruction sets that the trait's contract
// requires of the processor; loads and stores are of the unaligned kind and touch 8 elements.
unsafe impl Lanes for Avx2 {
    const N: usize = 8;
    type F = __m256;
    type I = __m256i;
    type M = __m256i;

    lanes! {
        fn splat(x: f32) -> __m256 {
            _mm256_set1_ps(x)
        }
        fn load(from: *const f32) -> __m256 {
            _mm256_loadu_ps(from)
        }
        fn load_bf16(from: *const bf16) -> __m256 {
            let bits = _mm256_cvtepu16_epi32(_mm_loadu_si128(from.cast()));
            _mm256_castsi256_ps(_mm256_slli_epi32::<16>(bits))
        }
        fn load_f16(from: *const f16) -> __m256 {
            _mm256_cvtph_ps(_mm_loadu_si128(from.cast()))
        }
        fn store(x: __m256, to: *mut f32) {
            _mm256_storeu_ps(to, x);
        }
        fn store_bf16(x: __m256, to: *mut bf16) {
            let bits = _mm256_castps_si256(x);
            let odd = _mm256_and_si256(_mm256_srli_epi32::<16>(bits), _mm256_set1_epi32(1));
            let half = _mm256_add_epi32(odd, _mm256_set1_epi32(0x7FFF));
            let rounded = _mm256_srli_epi32::<16>(_mm256_add_epi32(bits, half));
            let quiet = _mm256_or_si256(_mm256_srli_epi32::<16>(bits), _mm256_set1_epi32(0x40));
            let bits = _mm256_blendv_epi8(rounded, quiet, Self::is_nan(x));
            let (low, high) = (_mm256_castsi256_si128(bits), _mm256_extracti128_si256::<1>(bits));
            _mm_storeu_si128(to.cast(), _mm_packus_epi32(low, high));
        }
        fn store_f16(x: __m256, to: *mut f16) {
            let bits = _mm256_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(x);
            _mm_storeu_si128(to.cast(), bits);
        }
        fn add(a: __m256, b: __m256) -> __m256 {
            _mm256_add_ps(a, b)
        }
        fn sub(a: __m256, b: __m256) -> __m256 {
            _mm256_sub_ps(a, b)
        }
        fn mul(a: __m256, b: __m256) -> __m256 {
            _mm256_mul_ps(a, b)
        }
        fn div(a: __m256, b: __m256) -> __m256 {
            _mm256_div_ps(a, b)
        }
        fn sqrt(a: __m256) -> __m256 {
            _mm256_sqrt_ps(a)
        }
        fn fma(a: __m256, b: __m256, c: __m256) -> __m256 {
            _mm256_fmadd_ps(a, b, c)
        }
        fn fnma(a: __m256, b: __m256, c: __m256) -> __m256 {
            _mm256_fnmadd_ps(a, b, c)
        }
        fn abs(a: __m256) -> __m256 {
            _mm256_andnot_ps(_mm256_set1_ps(-0.0), a)
        }
        fn min(a: __m256, b: __m256) -> __m256 {
            _mm256_min_ps(a, b)
        }
        fn max(a: __m256, b: __m256) -> __m256 {
            _mm256_max_ps(a, b)
        }
        fn reduce_max(a: __m256) -> f32 {
            let max = _mm_max_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps::<1>(a));
            let max = _mm_max_ps(max, _mm_movehl_ps(max, max));
            _mm_cvtss_f32(_mm_max_ss(max, _mm_movehdup_ps(max)))
        }
        fn less(a: __m256, b: __m256) -> __m256i {
            _mm256_castps_si256(_mm256_cmp_ps::<_CMP_LT_OQ>(a, b))
        }
        fn at_most(a: __m256, b: __m256) -> __m256i {
            _mm256_castps_si256(_mm256_cmp_ps::<_CMP_LE_OQ>(a, b))
        }
        fn is_finite(a: __m256) -> __m256i {
            let infinity = _mm256_castps_si256(_mm256_set1_ps(f32::INFINITY));
            _mm256_cmpgt_epi32(infinity, _mm256_castps_si256(Self::abs(a)))
        }
        fn is_nan(a: __m256) -> __m256i {
            _mm256_castps_si256(_mm256_cmp_ps::<_CMP_UNORD_Q>(a, a))
        }
        fn select(mask: __m256i, a: __m256, b: __m256) -> __m256 {
            _mm256_blendv_ps(b, a, _mm256_castsi256_ps(mask))
        }
        fn select_i(mask: __m256i, a: __m256i, b: __m256i) -> __m256i {
            _mm256_blendv_epi8(b, a, mask)
        }
        fn all(mask: __m256i) -> bool {
            _mm256_movemask_ps(_mm256_castsi256_ps(mask)) == 0xFF
        }
        fn count(mask: __m256i) -> usize {
            _mm256_movemask_ps(_mm256_castsi256_ps(mask)).count_ones() as usize
        }
        fn splat_i(x: i32) -> __m256i {
            _mm256_set1_epi32(x)
        }
        fn add_i(a: __m256i, b: __m256i) -> __m256i {
            _mm256_add_epi32(a, b)
        }
        fn sub_i(a: __m256i, b: __m256i) -> __m256i {
            _mm256_sub_epi32(a, b)
        }
        fn min_i(a: __m256i, b: __m256i) -> __m256i {
            _mm256_min_epi32(a, b)
        }
        fn max_i(a: __m256i, b: __m256i) -> __m256i {
            _mm256_max_epi32(a, b)
        }
        fn to_float(a: __m256i) -> __m256 {
            _mm256_cvtepi32_ps(a)
        }
        fn truncate(a: __m256) -> __m256i {
            _mm256_cvttps_epi32(a)
        }
        fn bits(a: __m256) -> __m256i {
            _mm256_castps_si256(a)
        }
        fn with_sign(magnitude: __m256, sign: __m256) -> __m256 {
            _mm256_or_ps(magnitude, _mm256_and_ps(sign, _mm256_set1_ps(-0.0)))
        }
        fn exponent(a: __m256) -> __m256i {
            _mm256_srli_epi32::<23>(_mm256_castps_si256(a))
        }
        fn power_of_two(a: __m256) -> __m256 {
            let field = _mm256_set1_epi32(0x7F80_0000);
            _mm256_castsi256_ps(_mm256_and_si256(_mm256_castps_si256(a), field))
        }
        fn lookup(table: &[f32; 16], index: __m256i) -> __m256 {
            // a permutation sees the index modulo 8; its bit 3, moved to the sign, chooses the half
            let low = _mm256_permutevar8x32_ps(_mm256_loadu_ps(table.as_ptr()), index);
            let high = _mm256_permutevar8x32_ps(_mm256_loadu_ps(table.as_ptr().add(8)), index);
            _mm256_blendv_ps(low, high, _mm256_castsi256_ps(_mm256_slli_epi32::<28>(index)))
        }
        fn lookup_i(table: &[i32; 16], index: __m256i) -> __m256i {
            let low = _mm256_loadu_si256(table.as_ptr().cast());
            let high = _mm256_loadu_si256(table.as_ptr().add(8).cast());
            let low = _mm256_permutevar8x32_epi32(low, index);
            let high = _mm256_permutevar8x32_epi32(high, index);
            let half = _mm256_castsi256_ps(_mm256_slli_epi32::<28>(index));
            let (low, high) = (_mm256_castsi256_ps(low), _mm256_castsi256_ps(high));
            _mm256_castps_si256(_mm256_blendv_ps(low, high, half))
        }
        fn load_codes(from: *const u8) -> __m256i {
            _mm256_cvtepu8_epi32(_mm_loadl_epi64(from.cast()))
        }
        fn store_codes(codes: __m256i, to: *mut u8) {
            let (low, high) = (_mm256_castsi256_si128(codes), _mm256_extracti128_si256::<1>(codes));
            let words = _mm_packus_epi32(low, high);
            _mm_storel_epi64(to.cast(), _mm_packus_epi16(words, words));
        }
    }
}

/// # Safety
/// As [`simd::step32`], on a processor with AVX2, FMA and F16C.
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) unsafe fn step32<P: VectorFloat, G: VectorFloat>(
    param: *mut u8,
    grad: *const u8,
    moments: Moments32,
    len: usize,
    c: &Coefficients,
) -> usize {
    // SAFETY: this function's contract; the instruction set is enabled.
    unsafe { simd::step32::<Avx2, P, G>(param, grad, moments, len, c) }
}

/// # Safety
/// As [`simd::step8`], on a processor with AVX2, FMA and F16C.
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) unsafe fn step8<P: VectorFloat, G: VectorFloat>(
    param: *mut u8,
    grad: *const u8,
    moments: Coded8,
    len: usize,
    c: &Coefficients,
) -> usize {
    // SAFETY: this function's contract; the instruction set is enabled.
    unsafe { simd::step8::<Avx2, P, G>(param, grad, moments, len, c) }
}

/// # Safety
/// As [`simd::gauge32`], on a processor with AVX2, FMA and F16C.
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) unsafe fn gauge32<P: VectorFloat, G: VectorFloat>(
    param: *const u8,
    grad: *const u8,
    moments: Moments32,
    len: usize,
    c: &Coefficients,
    gauge: &mut Gauge,
) {
    // SAFETY: this function's contract; the instruction set is enabled.
    unsafe { simd::gauge32::<Avx2, P, G>(param, grad, moments, len, c, gauge) }
}

/// # Safety
/// As [`simd::gauge8`], on a processor with AVX2, FMA and F16C.
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) unsafe fn gauge8<P: VectorFloat, G: VectorFloat>(
    param: *const u8,
    grad: *const u8,
    moments: Moments8,
    len: usize,
    c: &Coefficients,
    gauge: &mut Gauge,
) {
    // SAFETY: this function's contract; the instruction set is enabled.
    unsafe { simd::gauge8::<Avx2, P, G>(param, grad, moments, len, c, gauge) }
}
