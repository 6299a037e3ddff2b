//! `ld`, `st`, `atom`, `red`, and addresses of variables.

use super::{Decoder, Formal, Frame, Mods, Op};
use crate::inst::{Addr, Atom, AtomOp, Mem};
use crate::ptx::ast::{Operand, Ptx, Space, Stmt, Ty};
use crate::regs::Slot;

const MEM: &[Ty] = &[
    Ty::B8,
    Ty::U8,
    Ty::S8,
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
    /// Space and address of a variable or formal parameter.
    fn place(&self, fr: &Frame<'m>, s: &Stmt, a: &Operand) -> Ptx<(Space, i64)> {
        match a {
            Operand::Var { global: true, index, offset } => {
                let v = &self.module.vars[*index];
                let base = match v.space {
                    Space::Shared => self.shared[&(String::new(), *index)],
                    _ => self.globals[*index] as i64,
                };
                Ok((v.space, base + offset))
            }
            Operand::Var { index, offset, .. } => {
                let v = &fr.func.vars[*index];
                Ok((v.space, fr.vars[*index] + offset))
            }
            Operand::Formal { index, offset } => match fr.formals[*index] {
                Formal::Kernel(at) => Ok((Space::Param, at as i64 + offset)),
                Formal::Local(at) => Ok((Space::Local, at as i64 + offset)),
            },
            Operand::FormalRet { index, offset } => {
                Ok((Space::Local, fr.rets[*index] as i64 + offset))
            }
            _ => self.refuse(s, "not a variable"),
        }
    }

    /// The address of a variable, as `mov` and `cvta` take it.
    pub(super) fn address_of(&mut self, fr: &Frame<'m>, s: &Stmt, a: &Operand, t: Ty) -> Ptx<Slot> {
        if t.bytes() < 4 || t.is_float() {
            return self.refuse(s, "address in a register of that type");
        }
        let (space, at) = self.place(fr, s, a)?;
        let call_param = matches!(a, Operand::Var { global: false, index, .. } if fr.func.vars[*index].space == Space::Param)
            || (matches!(a, Operand::Formal { .. }) && space == Space::Local);
        if call_param {
            return self.refuse(s, "address of a call parameter");
        }
        if t.bytes() == 4 && matches!(space, Space::Global | Space::Const) {
            return self.refuse(s, "global address in 32 bits");
        }
        Ok(self.constant(t, at as u64))
    }

    /// An address operand in `space`; a call's `.param` variables turn out to be local.
    fn addr(&mut self, fr: &Frame<'m>, s: &Stmt, a: &Operand, space: Space) -> Ptx<(Space, Addr)> {
        let Operand::Mem(base, offset) = a else {
            return self.refuse(s, "operand is not an address in brackets");
        };
        match &**base {
            Operand::Reg(r) => {
                let reg = &fr.func.regs[*r];
                let ok = match reg.ty {
                    Ty::B64 | Ty::U64 | Ty::S64 => true,
                    Ty::B32 | Ty::U32 | Ty::S32 => {
                        matches!(space, Space::Shared | Space::Local | Space::Param)
                    }
                    _ => false,
                };
                if !ok {
                    return self.refuse(
                        s,
                        &format!("register {} of type {:?} as an address", reg.name, reg.ty),
                    );
                }
                self.reads.push(fr.regs[*r]);
                if space == Space::Param && self.chain.len() > 1 {
                    return self
                        .refuse(s, "parameter by computed address inside a device function");
                }
                Ok((space, Addr { base: Some(fr.regs[*r]), offset: *offset }))
            }
            Operand::Imm(crate::ptx::ast::Imm::Int(v)) => {
                Ok((space, Addr { base: None, offset: v + offset }))
            }
            v @ (Operand::Var { .. } | Operand::Formal { .. } | Operand::FormalRet { .. }) => {
                let (declared, at) = self.place(fr, s, v)?;
                let is_param = matches!(v, Operand::Formal { .. } | Operand::FormalRet { .. })
                    || declared == Space::Param;
                let matches = if is_param {
                    space == Space::Param
                } else {
                    space == declared
                        || (space == Space::Generic
                            && matches!(declared, Space::Global | Space::Const))
                };
                if !matches {
                    return self.refuse(s, "variable of another state space");
                }
                // Call parameters live in the thread's local memory; kernel parameters in their block.
                let real = match (is_param, v) {
                    (true, Operand::Var { .. }) => Space::Local,
                    (true, _) => declared,
                    _ => space,
                };
                Ok((real, Addr { base: None, offset: at + offset }))
            }
            _ => self.refuse(s, "address form this device does not know"),
        }
    }

    /// Modifiers between `ld`/`st` and the type; returns the space and the vector width.
    fn how(&self, m: &mut Mods, store: bool) -> Ptx<(Space, usize)> {
        let volatile = m.eat("volatile");
        let ordered = if volatile || m.eat("weak") {
            false
        } else {
            let kinds: &[&str] =
                if store { &["relaxed", "release"] } else { &["relaxed", "acquire"] };
            let hit = m.any(kinds).is_some();
            if hit && m.any(&["cta", "gpu", "sys"]).is_none() {
                return m.refuse("needs a scope");
            }
            hit
        };
        let space = match m.any(&[
            "global",
            "shared",
            "shared::cta",
            "local",
            "const",
            "param",
            "param::entry",
            "param::func",
        ]) {
            None => Space::Generic,
            Some("global") => Space::Global,
            Some("local") => Space::Local,
            Some("const") if !store => Space::Const,
            Some("shared" | "shared::cta") => Space::Shared,
            Some("param" | "param::func") => Space::Param,
            Some("param::entry") if !store => Space::Param,
            Some(_) => return m.refuse("state space that cannot be stored to"),
        };
        if !volatile && !ordered {
            // Cache hints change timing only.
            if store {
                m.any(&["wb", "cg", "cs", "wt"]);
            } else {
                m.any(&["ca", "cg", "cs", "lu", "cv"]);
                if space == Space::Global {
                    m.eat("nc");
                }
            }
            m.any(&[
                "L1::evict_normal",
                "L1::evict_unchanged",
                "L1::evict_first",
                "L1::evict_last",
                "L1::no_allocate",
            ]);
            if !store {
                m.any(&["L2::64B", "L2::128B", "L2::256B"]);
            }
        }
        let n = match m.any(&["v2", "v4"]) {
            None => 1,
            Some("v2") => 2,
            Some(_) => 4,
        };
        Ok((space, n))
    }

    pub(super) fn ld(&mut self, fr: &Frame<'m>, s: &Stmt, m: &mut Mods) -> Ptx<Op> {
        let (space, n) = self.how(m, false)?;
        let ty = m.ty(MEM)?;
        m.end()?;
        self.args(s, 2)?;
        self.vector_size(s, n, ty)?;
        let (space, addr) = self.addr(fr, s, &s.args[1], space)?;
        let parts: Vec<&Operand> = match (&s.args[0], n) {
            (Operand::Vector(v), 2 | 4) if v.len() == n => v.iter().collect(),
            (one, 1) if !matches!(one, Operand::Vector(_)) => vec![one],
            _ => {
                return self
                    .refuse(s, "as many destinations as the vector has elements are needed");
            }
        };
        let mut regs = Vec::new();
        let mut keep = u64::MAX;
        for p in parts {
            regs.push(if p == &Operand::Sink {
                None
            } else {
                let (slot, have) = self.dst_with(fr, s, p, ty, true)?;
                if have.bytes() < 8 {
                    keep &= (1 << (8 * have.bytes())) - 1;
                }
                Some(slot)
            });
        }
        Ok(Op::Load(Mem { space, ty, regs, keep, addr }))
    }

    pub(super) fn st(&mut self, fr: &Frame<'m>, s: &Stmt, m: &mut Mods) -> Ptx<Op> {
        let (space, n) = self.how(m, true)?;
        let ty = m.ty(MEM)?;
        m.end()?;
        self.args(s, 2)?;
        self.vector_size(s, n, ty)?;
        let (space, addr) = self.addr(fr, s, &s.args[0], space)?;
        if space == Space::Param {
            return self.refuse(s, "store to a kernel parameter");
        }
        let parts: Vec<&Operand> = match (&s.args[1], n) {
            (Operand::Vector(v), 2 | 4) if v.len() == n => v.iter().collect(),
            (one, 1) if !matches!(one, Operand::Vector(_)) => vec![one],
            _ => return self.refuse(s, "as many sources as the vector has elements are needed"),
        };
        let mut regs = Vec::new();
        for p in parts {
            regs.push(Some(self.src_with(fr, s, p, ty, true)?.0));
        }
        Ok(Op::Store(Mem { space, ty, regs, keep: u64::MAX, addr }))
    }

    fn vector_size(&self, s: &Stmt, n: usize, ty: Ty) -> Ptx<()> {
        if n * ty.bytes() > 16 {
            self.refuse(s, "vector access of more than 16 bytes")
        } else {
            Ok(())
        }
    }

    pub(super) fn atom(&mut self, fr: &Frame<'m>, s: &Stmt, m: &mut Mods) -> Ptx<Op> {
        let red = s.op == "red";
        m.any(if red {
            &["relaxed", "release"][..]
        } else {
            &["relaxed", "acquire", "release", "acq_rel"][..]
        });
        let scopes = &["cta", "gpu", "sys"];
        let scope_first = m.any(scopes).is_some();
        let space = match m.any(&["global", "shared", "shared::cta"]) {
            None => Space::Generic,
            Some("global") => Space::Global,
            Some(_) => Space::Shared,
        };
        if !scope_first {
            m.any(scopes); // NVRTC writes `atom.global.sys`, which is not the manual's order
        }
        let name = m.next();
        let ints = [Ty::U32, Ty::S32, Ty::U64, Ty::S64];
        let (op, allowed): (AtomOp, &[Ty]) = match name {
            "add" => (AtomOp::Add, &[Ty::U32, Ty::S32, Ty::U64, Ty::F32, Ty::F64]),
            "min" => (AtomOp::Min, &ints),
            "max" => (AtomOp::Max, &ints),
            "and" => (AtomOp::And, &[Ty::B32, Ty::B64]),
            "or" => (AtomOp::Or, &[Ty::B32, Ty::B64]),
            "xor" => (AtomOp::Xor, &[Ty::B32, Ty::B64]),
            "inc" => (AtomOp::Inc, &[Ty::U32]),
            "dec" => (AtomOp::Dec, &[Ty::U32]),
            "exch" if !red => (AtomOp::Exch, &[Ty::B32, Ty::B64]),
            "cas" if !red => (AtomOp::Cas, &[Ty::B32, Ty::B64]),
            _ => return self.refuse(s, "atomic operation this device does not know"),
        };
        let ty = m.ty(allowed)?;
        m.end()?;
        let first = usize::from(!red);
        self.args(s, first + 2 + usize::from(op == AtomOp::Cas))?;
        let (space, addr) = self.addr(fr, s, &s.args[first], space)?;
        let b = self.src(fr, s, &s.args[first + 1], ty)?;
        let c =
            if op == AtomOp::Cas { Some(self.src(fr, s, &s.args[first + 2], ty)?) } else { None };
        let dest = match s.args.first() {
            Some(Operand::Sink) => None,
            Some(d) if !red => Some(self.dst(fr, s, d, ty)?),
            _ => None,
        };
        Ok(Op::Atom(Atom { space, op, ty, dest, addr, b, c }))
    }
}
