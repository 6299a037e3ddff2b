//! Integer and floating-point arithmetic.

use super::{Decoder, Frame, Mods, Op};
use crate::alu::float;
use crate::alu::int::sx16;
use crate::ptx::ast::{Ptx, Stmt, Ty};
use crate::regs::{Lane, Slot, op3x2};

const INTS: &[Ty] = &[Ty::U16, Ty::S16, Ty::U32, Ty::S32, Ty::U64, Ty::S64];

impl<'m> Decoder<'m> {
    fn same1<L: Lane>(
        &mut self,
        fr: &Frame<'m>,
        s: &Stmt,
        t: Ty,
        f: impl Fn(L) -> L + Send + Sync + 'static,
    ) -> Ptx<Op> {
        self.alu1::<L, L>(fr, s, (t, t), f)
    }

    pub(super) fn same2<L: Lane>(
        &mut self,
        fr: &Frame<'m>,
        s: &Stmt,
        t: Ty,
        f: impl Fn(L, L) -> L + Send + Sync + 'static,
    ) -> Ptx<Op> {
        self.alu2::<L, L, L>(fr, s, (t, t, t), f)
    }

    pub(super) fn same3<L: Lane>(
        &mut self,
        fr: &Frame<'m>,
        s: &Stmt,
        t: Ty,
        f: impl Fn(L, L, L) -> L + Send + Sync + 'static,
    ) -> Ptx<Op> {
        self.alu3::<L, L, L, L>(fr, s, (t, t, t, t), f)
    }

    /// Rounding of a floating-point instruction. Unrounded `add`, `sub` and `mul` may be fused by
    /// the assembler, so their result is not one value and this device refuses them.
    fn nearest(&self, m: &mut Mods) -> Ptx<bool> {
        if m.peek() == "f32" || m.peek() == "f64" {
            return m.refuse("without .rn the assembler may fuse it; compile with --fmad=false");
        }
        m.need("rn")?;
        if m.peek() == "ftz" {
            return m.refuse("flushes subnormals");
        }
        Ok(m.eat("sat"))
    }

    fn carry_slot(&mut self) -> Slot {
        if let Some(c) = self.carry {
            return c;
        }
        let c = self.alloc(Ty::Pred);
        self.names.insert(c, "CC.CF".into());
        self.carry = Some(c);
        c
    }

    fn with_carry(
        &mut self,
        fr: &Frame<'m>,
        s: &Stmt,
        t: Ty,
        sub: bool,
        reads: bool,
        writes: bool,
    ) -> Ptx<Op> {
        self.args(s, 3)?;
        let cc = self.carry_slot();
        let a = self.src(fr, s, &s.args[1], t)?;
        let b = self.src(fr, s, &s.args[2], t)?;
        let d = self.dst(fr, s, &s.args[0], t)?;
        let none = self.constant(Ty::Pred, 0);
        let cin = if reads { cc } else { none };
        let cout = if writes { cc } else { self.alloc(Ty::Pred) };
        if reads {
            self.reads.push(cc);
        }
        if writes {
            self.writes.push(cc);
        }
        let (ci, co) = (self.ix::<bool>(s, cin)?, self.ix::<bool>(s, cout)?);
        // A borrow is the carry flag of `a + !b + 1`, inverted; PTX leaves its sense to the machine,
        // and only chains of sub.cc and subc observe it.
        Ok(Op::Alu(if t.bytes() == 8 {
            let from = (self.ix::<u64>(s, a)?, self.ix::<u64>(s, b)?, ci);
            let d = self.ix::<u64>(s, d)?;
            op3x2::<u64, bool, u64, u64, bool>((d, co), from, move |a, b, c| {
                let (x, p) = if sub { a.overflowing_sub(b) } else { a.overflowing_add(b) };
                let c = u64::from(c);
                let (y, q) = if sub { x.overflowing_sub(c) } else { x.overflowing_add(c) };
                (y, p | q)
            })
        } else {
            let from = (self.ix::<u32>(s, a)?, self.ix::<u32>(s, b)?, ci);
            let d = self.ix::<u32>(s, d)?;
            op3x2::<u32, bool, u32, u32, bool>((d, co), from, move |a, b, c| {
                let (x, p) = if sub { a.overflowing_sub(b) } else { a.overflowing_add(b) };
                let c = u32::from(c);
                let (y, q) = if sub { x.overflowing_sub(c) } else { x.overflowing_add(c) };
                (y, p | q)
            })
        }))
    }

