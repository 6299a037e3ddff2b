//! Every back end's codes beside the definition's.

use super::lanes::Lanes;
use crate::codec::dynamic::{self, Sign};
use crate::cpu::{Backend, avx2, avx512};

/// Encodes normalized values as the kernels do: second moments if they have no sign.
#[inline(always)]
pub(in crate::cpu) unsafe fn encode<L: Lanes>(x: &[f32; 64], sign: Sign) -> [u8; 64] {
    let mut codes = [0; 64];
    for at in (0..64).step_by(4 * L::N) {
        let (x, to) = (x[at..].as_ptr(), codes[at..].as_mut_ptr());
        // SAFETY: `at + 4 N` is at most 64; the caller enables the instruction set.
        unsafe {
            let x = [
                L::load(x),
                L::load(x.add(L::N)),
                L::load(x.add(2 * L::N)),
                L::load(x.add(3 * L::N)),
            ];
            match sign {
                Sign::Signed => L::encode_signed(x, to),
                Sign::Unsigned => L::encode_unsigned(x, x, to),
            }
        }
    }
    codes
}

/// Decodes as the kernels do.
#[inline(always)]
pub(in crate::cpu) unsafe fn decode<L: Lanes>(codes: &[u8; 64], sign: Sign) -> [f32; 64] {
    let mut values = [0.0; 64];
    for at in (0..64).step_by(4 * L::N) {
        // SAFETY: `at + 4 N` is at most 64; the caller enables the instruction set.
        unsafe {
            let vectors = match sign {
                Sign::Signed => L::decode_signed(codes[at..].as_ptr()),
                Sign::Unsigned => L::decode_unsigned(codes[at..].as_ptr()),
            };
            for (i, vector) in vectors.into_iter().enumerate() {
                L::store(vector, values[at + i * L::N..].as_mut_ptr());
            }
        }
    }
    values
}

/// # Safety
/// The processor has the back end's instructions.
unsafe fn encode_by(backend: Backend, x: &[f32; 64], sign: Sign) -> [u8; 64] {
    // SAFETY: this function's contract.
    unsafe {
        match backend {
            Backend::Scalar => x.map(|x| {
                if sign == Sign::Unsigned && x > 0.0 {
                    dynamic::encode_positive(x)
                } else {
                    dynamic::encode(x, sign)
                }
            }),
            Backend::Avx2 => avx2::encode(x, sign),
            Backend::Avx512 => avx512::base::encode(x, sign),
            Backend::Avx512Vbmi => avx512::vbmi::encode(x, sign),
        }
    }
}

/// # Safety
/// The processor has the back end's instructions.
unsafe fn decode_by(backend: Backend, codes: &[u8; 64], sign: Sign) -> [f32; 64] {
    // SAFETY: this function's contract.
    unsafe {
        match backend {
            Backend::Scalar => codes.map(|code| dynamic::decode(code, sign)),
            Backend::Avx2 => avx2::decode(codes, sign),
            Backend::Avx512 => avx512::base::decode(codes, sign),
            Backend::Avx512Vbmi => avx512::vbmi::decode(codes, sign),
        }
    }
}

#[test]
fn every_code_decodes_to_the_same_bits() {
    for sign in [Sign::Signed, Sign::Unsigned] {
        for first in [0, 64, 128, 192] {
            let codes = std::array::from_fn(|i| first + i as u8);
            // SAFETY: scalar code needs nothing, and the back end is available.
            let want = unsafe { decode_by(Backend::Scalar, &codes, sign) }.map(f32::to_bits);
            for backend in Backend::available() {
                // SAFETY: as above.
                let got = unsafe { decode_by(backend, &codes, sign) }.map(f32::to_bits);
                assert_eq!(got, want, "{backend:?} {sign:?} from {first}");
            }
        }
    }
}

#[test]
fn numbers_around_every_border_and_all_over_encode_to_the_same_code() {
    let two = 2.0_f32.to_bits();
    let all_over = (0..two).step_by(997);
    let around = |bits: u32| bits.saturating_sub(64)..bits + 64;
    for sign in [Sign::Signed, Sign::Unsigned] {
        let borders = (1..=255).flat_map(|code| {
            let (below, above) = (dynamic::decode(code - 1, sign), dynamic::decode(code, sign));
            let middle = f32::midpoint(below, above).abs().to_bits();
            around(middle).chain(around(above.abs().to_bits()))
        });
        let numbers: Vec<f32> = borders
            .chain(all_over.clone())
            .map(f32::from_bits)
            .filter(|&x| x <= 1.000_001)
            .flat_map(|x| [x, -x])
            .collect();
        for chunk in numbers.chunks(64) {
            let mut x = [0.0; 64];
            x[..chunk.len()].copy_from_slice(chunk);
            // SAFETY: scalar code needs nothing, and the back end is available.
            let want = unsafe { encode_by(Backend::Scalar, &x, sign) };
            for backend in Backend::available() {
                // SAFETY: as above.
                let got = unsafe { encode_by(backend, &x, sign) };
                assert_eq!(got, want, "{backend:?} {sign:?} of {x:?}");
            }
        }
    }
}
