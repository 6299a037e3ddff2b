//! bitsandbytes' dynamic map, computed instead of looked up.
//!
//! The map (Dettmers et al., *8-bit Optimizers via Block-wise Quantization*, 2022) has 256 sorted
//! values: 0, 1, and for each decade `[0.1, 1] * 10^(d-6)`, `d = 0..=6`, the middles of `2^d`
//! (signed, each sign) or `2^(d+1)` (unsigned) equal cells. Counting from the zero, the `k`-th
//! value's decade is the exponent of `k` as a float and its cell the mantissa: with
//! `k = 2^e + j`,
//!
//! ```text
//! value(k) = 10^(e-6) * (0.1 + 0.9 * (j + 1/2) / 2^e)     signed,   code = 127 +- k, k = 1..=127
//! value(k) = 10^(e-7) * (0.1 + 0.9 * (j + 1/2) / 2^e)     unsigned, code = k - 1,    k = 2..=255
//! ```
//!
//! and code 255 is 1. A signed map has no -1: the code of -1 is that of -0.99297.
//!
//! Encoding counts the midpoints between decades that lie at or below `|x|`, which gives the
//! decade, then finds the cell by one `fma` and a truncation. The result is the nearest value; an
//! input midway between two goes to the larger magnitude. The arithmetic is f32, so an input within
//! `2^-23 * |x|` of the exact midpoint (one or two units in the last place) counts as a tie too and
//! may go to either neighbour.

/// Which of the two maps.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Sign {
    /// For the first moment: 127 negative values, 0, 128 positive ones.
    Signed,
    /// For the second moment: 0 and 255 positive values.
    Unsigned,
}

/// Constants of one map. `level` counts 0 for the zero, `d + 1` for decade `d`, 8 for the one.
/// Tables have 16 entries because that is what a vector instruction looks up.
#[derive(Debug)]
pub(crate) struct Map {
    /// `value = fma(2j + 1, slope[exponent], offset[exponent])`, where the exponent is that of
    /// `2k + 1` as a float, with its bias, modulo 16.
    pub slope: [f32; 16],
    pub offset: [f32; 16],
    /// `level` is how many of these are at or below `|x|`.
    pub thresholds: [f32; 16],
    /// `j = trunc(fma(|x|, gain[level], base[level]))`, cut to the decade's cells `0..=last[level]`.
    pub gain: [f32; 16],
    pub base: [f32; 16],
    pub last: [i32; 16],
}

const fn pow10(decade: usize) -> f64 {
    [1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0][decade]
}

/// Value of cell `j` of `cells` in `decade`.
const fn cell(decade: usize, j: usize, cells: usize) -> f64 {
    pow10(decade) * (0.1 + 0.9 * (j as f64 + 0.5) / cells as f64)
}

const fn map(sign: Sign) -> Map {
    // exponent of `k` at level 1; at level 0, `k` is 0 (signed) or 1 (unsigned)
    let first_exponent = match sign {
        Sign::Signed => 0,
        Sign::Unsigned => 1,
    };
    let mut map = Map {
        slope: [0.0; 16],
        offset: [0.0; 16],
        thresholds: [f32::INFINITY; 16],
        gain: [0.0; 16],
        base: [0.0; 16],
        last: [0; 16],
    };
    map.last[0] = (1 << first_exponent >> 1) - 1;
    let mut below = 0.0;
    let mut level = 1;
    while level <= 7 {
        let decade = level - 1;
        let exponent = decade + first_exponent;
        let cells = 1_usize << exponent;
        map.slope[table_index(exponent)] = (pow10(decade) * 0.45 / cells as f64) as f32;
        map.offset[table_index(exponent)] = (pow10(decade) * 0.1) as f32;
        map.thresholds[decade] = f64::midpoint(below, cell(decade, 0, cells)) as f32;
        map.gain[level] = (cells as f64 / (0.9 * pow10(decade))) as f32;
        map.base[level] = (cells as f64 / -9.0) as f32;
        map.last[level] = cells as i32 - 1;
        below = cell(decade, cells - 1, cells);
        level += 1;
    }
    map.offset[table_index(7 + first_exponent)] = 1.0;
    map.thresholds[7] = f64::midpoint(below, 1.0) as f32;
    map.last[8] = (1 << (7 + first_exponent)) - 1;
    map
}

