//! Branches, calls, barriers, fences and what lanes of a warp do together.

use super::{Decoder, Formal, Frame, Mods, Op};
use crate::inst::{AtomOp, Meet, Shuffle, Vote};
use crate::ptx::ast::{Imm, Operand, Ptx, Space, Stmt, Ty};

impl<'m> Decoder<'m> {
    /// Checks a `bra` and returns its target statement.
    pub(super) fn branch(&mut self, _fr: &Frame<'m>, s: &Stmt) -> Ptx<usize> {
        self.reads.clear();
        self.writes.clear();
        let mut m = Mods::new(s);
        m.eat("uni");
        m.end()?;
        self.args(s, 1)?;
        match s.args[0] {
            Operand::Label(at) => Ok(at),
            _ => self.refuse(s, "branch to something that is not a label"),
        }
    }

    /// `call (ret), f, (params);` inlined.
    pub(super) fn call(&mut self, fr: &Frame<'m>, s: &Stmt) -> Ptx<()> {
        let mut m = Mods::new(s);
        m.eat("uni");
        m.end()?;
        if s.guard.is_some() {
            return self.refuse(s, "guarded call");
        }
        let mut rest = s.args.as_slice();
        let mut rets = &[][..];
        if let [Operand::List(r), more @ ..] = rest {
            rets = r;
            rest = more;
        }
        let [Operand::Name(name), rest @ ..] = rest else {
            return self.refuse(s, "call of something that is not a function");
        };
        let args = match rest {
            [] => &[][..],
            [Operand::List(a)] => a,
            _ => return self.refuse(s, "indirect call"),
        };
        let module = self.module;
        let Some(f) = module.func(name).filter(|f| !f.entry) else {
            return self.refuse(s, &format!("call of {name}, which this module does not define"));
        };
        if f.params.len() != args.len() || f.rets.len() != rets.len() {
            return self.refuse(s, &format!("call of {name} with another number of parameters"));
        }
        let place = |a: &Operand, size: usize| match a {
            Operand::Var { global: false, index, .. }
                if fr.func.vars[*index].space == Space::Param
                    && fr.func.vars[*index].size == size =>
            {
                Ok(fr.vars[*index] as usize)
            }
            _ => self
                .refuse(s, "call argument that is not a .param variable of the parameter's size"),
        };
        let mut formals = Vec::new();
        for (a, p) in args.iter().zip(&f.params) {
            formals.push(Formal::Local(place(a, p.size)?));
        }
        let mut to = Vec::new();
        for (a, p) in rets.iter().zip(&f.rets) {
            to.push(place(a, p.size)?);
        }
        self.inline(f, formals, to)
    }

    pub(super) fn bar(&mut self, fr: &Frame<'m>, s: &Stmt, m: &mut Mods) -> Ptx<Op> {
        if s.op == "bar" && m.eat("warp") {
            m.need("sync")?;
            m.end()?;
            self.args(s, 1)?;
            let mask = self.src(fr, s, &s.args[0], Ty::B32)?;
            return Ok(Op::Meet(Meet::Barrier, mask));
        }
        m.eat("cta");
        m.need("sync")?;
        let aligned = m.eat("aligned") || s.op == "bar";
        m.end()?;
        self.args(s, 1)?;
        match s.args[0] {
            Operand::Imm(Imm::Int(id @ 0..=15)) => Ok(Op::Barrier { id: id as u32, aligned }),
            _ => self.refuse(s, "barrier that is not a literal from 0 to 15"),
        }
    }

    pub(super) fn fence(&mut self, s: &Stmt, m: &mut Mods) -> Ptx<Op> {
        if s.op == "membar" {
            if m.any(&["cta", "gl", "sys"]).is_none() {
                return m.refuse("needs a level");
            }
        } else {
            m.any(&["sc", "acq_rel"]);
            if m.any(&["cta", "gpu", "sys"]).is_none() {
                return m.refuse("needs a scope");
            }
        }
        m.end()?;
        self.args(s, 0)?;
        Ok(Op::Fence)
    }