    pub(super) fn add(&mut self, fr: &Frame<'m>, s: &Stmt, m: &mut Mods) -> Ptx<Op> {
        let sub = s.op.starts_with("sub");
        let wide = [Ty::U32, Ty::S32, Ty::U64, Ty::S64];
        if s.op.ends_with('c') {
            let writes = m.eat("cc");
            let t = m.ty(&wide)?;
            m.end()?;
            return self.with_carry(fr, s, t, sub, true, writes);
        }
        if m.eat("cc") {
            let t = m.ty(&wide)?;
            m.end()?;
            return self.with_carry(fr, s, t, sub, false, true);
        }
        if m.eat("sat") {
            let t = m.ty(&[Ty::S32])?;
            m.end()?;
            return self.same2::<u32>(fr, s, t, move |a, b| {
                let (a, b) = (a as i32, b as i32);
                (if sub { a.saturating_sub(b) } else { a.saturating_add(b) }) as u32
            });
        }
        if let Some(t) = Ty::named(m.peek()).filter(|t| INTS.contains(t)) {
            m.next();
            m.end()?;
            return match (t.bytes(), sub) {
                (2, false) => self.same2::<u32>(fr, s, t, |a, b| a.wrapping_add(b) & 0xffff),
                (2, true) => self.same2::<u32>(fr, s, t, |a, b| a.wrapping_sub(b) & 0xffff),
                (4, false) => self.same2::<u32>(fr, s, t, u32::wrapping_add),
                (4, true) => self.same2::<u32>(fr, s, t, u32::wrapping_sub),
                (_, false) => self.same2::<u64>(fr, s, t, u64::wrapping_add),
                (_, true) => self.same2::<u64>(fr, s, t, u64::wrapping_sub),
            };
        }
        let sat = self.nearest(m)?;
        let t = m.ty(if sat { &[Ty::F32] } else { &[Ty::F32, Ty::F64] })?;
        m.end()?;
        match (t, sub, sat) {
            (Ty::F64, false, _) => self.same2::<u64>(fr, s, t, float::add64),
            (Ty::F64, true, _) => self.same2::<u64>(fr, s, t, float::sub64),
            (_, false, false) => self.same2::<u32>(fr, s, t, float::add),
            (_, true, false) => self.same2::<u32>(fr, s, t, float::sub),
            (_, false, true) => self.same2::<u32>(fr, s, t, |a, b| float::sat(float::add(a, b))),
            (_, true, true) => self.same2::<u32>(fr, s, t, |a, b| float::sat(float::sub(a, b))),
        }
    }

