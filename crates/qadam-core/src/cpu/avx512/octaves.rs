//! Encoding by octave: [`Map::nearest`] for four vectors at a time.
//!
//! [`Map::nearest`]: crate::codec::dynamic

use std::arch::x86_64::*;

use crate::codec::dynamic::{Map, SIGNED, UNSIGNED};
use crate::cpu::simd::each_of_4;

/// A [`Map`]'s constants for numbers from [`LEAST`] to 2, by exponent field modulo 32.
///
/// No octave has more than one threshold between levels. To the bits of a number `add` adds what moves
/// that threshold to the end of its octave, so that the sum's exponent says which level it is.
#[repr(align(64))]
struct Octaves {
    add: [i32; 32],
    gain: [f32; 32],
    base: [f32; 32],
    /// What the level's first cell is encoded as, and its last.
    first: [u16; 32],
    last: [u16; 32],
}

/// `2^-31`, which is nearest to zero in both maps.
const LEAST: f32 = f32::from_bits(96 << 23);

/// The octaves of a map in which `zero` is the `k` of zero: what is encoded is `k - zero`.
const fn octaves(map: &Map, zero: i32) -> Octaves {
    let mut octaves =
        Octaves { add: [0; 32], gain: [0.0; 32], base: [0.0; 32], first: [0; 32], last: [0; 32] };
    let mut index = 0;
    while index < 32 {
        let (start, end) = ((96 + index as u32) << 23, (97 + index as u32) << 23);
        let mut level = 0;
        while map.thresholds[level].to_bits() <= start {
            level += 1;
        }
        if map.thresholds[level].to_bits() < end {
            octaves.add[index] = (end - map.thresholds[level].to_bits()) as i32;
        }
        octaves.gain[index] = map.gain[level];
        octaves.base[index] = map.base[level];
        let last = map.last[level];
        octaves.first[index] = (last + 1 - zero) as u16;
        // without a gain, the level has one cell
        let cells = if map.gain[level] == 0.0 { 0 } else { last };
        octaves.last[index] = (last + 1 + cells - zero) as u16;
        index += 1;
    }
    octaves
}

static SIGNED_OCTAVES: Octaves = octaves(&SIGNED, 0);
static UNSIGNED_OCTAVES: Octaves = octaves(&UNSIGNED, 1);

/// Encodes four vectors of normalized values with a sign.
///
/// # Safety
/// On a processor with AVX-512 F, BW and DQ; `to` is valid for 64 bytes.
#[inline(always)]
pub(super) unsafe fn encode_signed(x: [__m512; 4], to: *mut u8) {
    // SAFETY: this function's contract.
    unsafe {
        // the larger magnitude, without its sign
        let least = _mm512_set1_ps(LEAST);
        let magnitude = each_of_4!(I => _mm512_range_ps::<0b1011>(x[I], least));
        let k = encode(magnitude, &SIGNED_OCTAVES);
        // saturated, a negative float's bits become a negative byte
        let [a, b, c, d] = each_of_4!(I => _mm512_castps_si512(x[I]));
        let sign = _mm512_packs_epi16(_mm512_packs_epi32(a, b), _mm512_packs_epi32(c, d));
        let negative = _mm512_movepi8_mask(sign);
        let zero = _mm512_set1_epi8(127);
        let code = _mm512_mask_subs_epu8(_mm512_add_epi8(zero, k), negative, zero, k);
        _mm512_storeu_si512(to.cast(), in_order(code));
    }
}

/// Encodes four vectors of normalized `values`, `x`, without a sign; a positive value never as zero.
///
/// # Safety
/// As [`encode_signed`].
#[inline(always)]
pub(super) unsafe fn encode_unsigned(x: [__m512; 4], values: [__m512; 4], to: *mut u8) {
    // SAFETY: this function's contract.
    unsafe {
        let (zero, least) = (_mm512_setzero_ps(), _mm512_set1_ps(LEAST));
        let smallest = _mm512_set1_ps(UNSIGNED.thresholds[0]);
        let x = each_of_4!(I => {
            let positive = _mm512_cmp_ps_mask::<_CMP_LT_OQ>(zero, values[I]);
            _mm512_mask_max_ps(least, positive, x[I], smallest)
        });
        _mm512_storeu_si512(to.cast(), in_order(encode(x, &UNSIGNED_OCTAVES)));
    }
}

/// Encodes magnitudes from [`LEAST`] on; the bytes are four elements of each vector by turns.
#[inline(always)]
unsafe fn encode(x: [__m512; 4], map: &'static Octaves) -> __m512i {
    // SAFETY: the caller enables the instruction sets; tables are 32 long.
    unsafe {
        let bits = each_of_4!(I => _mm512_castps_si512(x[I]));
        let moved = each_of_4!(I => {
            let add = lookup(map.add.as_ptr().cast(), _mm512_srli_epi32::<23>(bits[I]));
            _mm512_add_epi32(bits[I], _mm512_castps_si512(add))
        });
        let octave = each_of_4!(I => _mm512_srli_epi32::<23>(moved[I]));
        let cell = each_of_4!(I => {
            let (gain, base) = (lookup(map.gain.as_ptr(), octave[I]), lookup(map.base.as_ptr(), octave[I]));
            _mm512_cvttps_epi32(_mm512_fmadd_ps(x[I], gain, base))
        });
        let first = _mm512_loadu_si512(map.first.as_ptr().cast());
        let last = _mm512_loadu_si512(map.last.as_ptr().cast());
        let low = words([octave[0], octave[1]], [cell[0], cell[1]], first, last);
        let high = words([octave[2], octave[3]], [cell[2], cell[3]], first, last);
        _mm512_packus_epi16(low, high)
    }
}

/// Two vectors' codes as words.
#[inline(always)]
unsafe fn words(
    octave: [__m512i; 2],
    cell: [__m512i; 2],
    first: __m512i,
    last: __m512i,
) -> __m512i {
    // SAFETY: the caller enables the instruction sets.
    unsafe {
        let octave = _mm512_packs_epi32(octave[0], octave[1]);
        let cell = _mm512_packs_epi32(cell[0], cell[1]);
        let code = _mm512_add_epi16(cell, _mm512_permutexvar_epi16(octave, first));
        _mm512_min_epi16(code, _mm512_permutexvar_epi16(octave, last))
    }
}

/// `table[index % 32]`.
#[inline(always)]
unsafe fn lookup(table: *const f32, index: __m512i) -> __m512 {
    // SAFETY: the caller enables the instruction sets; the table is 32 long.
    unsafe {
        let (low, high) = (_mm512_loadu_ps(table), _mm512_loadu_ps(table.add(16)));
        _mm512_permutex2var_ps(low, index, high)
    }
}

/// Bytes that go through four vectors by turns, four elements at a time, vector by vector.
#[inline(always)]
pub(super) unsafe fn in_order(bytes: __m512i) -> __m512i {
    // SAFETY: the caller enables the instruction sets.
    unsafe {
        let order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
        _mm512_permutexvar_epi32(order, bytes)
    }
}
