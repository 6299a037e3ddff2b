//! The driver's functions, looked up by name when the driver is first used.
//!
//! cudarc's own wrappers panic where a symbol is missing and return a Rust enum, in which the error
//! codes of a newer driver are undefined behaviour. Its library search and its types serve; the
//! functions are called through pointers that return a plain number.
#![allow(non_snake_case)] // the driver's names

use std::ffi::{c_char, c_int, c_uint, c_void};

use cudarc::driver::sys::{
    self, CUcontext, CUdevice, CUdevice_attribute, CUdeviceptr, CUevent, CUfunction, CUjit_option,
    CUmem_advise, CUmodule, CUstream, CUstreamCaptureStatus,
};

macro_rules! functions {
    ($($name:ident($($argument:ty),*);)*) => {
        /// A pointer for each function; each returns a `CUresult` as a number.
        #[derive(Debug)]
        pub(super) struct Api {
            $(pub $name: unsafe extern "C" fn($($argument),*) -> u32,)*
        }

        // The signatures are those that cudarc generated from cuda.h.
        $(const _: unsafe fn($($argument),*) -> sys::CUresult = sys::$name;)*

        impl Api {
            /// Finds every function; the error is the name of the first that is missing.
            ///
            /// # Safety
            /// `sys::is_culib_present()` was true.
            pub unsafe fn load() -> Result<Self, &'static str> {
                // SAFETY: a library was found, so this does not panic; loading libcuda is sound.
                let library = unsafe { sys::culib() };
                Ok(Self {
                    $($name: {
                        let name = concat!(stringify!($name), "\0");
                        // SAFETY: the type is that of cuda.h (checked above), but for the result,
                        // which C returns as an unsigned int.
                        let symbol = unsafe {
                            library.get::<unsafe extern "C" fn($($argument),*) -> u32>(
                                name.as_bytes(),
                            )
                        };
                        *symbol.map_err(|_| stringify!($name))?
                    },)*
                })
            }
        }
    };
}

functions! {
    cuInit(c_uint);
    cuDriverGetVersion(*mut c_int);
    cuDeviceGet(*mut CUdevice, c_int);
    cuDeviceGetCount(*mut c_int);
    cuDeviceGetAttribute(*mut c_int, CUdevice_attribute, CUdevice);
    cuDevicePrimaryCtxRetain(*mut CUcontext, CUdevice);
    cuCtxPushCurrent_v2(CUcontext);
    cuCtxPopCurrent_v2(*mut CUcontext);
    cuCtxSynchronize();
    cuModuleLoadDataEx(*mut CUmodule, *const c_void, c_uint, *mut CUjit_option, *mut *mut c_void);
    cuModuleUnload(CUmodule);
    cuModuleGetFunction(*mut CUfunction, CUmodule, *const c_char);
    cuMemAlloc_v2(*mut CUdeviceptr, usize);
    cuMemFree_v2(CUdeviceptr);
    cuMemAllocManaged(*mut CUdeviceptr, usize, c_uint);
    cuMemAdvise(CUdeviceptr, usize, CUmem_advise, CUdevice);
    cuMemPrefetchAsync(CUdeviceptr, usize, CUdevice, CUstream);
    cuMemHostAlloc(*mut *mut c_void, usize, c_uint);
    cuMemHostGetDevicePointer_v2(*mut CUdeviceptr, *mut c_void, c_uint);
    cuMemFreeHost(*mut c_void);
    cuMemcpyHtoDAsync_v2(CUdeviceptr, *const c_void, usize, CUstream);
    cuEventCreate(*mut CUevent, c_uint);
    cuEventRecord(CUevent, CUstream);
    cuEventQuery(CUevent);
    cuEventSynchronize(CUevent);
    cuEventDestroy_v2(CUevent);
    cuStreamCreate(*mut CUstream, c_uint);
    cuStreamDestroy_v2(CUstream);
    cuStreamWaitEvent(CUstream, CUevent, c_uint);
    cuStreamSynchronize(CUstream);
    cuStreamIsCapturing(CUstream, *mut CUstreamCaptureStatus);
    cuLaunchKernel(
        CUfunction, c_uint, c_uint, c_uint, c_uint, c_uint, c_uint, c_uint, CUstream,
        *mut *mut c_void, *mut *mut c_void
    );
}

/// `cuGetErrorName` apart from the rest: its argument is an enum in cudarc.
pub(super) type ErrorName = unsafe extern "C" fn(u32, *mut *const c_char) -> u32;

/// Finds `cuGetErrorName`.
///
/// # Safety
/// As [`Api::load`].
pub(super) unsafe fn error_name() -> Result<ErrorName, &'static str> {
    // SAFETY: as in `Api::load`; `CUresult` is an unsigned int in C.
    unsafe { sys::culib().get::<ErrorName>(b"cuGetErrorName\0") }
        .map(|symbol| *symbol)
        .map_err(|_| "cuGetErrorName")
}
