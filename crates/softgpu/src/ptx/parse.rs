//! The parser: directives, declarations, scopes and instructions.

use std::collections::HashMap;

use super::ast::{Func, Imm, Module, Operand, Param, Ptx, Reg, Space, Stmt, Ty, Var};
use super::lexer::{Tok, lex};
use crate::error::{PtxError, UNSUPPORTED_PTX_VERSION};

/// The newest PTX ISA this device reads, as a driver of CUDA 12.0 does.
pub const NEWEST_PTX: (u32, u32) = (8, 0);

/// Parse a whole module.
pub fn parse(text: &str) -> Ptx<Module> {
    let toks = lex(text)?;
    let mut p = Parser {
        toks: &toks,
        at: 0,
        module: Module { version: (0, 0), target: 0, vars: vec![], funcs: vec![] },
    };
    p.module()?;
    Ok(p.module)
}

struct Parser<'t, 'a> {
    toks: &'t [(Tok<'a>, u32)],
    at: usize,
    module: Module,
}

/// What a name means inside a function.
#[derive(Clone, Copy)]
enum Name {
    Reg(usize),
    Var(usize),
}

#[derive(Default)]
struct Scope {
    parent: usize,
    names: HashMap<String, Name>,
    labels: HashMap<String, usize>,
}

