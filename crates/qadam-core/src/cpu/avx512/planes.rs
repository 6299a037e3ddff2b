//! Decoding by looking up bytes: 64 codes at a time, of whose values each byte has a table.

use std::arch::x86_64::*;

use crate::codec::dynamic::{Map, SIGNED, UNSIGNED};
use crate::cpu::simd::each_of_4;

/// Byte `i` of each code's value in `planes[i]`.
#[repr(align(64))]
pub(super) struct Planes([[u8; 256]; 4]);

/// What all codes of a map stand for, where `zero` is the code of `k = 0`.
const fn planes(map: &Map, zero: i32) -> Planes {
    let mut planes = Planes([[0; 256]; 4]);
    let mut code = 0;
    while code < 256 {
        let k = code - zero;
        let value = value(map, k.unsigned_abs());
        let bytes = if k < 0 { -value } else { value }.to_le_bytes();
        let mut i = 0;
        while i < 4 {
            planes.0[i][code as usize] = bytes[i];
            i += 1;
        }
        code += 1;
    }
    planes
}

/// `Map::value`, whose `fma` no constant may call: the product and the sum are exact in f64.
const fn value(map: &Map, k: u32) -> f32 {
    let exponent = (2 * k + 1).ilog2();
    let twice_j_plus_1 = (2 * k + 1 - (1 << exponent)) as f64;
    let entry = (exponent as usize + 127) % 16;
    (twice_j_plus_1 * map.slope[entry] as f64 + map.offset[entry] as f64) as f32
}

pub(super) static SIGNED_PLANES: Planes = planes(&SIGNED, 127);
pub(super) static UNSIGNED_PLANES: Planes = planes(&UNSIGNED, -1);

/// Decodes 64 codes.
///
/// # Safety
/// On a processor with AVX-512 F, BW and VBMI; `from` is valid for 64 bytes.
#[inline(always)]
pub(super) unsafe fn decode(from: *const u8, planes: &'static Planes) -> [__m512; 4] {
    // SAFETY: this function's contract.
    unsafe {
        // what interleaving does to quarters of a register undoes this
        let order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
        let codes = _mm512_permutexvar_epi32(order, _mm512_loadu_si512(from.cast()));
        let upper = _mm512_movepi8_mask(codes);
        let [a, b, c, d] = each_of_4!(I => lookup(&planes.0[I], codes, upper));
        let (low, high) = (_mm512_unpacklo_epi8(a, b), _mm512_unpacklo_epi8(c, d));
        let (low_, high_) = (_mm512_unpackhi_epi8(a, b), _mm512_unpackhi_epi8(c, d));
        [
            _mm512_castsi512_ps(_mm512_unpacklo_epi16(low, high)),
            _mm512_castsi512_ps(_mm512_unpackhi_epi16(low, high)),
            _mm512_castsi512_ps(_mm512_unpacklo_epi16(low_, high_)),
            _mm512_castsi512_ps(_mm512_unpackhi_epi16(low_, high_)),
        ]
    }
}

/// `table[index]` for each byte; `upper` says which are 128 or more.
#[inline(always)]
unsafe fn lookup(table: &'static [u8; 256], index: __m512i, upper: __mmask64) -> __m512i {
    // SAFETY: the caller enables the instruction sets; a table is four vectors.
    unsafe {
        let [a, b, c, d] = each_of_4!(I => _mm512_loadu_si512(table.as_ptr().add(64 * I).cast()));
        let low = _mm512_permutex2var_epi8(a, index, b);
        _mm512_mask_mov_epi8(low, upper, _mm512_permutex2var_epi8(c, index, d))
    }
}
