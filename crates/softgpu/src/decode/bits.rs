//! Logic, shifts, bit counting, bit fields and byte permutation.

use super::{Decoder, Frame, Mods, Op};
use crate::alu::int;
use crate::ptx::ast::{Operand, Ptx, Stmt, Ty};
use crate::regs::{Lane, op3};

impl<'m> Decoder<'m> {
    pub(super) fn logic(&mut self, fr: &Frame<'m>, s: &Stmt, m: &mut Mods) -> Ptx<Op> {
        let t = m.ty(&[Ty::Pred, Ty::B16, Ty::B32, Ty::B64])?;
        m.end()?;
        match (s.op.as_str(), t) {
            ("not", Ty::Pred) => self.alu1::<bool, bool>(fr, s, (t, t), |a| !a),
            ("not", Ty::B16) => self.alu1::<u32, u32>(fr, s, (t, t), |a| !a & 0xffff),
            ("not", Ty::B32) => self.alu1::<u32, u32>(fr, s, (t, t), |a| !a),
            ("not", _) => self.alu1::<u64, u64>(fr, s, (t, t), |a| !a),
            ("and", Ty::Pred) => self.same2::<bool>(fr, s, t, |a, b| a & b),
            ("and", Ty::B64) => self.same2::<u64>(fr, s, t, |a, b| a & b),
            ("and", _) => self.same2::<u32>(fr, s, t, |a, b| a & b),
            ("or", Ty::Pred) => self.same2::<bool>(fr, s, t, |a, b| a | b),
            ("or", Ty::B64) => self.same2::<u64>(fr, s, t, |a, b| a | b),
            ("or", _) => self.same2::<u32>(fr, s, t, |a, b| a | b),
            (_, Ty::Pred) => self.same2::<bool>(fr, s, t, |a, b| a ^ b),
            (_, Ty::B64) => self.same2::<u64>(fr, s, t, |a, b| a ^ b),
            (_, _) => self.same2::<u32>(fr, s, t, |a, b| a ^ b),
        }
    }

    pub(super) fn shift(&mut self, fr: &Frame<'m>, s: &Stmt, m: &mut Mods) -> Ptx<Op> {
        let left = s.op == "shl";
        let t = m.ty(if left {
            &[Ty::B16, Ty::B32, Ty::B64]
        } else {
            &[Ty::B16, Ty::U16, Ty::S16, Ty::B32, Ty::U32, Ty::S32, Ty::B64, Ty::U64, Ty::S64]
        })?;
        m.end()?;
        // The amount is 32 bits wide whatever the type.
        match (t, left) {
            (Ty::B16, true) => {
                self.alu2(fr, s, (t, t, Ty::U32), |a: u32, n| int::shl32(a, n) & 0xffff)
            }
            (Ty::B32, true) => self.alu2(fr, s, (t, t, Ty::U32), int::shl32),
            (_, true) => self.alu2(fr, s, (t, t, Ty::U32), int::shl64),
            (Ty::B16 | Ty::U16 | Ty::B32 | Ty::U32, _) => {
                self.alu2(fr, s, (t, t, Ty::U32), int::shr_u32)
            }
            (Ty::S16, _) => self.alu2(fr, s, (t, t, Ty::U32), |a: u32, n| {
                int::shr_s32(int::sx16(a) as u32, n) & 0xffff
            }),
            (Ty::S32, _) => self.alu2(fr, s, (t, t, Ty::U32), int::shr_s32),
            (Ty::S64, _) => self.alu2(fr, s, (t, t, Ty::U32), int::shr_s64),
            _ => self.alu2(fr, s, (t, t, Ty::U32), int::shr_u64),
        }
    }

    pub(super) fn funnel(&mut self, fr: &Frame<'m>, s: &Stmt, m: &mut Mods) -> Ptx<Op> {
        let Some(dir) = m.any(&["l", "r"]) else { return m.refuse("needs .l or .r") };
        let Some(mode) = m.any(&["clamp", "wrap"]) else {
            return m.refuse("needs .clamp or .wrap");
        };
        let t = m.ty(&[Ty::B32])?;
        m.end()?;
        let (left, wrap) = (dir == "l", mode == "wrap");
        self.alu3(fr, s, (t, t, t, Ty::U32), move |lo, hi, n| int::funnel(lo, hi, n, left, wrap))
    }

