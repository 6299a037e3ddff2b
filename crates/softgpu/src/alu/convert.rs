//! `cvt`: between integers and f16, bf16, f32 and f64, with every rounding PTX has.

/// A rounding direction.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Round {
    /// To nearest, ties to even.
    Near,
    /// Towards zero.
    Zero,
    /// Towards minus infinity.
    Down,
    /// Towards plus infinity.
    Up,
}

/// A binary format narrower than f64.
#[derive(Clone, Copy, Debug)]
pub struct Format {
    /// Explicit mantissa bits.
    pub mantissa: u32,
    /// Exponent bias.
    pub bias: i32,
    /// The NaN a conversion gives.
    pub nan: u32,
    /// Width in bits.
    pub width: u32,
}

/// IEEE half precision.
pub const F16: Format = Format { mantissa: 10, bias: 15, nan: 0x7fff, width: 16 };
/// bfloat16.
pub const BF16: Format = Format { mantissa: 7, bias: 127, nan: 0x7fff, width: 16 };
/// IEEE single precision.
pub const F32: Format = Format { mantissa: 23, bias: 127, nan: 0x7fff_ffff, width: 32 };

/// Round an exact value to `fmt`. `x` must hold the source exactly, so that nothing is rounded twice.
pub fn narrow(x: f64, fmt: Format, round: Round) -> u32 {
    let sign = u32::from(x.is_sign_negative()) << (fmt.width - 1);
    let inf = ((2 * fmt.bias + 1) as u32) << fmt.mantissa;
    if x.is_nan() {
        return fmt.nan;
    }
    if x.is_infinite() {
        return sign | inf;
    }
    if x == 0.0 {
        return sign;
    }
    let bits = x.abs().to_bits();
    // Below 2^-1022 nothing here can be told from 2^-1022 by rounding.
    let exp = ((bits >> 52) as i32 - 1023).max(-1022);
    let frac = (bits & ((1 << 52) - 1)) | (u64::from(bits >> 52 != 0) << 52);
    let min_exp = 1 - fmt.bias;
    // How many of the 53 bits do not fit, more for a subnormal result.
    let drop = 52 - fmt.mantissa as i32 + (min_exp - exp).max(0);
    let (kept, rest, half) = if drop > 60 {
        (0, 1u64, 2u64)
    } else {
        (frac >> drop, frac & ((1 << drop) - 1), 1u64 << (drop - 1))
    };
    let up = match round {
        Round::Near => rest > half || (rest == half && kept & 1 == 1),
        Round::Zero => false,
        Round::Down => rest != 0 && sign != 0,
        Round::Up => rest != 0 && sign == 0,
    };
    let kept = kept + u64::from(up);
    // `kept` carries its implicit bit, so adding (not or-ing) lets a carry reach the exponent.
    let biased = if exp < min_exp { 0 } else { (exp - min_exp) as u64 };
    let out = (biased << fmt.mantissa) + kept;
    if out >= u64::from(inf) {
        let away = match round {
            Round::Near => true,
            Round::Zero => false,
            Round::Down => sign != 0,
            Round::Up => sign == 0,
        };
        return sign | if away { inf } else { inf - 1 };
    }
    sign | out as u32
}

/// 2^e for a normal f64.
fn pow2(e: i32) -> f64 {
    f64::from_bits(((e + 1023) as u64) << 52)
}

/// The exact value of a number in `fmt`.
pub fn widen(bits: u32, fmt: Format) -> f64 {
    let neg = (bits >> (fmt.width - 1)) & 1 == 1;
    let exp = ((bits >> fmt.mantissa) & (2 * fmt.bias + 1) as u32) as i32;
    let man = f64::from(bits & ((1 << fmt.mantissa) - 1));
    let scale = pow2(-(fmt.mantissa as i32));
    let v = if exp == 2 * fmt.bias + 1 {
        if man == 0.0 { f64::INFINITY } else { f64::NAN }
    } else if exp == 0 {
        man * scale * pow2(1 - fmt.bias)
    } else {
        (1.0 + man * scale) * pow2(exp - fmt.bias)
    };
    if neg { -v } else { v }
}

