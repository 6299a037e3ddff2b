//! Device, managed and pinned memory, streams and events, freed when they are dropped.
//!
//! Dropping makes the context current for itself and ignores errors: at the end of the process the
//! driver may be gone, and with a lost context the memory is.

use std::ffi::c_void;
use std::ptr::{NonNull, null_mut};

use cudarc::driver::sys::{
    CU_MEMHOSTALLOC_DEVICEMAP, CU_MEMHOSTALLOC_PORTABLE, CUevent, CUevent_flags, CUmem_advise,
    CUmemAttach_flags, CUstream, CUstream_flags,
};

use super::driver::Context;
use crate::error::{Error, Result};

/// Memory of a device.
#[derive(Debug)]
pub(super) struct DeviceMemory {
    context: &'static Context,
    pub address: u64,
    pub bytes: usize,
}

impl DeviceMemory {
    /// Allocates; the contents are arbitrary. The context is current.
    pub fn new(context: &'static Context, bytes: usize, what: &str) -> Result<Self> {
        let mut address = 0;
        // SAFETY: writes an address.
        let code = unsafe { (context.driver.api.cuMemAlloc_v2)(&raw mut address, bytes) };
        context.check(code, || format!("allocating {bytes} bytes for {what}"))?;
        Ok(Self { context, address, bytes })
    }
}

impl Drop for DeviceMemory {
    fn drop(&mut self) {
        if let Ok(_current) = self.context.enter() {
            // SAFETY: allocated by `new`; the driver waits for work that uses it.
            let _ = unsafe { (self.context.driver.api.cuMemFree_v2)(self.address) };
        }
    }
}

/// Memory whose pages the driver moves between the host and the devices.
#[derive(Debug)]
pub(crate) struct ManagedMemory {
    context: &'static Context,
    pub address: u64,
    pub bytes: usize,
}

impl ManagedMemory {
    /// Allocates; the contents are arbitrary, and no page is anywhere yet. The context is current.
    pub fn new(context: &'static Context, bytes: usize) -> Result<Self> {
        let mut address = 0;
        let everywhere = CUmemAttach_flags::CU_MEM_ATTACH_GLOBAL as u32;
        let api = &context.driver.api;
        // SAFETY: writes an address.
        let code = unsafe { (api.cuMemAllocManaged)(&raw mut address, bytes, everywhere) };
        context.check(code, || format!("allocating {bytes} bytes of managed memory"))?;
        Ok(Self { context, address, bytes })
    }

    /// Keeps all pages mapped for the device, wherever they are. The context is current, and the
    /// device has concurrent access.
    pub fn map_for_device(&self) -> Result<()> {
        let Self { context, address, bytes } = *self;
        let advice = CUmem_advise::CU_MEM_ADVISE_SET_ACCESSED_BY;
        // SAFETY: this allocation, all of it.
        let code =
            unsafe { (context.driver.api.cuMemAdvise)(address, bytes, advice, context.device) };
        context.check(code, || format!("mapping {bytes} bytes of managed memory"))
    }
}

impl Drop for ManagedMemory {
    fn drop(&mut self) {
        // Where this fails, the context may be current all the same: it is when `Arena::new` drops.
        let _current = self.context.enter();
        // SAFETY: allocated by `new`; the driver waits for work that uses it.
        let _ = unsafe { (self.context.driver.api.cuMemFree_v2)(self.address) };
    }
}

/// Pinned host memory that the device can reach, zeroed.
#[derive(Debug)]
pub(super) struct Pinned {
    context: &'static Context,
    host: NonNull<c_void>,
    /// Its address for the device.
    pub device: u64,
    pub bytes: usize,
}

// SAFETY: plain memory, not bound to a thread.
unsafe impl Send for Pinned {}
// SAFETY: a shared `Pinned` only tells where the memory is.
unsafe impl Sync for Pinned {}

