//! From syntax to a runnable kernel: calls inlined, operands resolved, everything unknown refused.

mod arith;
mod bits;
mod compare;
mod control;
mod cvt;
mod memory;
mod mods;

use std::collections::HashMap;

use crate::alu::convert::{F32, Round, narrow};
use crate::error::PtxError;
use crate::inst::{Inst, Kernel, Op, Special};
use crate::ptx::ast::{Func, Imm, Module, Operand, Ptx, Space, Stmt, Ty};
use crate::regs::{Alu, Lane, Slot};
use mods::{Mods, opcode};

/// How deep device functions may call each other. Calls are inlined, so recursion is refused.
const MAX_CALLS: usize = 16;
/// More instructions than this after inlining is a mistake.
const MAX_CODE: usize = 1 << 20;

/// Where a formal parameter of the function being decoded lives.
#[derive(Clone, Copy)]
enum Formal {
    /// In the kernel's parameter block, at this offset.
    Kernel(usize),
    /// In the thread's local memory: a caller's `.param` variable.
    Local(usize),
}

/// One inlined instance of a function.
struct Frame<'m> {
    func: &'m Func,
    regs: Vec<Slot>,
    vars: Vec<i64>,
    formals: Vec<Formal>,
    rets: Vec<usize>,
}

/// State of the decoding of one kernel.
struct Decoder<'m> {
    module: &'m Module,
    globals: &'m [u64],
    code: Vec<Inst>,
    counts: [u32; 3],
    consts: HashMap<(u8, u64), Slot>,
    specials: Vec<(Special, Slot)>,
    names: HashMap<Slot, String>,
    shared: HashMap<(String, usize), i64>,
    shared_bytes: usize,
    dynamic_align: usize,
    local_bytes: usize,
    carry: Option<Slot>,
    chain: Vec<String>,
    /// Reads and writes of the instruction at hand.
    reads: Vec<Slot>,
    writes: Vec<Slot>,
}

fn decoder<'m>(module: &'m Module, globals: &'m [u64]) -> Decoder<'m> {
    Decoder {
        module,
        globals,
        code: vec![],
        counts: [0; 3],
        consts: HashMap::new(),
        specials: vec![],
        names: HashMap::new(),
        shared: HashMap::new(),
        shared_bytes: 0,
        dynamic_align: 16,
        local_bytes: 0,
        carry: None,
        chain: vec![],
        reads: vec![],
        writes: vec![],
    }
}

/// Decode device function `func` only to see that nothing in it is unknown.
pub fn check(module: &Module, func: &Func, globals: &[u64]) -> Ptx<()> {
    let mut d = decoder(module, globals);
    d.layout_shared(func);
    let mut place = |list: &[crate::ptx::ast::Param]| -> Vec<usize> {
        list.iter().map(|p| d.local(p.align, p.size)).collect()
    };
    let formals = place(&func.params).into_iter().map(Formal::Local).collect();
    let rets = place(&func.rets);
    d.chain.push(String::new());
    d.inline(func, formals, rets)
}

/// Decode entry `func`. `globals` are the addresses of `module.vars` (0 for shared ones).
pub fn decode(module: &Module, func: &Func, globals: &[u64]) -> Ptx<Kernel> {
    let mut d = decoder(module, globals);
    d.layout_shared(func);
    let mut params = Vec::new();
    let mut at = 0usize;
    for p in &func.params {
        at = at.next_multiple_of(p.align.max(1));
        params.push((at, p.size));
        at += p.size;
    }
    if at > 4096 {
        return Err(PtxError::new(
            func.line,
            "more than 4096 bytes of kernel parameters",
            &func.name,
        ));
    }
    let formals = params.iter().map(|p| Formal::Kernel(p.0)).collect();
    d.inline(func, formals, vec![])?;

    let [nw, nq, np] = d.counts.map(|n| n as usize);
    let flat = |s: Slot| match s {
        Slot::W(i) => i,
        Slot::Q(i) => nw as u32 + i,
        Slot::P(i) => (nw + nq) as u32 + i,
    };
    // Until here `reads` and `writes` hold slots packed by `pack`; now the class sizes are known.
    for i in &mut d.code {
        for r in i.reads.iter_mut().chain(i.writes.iter_mut()) {
            *r = flat(unpack(*r));
        }
    }
    let mut names = vec![String::new(); nw + nq + np];
    for (s, n) in &d.names {
        names[flat(*s) as usize].clone_from(n);
    }
    let mut consts: Vec<(Slot, u64)> = d.consts.iter().map(|(k, s)| (*s, k.1)).collect();
    consts.sort_by_key(|c| flat(c.0));
    Ok(Kernel {
        name: func.name.clone(),
        code: d.code,
        counts: [nw, nq, np],
        consts,
        specials: d.specials,
        names,
        params,
        param_bytes: at,
        shared_bytes: d.shared_bytes,
        local_bytes: d.local_bytes,
        max_threads: func.req_threads.map(|r| r.iter().product()).or(func.max_threads),
        req_threads: func.req_threads,
        built_for: (module.version.0 * 10 + module.version.1, module.target),
    })
}

