//! Modules, functions and their variables.

use crate::driver::codes::{INVALID_HANDLE, INVALID_IMAGE, INVALID_VALUE, NOT_FOUND};
use crate::driver::state::{Driver, Function, Loaded, Res};
use crate::driver::{In, Out, Text, cuda};
use crate::module::Module;

/// `CU_JIT_*` options that only ask for text.
const LOG_OPTIONS: [u32; 5] = [3, 4, 5, 6, 12];

/// Loads PTX; the error is the code and what to put into the error log.
fn load(d: &mut Driver, out: &Out<u64>, image: &Text) -> Result<(), (i32, String)> {
    let plain = |c| (c, String::new());
    let device = d.device().map_err(plain)?;
    out.wanted().map_err(plain)?;
    d.unsafe_call().map_err(plain)?;
    let text = image.get().map_err(plain)?;
    if text.starts_with("\u{7f}ELF") || !text.contains(".version") {
        return Err((INVALID_IMAGE, "only PTX text can be loaded".into()));
    }
    let module = Module::load(&text, &mut d.mem, device, d.config.sm)
        .map_err(|e| (e.code, e.to_string()))?;
    let h = d.handle();
    d.modules.insert(h, Loaded { device, module });
    out.set(h).map_err(plain)
}

fn finish(d: &Driver, r: Result<(), (i32, String)>) -> Res {
    r.map_err(|(code, why)| {
        if !why.is_empty() {
            eprintln!("softgpu: {}: {why}", d.calls.last().map_or("", |c| c.name));
        }
        code
    })
}

cuda! {
    /// `cuModuleLoadData`.
    fn cuModuleLoadData(module: Out<u64>, image: Text) [None, 0] |d| {
        let r = load(d, &module, &image);
        finish(d, r)
    }

    /// `cuModuleLoadDataEx`: log buffers are filled, other JIT options refused.
    fn cuModuleLoadDataEx(module: Out<u64>, image: Text, n: u32, options: In<u32>, values: In<usize>) [None, 0] |d| {
        let (mut buffer, mut size) = (0usize, 0usize);
        for i in 0..n as usize {
            match (options.get(i)?, values.get(i)?) {
                (5, v) => buffer = v,
                (6, v) => size = v,
                (o, _) if LOG_OPTIONS.contains(&o) => {}
                (o, _) => return d.unsupported(&format!("JIT option {o}")),
            }
        }
        let r = load(d, &module, &image);
        if let Err((_, why)) = &r
            && buffer != 0
            && size > 0
        {
            let log = Out(buffer as *mut u8);
            for (k, b) in why.bytes().take(size - 1).chain([0]).enumerate() {
                log.set_at(k, b)?;
            }
        }
        finish(d, r)
    }

    /// `cuModuleUnload`.
    fn cuModuleUnload(module: u64) [None, 0] |d| {
        d.device()?;
        d.unsafe_call()?;
        let m = d.modules.remove(&module).ok_or(INVALID_HANDLE)?;
        m.module.unload(&mut d.mem);
        d.functions.retain(|_, f| f.module != module);
        Ok(())
    }

    /// `cuModuleGetFunction`.
    fn cuModuleGetFunction(function: Out<u64>, module: u64, name: Text) [None, 0] |d| {
        d.device()?;
        let name = name.get()?;
        let m = d.modules.get(&module).ok_or(INVALID_HANDLE)?;
        let Some(kernel) = m.module.kernel(&name).cloned() else { return Err(NOT_FOUND) };
        let device = m.device;
        let old = d.functions.iter().find(|f| f.1.module == module && f.1.kernel.name == name).map(|f| *f.0);
        let h = old.unwrap_or_else(|| {
            let h = d.handle();
            let max_dynamic = (48usize << 10).saturating_sub(kernel.shared_bytes);
            d.functions.insert(h, Function { module, device, kernel, max_dynamic });
            h
        });
        function.set(h)
    }

    /// `cuModuleGetGlobal_v2`.
    fn cuModuleGetGlobal_v2(ptr: Out<u64>, bytes: Out<usize>, module: u64, name: Text) [None, 0] |d| {
        d.device()?;
        let name = name.get()?;
        let m = d.modules.get(&module).ok_or(INVALID_HANDLE)?;
        let g = m.module.globals.iter().find(|g| g.0 == name).ok_or(NOT_FOUND)?;
        ptr.maybe(g.1);
        bytes.maybe(g.2 as usize);
        Ok(())
    }

    /// `cuFuncGetAttribute`.
    fn cuFuncGetAttribute(value: Out<i32>, which: i32, function: u64) [None, 0] |d| {
        d.device()?;
        let f = d.functions.get(&function).ok_or(INVALID_HANDLE)?;
        let k = &f.kernel;
        value.set(match which {
            0 => k.max_threads.unwrap_or(1024).min(1024) as i32,
            1 => k.shared_bytes as i32,
            2 | 7 => 0,
            3 => k.local_bytes as i32,
            // Virtual registers in units of 32 bits; nothing allocates real ones here.
            4 => (k.counts[0] + 2 * k.counts[1]).min(255) as i32,
            5 => k.built_for.0 as i32,
            6 => k.built_for.1 as i32,
            8 => f.max_dynamic as i32,
            9 => -1,
            _ => return d.unsupported(&format!("function attribute {which}")),
        })
    }

    /// `cuFuncSetAttribute`.
    fn cuFuncSetAttribute(function: u64, which: i32, value: i32) [None, 0] |d| {
        d.device()?;
        let f = d.functions.get_mut(&function).ok_or(INVALID_HANDLE)?;
        match which {
            8 if value >= 0 && f.kernel.shared_bytes + value as usize <= 163 << 10 => {
                f.max_dynamic = value as usize;
                Ok(())
            }
            8 => Err(INVALID_VALUE),
            // Preferred carve-out: a hint.
            9 if (-1..=100).contains(&value) => Ok(()),
            _ => d.unsupported(&format!("function attribute {which}")),
        }
    }
}
