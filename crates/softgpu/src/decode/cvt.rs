//! `cvt` and `cvta`.

use super::{Decoder, Frame, Mods, Op};
use crate::alu::convert::{
    BF16, F16, F32, Round, int_to_f32, int_to_f64, integral, narrow, to_int, widen,
};
use crate::alu::float::{self, NAN32};
use crate::inst::rounding;
use crate::ptx::ast::{Ptx, Space, Stmt, Ty};
use crate::regs::{Alu, Slot, op1};

const TYPES: &[Ty] = &[
    Ty::U8,
    Ty::S8,
    Ty::U16,
    Ty::S16,
    Ty::U32,
    Ty::S32,
    Ty::U64,
    Ty::S64,
    Ty::F16,
    Ty::BF16,
    Ty::F32,
    Ty::F64,
    Ty::F16x2,
    Ty::BF16x2,
];

/// The value of the low bits of a register as type `t`, sign- or zero-extended.
fn int_value(x: u64, t: Ty) -> i128 {
    match t {
        Ty::U8 => i128::from(x as u8),
        Ty::S8 => i128::from(x as i8),
        Ty::U16 => i128::from(x as u16),
        Ty::S16 => i128::from(x as i16),
        Ty::U32 => i128::from(x as u32),
        Ty::S32 => i128::from(x as i32),
        Ty::S64 => i128::from(x as i64),
        _ => i128::from(x),
    }
}

/// Exact value of a float of type `t`.
fn float_value(x: u64, t: Ty) -> f64 {
    match t {
        Ty::F16 => widen(x as u32 & 0xffff, F16),
        Ty::BF16 => widen(x as u32 & 0xffff, BF16),
        Ty::F32 => f64::from(f32::from_bits(x as u32)),
        _ => f64::from_bits(x),
    }
}

fn int_range(t: Ty) -> (i128, i128) {
    let bits = 8 * t.bytes() as u32;
    if t.is_signed() { (-(1 << (bits - 1)), (1 << (bits - 1)) - 1) } else { (0, (1 << bits) - 1) }
}

/// A float in format `t` from an exact value.
fn float_from(x: f64, t: Ty, round: Round) -> u64 {
    match t {
        Ty::F16 => narrow(x, F16, round).into(),
        Ty::BF16 => narrow(x, BF16, round).into(),
        Ty::F32 if x.is_nan() => NAN32.into(),
        Ty::F32 => narrow(x, F32, round).into(),
        _ => x.to_bits(),
    }
}