/// Where the tables keep what belongs to a `k` of this exponent: `2k + 1` has one more, and a bias
/// of 127.
const fn table_index(exponent: usize) -> usize {
    (exponent + 1 + 127) % 16
}

pub(crate) static SIGNED: Map = map(Sign::Signed);
pub(crate) static UNSIGNED: Map = map(Sign::Unsigned);

impl Map {
    /// Value of the `k`-th code counted from the zero.
    fn value(&self, k: u32) -> f32 {
        let odd = (2 * k + 1) as f32;
        let exponent = odd.to_bits() >> 23;
        let twice_j_plus_1 = odd - f32::from_bits(exponent << 23);
        let entry = (exponent % 16) as usize;
        twice_j_plus_1.mul_add(self.slope[entry], self.offset[entry])
    }

    /// The `k` whose value is nearest to `magnitude`; NaN counts as 0.
    fn nearest(&self, magnitude: f32) -> i32 {
        let level = self.thresholds.iter().filter(|&&threshold| magnitude >= threshold).count();
        let level = level.min(8);
        let j = magnitude.mul_add(self.gain[level], self.base[level]) as i32;
        let last = self.last[level];
        last + 1 + j.min(last).max(0)
    }
}

/// The value of `code`: within 1.5e-7 of the published map, relative.
#[must_use]
pub fn decode(code: u8, sign: Sign) -> f32 {
    match sign {
        Sign::Signed => {
            let k = i32::from(code) - 127;
            let value = SIGNED.value(k.unsigned_abs());
            if k < 0 { -value } else { value }
        }
        Sign::Unsigned => UNSIGNED.value(u32::from(code) + 1),
    }
}

/// The code whose value is nearest to `x`: see the module's notes on ties. Numbers beyond the
/// map's ends take the end's code; NaN takes the code of zero.
#[must_use]
pub fn encode(x: f32, sign: Sign) -> u8 {
    match sign {
        Sign::Signed => {
            let k = SIGNED.nearest(x.abs());
            let code = if x < 0.0 { 127 - k.min(127) } else { 127 + k };
            code as u8
        }
        Sign::Unsigned => (UNSIGNED.nearest(x) - 1) as u8,
    }
}

/// [`encode`] for a positive second moment: never the code of zero, because a second moment
/// rounded down to zero would make the next update explode. The smallest value stands in, through
/// which an update can only shrink.
#[must_use]
pub fn encode_positive(x: f32) -> u8 {
    encode(x, Sign::Unsigned).max(1)
}