impl<'a> Parser<'_, 'a> {
    fn line(&self) -> u32 {
        self.toks.get(self.at).or(self.toks.last()).map_or(1, |t| t.1)
    }

    fn peek(&self) -> Option<Tok<'a>> {
        self.toks.get(self.at).map(|t| t.0)
    }

    fn text(&self) -> String {
        match self.peek() {
            None => "end of file".into(),
            Some(Tok::Word(w)) => w.into(),
            Some(Tok::Str(s)) => format!("\"{s}\""),
            Some(Tok::Punct(c)) => c.into(),
        }
    }

    fn fail<T>(&self, why: &str) -> Ptx<T> {
        Err(PtxError::new(self.line(), why, &self.text()))
    }

    fn is(&self, c: char) -> bool {
        self.peek() == Some(Tok::Punct(c))
    }

    fn eat(&mut self, c: char) -> bool {
        let hit = self.is(c);
        self.at += usize::from(hit);
        hit
    }

    fn expect(&mut self, c: char) -> Ptx<()> {
        if self.eat(c) { Ok(()) } else { self.fail(&format!("expected `{c}`")) }
    }

    fn word(&mut self, what: &str) -> Ptx<&'a str> {
        match self.peek() {
            Some(Tok::Word(w)) => {
                self.at += 1;
                Ok(w)
            }
            _ => self.fail(&format!("expected {what}")),
        }
    }

    fn peek_word(&self) -> Option<&'a str> {
        match self.peek() {
            Some(Tok::Word(w)) => Some(w),
            _ => None,
        }
    }

    fn eat_word(&mut self, w: &str) -> bool {
        let hit = self.peek() == Some(Tok::Word(w));
        self.at += usize::from(hit);
        hit
    }

    fn number(&mut self) -> Ptx<i64> {
        let neg = self.eat('-');
        let w = self.word("a number")?;
        if let Some(Imm::Int(v)) = literal(w) {
            Ok(if neg { v.wrapping_neg() } else { v })
        } else {
            self.at -= 1;
            self.fail("expected an integer")
        }
    }

    fn small(&mut self, limit: i64) -> Ptx<usize> {
        let v = self.number()?;
        if (0..=limit).contains(&v) {
            Ok(v as usize)
        } else {
            self.at -= 1;
            self.fail("number out of range")
        }
    }

    fn module(&mut self) -> Ptx<()> {
        if !self.eat_word(".version") {
            return self.fail("a module starts with .version");
        }
        let v = self.word("a version")?;
        let version = v.split_once('.').and_then(|(a, b)| Some((a.parse().ok()?, b.parse().ok()?)));
        let Some(version) = version else {
            self.at -= 1;
            return self.fail("unreadable version");
        };
        if version > NEWEST_PTX || version < (6, 0) {
            self.at -= 1;
            let mut e = PtxError::new(self.line(), "PTX version outside 6.0 to 8.0", v);
            e.code = UNSUPPORTED_PTX_VERSION;
            return Err(e);
        }
        self.module.version = version;
        if !self.eat_word(".target") {
            return self.fail("expected .target");
        }
        let t = self.word("a target")?;
        match t.strip_prefix("sm_").and_then(|n| n.parse().ok()) {
            Some(n) if (70..=90).contains(&n) => self.module.target = n,
            _ => {
                self.at -= 1;
                return self.fail("target outside sm_70 to sm_90");
            }
        }
        if !self.eat_word(".address_size") {
            return self.fail("expected .address_size");
        }
        if self.number()? != 64 {
            self.at -= 1;
            return self.fail("address size is not 64");
        }
        while self.peek().is_some() {
            self.top()?;
        }
        if let Some(f) = self.module.funcs.iter().find(|f| f.declared_only) {
            return Err(PtxError::new(f.line, "function without a body", &f.name));
        }
        Ok(())
    }

    fn top(&mut self) -> Ptx<()> {
        let mut external = false;
        loop {
            match self.peek_word() {
                // One module is loaded at a time and nothing is linked, so visibility changes nothing.
                Some(".visible" | ".weak") => self.at += 1,
                Some(".extern") => {
                    external = true;
                    self.at += 1;
                }
                _ => break,
            }
        }
        match self.peek_word() {
            Some(".entry") if !external => self.func(true),
            Some(".func") if !external => self.func(false),
            Some(".global" | ".const" | ".shared") => {
                let v = self.var()?;
                if external && !(v.space == Space::Shared && v.dynamic) {
                    return Err(PtxError::new(
                        v.line,
                        "external symbols cannot be linked",
                        &v.name,
                    ));
                }
                if self.module.vars.iter().any(|o| o.name == v.name) {
                    return Err(PtxError::new(v.line, "name declared twice", &v.name));
                }
                self.module.vars.push(v);
                Ok(())
            }
            _ => self.fail("directive this device does not know"),
        }
    }

    /// `.space [.align n] [.v2|.v4] .type name[dims] [= init];`
    fn var(&mut self) -> Ptx<Var> {
        let line = self.line();
        let space = match self.word("a state space")? {
            ".global" => Space::Global,
            ".const" => Space::Const,
            ".shared" => Space::Shared,
            ".local" => Space::Local,
            ".param" => Space::Param,
            _ => {
                self.at -= 1;
                return self.fail("state space this device does not know");
            }
        };
        let (align, ty, lanes) = self.align_type()?;
        let name = self.word("a name")?.to_string();
        let (count, dynamic, dims) = self.dims()?;
        let mut size = lanes * ty.bytes() * count;
        let mut init = None;
        if self.eat('=') {
            if !matches!(space, Space::Global | Space::Const) || lanes != 1 {
                return self.fail("initial value where PTX allows none");
            }
            let mut bytes = Vec::new();
            if dims {
                self.expect('{')?;
                loop {
                    self.init_value(ty, &mut bytes)?;
                    if !self.eat(',') {
                        break;
                    }
                }
                self.expect('}')?;
            } else {
                self.init_value(ty, &mut bytes)?;
            }
            if dynamic {
                size = bytes.len();
            }
            if bytes.len() > size {
                return Err(PtxError::new(line, "more initial values than elements", &name));
            }
            init = Some(bytes);
        } else if dynamic && space != Space::Shared {
            return Err(PtxError::new(line, "array without a size", &name));
        }
        self.expect(';')?;
        Ok(Var { name, space, align, size, init, dynamic, line })
    }

    fn align_type(&mut self) -> Ptx<(usize, Ty, usize)> {
        let mut align = None;
        if self.eat_word(".align") {
            let a = self.small(1 << 16)?;
            if !a.is_power_of_two() {
                self.at -= 1;
                return self.fail("alignment is not a power of two");
            }
            align = Some(a);
        }
        let lanes = if self.eat_word(".v2") {
            2
        } else if self.eat_word(".v4") {
            4
        } else {
            1
        };
        let w = self.word("a type")?;
        match w.strip_prefix('.').and_then(Ty::named) {
            Some(ty) if ty != Ty::Pred => Ok((align.unwrap_or(ty.bytes() * lanes), ty, lanes)),
            _ => {
                self.at -= 1;
                self.fail("type this device does not know")
            }
        }
    }

    fn dims(&mut self) -> Ptx<(usize, bool, bool)> {
        let (mut count, mut dynamic, mut dims) = (1usize, false, false);
        while self.eat('[') {
            if self.eat(']') {
                if dims {
                    return self.fail("only the first dimension may be empty");
                }
                dynamic = true;
                count = 0;
            } else {
                count *= self.small(1 << 30)?;
                self.expect(']')?;
            }
            dims = true;
        }
        Ok((count, dynamic, dims))
    }

    fn init_value(&mut self, ty: Ty, out: &mut Vec<u8>) -> Ptx<()> {
        let neg = self.eat('-');
        let w = self.word("an initial value")?;
        let bits = match (literal(w), ty) {
            (Some(Imm::Int(v)), t) if !t.is_float() => {
                (if neg { v.wrapping_neg() } else { v }) as u64
            }
            (Some(Imm::F32(b)), Ty::F32) if !neg => u64::from(b),
            (Some(Imm::F64(b)), Ty::F64) if !neg => b,
            _ => {
                self.at -= 1;
                return self.fail("initial value this device does not know");
            }
        };
        out.extend_from_slice(&bits.to_le_bytes()[..ty.bytes()]);
        Ok(())
    }

    fn params(&mut self) -> Ptx<Vec<Param>> {
        let mut out = Vec::new();
        self.expect('(')?;
        if self.eat(')') {
            return Ok(out);
        }
        loop {
            if !self.eat_word(".param") {
                return self.fail("parameters live in the .param space");
            }
            // `.param .u64 .ptr .global .align 8 name` is also written with the type first.
            let (mut align, ty, lanes) = self.align_type()?;
            if self.eat_word(".ptr") {
                if matches!(self.peek_word(), Some(".global" | ".const" | ".local" | ".shared")) {
                    self.at += 1;
                }
                if self.eat_word(".align") {
                    self.small(1 << 16)?;
                }
                align = ty.bytes();
            }
            let name = self.word("a parameter name")?.to_string();
            let (count, dynamic, _) = self.dims()?;
            if dynamic || lanes != 1 {
                self.at -= 1;
                return self.fail("parameter form this device does not know");
            }
            out.push(Param { name, align, size: ty.bytes() * count });
            if !self.eat(',') {
                break;
            }
        }
        self.expect(')')?;
        Ok(out)
    }

    fn func(&mut self, entry: bool) -> Ptx<()> {
        let line = self.line();
        self.at += 1;
        let rets = if !entry && self.is('(') { self.params()? } else { vec![] };
        let name = self.word("a function name")?.to_string();
        let params = if self.is('(') { self.params()? } else { vec![] };
        let mut f = Func {
            name,
            entry,
            params,
            rets,
            regs: vec![],
            vars: vec![],
            body: vec![],
            max_threads: None,
            req_threads: None,
            line,
            declared_only: false,
        };
        loop {
            match self.peek_word() {
                Some(".noreturn") if !entry => {
                    return self.fail("directive this device does not know");
                }
                Some(".maxntid" | ".reqntid") if entry => {
                    let req = self.peek_word() == Some(".reqntid");
                    self.at += 1;
                    let mut d = [1u32; 3];
                    for (i, d) in d.iter_mut().enumerate() {
                        if i > 0 && !self.eat(',') {
                            break;
                        }
                        *d = self.small(1 << 20)? as u32;
                    }
                    if req {
                        f.req_threads = Some(d);
                    } else {
                        f.max_threads = Some(d.iter().product());
                    }
                }
                // Register allocation and occupancy advice; no effect on results.
                Some(".minnctapersm" | ".maxnreg") if entry => {
                    self.at += 1;
                    self.small(1 << 20)?;
                }
                _ => break,
            }
        }
        if self.eat(';') {
            f.declared_only = true;
        } else {
            self.body(&mut f)?;
        }
        match self.module.funcs.iter().position(|o| o.name == f.name) {
            Some(i) if self.module.funcs[i].declared_only => self.module.funcs[i] = f,
            Some(_) if f.declared_only => {}
            Some(_) => return Err(PtxError::new(line, "function defined twice", &f.name)),
            None => self.module.funcs.push(f),
        }
        Ok(())
    }

    fn body(&mut self, f: &mut Func) -> Ptx<()> {
        self.expect('{')?;
        let mut scopes = vec![Scope::default()];
        let mut stmt_scope = Vec::new();
        let mut here = 0;
        let mut depth = 1;
        while depth > 0 {
            if self.eat('{') {
                scopes.push(Scope { parent: here, ..Scope::default() });
                here = scopes.len() - 1;
                depth += 1;
            } else if self.eat('}') {
                here = scopes[here].parent;
                depth -= 1;
            } else if self.peek_word() == Some(".reg") {
                self.regs(f, &mut scopes[here])?;
            } else if matches!(self.peek_word(), Some(".shared" | ".local" | ".param")) {
                let v = self.var()?;
                if v.dynamic {
                    return Err(PtxError::new(v.line, "array without a size", &v.name));
                }
                define(&mut scopes[here], &v.name, Name::Var(f.vars.len()), v.line)?;
                f.vars.push(v);
            } else if self.eat_word(".pragma") {
                match self.peek() {
                    // A hint to the optimizer about one loop.
                    Some(Tok::Str("nounroll")) => self.at += 1,
                    _ => return self.fail("pragma this device does not know"),
                }
                self.expect(';')?;
            } else if self.peek_word().is_some()
                && self.toks.get(self.at + 1).map(|t| t.0) == Some(Tok::Punct(':'))
            {
                let line = self.line();
                let name = self.word("a label")?;
                self.at += 1;
                if scopes[here].labels.insert(name.to_string(), f.body.len()).is_some() {
                    return Err(PtxError::new(line, "label defined twice", name));
                }
            } else {
                let s = self.stmt(f, &scopes, here)?;
                f.body.push(s);
                stmt_scope.push(here);
            }
        }
        let end = f.body.len();
        for (s, &scope) in f.body.iter_mut().zip(&stmt_scope) {
            if s.op == "call" {
                continue;
            }
            for a in &mut s.args {
                if let Operand::Name(n) = a {
                    let at = find(&scopes, scope, |sc| sc.labels.get(n.as_str()).copied());
                    match at {
                        Some(i) if i < end => *a = Operand::Label(i),
                        Some(_) => {
                            return Err(PtxError::new(
                                s.line,
                                "label at the end, behind the last instruction",
                                n,
                            ));
                        }
                        None => return Err(PtxError::new(s.line, "unknown name", n)),
                    }
                }
            }
        }
        Ok(())
    }

    /// `.reg .type %r<4>, a, b;`
    fn regs(&mut self, f: &mut Func, scope: &mut Scope) -> Ptx<()> {
        self.at += 1;
        let w = self.word("a register type")?;
        let Some(ty) = w.strip_prefix('.').and_then(Ty::named).filter(|t| t.bytes() != 1) else {
            self.at -= 1;
            return self.fail("register type this device does not know");
        };
        loop {
            let line = self.line();
            let name = self.word("a register name")?;
            if self.eat('<') {
                let n = self.small(1 << 20)?;
                self.expect('>')?;
                for i in 0..n {
                    let name = format!("{name}{i}");
                    define(scope, &name, Name::Reg(f.regs.len()), line)?;
                    f.regs.push(Reg { name, ty });
                }
            } else {
                define(scope, name, Name::Reg(f.regs.len()), line)?;
                f.regs.push(Reg { name: name.to_string(), ty });
            }
            if !self.eat(',') {
                break;
            }
        }
        self.expect(';')
    }

    fn stmt(&mut self, f: &Func, scopes: &[Scope], here: usize) -> Ptx<Stmt> {
        let line = self.line();
        let mut guard = None;
        if self.eat('@') {
            let neg = self.eat('!');
            match self.operand(f, scopes, here)? {
                Operand::Reg(r) if f.regs[r].ty == Ty::Pred => guard = Some((r, neg)),
                _ => {
                    self.at -= 1;
                    return self.fail("guard is not a predicate register");
                }
            }
        }
        let w = self.word("an instruction")?;
        let mut parts = w.split('.');
        let op = parts.next().unwrap_or_default().to_string();
        if op.is_empty() {
            self.at -= 1;
            return self.fail("directive this device does not know");
        }
        let mods = parts.map(str::to_string).collect();
        let mut args = Vec::new();
        if !self.is(';') {
            loop {
                args.push(self.operand(f, scopes, here)?);
                if !self.eat(',') {
                    break;
                }
            }
        }
        self.expect(';')?;
        Ok(Stmt { guard, op, mods, args, line })
    }

    fn operand(&mut self, f: &Func, scopes: &[Scope], here: usize) -> Ptx<Operand> {
        let first = self.simple(f, scopes, here)?;
        if self.eat('|') {
            let second = self.simple(f, scopes, here)?;
            return Ok(Operand::Pair(Box::new(first), Box::new(second)));
        }
        Ok(first)
    }

    fn simple(&mut self, f: &Func, scopes: &[Scope], here: usize) -> Ptx<Operand> {
        if self.eat('{') {
            return Ok(Operand::Vector(self.list('}', f, scopes, here)?));
        }
        if self.eat('(') {
            return Ok(Operand::List(self.list(')', f, scopes, here)?));
        }
        if self.eat('[') {
            let base = self.simple(f, scopes, here)?;
            let mut off = 0;
            if self.eat('+') || self.is('-') {
                off = self.number()?;
            }
            self.expect(']')?;
            return Ok(Operand::Mem(Box::new(base), off));
        }
        if self.eat('!') {
            return match self.simple(f, scopes, here)? {
                Operand::Reg(r) if f.regs[r].ty == Ty::Pred => Ok(Operand::NotReg(r)),
                _ => {
                    self.at -= 1;
                    self.fail("`!` before something that is not a predicate")
                }
            };
        }
        if self.is('-') {
            return Ok(Operand::Imm(Imm::Int(self.number()?)));
        }
        let w = self.word("an operand")?;
        if w == "_" {
            return Ok(Operand::Sink);
        }
        if let Some(imm) = literal(w) {
            return Ok(Operand::Imm(imm));
        }
        if let Some(n) = find(scopes, here, |s| s.names.get(w).copied()) {
            return Ok(match n {
                Name::Reg(r) => Operand::Reg(r),
                Name::Var(v) => Operand::Var { global: false, index: v, offset: 0 },
            });
        }
        if w.starts_with('%') {
            return Ok(Operand::Special(w.to_string()));
        }
        if let Some(index) = f.params.iter().position(|p| p.name == w) {
            return Ok(Operand::Formal { index, offset: 0 });
        }
        if let Some(index) = f.rets.iter().position(|p| p.name == w) {
            return Ok(Operand::FormalRet { index, offset: 0 });
        }
        if let Some(index) = self.module.vars.iter().position(|v| v.name == w) {
            return Ok(Operand::Var { global: true, index, offset: 0 });
        }
        if w.as_bytes()[0].is_ascii_digit() || w.starts_with('.') {
            self.at -= 1;
            return self.fail("unreadable operand");
        }
        Ok(Operand::Name(w.to_string()))
    }

    fn list(&mut self, end: char, f: &Func, scopes: &[Scope], here: usize) -> Ptx<Vec<Operand>> {
        let mut out = Vec::new();
        if self.eat(end) {
            return Ok(out);
        }
        loop {
            out.push(self.simple(f, scopes, here)?);
            if !self.eat(',') {
                break;
            }
        }
        self.expect(end)?;
        Ok(out)
    }
}