fn pack(s: Slot) -> u32 {
    match s {
        Slot::W(i) => i << 2,
        Slot::Q(i) => (i << 2) | 1,
        Slot::P(i) => (i << 2) | 2,
    }
}

fn unpack(v: u32) -> Slot {
    match v & 3 {
        0 => Slot::W(v >> 2),
        1 => Slot::Q(v >> 2),
        _ => Slot::P(v >> 2),
    }
}

impl<'m> Decoder<'m> {
    /// Places every shared variable the entry can reach; dynamic ones start behind all of them.
    fn layout_shared(&mut self, entry: &'m Func) {
        let mut todo = vec![entry];
        let mut seen: Vec<&str> = vec![];
        let mut dynamic = Vec::new();
        let place = |key: (String, usize), align: usize, size: usize, bytes: &mut usize| {
            *bytes = bytes.next_multiple_of(align.max(1));
            let at = *bytes as i64;
            *bytes += size;
            (key, at)
        };
        while let Some(f) = todo.pop() {
            if seen.contains(&f.name.as_str()) {
                continue;
            }
            seen.push(&f.name);
            for (i, v) in f.vars.iter().enumerate().filter(|(_, v)| v.space == Space::Shared) {
                let (k, at) = place((f.name.clone(), i), v.align, v.size, &mut self.shared_bytes);
                self.shared.insert(k, at);
            }
            for s in &f.body {
                let mut names = vec![];
                let mut vars = vec![];
                s.args.iter().for_each(|a| mentioned(a, &mut names, &mut vars));
                for i in vars {
                    let v = &self.module.vars[i];
                    let key = (String::new(), i);
                    if v.space == Space::Shared && !self.shared.contains_key(&key) {
                        if v.dynamic {
                            self.dynamic_align = self.dynamic_align.max(v.align);
                            dynamic.push(i);
                        } else {
                            let (k, at) = place(key, v.align, v.size, &mut self.shared_bytes);
                            self.shared.insert(k, at);
                        }
                    }
                }
                if s.op == "call" {
                    todo.extend(names.iter().filter_map(|n| self.module.func(n)));
                }
            }
        }
        let start = if dynamic.is_empty() {
            0
        } else {
            self.shared_bytes = self.shared_bytes.next_multiple_of(self.dynamic_align);
            self.shared_bytes as i64
        };
        for i in dynamic {
            self.shared.insert((String::new(), i), start);
        }
    }

    fn alloc(&mut self, ty: Ty) -> Slot {
        let class = match ty.bytes() {
            0 => 2,
            8 => 1,
            _ => 0,
        };
        let i = self.counts[class];
        self.counts[class] += 1;
        match class {
            0 => Slot::W(i),
            1 => Slot::Q(i),
            _ => Slot::P(i),
        }
    }

    fn local(&mut self, align: usize, size: usize) -> usize {
        let at = self.local_bytes.next_multiple_of(align.max(1));
        self.local_bytes = at + size;
        at
    }

