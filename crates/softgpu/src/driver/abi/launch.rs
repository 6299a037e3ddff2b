//! `cuLaunchKernel`.

use crate::driver::codes::{INVALID_HANDLE, INVALID_VALUE};
use crate::driver::ops::Work;
use crate::driver::{In, cuda};

cuda! {
    /// `cuLaunchKernel`, with an array of parameter pointers.
    fn cuLaunchKernel(
        function: u64, gx: u32, gy: u32, gz: u32, bx: u32, by: u32, bz: u32,
        shared: u32, stream: u64, params: In<In<u8>>, extra: In<u64>
    ) [Some(stream), 0] |d| {
        let device = d.device()?;
        let key = d.stream(stream)?;
        let f = d.functions.get(&function).ok_or(INVALID_HANDLE)?;
        let kernel = f.kernel.clone();
        let (of, max_dynamic) = (f.device, f.max_dynamic);
        d.note(kernel.name.clone());
        if of != device {
            return d.refuse(INVALID_HANDLE, "function of another context");
        }
        if !extra.is_null() {
            return d.unsupported("parameters through `extra`");
        }
        let threads = u64::from(bx) * u64::from(by) * u64::from(bz);
        if gx == 0 || gy == 0 || gz == 0 || threads == 0 {
            return d.refuse(INVALID_VALUE, "empty grid or block");
        }
        if gx > i32::MAX as u32 || gy > 65535 || gz > 65535 {
            return d.refuse(INVALID_VALUE, &format!("grid ({gx},{gy},{gz}) beyond the limits"));
        }
        if bx > 1024 || by > 1024 || bz > 64 || threads > 1024 {
            return d.refuse(INVALID_VALUE, &format!("block ({bx},{by},{bz}) beyond the limits"));
        }
        if kernel.max_threads.is_some_and(|m| threads > u64::from(m)) {
            return d.refuse(INVALID_VALUE, &format!("{threads} threads a block, more than the kernel's launch bounds"));
        }
        if kernel.req_threads.is_some_and(|r| r != [bx, by, bz]) {
            return d.refuse(INVALID_VALUE, "block is not the one .reqntid asks for");
        }
        if shared as usize > max_dynamic {
            return d.refuse(INVALID_VALUE, &format!("{shared} bytes of dynamic shared memory, {max_dynamic} allowed"));
        }
        let mut block = vec![0u8; kernel.param_bytes];
        for (i, &(at, size)) in kernel.params.iter().enumerate() {
            let p = params.get(i)?;
            for k in 0..size {
                block[at + k] = p.get(k)?;
            }
        }
        let work = Work::Kernel {
            kernel,
            grid: [gx, gy, gz],
            block: [bx, by, bz],
            dynamic_shared: shared as usize,
            params: block,
        };
        // SAFETY: a kernel has no host pointers; its device accesses are all checked.
        unsafe { d.enqueue(key, work) }
    }
}
