//! `setp`, `set`, `selp`, `slct`, `testp`.

use super::{Decoder, Frame, Mods, Op};
use crate::alu::float;
use crate::alu::int::sx16;
use crate::ptx::ast::{Operand, Ptx, Stmt, Ty};
use crate::regs::{Lane, op1, op3x2};

/// How two operands of some type compare.
type Test = fn(std::cmp::Ordering) -> bool;

/// A comparison: what it wants of ordered operands, and its answer when one is a NaN.
fn comparison(name: &str, t: Ty) -> Option<(Test, bool)> {
    use std::cmp::Ordering as O;
    let (base, unordered) = match name {
        "equ" | "neu" | "ltu" | "leu" | "gtu" | "geu" if t.is_float() => (&name[..2], true),
        "num" if t.is_float() => return Some((|_| true, false)),
        "nan" if t.is_float() => return Some((|_| false, true)),
        "lo" if t.is_int() && !t.is_signed() => ("lt", false),
        "ls" if t.is_int() && !t.is_signed() => ("le", false),
        "hi" if t.is_int() && !t.is_signed() => ("gt", false),
        "hs" if t.is_int() && !t.is_signed() => ("ge", false),
        n => (n, false),
    };
    let test: Test = match base {
        "eq" => |o| o == O::Equal,
        "ne" => |o| o != O::Equal,
        // Untyped bits compare for equality only.
        _ if t.is_bits() => return None,
        "lt" => |o| o == O::Less,
        "le" => |o| o != O::Greater,
        "gt" => |o| o == O::Greater,
        "ge" => |o| o != O::Less,
        _ => return None,
    };
    Some((test, unordered))
}

fn compare32(
    t: Ty,
    test: Test,
    unordered: bool,
) -> impl Fn(u32, u32) -> bool + Send + Sync + Copy + 'static {
    move |a, b| match t {
        Ty::F32 => f32::from_bits(a).partial_cmp(&f32::from_bits(b)).map_or(unordered, test),
        Ty::S16 => test(sx16(a).cmp(&sx16(b))),
        Ty::S32 => test((a as i32).cmp(&(b as i32))),
        _ => test(a.cmp(&b)),
    }
}

fn compare64(
    t: Ty,
    test: Test,
    unordered: bool,
) -> impl Fn(u64, u64) -> bool + Send + Sync + Copy + 'static {
    move |a, b| match t {
        Ty::F64 => f64::from_bits(a).partial_cmp(&f64::from_bits(b)).map_or(unordered, test),
        Ty::S64 => test((a as i64).cmp(&(b as i64))),
        _ => test(a.cmp(&b)),
    }
}

const COMPARABLE: &[Ty] = &[
    Ty::B16,
    Ty::U16,
    Ty::S16,
    Ty::B32,
    Ty::U32,
    Ty::S32,
    Ty::F32,
    Ty::B64,
    Ty::U64,
    Ty::S64,
    Ty::F64,
];

impl<'m> Decoder<'m> {
    pub(super) fn setp(&mut self, fr: &Frame<'m>, s: &Stmt, m: &mut Mods) -> Ptx<Op> {
        let cmp = m.next();
        let combine = m.any(&["and", "or", "xor"]);
        let t = m.ty(COMPARABLE)?;
        m.end()?;
        let Some((test, unordered)) = comparison(cmp, t) else {
            return self.refuse(s, "comparison this device does not know for that type");
        };
        self.args(s, if combine.is_some() { 4 } else { 3 })?;
        let a = self.src(fr, s, &s.args[1], t)?;
        let b = self.src(fr, s, &s.args[2], t)?;
        let (third, negate) = match (combine, s.args.get(3)) {
            (Some(_), Some(Operand::NotReg(r))) => {
                (self.src(fr, s, &Operand::Reg(*r), Ty::Pred)?, true)
            }
            (Some(_), Some(c)) => (self.src(fr, s, c, Ty::Pred)?, false),
            _ => (self.constant(Ty::Pred, 0), false),
        };
        let (first, second) = match &s.args[0] {
            Operand::Pair(p, q) => (&**p, &**q),
            one => (one, &Operand::Sink),
        };
        let p = self.dst(fr, s, first, Ty::Pred)?;
        let q = self.dst(fr, s, second, Ty::Pred)?;
        let to = (self.ix::<bool>(s, p)?, self.ix::<bool>(s, q)?);
        let c = self.ix::<bool>(s, third)?;
        let join: fn(bool, bool) -> bool = match combine {
            Some("and") => |x, c| x & c,
            Some("or") => |x, c| x | c,
            Some("xor") => |x, c| x ^ c,
            _ => |x, _| x,
        };
        if combine.is_none() && matches!(second, Operand::Sink) {
            return Ok(Op::Alu(if t.bytes() == 8 {
                let from = (self.ix::<u64>(s, a)?, self.ix::<u64>(s, b)?);
                crate::regs::op2::<bool, u64, u64>(to.0, from, compare64(t, test, unordered))
            } else {
                let from = (self.ix::<u32>(s, a)?, self.ix::<u32>(s, b)?);
                crate::regs::op2::<bool, u32, u32>(to.0, from, compare32(t, test, unordered))
            }));
        }
        Ok(Op::Alu(if t.bytes() == 8 {
            let from = (self.ix::<u64>(s, a)?, self.ix::<u64>(s, b)?, c);
            let f = compare64(t, test, unordered);
            op3x2::<bool, bool, u64, u64, bool>(to, from, move |a, b, c| {
                let x = f(a, b);
                (join(x, c ^ negate), join(!x, c ^ negate))
            })
        } else {
            let from = (self.ix::<u32>(s, a)?, self.ix::<u32>(s, b)?, c);
            let f = compare32(t, test, unordered);
            op3x2::<bool, bool, u32, u32, bool>(to, from, move |a, b, c| {
                let x = f(a, b);
                (join(x, c ^ negate), join(!x, c ^ negate))
            })
        }))
    }

