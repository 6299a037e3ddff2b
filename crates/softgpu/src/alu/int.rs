//! Integer and bit operations whose PTX meaning is more than one Rust operator.

/// `shl.b32`: amounts beyond 31 give 0.
pub fn shl32(a: u32, n: u32) -> u32 {
    a.checked_shl(n).unwrap_or(0)
}

/// `shr.u32`/`shr.b32`.
pub fn shr_u32(a: u32, n: u32) -> u32 {
    a.checked_shr(n).unwrap_or(0)
}

/// `shr.s32`: amounts beyond 31 fill with the sign.
pub fn shr_s32(a: u32, n: u32) -> u32 {
    ((a as i32) >> n.min(31)) as u32
}

/// `shl.b64`; the amount is 32 bits wide in every shift.
pub fn shl64(a: u64, n: u32) -> u64 {
    a.checked_shl(n).unwrap_or(0)
}

/// `shr.u64`.
pub fn shr_u64(a: u64, n: u32) -> u64 {
    a.checked_shr(n).unwrap_or(0)
}

/// `shr.s64`.
pub fn shr_s64(a: u64, n: u32) -> u64 {
    ((a as i64) >> n.min(63)) as u64
}

/// `shf.l`/`shf.r` funnel shift of `hi:lo`; `wrap` takes the amount modulo 32, otherwise it is clamped.
pub fn funnel(lo: u32, hi: u32, n: u32, left: bool, wrap: bool) -> u32 {
    let n = if wrap { n & 31 } else { n.min(32) };
    let both = (u64::from(hi) << 32) | u64::from(lo);
    if left { ((both << n) >> 32) as u32 } else { (both >> n) as u32 }
}

/// `bfe.u32`/`bfe.u64` and their signed forms over a `width`-bit operand.
pub fn bfe(a: u64, pos: u32, len: u32, width: u32, signed: bool) -> u64 {
    let (pos, len) = (pos & 0xff, len & 0xff);
    let msb = width - 1;
    let sign =
        if !signed || len == 0 { 0 } else { (a >> (pos.saturating_add(len) - 1).min(msb)) & 1 };
    let mut out = 0;
    for i in 0..width {
        let bit = if i < len && pos + i <= msb { (a >> (pos + i)) & 1 } else { sign };
        out |= bit << i;
    }
    out
}

/// `bfi`: the low `len` bits of `a` put into `b` at `pos`.
pub fn bfi(a: u64, b: u64, pos: u32, len: u32, width: u32) -> u64 {
    let (pos, len) = (pos & 0xff, len & 0xff);
    let mut out = b;
    for i in 0..len {
        if pos + i >= width {
            break;
        }
        out = (out & !(1 << (pos + i))) | (((a >> i) & 1) << (pos + i));
    }
    out
}

/// `prmt.b32` in its default mode: any four of eight bytes, bit 3 of a selector replicating the sign.
pub fn prmt(a: u32, b: u32, sel: u32) -> u32 {
    let both = (u64::from(b) << 32) | u64::from(a);
    let mut out = 0;
    for i in 0..4 {
        let s = (sel >> (4 * i)) & 0xf;
        let byte = ((both >> (8 * (s & 7))) & 0xff) as u32;
        let byte = if s & 8 == 0 { byte } else { (byte >> 7) * 0xff };
        out |= byte << (8 * i);
    }
    out
}

/// `lop3.b32`: bit `4a+2b+c` of the table for each position.
pub fn lop3(a: u32, b: u32, c: u32, lut: u32) -> u32 {
    let mut out = 0;
    for k in 0..8 {
        if (lut >> k) & 1 == 1 {
            let pick = |x: u32, bit: u32| if (k >> bit) & 1 == 1 { x } else { !x };
            out |= pick(a, 2) & pick(b, 1) & pick(c, 0);
        }
    }
    out
}

/// `bfind.u32`: index of the highest one, or `u32::MAX`.
pub fn bfind_u32(a: u32) -> u32 {
    if a == 0 { u32::MAX } else { a.ilog2() }
}

/// `bfind.u64`.
pub fn bfind_u64(a: u64) -> u32 {
    if a == 0 { u32::MAX } else { a.ilog2() }
}