impl<'m> Decoder<'m> {
    pub(super) fn cvt(&mut self, fr: &Frame<'m>, s: &Stmt, m: &mut Mods) -> Ptx<Op> {
        let round = rounding(m.peek());
        if round.is_some() {
            m.next();
        }
        if m.peek() == "ftz" {
            return m.refuse("flushes subnormals");
        }
        let sat = m.eat("sat");
        let d = m.ty(TYPES)?;
        let a = m.ty(TYPES)?;
        m.end()?;
        if matches!(d, Ty::F16x2 | Ty::BF16x2) {
            self.needs_target(s, 80)?;
            if a != Ty::F32 || sat || round != Some((Round::Near, false)) {
                return self.refuse(s, "packed conversion this device does not know");
            }
            let fmt = if d == Ty::F16x2 { F16 } else { BF16 };
            return self.alu2(fr, s, (Ty::B32, a, a), move |hi: u32, lo: u32| {
                let half = |x: u32| narrow(f64::from(f32::from_bits(x)), fmt, Round::Near);
                (half(hi) << 16) | half(lo)
            });
        }
        if d == Ty::BF16 {
            self.needs_target(s, 80)?;
        }
        if a == Ty::BF16 || (d == Ty::BF16 && a != Ty::F32) {
            self.needs_target(s, 90)?;
        }
        if matches!(a, Ty::F16x2 | Ty::BF16x2) {
            return self.refuse(s, "packed conversion this device does not know");
        }
        self.args(s, 2)?;
        let (src, _) = self.src_with(fr, s, &s.args[1], a, true)?;
        let (dst, dreg) = self.dst_with(fr, s, &s.args[0], d, true)?;
        let fail = |this: &Self, why: &str| this.refuse(s, why);

        // A rounding is needed exactly where PTX asks for one, and refused elsewhere.
        let f: Box<dyn Fn(u64) -> u64 + Send + Sync> = match (d.is_float(), a.is_float()) {
            (false, false) => {
                if round.is_some() {
                    return fail(self, "rounding of an integer conversion");
                }
                let (lo, hi) = int_range(d);
                let cut = move |v: i128| if sat { v.clamp(lo, hi) } else { v } as u64;
                Box::new(move |x| cut(int_value(x, a)))
            }
            (false, true) => {
                let Some((round, true)) = round else {
                    return fail(self, "needs an integer rounding (.rni, .rzi, .rmi, .rpi)");
                };
                // Clamping is the default here, so .sat changes nothing.
                let (bits, signed) = (8 * d.bytes() as u32, d.is_signed());
                Box::new(move |x| to_int(float_value(x, a), round, bits, signed, a == Ty::F64))
            }
            (true, false) => {
                let Some((round, false)) = round else {
                    return fail(self, "needs a floating-point rounding (.rn, .rz, .rm, .rp)");
                };
                let make = move |v: i128| match d {
                    Ty::F64 => int_to_f64(v, round).to_bits(),
                    Ty::F32 => u64::from(int_to_f32(v, round).to_bits()),
                    // 2^53 and beyond are far outside f16, so the f64 on the way is as good as exact.
                    _ => float_from(int_to_f64(v, Round::Zero), d, round),
                };
                if d == Ty::BF16 {
                    return fail(self, "conversion this device does not know");
                }
                if sat {
                    return fail(self, "saturation of an integer to a float");
                }
                Box::new(move |x| make(int_value(x, a)))
            }
            (true, true) => {
                let narrows = d.bytes() < a.bytes()
                    || (d == Ty::BF16 && a == Ty::F16)
                    || (d == Ty::F16 && a == Ty::BF16);
                let (round, whole) = match (round, narrows) {
                    (Some((r, false)), true) => (r, false),
                    (Some((r, true)), false) if d == a => (r, true),
                    // cvt.f32.f32 with .sat alone, and widenings, round nothing.
                    (None, false) => (Round::Near, false),
                    _ => return fail(self, "rounding that PTX does not define for these types"),
                };
                if sat && d != Ty::F32 {
                    return fail(self, "saturation this device does not know");
                }
                if d == a && d != Ty::F32 && d != Ty::F64 && !whole {
                    return fail(self, "conversion this device does not know");
                }
                Box::new(move |x| {
                    let v = float_value(x, a);
                    let v = if whole { integral(v, round) } else { v };
                    let out = float_from(v, d, round);
                    if sat { float::sat(out as u32).into() } else { out }
                })
            }
        };
        // The result fills its register: sign-extended for signed types, zero-extended otherwise.
        let keep = move |v: u64| -> u64 {
            let v = if d.is_float() { v } else { int_value(v, d) as u64 };
            if dreg.bytes() == 2 { v & 0xffff } else { v }
        };
        let alu: Alu = match (dst, src) {
            // Frequent and simple enough for the compiler to vectorize.
            (Slot::Q(t), Slot::W(f)) if d.bytes() == 8 && a == Ty::U32 && !d.is_float() && !sat => {
                op1::<u64, u32>(t, f, u64::from)
            }
            (Slot::Q(t), Slot::W(f)) if d.bytes() == 8 && a == Ty::S32 && !d.is_float() && !sat => {
                op1::<u64, u32>(t, f, |x| i64::from(x as i32) as u64)
            }
            (Slot::W(t), Slot::Q(f))
                if d.bytes() == 4 && !d.is_float() && !a.is_float() && !sat =>
            {
                op1::<u32, u64>(t, f, |x| x as u32)
            }
            (Slot::W(t), Slot::W(i)) => op1::<u32, u32>(t, i, move |x| keep(f(x.into())) as u32),
            (Slot::W(t), Slot::Q(i)) => op1::<u32, u64>(t, i, move |x| keep(f(x)) as u32),
            (Slot::Q(t), Slot::W(i)) => op1::<u64, u32>(t, i, move |x| keep(f(x.into()))),
            (Slot::Q(t), Slot::Q(i)) => op1::<u64, u64>(t, i, move |x| keep(f(x))),
            _ => return fail(self, "predicates do not convert"),
        };
        Ok(Op::Alu(alu))
    }

    /// Generic addresses of shared and local memory are windows; global ones are themselves.
    pub(super) fn cvta(&mut self, fr: &Frame<'m>, s: &Stmt, m: &mut Mods) -> Ptx<Op> {
        let to = m.eat("to");
        let space = match m.any(&["global", "const", "shared", "local"]) {
            Some("shared") => Space::Shared,
            Some("local") => Space::Local,
            Some(_) => Space::Global,
            None => return m.refuse("state space this device does not know for cvta"),
        };
        let t = m.ty(&[Ty::U64])?;
        m.end()?;
        self.args(s, 2)?;
        let from = &s.args[1];
        let a = match from {
            crate::ptx::ast::Operand::Var { .. } if !to => self.address_of(fr, s, from, t)?,
            _ => self.src(fr, s, from, t)?,
        };
        let d = self.dst(fr, s, &s.args[0], t)?;
        let window = match space {
            Space::Shared => crate::memory::SHARED_WINDOW,
            Space::Local => crate::memory::LOCAL_WINDOW,
            _ => 0,
        };
        let (d, a) = (self.ix::<u64>(s, d)?, self.ix::<u64>(s, a)?);
        Ok(Op::Alu(if to {
            op1::<u64, u64>(d, a, move |x| x.wrapping_sub(window))
        } else {
            op1::<u64, u64>(d, a, move |x| x.wrapping_add(window))
        }))
    }
}
