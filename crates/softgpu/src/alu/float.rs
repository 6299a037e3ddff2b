//! IEEE arithmetic with PTX's NaN rules. Round to nearest even, subnormals kept: the host's
//! own `+ - * / sqrt fma` are that already.

/// What every f32 operation that makes a NaN returns.
pub const NAN32: u32 = 0x7fff_ffff;

fn canon(x: f32) -> u32 {
    if x.is_nan() { NAN32 } else { x.to_bits() }
}

fn f(a: u32) -> f32 {
    f32::from_bits(a)
}

fn d(a: u64) -> f64 {
    f64::from_bits(a)
}

/// `add.rn.f32`.
pub fn add(a: u32, b: u32) -> u32 {
    canon(f(a) + f(b))
}

/// `sub.rn.f32`.
pub fn sub(a: u32, b: u32) -> u32 {
    canon(f(a) - f(b))
}

/// `mul.rn.f32`.
pub fn mul(a: u32, b: u32) -> u32 {
    canon(f(a) * f(b))
}

/// `div.rn.f32`.
pub fn div(a: u32, b: u32) -> u32 {
    canon(f(a) / f(b))
}

/// `fma.rn.f32`: one rounding.
pub fn fma(a: u32, b: u32, c: u32) -> u32 {
    canon(f(a).mul_add(f(b), f(c)))
}

/// `sqrt.rn.f32`.
pub fn sqrt(a: u32) -> u32 {
    canon(f(a).sqrt())
}

/// `rcp.rn.f32`.
pub fn rcp(a: u32) -> u32 {
    canon(1.0 / f(a))
}

/// `x.sat`: clamp to [0, 1], NaN to +0.
pub fn sat(a: u32) -> u32 {
    let x = f(a);
    if x >= 1.0 {
        1f32.to_bits()
    } else if x > 0.0 {
        a
    } else {
        0
    }
}

/// A total order in which -0 lies below +0; NaN not expected.
fn key32(a: u32) -> i32 {
    let s = a as i32;
    s ^ (((s >> 31) as u32) >> 1) as i32
}

fn key64(a: u64) -> i64 {
    let s = a as i64;
    s ^ (((s >> 63) as u64) >> 1) as i64
}

/// `min.f32`: the number if one is a NaN, the canonical NaN if both are; -0 < +0.
pub fn min(a: u32, b: u32) -> u32 {
    match (f(a).is_nan(), f(b).is_nan()) {
        (true, true) => NAN32,
        (true, false) => b,
        (false, true) => a,
        _ if key32(a) < key32(b) => a,
        _ => b,
    }
}

/// `max.f32`.
pub fn max(a: u32, b: u32) -> u32 {
    match (f(a).is_nan(), f(b).is_nan()) {
        (true, true) => NAN32,
        (true, false) => b,
        (false, true) => a,
        _ if key32(a) > key32(b) => a,
        _ => b,
    }
}

/// `min.NaN.f32`/`max.NaN.f32`: a NaN operand wins.
pub fn nan_or(a: u32, b: u32, pick: fn(u32, u32) -> u32) -> u32 {
    if f(a).is_nan() || f(b).is_nan() { NAN32 } else { pick(a, b) }
}

/// `add.rn.f64`.
pub fn add64(a: u64, b: u64) -> u64 {
    (d(a) + d(b)).to_bits()
}

/// `sub.rn.f64`.
pub fn sub64(a: u64, b: u64) -> u64 {
    (d(a) - d(b)).to_bits()
}

/// `mul.rn.f64`.
pub fn mul64(a: u64, b: u64) -> u64 {
    (d(a) * d(b)).to_bits()
}

/// `div.rn.f64`.
pub fn div64(a: u64, b: u64) -> u64 {
    (d(a) / d(b)).to_bits()
}

/// `fma.rn.f64`.
pub fn fma64(a: u64, b: u64, c: u64) -> u64 {
    d(a).mul_add(d(b), d(c)).to_bits()
}

/// `sqrt.rn.f64`.
pub fn sqrt64(a: u64) -> u64 {
    d(a).sqrt().to_bits()
}

/// `rcp.rn.f64`.
pub fn rcp64(a: u64) -> u64 {
    (1.0 / d(a)).to_bits()
}

