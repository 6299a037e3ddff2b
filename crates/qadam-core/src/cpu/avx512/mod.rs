//! 16 lanes by AVX-512 F, BW, DQ and VL, and more of them in [`vbmi`] by VBMI.

mod octaves;
mod planes;

use std::arch::x86_64::*;

use half::{bf16, f16};

use self::planes::{SIGNED_PLANES, UNSIGNED_PLANES};
use super::simd::{self, Lanes, kernels, lanes};

/// With VBMI or without.
#[derive(Clone, Copy)]
struct Avx512<const VBMI: bool>;

/// NaN and the infinities, for `vfpclassps`.
const NAN: i32 = 0x81;
const NOT_FINITE: i32 = NAN | 0x18;

// SAFETY: every method is one or a few intrinsics of the instruction sets that the trait's contract
// requires of the processor; loads and stores are of the unaligned kind and touch 16 elements.
unsafe impl<const VBMI: bool> Lanes for Avx512<VBMI> {
    const N: usize = 16;
    type F = __m512;
    type I = __m512i;
    type M = __mmask16;

    lanes! {
        fn splat(x: f32) -> __m512 {
            _mm512_set1_ps(x)
        }
        fn load(from: *const f32) -> __m512 {
            _mm512_loadu_ps(from)
        }
        fn load_bf16(from: *const bf16) -> __m512 {
            let words = _mm512_castsi256_si512(_mm256_loadu_si256(from.cast()));
            // word `i` becomes the upper half of lane `i`
            let order = _mm512_cvtepu16_epi32(_mm256_setr_epi16(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15));
            let order = _mm512_slli_epi32::<16>(order);
            let bits = _mm512_maskz_permutexvar_epi16(0xAAAA_AAAA, order, words);
            _mm512_castsi512_ps(bits)
        }
        fn load_f16(from: *const f16) -> __m512 {
            _mm512_cvtph_ps(_mm256_loadu_si256(from.cast()))
        }
        fn store(x: __m512, to: *mut f32) {
            _mm512_storeu_ps(to, x);
        }
        /// By integers: `vcvtneps2bf16` flushes subnormals.
        fn store_bf16(x: __m512, to: *mut bf16) {
            let words = upper_words(rounded(x), rounded(x));
            _mm256_storeu_si256(to.cast(), _mm512_castsi512_si256(words));
        }
        fn store_bf16_4([a, b, c, d]: [__m512; 4], to: *mut bf16) {
            _mm512_storeu_si512(to.cast(), upper_words(rounded(a), rounded(b)));
            _mm512_storeu_si512(to.add(32).cast(), upper_words(rounded(c), rounded(d)));
        }
        fn store_f16(x: __m512, to: *mut f16) {
            let bits = _mm512_cvtps_ph::<{ _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC }>(x);
            _mm256_storeu_si256(to.cast(), bits);
        }
        fn add(a: __m512, b: __m512) -> __m512 {
            _mm512_add_ps(a, b)
        }
        fn sub(a: __m512, b: __m512) -> __m512 {
            _mm512_sub_ps(a, b)
        }
        fn mul(a: __m512, b: __m512) -> __m512 {
            _mm512_mul_ps(a, b)
        }
        fn div(a: __m512, b: __m512) -> __m512 {
            _mm512_div_ps(a, b)
        }
        fn sqrt(a: __m512) -> __m512 {
            _mm512_sqrt_ps(a)
        }
        fn fma(a: __m512, b: __m512, c: __m512) -> __m512 {
            _mm512_fmadd_ps(a, b, c)
        }
        fn fnma(a: __m512, b: __m512, c: __m512) -> __m512 {
            _mm512_fnmadd_ps(a, b, c)
        }
        fn abs(a: __m512) -> __m512 {
            _mm512_abs_ps(a)
        }
        fn min(a: __m512, b: __m512) -> __m512 {
            _mm512_min_ps(a, b)
        }
        fn max(a: __m512, b: __m512) -> __m512 {
            _mm512_max_ps(a, b)
        }
        fn max_magnitude(a: __m512, b: __m512) -> __m512 {
            // the larger magnitude, without its sign
            _mm512_range_ps::<0b1011>(a, b)
        }
        fn reduce_max(a: __m512) -> f32 {
            _mm512_reduce_max_ps(a)
        }
        fn less(a: __m512, b: __m512) -> __mmask16 {
            _mm512_cmp_ps_mask::<_CMP_LT_OQ>(a, b)
        }
        fn at_most(a: __m512, b: __m512) -> __mmask16 {
            _mm512_cmp_ps_mask::<_CMP_LE_OQ>(a, b)
        }
        fn is_finite(a: __m512) -> __mmask16 {
            !_mm512_fpclass_ps_mask::<NOT_FINITE>(a)
        }
        fn is_nan(a: __m512) -> __mmask16 {
            _mm512_fpclass_ps_mask::<NAN>(a)
        }
        fn select(mask: __mmask16, a: __m512, b: __m512) -> __m512 {
            _mm512_mask_mov_ps(b, mask, a)
        }
        fn all(mask: __mmask16) -> bool {
            _kortestc_mask16_u8(mask, mask) == 1
        }
        fn count(mask: __mmask16) -> usize {
            _cvtmask16_u32(mask).count_ones() as usize
        }
        fn splat_i(x: i32) -> __m512i {
            _mm512_set1_epi32(x)
        }
        fn add_i(a: __m512i, b: __m512i) -> __m512i {
            _mm512_add_epi32(a, b)
        }
        fn sub_i(a: __m512i, b: __m512i) -> __m512i {
            _mm512_sub_epi32(a, b)
        }
        fn and_i(a: __m512i, b: __m512i) -> __m512i {
            _mm512_and_si512(a, b)
        }
        fn or_i(a: __m512i, b: __m512i) -> __m512i {
            _mm512_or_si512(a, b)
        }
        fn not_i(a: __m512i) -> __m512i {
            _mm512_xor_si512(a, _mm512_set1_epi32(-1))
        }
        fn left<const BY: u32>(a: __m512i) -> __m512i {
            _mm512_slli_epi32::<BY>(a)
        }
        fn right<const BY: u32>(a: __m512i) -> __m512i {
            _mm512_srli_epi32::<BY>(a)
        }
        fn max_i(a: __m512i, b: __m512i) -> __m512i {
            _mm512_max_epi32(a, b)
        }
        fn min_i(a: __m512i, b: __m512i) -> __m512i {
            _mm512_min_epi32(a, b)
        }
        fn reduce_min_i(a: __m512i) -> i32 {
            _mm512_reduce_min_epi32(a)
        }
        fn load_i(from: *const i32) -> __m512i {
            _mm512_loadu_si512(from.cast())
        }
        fn round(a: __m512) -> __m512i {
            _mm512_cvtps_epi32(a)
        }
        fn to_float(a: __m512i) -> __m512 {
            _mm512_cvtepi32_ps(a)
        }
        fn bits(a: __m512) -> __m512i {
            _mm512_castps_si512(a)
        }
        fn from_bits(a: __m512i) -> __m512 {
            _mm512_castsi512_ps(a)
        }
        fn with_sign(magnitude: __m512, sign: __m512) -> __m512 {
            _mm512_or_ps(magnitude, _mm512_and_ps(sign, _mm512_set1_ps(-0.0)))
        }
        fn exponent(a: __m512) -> __m512i {
            _mm512_srli_epi32::<23>(_mm512_castps_si512(a))
        }
        fn power_of_two(a: __m512) -> __m512 {
            let field = _mm512_set1_epi32(0x7F80_0000);
            _mm512_castsi512_ps(_mm512_and_si512(_mm512_castps_si512(a), field))
        }
        fn lookup(table: &'static [f32; 16], index: __m512i) -> __m512 {
            _mm512_permutexvar_ps(index, _mm512_loadu_ps(table.as_ptr()))
        }
        fn max_words(a: __m512i, from: *const u16) -> __m512i {
            let magnitude = _mm512_set1_epi16(0x7FFF);
            _mm512_max_epi16(a, _mm512_and_si512(_mm512_loadu_si512(from.cast()), magnitude))
        }
        fn store_words(a: __m512i, to: *mut u16) {
            _mm512_storeu_si512(to.cast(), a);
        }
        fn decode_signed(from: *const u8) -> [__m512; 4] {
            if VBMI {
                planes::decode(from, &SIGNED_PLANES)
            } else {
                simd::decode_signed::<Self>(from)
            }
        }
        fn decode_unsigned(from: *const u8) -> [__m512; 4] {
            if VBMI {
                planes::decode(from, &UNSIGNED_PLANES)
            } else {
                simd::decode_unsigned::<Self>(from)
            }
        }
        fn encode_signed(x: [__m512; 4], to: *mut u8) {
            octaves::encode_signed(x, to);
        }
        fn encode_unsigned(x: [__m512; 4], values: [__m512; 4], to: *mut u8) {
            octaves::encode_unsigned(x, values, to);
        }
        fn store_codes([a, b, c, d]: [__m512i; 4], to: *mut u8) {
            let (low, high) = (_mm512_packs_epi32(a, b), _mm512_packs_epi32(c, d));
            _mm512_storeu_si512(to.cast(), octaves::in_order(_mm512_packus_epi16(low, high)));
        }
        fn split_codes([a, b, c, d]: [__m512i; 4], upper: *mut u8, lowest: *mut u8) {
            let (low, high) = (_mm512_packs_epi32(a, b), _mm512_packs_epi32(c, d));
            let (u, v) = (_mm512_srli_epi16::<1>(low), _mm512_srli_epi16::<1>(high));
            let bytes = Self::not_i(octaves::in_order(_mm512_packus_epi16(u, v)));
            _mm512_storeu_si512(upper.cast(), bytes);
            let one = _mm512_set1_epi16(1);
            let (u, v) = (_mm512_andnot_si512(low, one), _mm512_andnot_si512(high, one));
            _mm512_storeu_si512(lowest.cast(), _mm512_packus_epi16(u, v));
        }
        fn join_codes([a, b, c, d]: [__m512i; 4], lowest: *const u8, to: *mut u8) {
            let (low, high) = (_mm512_packs_epi32(a, b), _mm512_packs_epi32(c, d));
            let code = _mm512_packs_epi16(low, high);
            // twice 64 more is the top bit the other way round
            let ratio = _mm512_xor_si512(_mm512_add_epi8(code, code), _mm512_set1_epi8(-128));
            let bytes = _mm512_or_si512(ratio, _mm512_loadu_si512(lowest.cast()));
            _mm512_storeu_si512(to.cast(), octaves::in_order(bytes));
        }
        fn load_codes(from: *const u8) -> __m512i {
            _mm512_cvtepu8_epi32(_mm_loadu_si128(from.cast()))
        }
    }
}