    pub(super) fn mul(&mut self, fr: &Frame<'m>, s: &Stmt, m: &mut Mods) -> Ptx<Op> {
        let mad = s.op == "mad";
        let Some(part) = m.any(&["lo", "hi", "wide"]) else {
            if mad {
                // mad.rn is fma.rn on every target this device reads.
                return self.fma(fr, s, m);
            }
            let sat = self.nearest(m)?;
            let t = m.ty(if sat { &[Ty::F32] } else { &[Ty::F32, Ty::F64] })?;
            m.end()?;
            return match (t, sat) {
                (Ty::F64, _) => self.same2::<u64>(fr, s, t, float::mul64),
                (_, false) => self.same2::<u32>(fr, s, t, float::mul),
                (_, true) => self.same2::<u32>(fr, s, t, |a, b| float::sat(float::mul(a, b))),
            };
        };
        let t = m.ty(if part == "wide" { &INTS[..4] } else { INTS })?;
        m.end()?;
        let signed = t.is_signed();
        // Every product through 128 bits: one definition for lo, hi and wide.
        let value = move |x: u64| -> i128 {
            match t {
                Ty::S16 => i128::from(x as i16),
                Ty::S32 => i128::from(x as i32),
                Ty::S64 => i128::from(x as i64),
                _ => i128::from(x),
            }
        };
        let product = move |a: u64, b: u64| -> i128 {
            if signed {
                value(a).wrapping_mul(value(b))
            } else {
                (u128::from(a) * u128::from(b)) as i128
            }
        };
        let bits = 8 * t.bytes() as u32;
        let shift = if part == "hi" { bits } else { 0 };
        match (part, t.bytes(), mad) {
            // The two that matter for speed.
            ("lo", 4, false) => self.same2::<u32>(fr, s, t, u32::wrapping_mul),
            ("lo", 4, true) => {
                self.same3::<u32>(fr, s, t, |a, b, c| a.wrapping_mul(b).wrapping_add(c))
            }
            ("lo", 8, false) => self.same2::<u64>(fr, s, t, u64::wrapping_mul),
            ("lo", 8, true) => {
                self.same3::<u64>(fr, s, t, |a, b, c| a.wrapping_mul(b).wrapping_add(c))
            }
            ("wide", 4, false) if !signed => {
                self.alu2::<u64, u32, u32>(fr, s, (Ty::U64, t, t), |a, b| {
                    u64::from(a) * u64::from(b)
                })
            }
            ("wide", 4, false) => {
                self.alu2::<u64, u32, u32>(fr, s, (Ty::S64, t, t), move |a, b| {
                    product(u64::from(a), u64::from(b)) as u64
                })
            }
            ("wide", 4, true) => {
                let d = if signed { Ty::S64 } else { Ty::U64 };
                self.alu3::<u64, u32, u32, u64>(fr, s, (d, t, t, d), move |a, b, c| {
                    (product(u64::from(a), u64::from(b)) as u64).wrapping_add(c)
                })
            }
            ("wide", _, false) => {
                let d = if signed { Ty::S32 } else { Ty::U32 };
                self.alu2::<u32, u32, u32>(fr, s, (d, t, t), move |a, b| {
                    product(u64::from(a), u64::from(b)) as u32
                })
            }
            ("wide", _, true) => {
                let d = if signed { Ty::S32 } else { Ty::U32 };
                self.alu3::<u32, u32, u32, u32>(fr, s, (d, t, t, d), move |a, b, c| {
                    (product(u64::from(a), u64::from(b)) as u32).wrapping_add(c)
                })
            }
            (_, 8, false) => {
                self.same2::<u64>(fr, s, t, move |a, b| (product(a, b) >> shift) as u64)
            }
            (_, 8, true) => self.same3::<u64>(fr, s, t, move |a, b, c| {
                ((product(a, b) >> shift) as u64).wrapping_add(c)
            }),
            (_, n, false) => {
                let keep = if n == 2 { 0xffff } else { u32::MAX };
                self.same2::<u32>(fr, s, t, move |a, b| {
                    (product(a.into(), b.into()) >> shift) as u32 & keep
                })
            }
            (_, n, true) => {
                let keep = if n == 2 { 0xffff } else { u32::MAX };
                self.same3::<u32>(fr, s, t, move |a, b, c| {
                    ((product(a.into(), b.into()) >> shift) as u32).wrapping_add(c) & keep
                })
            }
        }
    }