/// Round to an integral value.
pub fn integral(x: f64, round: Round) -> f64 {
    match round {
        Round::Near => x.round_ties_even(),
        Round::Zero => x.trunc(),
        Round::Down => x.floor(),
        Round::Up => x.ceil(),
    }
}

/// Float to integer of `bits` bits: clamped to the range. NaN gives 0, but `MININT` (or its bits)
/// where source or destination is 64 bits wide, as the manual's later editions and the hardware have it.
pub fn to_int(x: f64, round: Round, bits: u32, signed: bool, from64: bool) -> u64 {
    let mask = if bits == 64 { u64::MAX } else { (1 << bits) - 1 };
    if x.is_nan() {
        return if from64 || bits == 64 { 1 << (bits - 1) } else { 0 };
    }
    let r = integral(x, round);
    // Rust's float-to-int casts clamp; i128 and u128 hold every bound exactly.
    let v = if signed {
        (r as i128).clamp(-(1i128 << (bits - 1)), (1i128 << (bits - 1)) - 1) as u64
    } else {
        (r as i128).clamp(0, i128::from(mask)) as u64
    };
    v & mask
}

/// Integer to f64 with a rounding.
pub fn int_to_f64(v: i128, round: Round) -> f64 {
    let near = v as f64;
    let back = near as i128;
    fix(near, back.cmp(&v), round, f64::next_up, f64::next_down)
}

/// Integer to f32 with a rounding, rounded once.
pub fn int_to_f32(v: i128, round: Round) -> f32 {
    let near = v as f32;
    let back = near as i128;
    fix(near, back.cmp(&v), round, f32::next_up, f32::next_down)
}

