//! The kernels: PTX as shipped, compiled by the driver once a context.

use std::ffi::{CStr, CString, c_void};
use std::ptr::null_mut;

use cudarc::driver::sys::{CUfunction, CUjit_option, CUmodule};

use super::driver::Context;
use crate::error::{Error, Result};

/// Compute capability and PTX, oldest first.
const TARGETS: [(u32, &str); 2] = [
    (75, include_str!("../../kernels/ptx/qadam_sm_75.ptx")),
    (80, include_str!("../../kernels/ptx/qadam_sm_80.ptx")),
];

/// The kernels' handles, which live as long as their context.
#[derive(Debug, Clone, Copy)]
pub(super) struct Kernels {
    /// `qadam_step(const Table*)`.
    pub step: CUfunction,
    /// `qadam_count(const Table*, u64* counts)`.
    pub count: CUfunction,
    /// `qadam_measure(const Table*)`, before `step` where a tensor asks for it.
    pub measure: CUfunction,
    /// `qadam_squares(const Table*)`.
    pub squares: CUfunction,
    /// `qadam_cut(const Table*)`, behind `squares`.
    pub cut: CUfunction,
}

/// The newest PTX that a device of this capability runs.
fn newest(capability: u32, ordinal: usize) -> Result<&'static str> {
    let fits = TARGETS.iter().rev().find(|(target, _)| *target <= capability);
    fits.map(|(_, text)| *text).ok_or_else(|| {
        let (major, minor) = (capability / 10, capability % 10);
        let reason = format!(
            "device {ordinal} has compute capability {major}.{minor}; 7.5 (Turing) or later is \
             needed"
        );
        Error::CudaUnavailable { reason }
    })
}

impl Kernels {
    /// Compiles and loads them.
    pub fn load(context: &'static Context) -> Result<Self> {
        let text = newest(context.capability()?, context.ordinal)?;
        let image = CString::new(text).map_err(|_| Error::CudaUnavailable {
            reason: "the kernels' PTX holds a NUL".to_owned(),
        })?;
        let _current = context.enter()?;
        let module = compile(context, &image)?;
        let find = |name: &CStr| {
            let mut function = null_mut();
            let api = &context.driver.api;
            // SAFETY: writes a handle; the module was just loaded, the name ends with a NUL.
            let code =
                unsafe { (api.cuModuleGetFunction)(&raw mut function, module, name.as_ptr()) };
            context.check(code, || format!("looking for the kernel {name:?}"))?;
            Ok(function)
        };
        let all = || {
            Ok(Self {
                step: find(c"qadam_step")?,
                count: find(c"qadam_count")?,
                measure: find(c"qadam_measure")?,
                squares: find(c"qadam_squares")?,
                cut: find(c"qadam_cut")?,
            })
        };
        let kernels = all();
        if kernels.is_err() {
            // SAFETY: loaded above, and nothing refers to it.
            let _ = unsafe { (context.driver.api.cuModuleUnload)(module) };
        }
        kernels
    }
}

fn compile(context: &Context, image: &CStr) -> Result<CUmodule> {
    let mut log = [0_u8; 2048];
    let mut options =
        [CUjit_option::CU_JIT_ERROR_LOG_BUFFER, CUjit_option::CU_JIT_ERROR_LOG_BUFFER_SIZE_BYTES];
    // The size is passed in the pointer's place.
    let mut values: [*mut c_void; 2] =
        [log.as_mut_ptr().cast(), std::ptr::without_provenance_mut(log.len())];
    let mut module = null_mut();
    // SAFETY: a NUL-terminated image, two options with a value each, and a log as long as said.
    let code = unsafe {
        (context.driver.api.cuModuleLoadDataEx)(
            &raw mut module,
            image.as_ptr().cast(),
            2,
            options.as_mut_ptr(),
            values.as_mut_ptr(),
        )
    };
    context.check(code, || {
        let length = log.iter().position(|&byte| byte == 0).unwrap_or(log.len());
        let log = String::from_utf8_lossy(&log[..length]);
        format!("loading the kernels ({})", log.trim())
    })?;
    Ok(module)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_newest_target_that_fits_is_chosen() {
        for (capability, target) in [(75, "sm_75"), (79, "sm_75"), (80, "sm_80"), (121, "sm_80")] {
            let text = newest(capability, 0).unwrap();
            assert!(text.contains(&format!(".target {target}\n")), "{capability}");
        }
        let text = newest(70, 3).unwrap_err().to_string();
        assert!(text.contains("device 3 has compute capability 7.0; 7.5"), "{text}");
    }
}