    /// Decodes `func` at the end of the code; its returns jump behind it (or exit, for the entry).
    fn inline(&mut self, func: &'m Func, formals: Vec<Formal>, rets: Vec<usize>) -> Ptx<()> {
        if self.chain.contains(&func.name) || self.chain.len() >= MAX_CALLS {
            return Err(PtxError::new(func.line, "recursive or too deep calls", &func.name));
        }
        self.chain.push(func.name.clone());
        let mut fr = Frame { func, regs: vec![], vars: vec![], formals, rets };
        for r in &func.regs {
            let s = self.alloc(r.ty);
            self.names.insert(s, r.name.clone());
            fr.regs.push(s);
        }
        for (i, v) in func.vars.iter().enumerate() {
            let at = match v.space {
                Space::Shared => self.shared[&(func.name.clone(), i)],
                _ => self.local(v.align, v.size) as i64,
            };
            fr.vars.push(at);
        }
        let entry = self.chain.len() == 1;
        let mut starts = Vec::with_capacity(func.body.len());
        let mut branches = Vec::new();
        let mut returns = Vec::new();
        for s in &func.body {
            starts.push(self.code.len() as u32);
            if self.code.len() > MAX_CODE {
                return Err(PtxError::new(
                    s.line,
                    "more instructions than this device takes",
                    &func.name,
                ));
            }
            match s.op.as_str() {
                "bra" => {
                    let at = self.branch(&fr, s)?;
                    branches.push((self.code.len(), at));
                    self.push(&fr, s, Op::Branch(0))?;
                }
                "ret" | "exit" => {
                    let mut m = Mods::new(s);
                    if s.op == "ret" {
                        m.eat("uni");
                    }
                    m.end()?;
                    self.args(s, 0)?;
                    if entry || s.op == "exit" {
                        self.push(&fr, s, Op::Exit)?;
                    } else {
                        returns.push(self.code.len());
                        self.push(&fr, s, Op::Branch(0))?;
                    }
                }
                "call" => self.call(&fr, s)?,
                _ => {
                    let op = self.one(&fr, s)?;
                    self.push(&fr, s, op)?;
                }
            }
        }
        // Running off the end of a function returns from it.
        if entry {
            let line = func.body.last().map_or(func.line, |s| s.line);
            self.code.push(Inst {
                guard: None,
                op: Op::Exit,
                reads: Box::new([]),
                writes: Box::new([]),
                line,
                text: "exit".into(),
            });
        }
        for (at, label) in branches {
            self.code[at].op = Op::Branch(starts[label]);
        }
        let end = self.code.len() as u32;
        for at in returns {
            self.code[at].op = Op::Branch(end);
        }
        self.chain.pop();
        Ok(())
    }

    fn push(&mut self, fr: &Frame<'m>, s: &Stmt, op: Op) -> Ptx<()> {
        let guard = match s.guard {
            None => None,
            Some((r, neg)) => match fr.regs[r] {
                Slot::P(i) => {
                    // First, so that the guard is checked for all lanes and the rest for the guarded ones.
                    self.reads.insert(0, Slot::P(i));
                    Some((i, neg))
                }
                _ => {
                    return Err(PtxError::new(
                        s.line,
                        "guard is not a predicate register",
                        &opcode(s),
                    ));
                }
            },
        };
        let fixed = |v: &mut Vec<Slot>| {
            let out = v.iter().copied().map(pack).collect::<Box<[u32]>>();
            v.clear();
            out
        };
        let reads = fixed(&mut self.reads);
        let writes = fixed(&mut self.writes);
        self.code.push(Inst { guard, op, reads, writes, line: s.line, text: opcode(s).into() });
        Ok(())
    }

    /// The opcode table.
    fn one(&mut self, fr: &Frame<'m>, s: &Stmt) -> Ptx<Op> {
        self.reads.clear();
        self.writes.clear();
        let mut m = Mods::new(s);
        match s.op.as_str() {
            "add" | "sub" | "addc" | "subc" => self.add(fr, s, &mut m),
            "mul" | "mad" => self.mul(fr, s, &mut m),
            "fma" => self.fma(fr, s, &mut m),
            "div" | "rem" => self.div(fr, s, &mut m),
            "sqrt" | "rcp" => self.root(fr, s, &mut m),
            "abs" | "neg" => self.sign(fr, s, &mut m),
            "min" | "max" => self.minmax(fr, s, &mut m),
            "copysign" => self.copysign(fr, s, &mut m),
            "and" | "or" | "xor" | "not" => self.logic(fr, s, &mut m),
            "shl" | "shr" => self.shift(fr, s, &mut m),
            "shf" => self.funnel(fr, s, &mut m),
            "popc" | "clz" | "brev" | "bfind" | "fns" => self.count(fr, s, &mut m),
            "bfe" | "bfi" => self.field(fr, s, &mut m),
            "prmt" | "lop3" => self.mix(fr, s, &mut m),
            "setp" => self.setp(fr, s, &mut m),
            "set" => self.set(fr, s, &mut m),
            "selp" | "slct" => self.select(fr, s, &mut m),
            "testp" => self.testp(fr, s, &mut m),
            "cvt" => self.cvt(fr, s, &mut m),
            "cvta" => self.cvta(fr, s, &mut m),
            "mov" => self.mov(fr, s, &mut m),
            "ld" => self.ld(fr, s, &mut m),
            "st" => self.st(fr, s, &mut m),
            "atom" | "red" => self.atom(fr, s, &mut m),
            "bar" | "barrier" => self.bar(fr, s, &mut m),
            "shfl" => self.shfl(fr, s, &mut m),
            "vote" => self.vote(fr, s, &mut m),
            "redux" => self.redux(fr, s, &mut m),
            "match" => self.matching(fr, s, &mut m),
            "activemask" => self.activemask(fr, s, &mut m),
            "membar" | "fence" => self.fence(s, &mut m),
            "trap" => {
                m.end()?;
                self.args(s, 0)?;
                Ok(Op::Trap)
            }
            _ => Err(PtxError::new(s.line, "instruction this device does not know", &opcode(s))),
        }
    }