/// Corrects a nearest result to a directed one, given how it compares with the exact value.
fn fix<F: Copy + PartialOrd + Default>(
    near: F,
    cmp: std::cmp::Ordering,
    round: Round,
    up: fn(F) -> F,
    down: fn(F) -> F,
) -> F {
    use std::cmp::Ordering::{Equal, Greater, Less};
    let neg = near < F::default();
    match (round, cmp) {
        (Round::Near, _) | (_, Equal) => near,
        (Round::Down, Greater) => down(near),
        (Round::Up, Less) => up(near),
        (Round::Zero, Greater) if !neg => down(near),
        (Round::Zero, Less) if neg => up(near),
        _ => near,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn f16_rounds_to_nearest_even_with_subnormals() {
        let n = |x: f64| narrow(x, F16, Round::Near);
        assert_eq!(n(1.0), 0x3c00);
        assert_eq!(n(-2.0), 0xc000);
        assert_eq!(n(65504.0), 0x7bff);
        assert_eq!(n(65519.99), 0x7bff);
        assert_eq!(n(65520.0), 0x7c00);
        assert_eq!(n(2f64.powi(-24)), 1);
        assert_eq!(n(2f64.powi(-25)), 0); // tie, to even
        assert_eq!(n(2f64.powi(-25) * 1.0001), 1);
        assert_eq!(n(1.0 + 2f64.powi(-11)), 0x3c00); // tie, to even
        assert_eq!(n(1.0 + 3.0 * 2f64.powi(-11)), 0x3c02); // tie, to even
        assert_eq!(n(2f64.powi(-14) - 2f64.powi(-26)), 0x0400); // rounds up into the normals
        assert_eq!(n(f64::NAN), 0x7fff);
        assert_eq!(n(-0.0), 0x8000);
        assert_eq!(n(5e-324), 0);
        assert_eq!(narrow(1e9, F16, Round::Zero), 0x7bff);
        assert_eq!(narrow(-1e-9, F16, Round::Down), 0x8001);
        assert_eq!(narrow(1e-9, F16, Round::Up), 1);
    }

    #[test]
    fn bf16_matches_the_integer_rounding_on_every_pattern_class() {
        // The usual integer recipe, for every high half and the interesting low halves.
        for hi in (0..=0xffffu32).step_by(7) {
            for lo in [0, 1, 0x7fff, 0x8000, 0x8001, 0xffff] {
                let b = (hi << 16) | lo;
                let x = f32::from_bits(b);
                let want = if x.is_nan() { 0x7fff } else { (b + 0x7fff + ((b >> 16) & 1)) >> 16 };
                assert_eq!(narrow(f64::from(x), BF16, Round::Near), want, "{b:#x}");
            }
        }
    }

    #[test]
    fn f32_narrowing_agrees_with_the_host() {
        for x in
            [1.1, 1e-40, 1e-46, 7e-46, 3.5e38, -1e39, 1.0 + 1e-9, 2f64.powi(-149) * 1.5, 5e-324]
        {
            assert_eq!(narrow(x, F32, Round::Near), (x as f32).to_bits(), "{x}");
        }
        assert_eq!(narrow(1.1, F32, Round::Down), 0x3f8c_cccc);
        assert_eq!(narrow(1.1, F32, Round::Up), 0x3f8c_cccd);
    }

    #[test]
    fn every_half_survives_a_round_trip() {
        for b in 0..=0xffffu32 {
            for fmt in [F16, BF16] {
                let x = widen(b, fmt);
                if !x.is_nan() {
                    assert_eq!(narrow(x, fmt, Round::Near), b);
                }
            }
            assert_eq!(widen(b, BF16).to_bits() << 1 >> 1 == 0, b % 0x8000 == 0);
        }
        assert_eq!(widen(1, F16), 2f64.powi(-24));
    }

    #[test]
    fn to_int_clamps_and_rounds() {
        assert_eq!(to_int(2.5, Round::Near, 32, true, false), 2);
        assert_eq!(to_int(3.5, Round::Near, 32, true, false), 4);
        assert_eq!(to_int(-1.5, Round::Zero, 32, true, false), 0xffff_ffff);
        assert_eq!(to_int(-1.5, Round::Down, 32, true, false), 0xffff_fffe);
        assert_eq!(to_int(1.2, Round::Up, 8, false, false), 2);
        assert_eq!(to_int(1e20, Round::Zero, 32, true, false), 0x7fff_ffff);
        assert_eq!(to_int(-1e20, Round::Zero, 32, true, false), 0x8000_0000);
        assert_eq!(to_int(-5.0, Round::Zero, 32, false, false), 0);
        assert_eq!(to_int(300.0, Round::Zero, 8, false, false), 255);
        assert_eq!(to_int(f64::NAN, Round::Zero, 32, true, false), 0);
        assert_eq!(to_int(f64::NAN, Round::Zero, 64, true, false), 1 << 63);
        assert_eq!(to_int(f64::NAN, Round::Zero, 32, false, true), 1 << 31);
        assert_eq!(to_int(f64::INFINITY, Round::Zero, 64, false, false), u64::MAX);
    }

    #[test]
    fn ints_round_once_in_each_direction() {
        let v = (1i128 << 24) + 1;
        assert_eq!(int_to_f32(v, Round::Near), 16_777_216.0);
        assert_eq!(int_to_f32(v, Round::Up), 16_777_218.0);
        assert_eq!(int_to_f32(v, Round::Zero), 16_777_216.0);
        assert_eq!(int_to_f32(-v, Round::Zero), -16_777_216.0);
        assert_eq!(int_to_f32(-v, Round::Down), -16_777_218.0);
        assert_eq!(int_to_f32(i128::from(u64::MAX), Round::Near), 18_446_744_073_709_551_616.0);
        assert_eq!(int_to_f32(i128::from(u64::MAX), Round::Zero).to_bits(), 0x5f7f_ffff);
        assert_eq!(int_to_f64((1 << 53) + 1, Round::Up), 9_007_199_254_740_994.0);
    }
}
