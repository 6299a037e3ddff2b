//! Reads an opcode's modifiers in order and refuses what is left.

use crate::error::PtxError;
use crate::ptx::ast::{Ptx, Stmt, Ty};

/// A cursor over `.a.b.c`.
pub struct Mods<'s> {
    stmt: &'s Stmt,
    at: usize,
}

impl<'s> Mods<'s> {
    /// At the first modifier.
    pub fn new(stmt: &'s Stmt) -> Self {
        Mods { stmt, at: 0 }
    }

    /// The next modifier, not consumed.
    pub fn peek(&self) -> &'s str {
        self.stmt.mods.get(self.at).map_or("", String::as_str)
    }

    /// Consumes `m` if it is next.
    pub fn eat(&mut self, m: &str) -> bool {
        let hit = self.peek() == m;
        self.at += usize::from(hit);
        hit
    }

    /// Consumes any one of `ms`.
    pub fn any(&mut self, ms: &[&str]) -> Option<&'s str> {
        let p = self.peek();
        ms.contains(&p).then(|| {
            self.at += 1;
            p
        })
    }

    /// Consumes the next modifier, whatever it is.
    pub fn next(&mut self) -> &'s str {
        let p = self.peek();
        self.at += 1;
        p
    }

    /// Consumes `m` or refuses.
    pub fn need(&mut self, m: &str) -> Ptx<()> {
        if self.eat(m) { Ok(()) } else { self.refuse(&format!("needs .{m}")) }
    }

    /// Consumes a type among `allowed`.
    pub fn ty(&mut self, allowed: &[Ty]) -> Ptx<Ty> {
        match Ty::named(self.peek()) {
            Some(t) if allowed.contains(&t) => {
                self.at += 1;
                Ok(t)
            }
            _ => self.refuse("modifier or type this device does not know for this instruction"),
        }
    }

    /// Refuses leftovers.
    pub fn end(&self) -> Ptx<()> {
        if self.at >= self.stmt.mods.len() {
            Ok(())
        } else {
            self.refuse("modifier this device does not know for this instruction")
        }
    }

    /// An error that quotes the opcode and the modifier at the cursor.
    pub fn refuse<T>(&self, why: &str) -> Ptx<T> {
        let why = match self.peek() {
            "" => why.to_string(),
            m => format!("{why} (at .{m})"),
        };
        Err(PtxError::new(self.stmt.line, &why, &opcode(self.stmt)))
    }
}

/// The opcode with its modifiers.
pub fn opcode(s: &Stmt) -> String {
    let mut t = s.op.clone();
    for m in &s.mods {
        t.push('.');
        t.push_str(m);
    }
    t
}