    fn refuse<T>(&self, s: &Stmt, why: &str) -> Ptx<T> {
        Err(PtxError::new(s.line, why, &opcode(s)))
    }

    fn needs_target(&self, s: &Stmt, sm: u32) -> Ptx<()> {
        if self.module.target >= sm {
            Ok(())
        } else {
            self.refuse(s, &format!("needs .target sm_{sm} or newer"))
        }
    }

    fn args(&self, s: &Stmt, n: usize) -> Ptx<()> {
        if s.args.len() == n {
            Ok(())
        } else {
            self.refuse(s, &format!("takes {n} operands, has {}", s.args.len()))
        }
    }

    fn constant(&mut self, ty: Ty, bits: u64) -> Slot {
        let class = match ty.bytes() {
            0 => 2u8,
            8 => 1,
            _ => 0,
        };
        let bits = match ty.bytes() {
            0 => bits & 1,
            1 => bits & 0xff,
            2 => bits & 0xffff,
            4 => bits & 0xffff_ffff,
            _ => bits,
        };
        if let Some(&s) = self.consts.get(&(class, bits)) {
            return s;
        }
        let s = self.alloc(ty);
        self.consts.insert((class, bits), s);
        s
    }

    /// Checks a register against an instruction type; `wider` allows bigger registers (ld, st, cvt).
    fn fits(&self, s: &Stmt, name: &str, have: Ty, want: Ty, wider: bool) -> Ptx<()> {
        let size = if wider { have.bytes() >= want.bytes() } else { have.bytes() == want.bytes() };
        let kind = if have == Ty::Pred || want == Ty::Pred {
            have == want
        } else if have.is_bits() || want.is_bits() || (have.is_int() && want.is_int()) {
            true
        } else {
            have == want
        };
        if size && kind {
            Ok(())
        } else {
            self.refuse(s, &format!("register {name} of type {have:?} where {want:?} is wanted"))
        }
    }

    /// A source operand of type `ty`.
    fn src(&mut self, fr: &Frame<'m>, s: &Stmt, a: &Operand, ty: Ty) -> Ptx<Slot> {
        self.src_with(fr, s, a, ty, false).map(|x| x.0)
    }

    /// A source that may be wider than `ty`; also its real type.
    fn src_with(
        &mut self,
        fr: &Frame<'m>,
        s: &Stmt,
        a: &Operand,
        ty: Ty,
        wider: bool,
    ) -> Ptx<(Slot, Ty)> {
        match a {
            Operand::Reg(r) => {
                let reg = &fr.func.regs[*r];
                self.fits(s, &reg.name, reg.ty, ty, wider)?;
                self.reads.push(fr.regs[*r]);
                Ok((fr.regs[*r], reg.ty))
            }
            Operand::Imm(i) => {
                let bits = match (*i, ty) {
                    (Imm::Int(v), t) if !t.is_float() => v as u64,
                    (Imm::F32(b), Ty::F32 | Ty::B32) => u64::from(b),
                    (Imm::F64(b), Ty::F64 | Ty::B64) => b,
                    (Imm::F64(b), Ty::F32) => {
                        u64::from(narrow(f64::from_bits(b), F32, Round::Near))
                    }
                    _ => {
                        return self
                            .refuse(s, "literal of another kind than the instruction's type");
                    }
                };
                Ok((self.constant(ty, bits), ty))
            }
            Operand::Special(name) => {
                let Some((what, st)) = Special::named(name) else {
                    return self
                        .refuse(s, &format!("special register {name} this device does not have"));
                };
                self.fits(s, name, st, ty, wider)?;
                if let Some(x) = self.specials.iter().find(|x| x.0 == what) {
                    return Ok((x.1, st));
                }
                let slot = self.alloc(st);
                self.specials.push((what, slot));
                Ok((slot, st))
            }
            _ => self.refuse(s, "operand form this device does not know here"),
        }
    }

