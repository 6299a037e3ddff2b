//! A loaded module: its variables in memory, its kernels decoded.

use std::sync::Arc;

use crate::decode::decode;
use crate::error::PtxError;
use crate::inst::Kernel;
use crate::memory::managed::Place;
use crate::memory::{Kind, Memory};
use crate::ptx::ast::Space;
use crate::ptx::parse;

/// A loaded module.
pub struct Module {
    /// Entries by name.
    pub kernels: Vec<Arc<Kernel>>,
    /// Variables: name, address, size.
    pub globals: Vec<(String, u64, u64)>,
}

impl Module {
    /// Parses and decodes `text` for a device of compute capability `sm` (75, 80, ...).
    pub fn load(text: &str, mem: &mut Memory, device: u32, sm: u32) -> Result<Module, PtxError> {
        let ast = parse(text)?;
        if ast.target > sm {
            return Err(PtxError::new(
                2,
                "target newer than the device",
                &format!("sm_{} on sm_{sm}", ast.target),
            ));
        }
        let mut module = Module { kernels: vec![], globals: vec![] };
        let mut addresses = Vec::new();
        let mut failed = None;
        for v in &ast.vars {
            let kind = match v.space {
                Space::Global => Kind::ModuleGlobal,
                Space::Const => Kind::ModuleConst,
                _ => {
                    addresses.push(0);
                    continue;
                }
            };
            let Some(at) = mem.alloc(v.size as u64, kind, Some(device)) else {
                failed = Some(PtxError {
                    code: 2,
                    ..PtxError::new(v.line, "no memory for variable", &v.name)
                });
                break;
            };
            if let Some(bytes) = &v.init {
                // SAFETY: `bytes` is a slice of that length.
                let r = unsafe {
                    mem.upload(at, bytes.as_ptr(), bytes.len() as u64, Place::Device(device))
                };
                debug_assert!(r.is_ok(), "initial values are no longer than the variable");
            }
            addresses.push(at);
            module.globals.push((v.name.clone(), at, v.size as u64));
        }
        // A module's own initialisation is no operation of any stream.
        mem.take_spans();
        if failed.is_none() {
            for f in ast.funcs.iter().filter(|f| f.entry) {
                match decode(&ast, f, &addresses) {
                    Ok(k) => module.kernels.push(Arc::new(k)),
                    Err(e) => {
                        failed = Some(e);
                        break;
                    }
                }
            }
        }
        // Device functions that no entry calls are checked as well: nothing unknown goes unnoticed.
        if failed.is_none() {
            failed = ast
                .funcs
                .iter()
                .filter(|f| !f.entry)
                .find_map(|f| crate::decode::check(&ast, f, &addresses).err());
        }
        match failed {
            None => Ok(module),
            Some(e) => {
                module.unload(mem);
                Err(e)
            }
        }
    }

    /// The entry of that name.
    pub fn kernel(&self, name: &str) -> Option<&Arc<Kernel>> {
        self.kernels.iter().find(|k| k.name == name)
    }

    /// Frees the module's variables.
    pub fn unload(&self, mem: &mut Memory) {
        for g in &self.globals {
            mem.free(g.1, &[Kind::ModuleGlobal, Kind::ModuleConst]);
        }
    }
}