/// `min.f64`.
pub fn min64(a: u64, b: u64) -> u64 {
    match (d(a).is_nan(), d(b).is_nan()) {
        (true, true) => 0x7fff_ffff_ffff_ffff,
        (true, false) => b,
        (false, true) => a,
        _ if key64(a) < key64(b) => a,
        _ => b,
    }
}

/// `max.f64`.
pub fn max64(a: u64, b: u64) -> u64 {
    match (d(a).is_nan(), d(b).is_nan()) {
        (true, true) => 0x7fff_ffff_ffff_ffff,
        (true, false) => b,
        (false, true) => a,
        _ if key64(a) > key64(b) => a,
        _ => b,
    }
}

/// `testp`: the class a float belongs to.
pub fn testp(kind: &str) -> Option<fn(f64, bool) -> bool> {
    // The flag says whether the value is subnormal in its own format.
    Some(match kind {
        "finite" => |x, _| x.is_finite(),
        "infinite" => |x, _| x.is_infinite(),
        "number" => |x, _| !x.is_nan(),
        "notanumber" => |x, _| x.is_nan(),
        "normal" => |x, sub| x.is_finite() && x != 0.0 && !sub,
        "subnormal" => |_, sub| sub,
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const INF: u32 = 0x7f80_0000;
    const TINY: u32 = 1;

    #[test]
    fn nan_results_are_canonical() {
        for nan in [0x7fc0_0000, 0xffc0_1234, 0x7f80_0001] {
            for x in [
                add(nan, 0),
                sub(0, nan),
                mul(nan, nan),
                div(nan, 1),
                fma(nan, 0, 0),
                sqrt(nan),
                rcp(nan),
            ] {
                assert_eq!(x, NAN32);
            }
        }
        assert_eq!(sub(INF, INF), NAN32);
        assert_eq!(mul(0, INF), NAN32);
        assert_eq!(div(0, 0), NAN32);
        assert_eq!(sqrt((-1f32).to_bits()), NAN32);
        assert_eq!(sqrt(0x8000_0000), 0x8000_0000);
    }

    #[test]
    fn subnormals_are_kept() {
        assert_eq!(add(TINY, TINY), 2);
        assert_eq!(mul(0x0080_0000, 0.5f32.to_bits()), 0x0040_0000);
        assert_eq!(div(0x0080_0000, 4f32.to_bits()), 0x0020_0000);
        assert_eq!(fma(TINY, 1f32.to_bits(), TINY), 2);
        assert_eq!(sqrt(TINY), 0x1a35_04f3); // sqrt(2^-149)
    }

    #[test]
    fn fma_rounds_once() {
        let x = 0x3f80_0001; // 1 + 2^-23
        let square = mul(x, x);
        assert_eq!(sub(square, square), 0);
        // x*x - rn(x*x) is 2^-46, which only a fused operation sees.
        assert_eq!(fma(x, x, square ^ 0x8000_0000), 2f32.powi(-46).to_bits());
    }

    #[test]
    fn min_and_max_know_nan_and_signed_zero() {
        let (p, n) = (0u32, 0x8000_0000u32);
        assert_eq!(min(p, n), n);
        assert_eq!(min(n, p), n);
        assert_eq!(max(p, n), p);
        assert_eq!(max(n, p), p);
        assert_eq!(max(0x7fc0_0000, 5), 5);
        assert_eq!(min(5, 0xffc0_0000), 5);
        assert_eq!(max(0x7fc0_0000, 0xffc0_0000), NAN32);
        assert_eq!(nan_or(5, 0xffc0_0000, max), NAN32);
        assert_eq!(max((-1f32).to_bits(), (-2f32).to_bits()), (-1f32).to_bits());
        assert_eq!(min64(0, 1 << 63), 1 << 63);
        assert_eq!(max64((-1f64).to_bits(), (-2f64).to_bits()), (-1f64).to_bits());
    }

    #[test]
    fn sat_clamps() {
        assert_eq!(sat(NAN32), 0);
        assert_eq!(sat(0x8000_0000), 0);
        assert_eq!(sat(2f32.to_bits()), 1f32.to_bits());
        assert_eq!(sat(0.25f32.to_bits()), 0.25f32.to_bits());
    }
}