    /// A destination register of type `ty`.
    fn dst(&mut self, fr: &Frame<'m>, s: &Stmt, a: &Operand, ty: Ty) -> Ptx<Slot> {
        self.dst_with(fr, s, a, ty, false).map(|x| x.0)
    }

    fn dst_with(
        &mut self,
        fr: &Frame<'m>,
        s: &Stmt,
        a: &Operand,
        ty: Ty,
        wider: bool,
    ) -> Ptx<(Slot, Ty)> {
        match a {
            Operand::Reg(r) => {
                let reg = &fr.func.regs[*r];
                self.fits(s, &reg.name, reg.ty, ty, wider)?;
                self.writes.push(fr.regs[*r]);
                Ok((fr.regs[*r], reg.ty))
            }
            // A result nobody reads still needs a place.
            Operand::Sink => Ok((self.alloc(ty), ty)),
            _ => self.refuse(s, "destination is not a register"),
        }
    }

    fn ix<L: Lane>(&self, s: &Stmt, slot: Slot) -> Ptx<u32> {
        L::index(slot)
            .ok_or_else(|| PtxError::new(s.line, "register of the wrong class", &opcode(s)))
    }

    /// `d = f(a)`.
    fn alu1<D: Lane, A: Lane>(
        &mut self,
        fr: &Frame<'m>,
        s: &Stmt,
        (dt, at): (Ty, Ty),
        f: impl Fn(A) -> D + Send + Sync + 'static,
    ) -> Ptx<Op> {
        self.args(s, 2)?;
        let a = self.src(fr, s, &s.args[1], at)?;
        let d = self.dst(fr, s, &s.args[0], dt)?;
        Ok(Op::Alu(crate::regs::op1(self.ix::<D>(s, d)?, self.ix::<A>(s, a)?, f)))
    }

    /// `d = f(a, b)`.
    fn alu2<D: Lane, A: Lane, B: Lane>(
        &mut self,
        fr: &Frame<'m>,
        s: &Stmt,
        (dt, at, bt): (Ty, Ty, Ty),
        f: impl Fn(A, B) -> D + Send + Sync + 'static,
    ) -> Ptx<Op> {
        self.args(s, 3)?;
        let a = self.src(fr, s, &s.args[1], at)?;
        let b = self.src(fr, s, &s.args[2], bt)?;
        let d = self.dst(fr, s, &s.args[0], dt)?;
        let from = (self.ix::<A>(s, a)?, self.ix::<B>(s, b)?);
        Ok(Op::Alu(crate::regs::op2(self.ix::<D>(s, d)?, from, f)))
    }

    /// `d = f(a, b, c)`.
    fn alu3<D: Lane, A: Lane, B: Lane, C: Lane>(
        &mut self,
        fr: &Frame<'m>,
        s: &Stmt,
        (dt, at, bt, ct): (Ty, Ty, Ty, Ty),
        f: impl Fn(A, B, C) -> D + Send + Sync + 'static,
    ) -> Ptx<Op> {
        self.args(s, 4)?;
        let a = self.src(fr, s, &s.args[1], at)?;
        let b = self.src(fr, s, &s.args[2], bt)?;
        let c = self.src(fr, s, &s.args[3], ct)?;
        let d = self.dst(fr, s, &s.args[0], dt)?;
        let from = (self.ix::<A>(s, a)?, self.ix::<B>(s, b)?, self.ix::<C>(s, c)?);
        Ok(Op::Alu(crate::regs::op3(self.ix::<D>(s, d)?, from, f)))
    }
}

/// Function names and module variables an operand mentions.
fn mentioned<'o>(a: &'o Operand, names: &mut Vec<&'o str>, vars: &mut Vec<usize>) {
    match a {
        Operand::Name(n) => names.push(n),
        Operand::Var { global: true, index, .. } => vars.push(*index),
        Operand::Mem(b, _) => mentioned(b, names, vars),
        Operand::Vector(v) | Operand::List(v) => v.iter().for_each(|x| mentioned(x, names, vars)),
        _ => {}
    }
}

/// Chains operations into one.
fn both(a: Alu, b: Alu) -> Alu {
    Box::new(move |r, m| {
        a(r, m);
        b(r, m);
    })
}
