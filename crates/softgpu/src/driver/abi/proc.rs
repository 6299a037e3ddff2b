//! `cuGetProcAddress`: symbols by name, as runtimes look them up.

use crate::driver::codes::{INVALID_VALUE, NOT_FOUND};
use crate::driver::{Out, Text, cuda};

/// Address of an exported function; the newest version this driver has of that name.
fn lookup(name: &str) -> Option<usize> {
    if !name.starts_with("cu") || name.starts_with("cuda") {
        return None;
    }
    let base = super::super::plain(name);
    // Both spellings are asked for: `cuMemAlloc` means `cuMemAlloc_v2` to this function.
    TABLE
        .iter()
        .find(|t| t.0 == format!("{base}_v2"))
        .or_else(|| TABLE.iter().find(|t| t.0 == base))
        .map(|t| (t.1)())
}

macro_rules! table {
    ($($m:ident: $($f:ident)*;)*) => {
        /// Everything exported, by name.
        const TABLE: &[(&str, fn() -> usize)] = &[$($((stringify!($f), || super::$m::$f as *const () as usize)),*),*];
    };
}

table! {
    device: cuInit cuDriverGetVersion cuDeviceGet cuDeviceGetCount cuDeviceGetName cuDeviceGetUuid cuDeviceGetUuid_v2
        cuDeviceGetAttribute cuDeviceTotalMem_v2 cuDeviceCanAccessPeer cuGetErrorName cuGetErrorString;
    context: cuDevicePrimaryCtxRetain cuDevicePrimaryCtxRelease_v2 cuDevicePrimaryCtxReset_v2
        cuDevicePrimaryCtxGetState cuDevicePrimaryCtxSetFlags_v2 cuCtxSetCurrent cuCtxGetCurrent cuCtxPushCurrent_v2
        cuCtxPopCurrent_v2 cuCtxGetDevice cuCtxGetFlags cuCtxSetFlags cuCtxGetStreamPriorityRange cuCtxSynchronize;
    module: cuModuleLoadData cuModuleLoadDataEx cuModuleUnload cuModuleGetFunction cuModuleGetGlobal_v2
        cuFuncGetAttribute cuFuncSetAttribute;
    launch: cuLaunchKernel;
    stream: cuStreamCreate cuStreamCreateWithPriority cuStreamDestroy_v2 cuStreamSynchronize cuStreamQuery
        cuStreamWaitEvent cuStreamGetPriority cuStreamGetFlags cuStreamGetCtx cuStreamIsCapturing
        cuStreamBeginCapture_v2 cuStreamEndCapture;
    graph: cuGraphInstantiateWithFlags cuGraphUpload cuGraphLaunch cuGraphGetNodes cuGraphDestroy cuGraphExecDestroy;
    event: cuEventCreate cuEventRecord cuEventQuery cuEventSynchronize cuEventElapsedTime cuEventElapsedTime_v2
        cuEventDestroy_v2;
    memory: cuMemGetInfo_v2 cuMemAlloc_v2 cuMemAllocAsync cuMemFree_v2 cuMemFreeAsync cuMemAllocManaged
        cuMemAllocHost_v2 cuMemHostAlloc cuMemHostGetDevicePointer_v2 cuMemFreeHost cuMemcpyHtoD_v2 cuMemcpyDtoH_v2
        cuMemcpyDtoD_v2 cuMemcpyHtoDAsync_v2 cuMemcpyDtoHAsync_v2 cuMemcpyDtoDAsync_v2 cuMemsetD8_v2 cuMemsetD32_v2
        cuMemsetD8Async cuMemsetD32Async cuMemPrefetchAsync cuMemPrefetchAsync_v2 cuMemAdvise cuMemAdvise_v2
        cuPointerGetAttribute cuPointerGetAttributes cuMemGetAddressRange_v2;
}

/// Names of all exported driver functions but `cuGetProcAddress` itself.
pub fn exported() -> impl Iterator<Item = &'static str> {
    TABLE.iter().map(|t| t.0)
}

/// Functions whose second version came after CUDA 12.0: an older caller means the first.
fn for_version(name: &str, version: i32) -> Option<usize> {
    let late = matches!(name, "cuMemPrefetchAsync" | "cuMemAdvise" if version < 12020)
        || (name == "cuEventElapsedTime" && version < 12080);
    if late { TABLE.iter().find(|t| t.0 == name).map(|t| (t.1)()) } else { lookup(name) }
}

cuda! {
    /// `cuGetProcAddress`, version 1.
    fn cuGetProcAddress(name: Text, f: Out<usize>, version: i32, _flags: u64) [None, 0] |_d| {
        match for_version(&name.get()?, version) {
            Some(at) => f.set(at),
            None => f.set(0).and(Err(NOT_FOUND)),
        }
    }

    /// `cuGetProcAddress_v2`.
    fn cuGetProcAddress_v2(name: Text, f: Out<usize>, version: i32, flags: u64, status: Out<i32>) [None, 0] |_d| {
        if flags > 2 {
            return Err(INVALID_VALUE);
        }
        let name = name.get()?;
        let own = match name.as_str() {
            "cuGetProcAddress" if version < 12000 => Some(cuGetProcAddress as *const () as usize),
            "cuGetProcAddress" | "cuGetProcAddress_v2" => Some(cuGetProcAddress_v2 as *const () as usize),
            n => for_version(n, version),
        };
        if let Some(at) = own {
            status.maybe(0);
            f.set(at)
        } else {
            status.maybe(1);
            f.set(0).and(Err(NOT_FOUND))
        }
    }
}