/// `fns.b32`: position of the n-th one counted from `base`, upwards for positive `n`,
/// downwards for negative; `u32::MAX` if there is none.
pub fn fns(mask: u32, base: u32, n: i32) -> u32 {
    if base > 31 {
        return u32::MAX;
    }
    if n == 0 {
        return if (mask >> base) & 1 == 1 { base } else { u32::MAX };
    }
    let (step, mut left) = (n.signum(), n.unsigned_abs());
    let mut pos = base as i32;
    while (0..32).contains(&pos) {
        if (mask >> pos) & 1 == 1 {
            left -= 1;
            if left == 0 {
                return pos as u32;
            }
        }
        pos += step;
    }
    u32::MAX
}

/// Sign extension of the low 16 bits.
pub fn sx16(a: u32) -> i32 {
    i32::from(a as u16 as i16)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shifts_clamp() {
        assert_eq!(shl32(1, 31), 0x8000_0000);
        assert_eq!(shl32(1, 32), 0);
        assert_eq!(shr_u32(0x8000_0000, 32), 0);
        assert_eq!(shr_s32(0x8000_0000, 40), 0xffff_ffff);
        assert_eq!(shl64(1, 64), 0);
        assert_eq!(shr_s64(1 << 63, 99), u64::MAX);
        assert_eq!(shr_u64(1 << 63, 63), 1);
    }

    #[test]
    fn funnel_takes_the_words_the_manual_names() {
        assert_eq!(funnel(0x8000_0001, 0x7, 4, true, true), 0x78);
        assert_eq!(funnel(0x8000_0001, 0x7, 4, false, true), 0x7800_0000);
        assert_eq!(funnel(1, 2, 32, true, true), 2);
        assert_eq!(funnel(1, 2, 32, true, false), 1);
        assert_eq!(funnel(1, 2, 40, false, false), 2);
    }

    #[test]
    fn bit_fields() {
        assert_eq!(bfe(0xabcd, 4, 8, 32, false), 0xbc);
        assert_eq!(bfe(0xabcd, 4, 8, 32, true), 0xffff_ffbc);
        assert_eq!(bfe(0x8000_0000, 28, 8, 32, true), 0xffff_fff8);
        assert_eq!(bfe(0x8000_0000, 28, 8, 32, false), 8);
        assert_eq!(bfe(u64::MAX, 3, 0, 64, true), 0);
        assert_eq!(bfi(0xff, 0, 28, 8, 32), 0xf000_0000);
        assert_eq!(bfi(0, 0xffff, 4, 4, 32), 0xff0f);
    }

    #[test]
    fn prmt_selects_and_replicates_signs() {
        assert_eq!(prmt(0x3322_1100, 0x7766_5544, 0x7654), 0x7766_5544);
        assert_eq!(prmt(0x3322_1100, 0x7766_5544, 0x0123), 0x0011_2233);
        assert_eq!(prmt(0x0000_0080, 0, 0x8888), 0xffff_ffff);
        assert_eq!(prmt(0x0000_007f, 0, 0x8888), 0);
    }

    #[test]
    fn lop3_tables() {
        let (a, b, c) = (0xf0f0_1234, 0xcccc_5678, 0xaaaa_9abc);
        assert_eq!(lop3(a, b, c, 0x80), a & b & c);
        assert_eq!(lop3(a, b, c, 0xfe), a | b | c);
        assert_eq!(lop3(a, b, c, 0x96), a ^ b ^ c);
        assert_eq!(lop3(a, b, c, 0xe2), (a & b) | (!b & c));
        assert_eq!(lop3(a, b, c, 0x1a), (a & b | c) ^ a);
    }

    #[test]
    fn finds() {
        assert_eq!(bfind_u32(0), u32::MAX);
        assert_eq!(bfind_u32(1), 0);
        assert_eq!(bfind_u64(1 << 40), 40);
        assert_eq!(fns(0b1011_0100, 0, 1), 2);
        assert_eq!(fns(0b1011_0100, 0, 3), 5);
        assert_eq!(fns(0b1011_0100, 7, -2), 5);
        assert_eq!(fns(0b1011_0100, 3, 0), u32::MAX);
        assert_eq!(fns(0b1011_0100, 2, 0), 2);
        assert_eq!(fns(1, 0, 2), u32::MAX);
    }
}