    pub(super) fn fma(&mut self, fr: &Frame<'m>, s: &Stmt, m: &mut Mods) -> Ptx<Op> {
        m.need("rn")?;
        let sat = m.eat("sat");
        let t = m.ty(if sat { &[Ty::F32] } else { &[Ty::F32, Ty::F64] })?;
        m.end()?;
        match (t, sat) {
            (Ty::F64, _) => self.same3::<u64>(fr, s, t, float::fma64),
            (_, false) => self.same3::<u32>(fr, s, t, float::fma),
            (_, true) => self.same3::<u32>(fr, s, t, |a, b, c| float::sat(float::fma(a, b, c))),
        }
    }

    pub(super) fn div(&mut self, fr: &Frame<'m>, s: &Stmt, m: &mut Mods) -> Ptx<Op> {
        let rem = s.op == "rem";
        if !rem && m.eat("rn") {
            let t = m.ty(&[Ty::F32, Ty::F64])?;
            m.end()?;
            return match t {
                Ty::F64 => self.same2::<u64>(fr, s, t, float::div64),
                _ => self.same2::<u32>(fr, s, t, float::div),
            };
        }
        let t = m.ty(INTS)?;
        m.end()?;
        // Lanes outside the mask may divide by zero here, and MININT / -1 wraps; neither may panic.
        // The executor traps zero divisors of running lanes before it calls this.
        let alu = match (t, rem) {
            (Ty::U16 | Ty::U32, false) => {
                self.same2::<u32>(fr, s, t, |a, b| a.checked_div(b).unwrap_or(0))
            }
            (Ty::U16 | Ty::U32, true) => {
                self.same2::<u32>(fr, s, t, |a, b| a.checked_rem(b).unwrap_or(0))
            }
            (Ty::S16, _) => self.same2::<u32>(fr, s, t, move |a, b| {
                let (a, b) = (sx16(a), sx16(b));
                let v = if rem { a.checked_rem(b) } else { a.checked_div(b) };
                v.unwrap_or(0) as u32 & 0xffff
            }),
            (Ty::S32, _) => self.same2::<u32>(fr, s, t, move |a, b| {
                let (a, b) = (a as i32, b as i32);
                (match (b, rem) {
                    (0, _) => 0,
                    (_, true) => a.wrapping_rem(b),
                    (_, false) => a.wrapping_div(b),
                }) as u32
            }),
            (Ty::U64, false) => self.same2::<u64>(fr, s, t, |a, b| a.checked_div(b).unwrap_or(0)),
            (Ty::U64, true) => self.same2::<u64>(fr, s, t, |a, b| a.checked_rem(b).unwrap_or(0)),
            (_, _) => self.same2::<u64>(fr, s, t, move |a, b| {
                let (a, b) = (a as i64, b as i64);
                (match (b, rem) {
                    (0, _) => 0,
                    (_, true) => a.wrapping_rem(b),
                    (_, false) => a.wrapping_div(b),
                }) as u64
            }),
        }?;
        let by = self.src(fr, s, &s.args[2], t)?;
        match alu {
            Op::Alu(f) => Ok(Op::Divide(f, by)),
            other => Ok(other),
        }
    }

    pub(super) fn root(&mut self, fr: &Frame<'m>, s: &Stmt, m: &mut Mods) -> Ptx<Op> {
        m.need("rn")?;
        let t = m.ty(&[Ty::F32, Ty::F64])?;
        m.end()?;
        match (t, s.op == "sqrt") {
            (Ty::F64, true) => self.same1::<u64>(fr, s, t, float::sqrt64),
            (Ty::F64, false) => self.same1::<u64>(fr, s, t, float::rcp64),
            (_, true) => self.same1::<u32>(fr, s, t, float::sqrt),
            (_, false) => self.same1::<u32>(fr, s, t, float::rcp),
        }
    }