    pub(super) fn set(&mut self, fr: &Frame<'m>, s: &Stmt, m: &mut Mods) -> Ptx<Op> {
        let cmp = m.next();
        let d = m.ty(&[Ty::U32, Ty::S32, Ty::F32])?;
        let t = m.ty(COMPARABLE)?;
        m.end()?;
        let Some((test, unordered)) = comparison(cmp, t) else {
            return self.refuse(s, "comparison this device does not know for that type");
        };
        let yes = if d == Ty::F32 { 1f32.to_bits() } else { u32::MAX };
        let out = move |x: bool| if x { yes } else { 0 };
        if t.bytes() == 8 {
            let f = compare64(t, test, unordered);
            self.alu2(fr, s, (d, t, t), move |a: u64, b: u64| out(f(a, b)))
        } else {
            let f = compare32(t, test, unordered);
            self.alu2(fr, s, (d, t, t), move |a: u32, b: u32| out(f(a, b)))
        }
    }

    pub(super) fn select(&mut self, fr: &Frame<'m>, s: &Stmt, m: &mut Mods) -> Ptx<Op> {
        let t = m.ty(COMPARABLE)?;
        if s.op == "selp" {
            m.end()?;
            return if t.bytes() == 8 {
                self.alu3(
                    fr,
                    s,
                    (t, t, t, Ty::Pred),
                    |a: u64, b: u64, p: bool| if p { a } else { b },
                )
            } else {
                self.alu3(
                    fr,
                    s,
                    (t, t, t, Ty::Pred),
                    |a: u32, b: u32, p: bool| if p { a } else { b },
                )
            };
        }
        let c = m.ty(&[Ty::S32, Ty::F32])?;
        m.end()?;
        // `c >= 0`: -0.0 is, a NaN is not.
        let first =
            move |x: u32| if c == Ty::S32 { (x as i32) >= 0 } else { f32::from_bits(x) >= 0.0 };
        if t.bytes() == 8 {
            self.alu3(
                fr,
                s,
                (t, t, t, c),
                move |a: u64, b: u64, x: u32| if first(x) { a } else { b },
            )
        } else {
            self.alu3(
                fr,
                s,
                (t, t, t, c),
                move |a: u32, b: u32, x: u32| if first(x) { a } else { b },
            )
        }
    }

    pub(super) fn testp(&mut self, fr: &Frame<'m>, s: &Stmt, m: &mut Mods) -> Ptx<Op> {
        let Some(test) = float::testp(m.next()) else {
            return self.refuse(s, "class this device does not know");
        };
        let t = m.ty(&[Ty::F32, Ty::F64])?;
        m.end()?;
        match t {
            Ty::F32 => self.alu1(fr, s, (Ty::Pred, t), move |a: u32| {
                let x = f32::from_bits(a);
                test(x.into(), x.is_subnormal())
            }),
            _ => self.alu1(fr, s, (Ty::Pred, t), move |a: u64| {
                let x = f64::from_bits(a);
                test(x, x.is_subnormal())
            }),
        }
    }