    pub(super) fn count(&mut self, fr: &Frame<'m>, s: &Stmt, m: &mut Mods) -> Ptx<Op> {
        match s.op.as_str() {
            "brev" => {
                let t = m.ty(&[Ty::B32, Ty::B64])?;
                m.end()?;
                match t {
                    Ty::B32 => self.alu1(fr, s, (t, t), u32::reverse_bits),
                    _ => self.alu1(fr, s, (t, t), u64::reverse_bits),
                }
            }
            "fns" => {
                m.need("b32")?;
                m.end()?;
                self.alu3(fr, s, (Ty::B32, Ty::B32, Ty::B32, Ty::S32), |mask, base, n: u32| {
                    int::fns(mask, base, n as i32)
                })
            }
            "bfind" => {
                let shiftamt = m.eat("shiftamt");
                let t = m.ty(&[Ty::U32, Ty::S32, Ty::U64, Ty::S64])?;
                m.end()?;
                let (signed, top) = (t.is_signed(), 8 * t.bytes() as u32 - 1);
                // For a signed type: the highest bit that differs from the sign.
                let out = move |at: u32| if shiftamt && at != u32::MAX { top - at } else { at };
                match t.bytes() {
                    4 => self.alu1(fr, s, (Ty::U32, t), move |a: u32| {
                        out(int::bfind_u32(if signed && (a as i32) < 0 { !a } else { a }))
                    }),
                    _ => self.alu1(fr, s, (Ty::U32, t), move |a: u64| {
                        out(int::bfind_u64(if signed && (a as i64) < 0 { !a } else { a }))
                    }),
                }
            }
            op => {
                let popc = op == "popc";
                let t = m.ty(&[Ty::B32, Ty::B64])?;
                m.end()?;
                match (t, popc) {
                    (Ty::B32, true) => self.alu1(fr, s, (Ty::U32, t), u32::count_ones),
                    (Ty::B32, false) => self.alu1(fr, s, (Ty::U32, t), u32::leading_zeros),
                    (_, true) => self.alu1(fr, s, (Ty::U32, t), u64::count_ones),
                    (_, false) => self.alu1(fr, s, (Ty::U32, t), u64::leading_zeros),
                }
            }
        }
    }

    pub(super) fn field(&mut self, fr: &Frame<'m>, s: &Stmt, m: &mut Mods) -> Ptx<Op> {
        if s.op == "bfe" {
            let t = m.ty(&[Ty::U32, Ty::S32, Ty::U64, Ty::S64])?;
            m.end()?;
            let (signed, width) = (t.is_signed(), 8 * t.bytes() as u32);
            let types = (t, t, Ty::U32, Ty::U32);
            return match width {
                32 => self.alu3(fr, s, types, move |a: u32, p, n| {
                    int::bfe(a.into(), p, n, 32, signed) as u32
                }),
                _ => self.alu3(fr, s, types, move |a: u64, p, n| int::bfe(a, p, n, 64, signed)),
            };
        }
        let t = m.ty(&[Ty::B32, Ty::B64])?;
        m.end()?;
        // Position and length travel as one 64-bit pair, since operations take three sources.
        self.args(s, 5)?;
        let a = self.src(fr, s, &s.args[1], t)?;
        let b = self.src(fr, s, &s.args[2], t)?;
        let p = self.src(fr, s, &s.args[3], Ty::U32)?;
        let n = self.src(fr, s, &s.args[4], Ty::U32)?;
        let d = self.dst(fr, s, &s.args[0], t)?;
        let pair = self.alloc(Ty::B64);
        let (pi, ni, x) = (self.ix::<u32>(s, p)?, self.ix::<u32>(s, n)?, self.ix::<u64>(s, pair)?);
        let join = crate::regs::op2::<u64, u32, u32>(x, (pi, ni), |p, n| {
            (u64::from(n) << 32) | u64::from(p)
        });
        let width = 8 * t.bytes() as u32;
        let put = if width == 32 {
            let from = (self.ix::<u32>(s, a)?, self.ix::<u32>(s, b)?, x);
            op3::<u32, u32, u32, u64>(self.ix::<u32>(s, d)?, from, |a, b, x| {
                int::bfi(a.into(), b.into(), x as u32, (x >> 32) as u32, 32) as u32
            })
        } else {
            let from = (self.ix::<u64>(s, a)?, self.ix::<u64>(s, b)?, x);
            op3::<u64, u64, u64, u64>(self.ix::<u64>(s, d)?, from, |a, b, x| {
                int::bfi(a, b, x as u32, (x >> 32) as u32, 64)
            })
        };
        Ok(Op::Alu(super::both(join, put)))
    }

    pub(super) fn mix(&mut self, fr: &Frame<'m>, s: &Stmt, m: &mut Mods) -> Ptx<Op> {
        m.need("b32")?;
        m.end()?;
        let t = Ty::B32;
        if s.op == "prmt" {
            return self.same3::<u32>(fr, s, t, int::prmt);
        }
        self.args(s, 5)?;
        let Operand::Imm(crate::ptx::ast::Imm::Int(lut @ 0..=255)) = s.args[4] else {
            return self.refuse(s, "the table of lop3 is a literal from 0 to 255");
        };
        let lut = lut as u32;
        let mut x = [0; 3];
        for (i, x) in x.iter_mut().enumerate() {
            let a = self.src(fr, s, &s.args[i + 1], t)?;
            *x = u32::index(a).unwrap_or_default();
        }
        let d = self.dst(fr, s, &s.args[0], t)?;
        let f = move |a, b, c| int::lop3(a, b, c, lut);
        Ok(Op::Alu(op3::<u32, u32, u32, u32>(self.ix::<u32>(s, d)?, (x[0], x[1], x[2]), f)))
    }
}