    pub(super) fn sign(&mut self, fr: &Frame<'m>, s: &Stmt, m: &mut Mods) -> Ptx<Op> {
        let t = m.ty(&[Ty::S16, Ty::S32, Ty::S64, Ty::F32, Ty::F64])?;
        m.end()?;
        match (t, s.op == "abs") {
            (Ty::S16, true) => self.same1::<u32>(fr, s, t, |a| sx16(a).unsigned_abs() & 0xffff),
            (Ty::S16, false) => self.same1::<u32>(fr, s, t, |a| a.wrapping_neg() & 0xffff),
            (Ty::S32, true) => self.same1::<u32>(fr, s, t, |a| (a as i32).unsigned_abs()),
            (Ty::S32, false) => self.same1::<u32>(fr, s, t, u32::wrapping_neg),
            (Ty::S64, true) => self.same1::<u64>(fr, s, t, |a| (a as i64).unsigned_abs()),
            (Ty::S64, false) => self.same1::<u64>(fr, s, t, u64::wrapping_neg),
            // Only the sign bit, NaN or not: what hardware does within the manual's licence.
            (Ty::F32, true) => self.same1::<u32>(fr, s, t, |a| a & 0x7fff_ffff),
            (Ty::F32, false) => self.same1::<u32>(fr, s, t, |a| a ^ 0x8000_0000),
            (_, true) => self.same1::<u64>(fr, s, t, |a| a & (u64::MAX >> 1)),
            (_, false) => self.same1::<u64>(fr, s, t, |a| a ^ (1 << 63)),
        }
    }

    pub(super) fn minmax(&mut self, fr: &Frame<'m>, s: &Stmt, m: &mut Mods) -> Ptx<Op> {
        let max = s.op == "max";
        if m.eat("NaN") {
            self.needs_target(s, 80)?;
            let t = m.ty(&[Ty::F32])?;
            m.end()?;
            let pick = if max { float::max } else { float::min };
            return self.same2::<u32>(fr, s, t, move |a, b| float::nan_or(a, b, pick));
        }
        let t = m.ty(&[Ty::U16, Ty::S16, Ty::U32, Ty::S32, Ty::U64, Ty::S64, Ty::F32, Ty::F64])?;
        m.end()?;
        match (t, max) {
            (Ty::F32, false) => self.same2::<u32>(fr, s, t, float::min),
            (Ty::F32, true) => self.same2::<u32>(fr, s, t, float::max),
            (Ty::F64, false) => self.same2::<u64>(fr, s, t, float::min64),
            (Ty::F64, true) => self.same2::<u64>(fr, s, t, float::max64),
            (Ty::U16 | Ty::U32, false) => self.same2::<u32>(fr, s, t, u32::min),
            (Ty::U16 | Ty::U32, true) => self.same2::<u32>(fr, s, t, u32::max),
            (Ty::S16, _) => self
                .same2::<u32>(fr, s, t, move |a, b| if (sx16(a) < sx16(b)) == max { b } else { a }),
            (Ty::S32, _) => {
                self.same2::<u32>(
                    fr,
                    s,
                    t,
                    move |a, b| if ((a as i32) < b as i32) == max { b } else { a },
                )
            }
            (Ty::U64, false) => self.same2::<u64>(fr, s, t, u64::min),
            (Ty::U64, true) => self.same2::<u64>(fr, s, t, u64::max),
            _ => self.same2::<u64>(
                fr,
                s,
                t,
                move |a, b| if ((a as i64) < b as i64) == max { b } else { a },
            ),
        }
    }

    pub(super) fn copysign(&mut self, fr: &Frame<'m>, s: &Stmt, m: &mut Mods) -> Ptx<Op> {
        let t = m.ty(&[Ty::F32, Ty::F64])?;
        m.end()?;
        // The sign of the first source on the magnitude of the second.
        match t {
            Ty::F32 => self.same2::<u32>(fr, s, t, |a, b| (a & 0x8000_0000) | (b & 0x7fff_ffff)),
            _ => self.same2::<u64>(fr, s, t, |a, b| (a & (1 << 63)) | (b & (u64::MAX >> 1))),
        }
    }
}