/// The code of zero, with which state begins.
#[must_use]
pub const fn zero_code(sign: Sign) -> u8 {
    match sign {
        Sign::Signed => 127,
        Sign::Unsigned => 0,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The published construction, in f64: sorted values of every decade, 0 and 1.
    fn published(sign: Sign) -> Vec<f64> {
        let mut values = vec![0.0, 1.0];
        for decade in 0..7 {
            let cells = match sign {
                Sign::Signed => 1 << decade,
                Sign::Unsigned => 2 << decade,
            };
            // linspace(0.1, 1, cells + 1), and the means of neighbours
            let edge = |j: usize| 0.1 + 0.9 * j as f64 / cells as f64;
            for j in 0..cells {
                let value = 10_f64.powi(decade - 6) * f64::midpoint(edge(j), edge(j + 1));
                values.push(value);
                if sign == Sign::Signed {
                    values.push(-value);
                }
            }
        }
        values.sort_by(f64::total_cmp);
        values
    }

    #[test]
    fn all_values_equal_the_published_construction() {
        for sign in [Sign::Signed, Sign::Unsigned] {
            let published = published(sign);
            assert_eq!(published.len(), 256);
            for (code, want) in published.into_iter().enumerate() {
                let got = f64::from(decode(code as u8, sign));
                let close = (got - want).abs() <= 1.5e-7 * want.abs();
                assert!(close, "{sign:?} code {code}: {got} {want}");
            }
        }
    }

    #[test]
    fn encode_inverts_decode() {
        for sign in [Sign::Signed, Sign::Unsigned] {
            for code in 0..=255 {
                assert_eq!(encode(decode(code, sign), sign), code, "{sign:?}");
            }
        }
    }

    /// Distance from `x` to the value of `code`, exact enough in f64.
    fn distance(x: f32, code: u8, sign: Sign) -> f64 {
        (f64::from(x) - f64::from(decode(code, sign))).abs()
    }

    /// Asserts that no neighbour's value is nearer than the code's, but for the ties that the
    /// module documents. Neighbours are enough: values ascend.
    fn assert_nearest(x: f32, sign: Sign) {
        let code = encode(x, sign);
        let slack = 2.0 * f64::from(f32::EPSILON) * f64::from(x.abs());
        for other in [code.saturating_sub(1), code.saturating_add(1)] {
            let (own, theirs) = (distance(x, code, sign), distance(x, other, sign));
            assert!(own <= theirs + slack, "{sign:?} {x:e}: code {code}, nearer {other}");
        }
    }

    #[test]
    fn values_ascend() {
        for sign in [Sign::Signed, Sign::Unsigned] {
            assert!((0..255).all(|code| decode(code, sign) < decode(code + 1, sign)));
        }
    }

    #[test]
    fn encode_is_nearest_for_ten_million_random_inputs() {
        let mut state = 0x9E37_79B9_7F4A_7C15_u64;
        for round in 0..10_000_000_u32 {
            // xorshift64* (Vigna 2016): uniform over [0, 1), then over 8 decades
            state ^= state >> 12;
            state ^= state << 25;
            state ^= state >> 27;
            let random = state.wrapping_mul(0x2545_F491_4F6C_DD1D);
            let uniform = (random >> 40) as f32 / 16_777_216.0;
            let x = if round % 2 == 0 { uniform } else { (uniform * -18.5).exp() };
            assert_nearest(x, Sign::Unsigned);
            assert_nearest(if random & 1 == 0 { x } else { -x }, Sign::Signed);
        }
    }

    #[test]
    fn encode_is_nearest_around_every_midpoint_and_value() {
        for sign in [Sign::Signed, Sign::Unsigned] {
            for code in 0..255 {
                let (a, b) = (decode(code, sign), decode(code + 1, sign));
                for centre in [a, b, f32::midpoint(a, b)] {
                    for ulps in -40..=40_i32 {
                        let x = f32::from_bits(centre.to_bits().wrapping_add_signed(ulps));
                        if x.is_finite() && x.abs() <= 1.0 && (sign == Sign::Signed || x >= 0.0) {
                            assert_nearest(x, sign);
                        }
                    }
                }
            }
        }
    }

    #[test]
    fn ends_zeros_and_nan() {
        for zero in [0.0, -0.0, f32::from_bits(1), -f32::from_bits(1), f32::NAN] {
            assert_eq!(encode(zero, Sign::Signed), 127);
            assert_eq!(encode(zero.abs(), Sign::Unsigned), 0);
        }
        for (x, code) in [(1.0, 255), (1.5, 255), (f32::INFINITY, 255), (-1.0, 0), (-9.0, 0)] {
            assert_eq!(encode(x, Sign::Signed), code);
        }
        assert_eq!(encode(f32::MAX, Sign::Unsigned), 255);
        assert_eq!(decode(zero_code(Sign::Signed), Sign::Signed), 0.0);
        assert_eq!(decode(zero_code(Sign::Unsigned), Sign::Unsigned), 0.0);
    }

    #[test]
    fn a_positive_second_moment_never_becomes_zero() {
        for x in [f32::from_bits(1), 1e-30, 1e-8, 1.6e-7, 2e-7] {
            assert_eq!(encode_positive(x), 1);
        }
        assert_eq!(encode_positive(1.0), 255);
    }
}
