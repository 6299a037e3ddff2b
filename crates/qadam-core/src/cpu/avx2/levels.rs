//! Encoding by level: [`Map::nearest`] for four vectors at a time.
//!
//! [`Map::nearest`]: crate::codec::dynamic

use std::arch::x86_64::*;

use crate::codec::dynamic::{Map, SIGNED, UNSIGNED};
use crate::cpu::simd::each_of_4;

/// A [`Map`]'s constants by level.
///
/// A permutation of eight lanes takes level 8, which is the one alone, for level 0, which is the zero
/// alone: there the gain makes the one's cell the one's code, and the zero's 0.
struct Levels {
    thresholds: [f32; 8],
    gain: [f32; 8],
    base: [f32; 8],
    /// What the level's first cell is encoded as, and its last; twice, as bytes are looked up in
    /// halves of a register.
    first: [u8; 32],
    last: [u8; 32],
}

/// The levels of a map in which `zero` is the `k` of zero: what is encoded is `k - zero`.
const fn levels(map: &Map, zero: i32) -> Levels {
    let one = map.last[8] + 1 - zero;
    let mut levels = Levels {
        thresholds: [0.0; 8],
        gain: [one as f32 + 0.6; 8],
        base: [0.0; 8],
        first: [0; 32],
        last: [one as u8; 32],
    };
    let mut level = 0;
    while level < 8 {
        levels.thresholds[level] = map.thresholds[level];
        if level > 0 {
            levels.gain[level] = map.gain[level];
            levels.base[level] = map.base[level];
            let first = map.last[level] + 1 - zero;
            levels.first[level] = first as u8;
            levels.first[level + 16] = first as u8;
            levels.last[level] = (first + map.last[level]) as u8;
            levels.last[level + 16] = (first + map.last[level]) as u8;
        }
        level += 1;
    }
    levels
}

static SIGNED_LEVELS: Levels = levels(&SIGNED, 0);
static UNSIGNED_LEVELS: Levels = levels(&UNSIGNED, 1);

/// `trunc(bits * LOG_SLOPE + LOG_OFFSET)` guesses a number's level, or one less: a positive float's
/// bits are `2^23 * (log2(x) + 127)` within 0.09, so the guess passes from `i - 1` to `i` near
/// `10^(i - 7.3)`, well between thresholds `i - 1` and `i`.
const LOG_SLOPE: f32 = std::f32::consts::LOG10_2 / 8_388_608.0;
const LOG_OFFSET: f32 = 7.3 - 127.0 * std::f32::consts::LOG10_2;

/// Encodes four vectors of normalized values with a sign.
///
/// # Safety
/// On a processor with AVX2 and FMA; `to` is valid for 32 bytes.
#[inline(always)]
pub(super) unsafe fn encode_signed(x: [__m256; 4], to: *mut u8) {
    // SAFETY: this function's contract.
    unsafe {
        let sign = _mm256_set1_ps(-0.0);
        let k = encode(each_of_4!(I => _mm256_andnot_ps(sign, x[I])), &SIGNED_LEVELS);
        let negative = signs(x);
        let zero = _mm256_set1_epi8(127);
        let (plus, minus) = (_mm256_add_epi8(zero, k), _mm256_subs_epu8(zero, k));
        store(_mm256_blendv_epi8(plus, minus, negative), to);
    }
}

/// Encodes four vectors of normalized `values`, `x`, without a sign; a positive value never as zero.
///
/// # Safety
/// As [`encode_signed`].
#[inline(always)]
pub(super) unsafe fn encode_unsigned(x: [__m256; 4], values: [__m256; 4], to: *mut u8) {
    // SAFETY: this function's contract.
    unsafe {
        let code = encode(x, &UNSIGNED_LEVELS);
        let positive = _mm256_cmpgt_epi8(signs(values), _mm256_setzero_si256());
        store(_mm256_max_epu8(code, _mm256_and_si256(positive, _mm256_set1_epi8(1))), to);
    }
}

/// Encodes magnitudes; the bytes are four elements of each vector by turns.
#[inline(always)]
unsafe fn encode(x: [__m256; 4], map: &'static Levels) -> __m256i {
    // SAFETY: the caller enables the instruction sets; tables are 8 or 32 long.
    unsafe {
        let guess = each_of_4!(I => {
            let bits = _mm256_cvtepi32_ps(_mm256_castps_si256(x[I]));
            let (slope, offset) = (_mm256_set1_ps(LOG_SLOPE), _mm256_set1_ps(LOG_OFFSET));
            let log = _mm256_fmadd_ps(bits, slope, offset);
            _mm256_cvttps_epi32(_mm256_max_ps(log, _mm256_setzero_ps()))
        });
        // one threshold lies between the levels that the guess leaves open
        let level = each_of_4!(I => {
            let threshold = lookup(&map.thresholds, guess[I]);
            let reached = _mm256_cmp_ps::<_CMP_LE_OQ>(threshold, x[I]);
            _mm256_sub_epi32(guess[I], _mm256_castps_si256(reached))
        });
        let cell = each_of_4!(I => {
            let (gain, base) = (lookup(&map.gain, level[I]), lookup(&map.base, level[I]));
            _mm256_cvttps_epi32(_mm256_fmadd_ps(x[I], gain, base))
        });
        let (level, cell) = (bytes(level), bytes(cell));
        let first = _mm256_shuffle_epi8(_mm256_loadu_si256(map.first.as_ptr().cast()), level);
        let last = _mm256_shuffle_epi8(_mm256_loadu_si256(map.last.as_ptr().cast()), level);
        _mm256_min_epu8(_mm256_adds_epu8(first, cell), last)
    }
}

/// `table[index % 8]`.
#[inline(always)]
unsafe fn lookup(table: &'static [f32; 8], index: __m256i) -> __m256 {
    // SAFETY: the caller enables the instruction sets.
    unsafe { _mm256_permutevar8x32_ps(_mm256_loadu_ps(table.as_ptr()), index) }
}

/// Four vectors' integers as bytes, four elements of each vector by turns; cut to 0 and 255.
#[inline(always)]
pub(super) unsafe fn bytes([a, b, c, d]: [__m256i; 4]) -> __m256i {
    // SAFETY: the caller enables the instruction sets.
    unsafe { _mm256_packus_epi16(_mm256_packs_epi32(a, b), _mm256_packs_epi32(c, d)) }
}

/// Bytes with the signs of four vectors' numbers, which are 0 only for numbers that are.
#[inline(always)]
unsafe fn signs(x: [__m256; 4]) -> __m256i {
    // SAFETY: the caller enables the instruction sets.
    unsafe {
        // saturated, a float's bits keep their sign
        let [a, b, c, d] = each_of_4!(I => _mm256_castps_si256(x[I]));
        _mm256_packs_epi16(_mm256_packs_epi32(a, b), _mm256_packs_epi32(c, d))
    }
}

/// Stores bytes that go through four vectors by turns, vector by vector.
#[inline(always)]
pub(super) unsafe fn store(bytes: __m256i, to: *mut u8) {
    // SAFETY: the caller enables the instruction sets; `to` is valid for 32 bytes.
    unsafe {
        let order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
        _mm256_storeu_si256(to.cast(), _mm256_permutevar8x32_epi32(bytes, order));
    }
}