/// Bits whose upper halves are the nearest bf16 numbers.
#[inline(always)]
unsafe fn rounded(x: __m512) -> __m512i {
    // SAFETY: the caller enables the instruction sets.
    unsafe {
        let bits = _mm512_castps_si512(x);
        let odd = _mm512_and_si512(_mm512_srli_epi32::<16>(bits), _mm512_set1_epi32(1));
        _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7FFF)))
    }
}

/// The upper halves of the lanes of two vectors.
#[inline(always)]
unsafe fn upper_words(a: __m512i, b: __m512i) -> __m512i {
    // SAFETY: the caller enables the instruction sets.
    unsafe {
        let order = _mm512_set_epi16(
            63, 61, 59, 57, 55, 53, 51, 49, 47, 45, 43, 41, 39, 37, 35, 33, 31, 29, 27, 25, 23, 21,
            19, 17, 15, 13, 11, 9, 7, 5, 3, 1,
        );
        _mm512_permutex2var_epi16(a, order, b)
    }
}

/// The kernels without VBMI.
pub(super) mod base {
    super::kernels! {
        "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c",
        super::Avx512<false>,
        "AVX-512 F, BW, DQ and VL"
    }
}

/// The kernels with VBMI.
pub(super) mod vbmi {
    super::kernels! {
        "avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi,avx2,fma,f16c",
        super::Avx512<true>,
        "AVX-512 F, BW, DQ, VL and VBMI"
    }
}