fn define(scope: &mut Scope, name: &str, what: Name, line: u32) -> Ptx<()> {
    match scope.names.insert(name.to_string(), what) {
        None => Ok(()),
        Some(_) => Err(PtxError::new(line, "name declared twice", name)),
    }
}

fn find<T>(scopes: &[Scope], mut here: usize, get: impl Fn(&Scope) -> Option<T>) -> Option<T> {
    loop {
        if let Some(x) = get(&scopes[here]) {
            return Some(x);
        }
        if here == 0 {
            return None;
        }
        here = scopes[here].parent;
    }
}

/// A number as PTX writes it, or `None`.
fn literal(w: &str) -> Option<Imm> {
    let b = w.as_bytes();
    if !b.first()?.is_ascii_digit() {
        return None;
    }
    let rest = w.get(2..).unwrap_or("");
    if b[0] == b'0' && b.len() > 1 {
        match b[1] {
            b'f' | b'F' if rest.len() == 8 => {
                return u32::from_str_radix(rest, 16).ok().map(Imm::F32);
            }
            b'd' | b'D' if rest.len() == 16 => {
                return u64::from_str_radix(rest, 16).ok().map(Imm::F64);
            }
            b'x' | b'X' => {
                return u64::from_str_radix(rest.trim_end_matches('U'), 16)
                    .ok()
                    .map(|v| Imm::Int(v as i64));
            }
            b'b' | b'B' => {
                return u64::from_str_radix(rest.trim_end_matches('U'), 2)
                    .ok()
                    .map(|v| Imm::Int(v as i64));
            }
            _ => {}
        }
    }
    if w.contains('.') {
        // A decimal float is an f64 by PTX's rules; `1.` and exponents included.
        return w.parse::<f64>().ok().map(|v| Imm::F64(v.to_bits()));
    }
    let d = w.trim_end_matches('U');
    if d.len() > 1 && d.starts_with('0') {
        return u64::from_str_radix(d, 8).ok().map(|v| Imm::Int(v as i64));
    }
    d.parse::<u64>().ok().map(|v| Imm::Int(v as i64))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn module(body: &str) -> Ptx<Module> {
        parse(&format!(".version 8.0\n.target sm_75\n.address_size 64\n{body}"))
    }

    #[test]
    fn literals_read_as_ptx_writes_them() {
        assert_eq!(literal("0f3F800000"), Some(Imm::F32(0x3f80_0000)));
        assert_eq!(literal("0d3FF0000000000000"), Some(Imm::F64(0x3ff0_0000_0000_0000)));
        assert_eq!(literal("0xffffffff"), Some(Imm::Int(0xffff_ffff)));
        assert_eq!(literal("017"), Some(Imm::Int(15)));
        assert_eq!(literal("0"), Some(Imm::Int(0)));
        assert_eq!(literal("0b101"), Some(Imm::Int(5)));
        assert_eq!(literal("18446744073709551615"), Some(Imm::Int(-1)));
        assert_eq!(literal("0f3F80"), None);
        assert_eq!(literal("12x"), None);
    }

    #[test]
    fn inner_scopes_shadow_and_labels_are_local() {
        let m = module(
            ".entry k() { .reg .u32 a; mov.u32 a, 1; { .reg .u32 a; L: mov.u32 a, 2; bra L; } { L: bra L; } ret; }",
        )
        .unwrap();
        let f = &m.funcs[0];
        assert_eq!(f.regs.len(), 2);
        assert_eq!(f.body[0].args[0], Operand::Reg(0));
        assert_eq!(f.body[1].args[0], Operand::Reg(1));
        assert_eq!(f.body[2].args[0], Operand::Label(1));
        assert_eq!(f.body[3].args[0], Operand::Label(3));
    }

    #[test]
    fn refusals_name_line_and_text() {
        for (src, line, text) in [
            (".entry k() { bra L; }", 4, "L"),
            (".entry k() {\n .reg .u32 a, a; }", 5, "a"),
            (".section .debug { }", 4, ".section"),
            (".entry k() {\n.loc 1 2 3\nret; }", 5, ".loc"),
            (".entry k() .unknown 3 { ret; }", 4, ".unknown"),
            (".tex .u32 t;", 4, ".tex"),
            (".entry k(.param .q64 x) { ret; }", 4, ".q64"),
            (".entry k() { .pragma \"other\"; ret; }", 4, "\"other\""),
            (".extern .func f();", 4, ".func"),
            (".extern .global .u32 x;", 4, "x"),
            (".entry k() { .reg .u8 a; ret; }", 4, ".u8"),
            (".func f(); .entry k() { ret; }", 4, "f"),
        ] {
            let e = module(src).expect_err(src);
            assert_eq!((e.line, e.text.as_str()), (line, text), "{src}: {e}");
        }
    }

    #[test]
    fn versions_and_targets_are_checked() {
        let e = parse(".version 9.0\n.target sm_75\n.address_size 64").unwrap_err();
        assert_eq!(e.code, UNSUPPORTED_PTX_VERSION);
        assert!(parse(".version 8.0\n.target sm_30\n.address_size 64").is_err());
        assert!(parse(".version 8.0\n.target sm_75, debug\n.address_size 64").is_err());
        assert!(parse(".version 8.0\n.target sm_75\n.address_size 32").is_err());
    }
}
