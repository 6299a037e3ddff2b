//! [`codec::dynamic`](crate::codec::dynamic) by arithmetic: decoding, for any lanes.

use super::lanes::{Lanes, each_of_4};
use crate::codec::dynamic::{Map, SIGNED, UNSIGNED};

/// The slopes and offsets of a [`Map`], by the exponent of `2k + 1` modulo 8.
///
/// The zero and the one of a map are 8 exponents apart and share an entry: a slope of 1, which makes
/// the cell (0 and 1 of a signed map) the value.
struct Values {
    slope: [f32; 16],
    offset: [f32; 16],
}

const fn values(map: &Map, first_exponent: usize) -> Values {
    let mut values = Values { slope: [1.0; 16], offset: [0.0; 16] };
    let mut exponent = first_exponent + 1;
    while exponent < first_exponent + 8 {
        let of = (exponent + 127) % 16;
        let mut at = of % 8;
        while at < 16 {
            values.slope[at] = map.slope[of];
            values.offset[at] = map.offset[of];
            at += 8;
        }
        exponent += 1;
    }
    values
}

static SIGNED_VALUES: Values = values(&SIGNED, 0);
static UNSIGNED_VALUES: Values = values(&UNSIGNED, 1);

/// `Map::value` for `odd = 2k + 1`, in stages of four vectors so that they overlap.
#[inline(always)]
unsafe fn decode<L: Lanes>(odd: [L::F; 4], values: &'static Values) -> [L::F; 4] {
    // SAFETY: the caller enables the instruction set.
    unsafe {
        let exponent = each_of_4!(I => L::exponent(odd[I]));
        let cell = each_of_4!(I => L::sub(odd[I], L::power_of_two(odd[I])));
        let slope = each_of_4!(I => L::lookup(&values.slope, exponent[I]));
        let offset = each_of_4!(I => L::lookup(&values.offset, exponent[I]));
        each_of_4!(I => L::fma(cell[I], slope[I], offset[I]))
    }
}

/// [`decode`](crate::codec::dynamic::decode) of `4 N` signed codes.
///
/// # Safety
/// So many are valid; the caller enables the instruction set.
#[inline(always)]
pub(in crate::cpu) unsafe fn decode_signed<L: Lanes>(from: *const u8) -> [L::F; 4] {
    // SAFETY: this function's contract.
    unsafe {
        let code = each_of_4!(I => L::to_float(L::load_codes(from.add(I * L::N))));
        let k = each_of_4!(I => L::sub(code[I], L::splat(127.0)));
        let odd = each_of_4!(I => L::fma(L::abs(k[I]), L::splat(2.0), L::splat(1.0)));
        let magnitude = decode::<L>(odd, &SIGNED_VALUES);
        each_of_4!(I => L::with_sign(magnitude[I], k[I]))
    }
}

/// [`decode`](crate::codec::dynamic::decode) of `4 N` unsigned codes.
///
/// # Safety
/// As [`decode_signed`].
#[inline(always)]
pub(in crate::cpu) unsafe fn decode_unsigned<L: Lanes>(from: *const u8) -> [L::F; 4] {
    // SAFETY: this function's contract.
    unsafe {
        let code = each_of_4!(I => L::to_float(L::load_codes(from.add(I * L::N))));
        let odd = each_of_4!(I => L::fma(code[I], L::splat(2.0), L::splat(3.0)));
        let value = decode::<L>(odd, &UNSIGNED_VALUES);
        let zero = L::splat(0.0);
        // the zero's cell is 1 here
        each_of_4!(I => L::select(L::less(zero, code[I]), value[I], zero))
    }
}