impl Pinned {
    /// Allocates and zeroes. The context is current.
    pub fn new(context: &'static Context, bytes: usize, what: &str) -> Result<Self> {
        let api = &context.driver.api;
        let doing = || format!("allocating {bytes} bytes of pinned memory for {what}");
        let mut host = null_mut();
        let flags = CU_MEMHOSTALLOC_PORTABLE | CU_MEMHOSTALLOC_DEVICEMAP;
        // SAFETY: writes a pointer.
        let code = unsafe { (api.cuMemHostAlloc)(&raw mut host, bytes, flags) };
        context.check(code, doing)?;
        let Some(host) = NonNull::new(host) else {
            return Err(Error::Cuda { name: "a null pointer".to_owned(), code: 0, doing: doing() });
        };
        let mut memory = Self { context, host, device: 0, bytes };
        // SAFETY: just allocated, so many bytes.
        unsafe { host.write_bytes(0, bytes) };
        let device = &raw mut memory.device;
        // SAFETY: writes an address; the memory was allocated with DEVICEMAP.
        let code = unsafe { (api.cuMemHostGetDevicePointer_v2)(device, host.as_ptr(), 0) };
        context.check(code, || format!("mapping pinned memory for {what}"))?;
        Ok(memory)
    }

    /// The first element; memory of the driver's is aligned to more than any.
    pub const fn host<T>(&self) -> *mut T {
        self.host.as_ptr().cast()
    }
}

impl Drop for Pinned {
    fn drop(&mut self) {
        if let Ok(_current) = self.context.enter() {
            // SAFETY: allocated by `new`; the owner waited for work that uses it.
            let _ = unsafe { (self.context.driver.api.cuMemFreeHost)(self.host.as_ptr()) };
        }
    }
}

/// An event without a time stamp.
#[derive(Debug)]
pub(super) struct Event {
    context: &'static Context,
    pub handle: CUevent,
}

// SAFETY: an event may be used from any thread.
unsafe impl Send for Event {}
// SAFETY: a shared `Event` only tells its handle.
unsafe impl Sync for Event {}

impl Event {
    /// Makes one. The context is current.
    pub fn new(context: &'static Context) -> Result<Self> {
        let mut handle = null_mut();
        let flags = CUevent_flags::CU_EVENT_DISABLE_TIMING as u32;
        // SAFETY: writes a handle.
        let code = unsafe { (context.driver.api.cuEventCreate)(&raw mut handle, flags) };
        context.check(code, || "creating an event".to_owned())?;
        Ok(Self { context, handle })
    }
}

impl Drop for Event {
    fn drop(&mut self) {
        if let Ok(_current) = self.context.enter() {
            // SAFETY: created by `new`; work that waits for it is not affected.
            let _ = unsafe { (self.context.driver.api.cuEventDestroy_v2)(self.handle) };
        }
    }
}

/// A stream that does not wait for the legacy stream.
#[derive(Debug)]
pub(super) struct Stream {
    context: &'static Context,
    pub handle: CUstream,
}

// SAFETY: a stream may be used from any thread.
unsafe impl Send for Stream {}
// SAFETY: a shared `Stream` only tells its handle.
unsafe impl Sync for Stream {}

impl Stream {
    /// Makes one. The context is current.
    pub fn new(context: &'static Context) -> Result<Self> {
        let mut handle = null_mut();
        let flags = CUstream_flags::CU_STREAM_NON_BLOCKING as u32;
        // SAFETY: writes a handle.
        let code = unsafe { (context.driver.api.cuStreamCreate)(&raw mut handle, flags) };
        context.check(code, || "creating a stream".to_owned())?;
        Ok(Self { context, handle })
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        if let Ok(_current) = self.context.enter() {
            // SAFETY: created by `new`; the driver keeps what is enqueued until it is done.
            let _ = unsafe { (self.context.driver.api.cuStreamDestroy_v2)(self.handle) };
        }
    }
}