    pub(super) fn shfl(&mut self, fr: &Frame<'m>, s: &Stmt, m: &mut Mods) -> Ptx<Op> {
        m.need("sync")?;
        let mode = match m.next() {
            "up" => Shuffle::Up,
            "down" => Shuffle::Down,
            "bfly" => Shuffle::Bfly,
            "idx" => Shuffle::Idx,
            _ => return self.refuse(s, "shuffle mode this device does not know"),
        };
        m.need("b32")?;
        m.end()?;
        self.args(s, 5)?;
        let t = Ty::B32;
        let a = self.src(fr, s, &s.args[1], t)?;
        let b = self.src(fr, s, &s.args[2], t)?;
        let c = self.src(fr, s, &s.args[3], t)?;
        let mask = self.src(fr, s, &s.args[4], t)?;
        let (d, p) = match &s.args[0] {
            Operand::Pair(d, p) => (&**d, Some(&**p)),
            d => (d, None),
        };
        let dest = match d {
            Operand::Sink => None,
            d => Some(self.dst(fr, s, d, t)?),
        };
        let pred = match p {
            None | Some(Operand::Sink) => None,
            Some(p) => Some(self.dst(fr, s, p, Ty::Pred)?),
        };
        Ok(Op::Meet(Meet::Shfl { mode, dest, pred, a, b, c }, mask))
    }

    pub(super) fn vote(&mut self, fr: &Frame<'m>, s: &Stmt, m: &mut Mods) -> Ptx<Op> {
        m.need("sync")?;
        let mode = match m.next() {
            "all" => Vote::All,
            "any" => Vote::Any,
            "uni" => Vote::Uni,
            "ballot" => Vote::Ballot,
            _ => return self.refuse(s, "vote this device does not know"),
        };
        let t = if mode == Vote::Ballot { Ty::B32 } else { Ty::Pred };
        m.ty(&[t])?;
        m.end()?;
        self.args(s, 3)?;
        let (src, negate) = match &s.args[1] {
            Operand::NotReg(r) => (self.src(fr, s, &Operand::Reg(*r), Ty::Pred)?, true),
            a => (self.src(fr, s, a, Ty::Pred)?, false),
        };
        let mask = self.src(fr, s, &s.args[2], Ty::B32)?;
        let dest = self.dst(fr, s, &s.args[0], t)?;
        Ok(Op::Meet(Meet::Vote { mode, dest, src, negate }, mask))
    }

    pub(super) fn redux(&mut self, fr: &Frame<'m>, s: &Stmt, m: &mut Mods) -> Ptx<Op> {
        self.needs_target(s, 80)?;
        m.need("sync")?;
        let (op, allowed): (AtomOp, &[Ty]) = match m.next() {
            "add" => (AtomOp::Add, &[Ty::U32, Ty::S32]),
            "min" => (AtomOp::Min, &[Ty::U32, Ty::S32]),
            "max" => (AtomOp::Max, &[Ty::U32, Ty::S32]),
            "and" => (AtomOp::And, &[Ty::B32]),
            "or" => (AtomOp::Or, &[Ty::B32]),
            "xor" => (AtomOp::Xor, &[Ty::B32]),
            _ => return self.refuse(s, "reduction this device does not know"),
        };
        let t = m.ty(allowed)?;
        m.end()?;
        self.args(s, 3)?;
        let src = self.src(fr, s, &s.args[1], t)?;
        let mask = self.src(fr, s, &s.args[2], Ty::B32)?;
        let dest = self.dst(fr, s, &s.args[0], t)?;
        Ok(Op::Meet(Meet::Redux { op, signed: t.is_signed(), dest, src }, mask))
    }

    pub(super) fn matching(&mut self, fr: &Frame<'m>, s: &Stmt, m: &mut Mods) -> Ptx<Op> {
        m.need("any")?;
        m.need("sync")?;
        let t = m.ty(&[Ty::B32, Ty::B64])?;
        m.end()?;
        self.args(s, 3)?;
        let src = self.src(fr, s, &s.args[1], t)?;
        let mask = self.src(fr, s, &s.args[2], Ty::B32)?;
        let dest = self.dst(fr, s, &s.args[0], Ty::B32)?;
        Ok(Op::Meet(Meet::MatchAny { dest, src }, mask))
    }

    pub(super) fn activemask(&mut self, fr: &Frame<'m>, s: &Stmt, m: &mut Mods) -> Ptx<Op> {
        m.need("b32")?;
        m.end()?;
        self.args(s, 1)?;
        let d = self.dst(fr, s, &s.args[0], Ty::B32)?;
        Ok(Op::ActiveMask(d))
    }
}