    /// `mov` between registers, packing, unpacking and addresses of variables.
    pub(super) fn mov(&mut self, fr: &Frame<'m>, s: &Stmt, m: &mut Mods) -> Ptx<Op> {
        let t = m.ty(&[
            Ty::Pred,
            Ty::B16,
            Ty::U16,
            Ty::S16,
            Ty::B32,
            Ty::U32,
            Ty::S32,
            Ty::F32,
            Ty::B64,
            Ty::U64,
            Ty::S64,
            Ty::F64,
        ])?;
        m.end()?;
        self.args(s, 2)?;
        match (&s.args[0], &s.args[1]) {
            (Operand::Vector(_), Operand::Vector(_)) => self.refuse(s, "vector to vector move"),
            (Operand::Vector(parts), from) => {
                let part = self.part(s, t, parts.len())?;
                let a = self.src(fr, s, from, t)?;
                let mut all: Option<crate::regs::Alu> = None;
                for (i, p) in parts.iter().enumerate() {
                    if matches!(p, Operand::Sink) {
                        continue;
                    }
                    let d = self.dst(fr, s, p, part)?;
                    let shift = (8 * part.bytes() * i) as u32;
                    let next = match (t.bytes(), part.bytes()) {
                        (4, _) => op1::<u32, u32>(
                            self.ix::<u32>(s, d)?,
                            self.ix::<u32>(s, a)?,
                            move |x| (x >> shift) & 0xffff,
                        ),
                        (_, 2) => op1::<u32, u64>(
                            self.ix::<u32>(s, d)?,
                            self.ix::<u64>(s, a)?,
                            move |x| (x >> shift) as u32 & 0xffff,
                        ),
                        _ => op1::<u32, u64>(
                            self.ix::<u32>(s, d)?,
                            self.ix::<u64>(s, a)?,
                            move |x| (x >> shift) as u32,
                        ),
                    };
                    all = Some(match all {
                        None => next,
                        Some(before) => super::both(before, next),
                    });
                }
                all.map(Op::Alu).map_or_else(|| self.refuse(s, "unpacks into nothing"), Ok)
            }
            (to, Operand::Vector(parts)) => {
                let part = self.part(s, t, parts.len())?;
                let mut from = Vec::new();
                for p in parts {
                    let a = self.src(fr, s, p, part)?;
                    from.push(self.ix::<u32>(s, a)?);
                }
                let d = self.dst(fr, s, to, t)?;
                let shift = 8 * part.bytes() as u32;
                Ok(Op::Alu(if t.bytes() == 4 {
                    let d = self.ix::<u32>(s, d)?;
                    crate::regs::op2::<u32, u32, u32>(d, (from[0], from[1]), |a, b| {
                        (b << 16) | (a & 0xffff)
                    })
                } else {
                    let d = self.ix::<u64>(s, d)?;
                    Box::new(move |r, mask| {
                        let mut out = [0u64; 32];
                        for (i, &a) in from.iter().enumerate() {
                            let x = u32::get(r, a);
                            for l in 0..32 {
                                out[l] |= u64::from(x[l]) << (shift * i as u32);
                            }
                        }
                        u64::put(r, d, &out, mask);
                    })
                }))
            }
            (to, from) => {
                let a = match from {
                    Operand::Var { .. } | Operand::Formal { .. } => {
                        self.address_of(fr, s, from, t)?
                    }
                    _ => self.src(fr, s, from, t)?,
                };
                let d = self.dst(fr, s, to, t)?;
                Ok(Op::Alu(match t.bytes() {
                    0 => op1::<bool, bool>(self.ix::<bool>(s, d)?, self.ix::<bool>(s, a)?, |x| x),
                    8 => op1::<u64, u64>(self.ix::<u64>(s, d)?, self.ix::<u64>(s, a)?, |x| x),
                    _ => op1::<u32, u32>(self.ix::<u32>(s, d)?, self.ix::<u32>(s, a)?, |x| x),
                }))
            }
        }
    }

    /// The element type of a packed `mov`.
    fn part(&self, s: &Stmt, t: Ty, n: usize) -> Ptx<Ty> {
        match (t, n) {
            (Ty::B32, 2) => Ok(Ty::B16),
            (Ty::B64, 2) => Ok(Ty::B32),
            (Ty::B64, 4) => Ok(Ty::B16),
            _ => self.refuse(s, "vector form this device does not know"),
        }
    }
}
