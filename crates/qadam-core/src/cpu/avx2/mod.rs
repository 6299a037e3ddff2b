//! 8 lanes by AVX2, FMA and F16C.

mod levels;

use std::arch::x86_64::*;

use half::{bf16, f16};

use super::simd::{Lanes, kernels, lanes};

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
            let bits = rounded(x);
            let (low, high) = (_mm256_castsi256_si128(bits), _mm256_extracti128_si256::<1>(bits));
            _mm_storeu_si128(to.cast(), _mm_packus_epi32(low, high));
        }
        fn load_bf16_4(from: *const bf16) -> [__m256; 4] {
            let zero = _mm256_setzero_si256();
            let low = _mm256_permute4x64_epi64::<QUARTERS>(_mm256_loadu_si256(from.cast()));
            let high = _mm256_permute4x64_epi64::<QUARTERS>(_mm256_loadu_si256(from.add(16).cast()));
            [
                _mm256_castsi256_ps(_mm256_unpacklo_epi16(zero, low)),
                _mm256_castsi256_ps(_mm256_unpackhi_epi16(zero, low)),
                _mm256_castsi256_ps(_mm256_unpacklo_epi16(zero, high)),
                _mm256_castsi256_ps(_mm256_unpackhi_epi16(zero, high)),
            ]
        }
        fn store_bf16_4([a, b, c, d]: [__m256; 4], to: *mut bf16) {
            let low = _mm256_packus_epi32(rounded(a), rounded(b));
            let high = _mm256_packus_epi32(rounded(c), rounded(d));
            _mm256_storeu_si256(to.cast(), _mm256_permute4x64_epi64::<QUARTERS>(low));
            _mm256_storeu_si256(to.add(16).cast(), _mm256_permute4x64_epi64::<QUARTERS>(high));
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
        fn and_i(a: __m256i, b: __m256i) -> __m256i {
            _mm256_and_si256(a, b)
        }
        fn or_i(a: __m256i, b: __m256i) -> __m256i {
            _mm256_or_si256(a, b)
        }
        fn not_i(a: __m256i) -> __m256i {
            _mm256_xor_si256(a, _mm256_set1_epi32(-1))
        }
        fn left<const BY: u32>(a: __m256i) -> __m256i {
            _mm256_sll_epi32(a, _mm_cvtsi32_si128(BY as i32))
        }
        fn right<const BY: u32>(a: __m256i) -> __m256i {
            _mm256_srl_epi32(a, _mm_cvtsi32_si128(BY as i32))
        }
        fn max_i(a: __m256i, b: __m256i) -> __m256i {
            _mm256_max_epi32(a, b)
        }
        fn min_i(a: __m256i, b: __m256i) -> __m256i {
            _mm256_min_epi32(a, b)
        }
        fn reduce_min_i(a: __m256i) -> i32 {
            let min = _mm_min_epi32(_mm256_castsi256_si128(a), _mm256_extracti128_si256::<1>(a));
            let min = _mm_min_epi32(min, _mm_shuffle_epi32::<0b00_00_11_10>(min));
            let min = _mm_min_epi32(min, _mm_shuffle_epi32::<0b00_00_00_01>(min));
            _mm_cvtsi128_si32(min)
        }
        fn load_i(from: *const i32) -> __m256i {
            _mm256_loadu_si256(from.cast())
        }
        fn round(a: __m256) -> __m256i {
            _mm256_cvtps_epi32(a)
        }
        fn to_float(a: __m256i) -> __m256 {
            _mm256_cvtepi32_ps(a)
        }
        fn bits(a: __m256) -> __m256i {
            _mm256_castps_si256(a)
        }
        fn from_bits(a: __m256i) -> __m256 {
            _mm256_castsi256_ps(a)
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
        fn max_words(a: __m256i, from: *const u16) -> __m256i {
            let magnitude = _mm256_set1_epi16(0x7FFF);
            _mm256_max_epi16(a, _mm256_and_si256(_mm256_loadu_si256(from.cast()), magnitude))
        }
        fn store_words(a: __m256i, to: *mut u16) {
            _mm256_storeu_si256(to.cast(), a);
        }
        fn lookup(table: &'static [f32; 16], index: __m256i) -> __m256 {
            _mm256_permutevar8x32_ps(_mm256_loadu_ps(table.as_ptr()), index)
        }
        fn encode_signed(x: [__m256; 4], to: *mut u8) {
            levels::encode_signed(x, to);
        }
        fn encode_unsigned(x: [__m256; 4], values: [__m256; 4], to: *mut u8) {
            levels::encode_unsigned(x, values, to);
        }
        fn store_codes(codes: [__m256i; 4], to: *mut u8) {
            levels::store(levels::bytes(codes), to);
        }
        fn split_codes([a, b, c, d]: [__m256i; 4], upper: *mut u8, lowest: *mut u8) {
            let (low, high) = (_mm256_packs_epi32(a, b), _mm256_packs_epi32(c, d));
            let (u, v) = (_mm256_srli_epi16::<1>(low), _mm256_srli_epi16::<1>(high));
            levels::store(Self::not_i(_mm256_packus_epi16(u, v)), upper);
            let one = _mm256_set1_epi16(1);
            let (u, v) = (_mm256_andnot_si256(low, one), _mm256_andnot_si256(high, one));
            _mm256_storeu_si256(lowest.cast(), _mm256_packus_epi16(u, v));
        }
        fn join_codes([a, b, c, d]: [__m256i; 4], lowest: *const u8, to: *mut u8) {
            let code = _mm256_packs_epi16(_mm256_packs_epi32(a, b), _mm256_packs_epi32(c, d));
            // twice 64 more is the top bit the other way round
            let ratio = _mm256_xor_si256(_mm256_add_epi8(code, code), _mm256_set1_epi8(-128));
            let lowest = _mm256_loadu_si256(lowest.cast());
            levels::store(_mm256_or_si256(ratio, lowest), to);
        }
        fn load_codes(from: *const u8) -> __m256i {
            _mm256_cvtepu8_epi32(_mm_loadl_epi64(from.cast()))
        }
    }
}

/// Between the order of elements and that of what packing and unpacking do in each half of a register.
const QUARTERS: i32 = 0b11_01_10_00;

/// The nearest bf16 numbers, in the lower halves.
#[inline(always)]
unsafe fn rounded(x: __m256) -> __m256i {
    // SAFETY: the caller enables the instruction sets.
    unsafe {
        let bits = _mm256_castps_si256(x);
        let odd = _mm256_and_si256(_mm256_srli_epi32::<16>(bits), _mm256_set1_epi32(1));
        let half = _mm256_add_epi32(odd, _mm256_set1_epi32(0x7FFF));
        _mm256_srli_epi32::<16>(_mm256_add_epi32(bits, half))
    }
}

kernels! { "avx2,fma,f16c", Avx2, "AVX2, FMA and F16C" }
