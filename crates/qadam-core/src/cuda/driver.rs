//! Finding the driver, and one context a device for the life of the process.

use std::collections::BTreeMap;
use std::ffi::CStr;
use std::mem::MaybeUninit;
use std::ptr::{null, null_mut};
use std::sync::{Mutex, OnceLock, PoisonError};

use cudarc::driver::sys::{self, CUcontext, CUdevice, CUdevice_attribute, CUstream};

use super::api::{Api, ErrorName, error_name};
use super::module::Kernels;
use crate::error::{Error, Result};

/// The oldest driver that reads the PTX shipped here: that of CUDA 12.0.
const OLDEST: i32 = 12000;

/// The driver, initialised.
#[derive(Debug)]
pub(super) struct Driver {
    pub api: Api,
    error_name: ErrorName,
}

/// How many CUDA devices there are.
///
/// # Errors
/// [`Error::CudaUnavailable`] without a driver, with one that is too old, and without a device.
pub fn availability() -> Result<u32> {
    Driver::get()?.count()
}

fn unavailable<T>(reason: impl Into<String>) -> Result<T> {
    Err(Error::CudaUnavailable { reason: reason.into() })
}

impl Driver {
    /// The driver. What was found stays; what was not is looked for anew each time.
    pub fn get() -> Result<&'static Self> {
        static DRIVER: OnceLock<Driver> = OnceLock::new();
        if let Some(driver) = DRIVER.get() {
            return Ok(driver);
        }
        let driver = Self::find()?;
        driver.count()?;
        Ok(DRIVER.get_or_init(|| driver))
    }

    fn find() -> Result<Self> {
        // SAFETY: opens and closes a library whose initialisers are those of a CUDA driver.
        if !unsafe { sys::is_culib_present() } {
            return unavailable("the driver's library (libcuda.so.1) was not found");
        }
        // SAFETY: the library was found.
        let symbols = unsafe { Api::load().and_then(|api| Ok((api, error_name()?))) };
        let (api, error_name) = symbols.or_else(|name| {
            unavailable(format!(
                "the driver has no {name}; a driver for CUDA 12.0 or later (525 or later) is needed"
            ))
        })?;
        let driver = Self { api, error_name };
        // SAFETY: no conditions.
        let code = unsafe { (driver.api.cuInit)(0) };
        if code != 0 {
            let name = driver.name(code);
            return unavailable(format!("the driver does not start: {name} ({code})"));
        }
        let mut version = 0;
        // SAFETY: writes an int.
        let code = unsafe { (driver.api.cuDriverGetVersion)(&raw mut version) };
        driver.check(code, || "asking for the driver's version".to_owned())?;
        if version < OLDEST {
            let (major, minor) = (version / 1000, version % 1000 / 10);
            return unavailable(format!(
                "the driver is for CUDA {major}.{minor}; one for CUDA 12.0 or later (525 or \
                 later) is needed"
            ));
        }
        Ok(driver)
    }

    fn count(&self) -> Result<u32> {
        let mut count = 0;
        // SAFETY: writes an int.
        let code = unsafe { (self.api.cuDeviceGetCount)(&raw mut count) };
        self.check(code, || "counting the devices".to_owned())?;
        match u32::try_from(count) {
            Ok(count) if count > 0 => Ok(count),
            _ => unavailable("the driver sees no device"),
        }
    }

    /// The driver's name of an error.
    fn name(&self, code: u32) -> String {
        let mut text = null();
        // SAFETY: writes a pointer to static text, or leaves it null where the code is unknown.
        let known = unsafe { (self.error_name)(code, &raw mut text) } == 0 && !text.is_null();
        if !known {
            return "an error unknown to the driver".to_owned();
        }
        // SAFETY: not null, and a C string in the driver's static memory.
        unsafe { CStr::from_ptr(text) }.to_string_lossy().into_owned()
    }

    /// Makes an error of a call's result; `doing` completes "while …".
    pub fn check(&self, code: u32, doing: impl FnOnce() -> String) -> Result<()> {
        if code == 0 {
            return Ok(());
        }
        Err(Error::Cuda { name: self.name(code), code, doing: doing() })
    }
}

/// What an error means for later calls, to end its message.
pub(crate) const fn consequence(code: u32) -> &'static str {
    match code {
        214 | 700..=703 | 709 | 710 | 714..=719 => {
            "; this process can no longer use the device: start a new one"
        }
        _ => "",
    }
}

/// A device's primary context, which torch and the CUDA runtime use too.
#[derive(Debug)]
pub(crate) struct Context {
    pub(super) driver: &'static Driver,
    pub ordinal: usize,
    pub(super) device: CUdevice,
    handle: CUcontext,
    kernels: OnceLock<Kernels>,
}

// SAFETY: the handle may be used from any thread; the driver locks where it must.
unsafe impl Send for Context {}
// SAFETY: as above.
unsafe impl Sync for Context {}

impl Context {
    /// The context of device `ordinal`: retained by the first call, and never released.
    pub fn get(ordinal: usize) -> Result<&'static Self> {
        static CONTEXTS: Mutex<BTreeMap<usize, &'static Context>> = Mutex::new(BTreeMap::new());
        let mut contexts = CONTEXTS.lock().unwrap_or_else(PoisonError::into_inner);
        let context = if let Some(context) = contexts.get(&ordinal) {
            context
        } else {
            let context: &'static Self = Box::leak(Box::new(Self::retain(ordinal)?));
            contexts.insert(ordinal, context);
            context
        };
        // Under the lock, so that the kernels are loaded once.
        if context.kernels.get().is_none() {
            let kernels = Kernels::load(context)?;
            let _ = context.kernels.set(kernels);
        }
        Ok(context)
    }

    fn retain(ordinal: usize) -> Result<Self> {
        let driver = Driver::get()?;
        let count = driver.count()?;
        let known = u32::try_from(ordinal).is_ok_and(|ordinal| ordinal < count);
        if !known {
            return unavailable(format!("there is no device {ordinal}, only {count}"));
        }
        let (mut device, mut handle) = (0, null_mut());
        // SAFETY: writes a device number; the ordinal is below the count, which is an int.
        let code = unsafe { (driver.api.cuDeviceGet)(&raw mut device, ordinal as i32) };
        driver.check(code, || format!("looking for device {ordinal}"))?;
        // SAFETY: writes a handle; the device exists.
        let code = unsafe { (driver.api.cuDevicePrimaryCtxRetain)(&raw mut handle, device) };
        driver.check(code, || format!("retaining the context of device {ordinal}"))?;
        Ok(Self { driver, ordinal, device, handle, kernels: OnceLock::new() })
    }

    /// The kernels.
    pub(super) fn kernels(&self) -> Result<&Kernels> {
        let missing = || Error::CudaUnavailable { reason: "the kernels are not loaded".to_owned() };
        self.kernels.get().ok_or_else(missing)
    }

    /// Compute capability, as 75 for 7.5.
    pub fn capability(&self) -> Result<u32> {
        let ask = |attribute| self.attribute(attribute, "the compute capability");
        let major = ask(CUdevice_attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?;
        let minor = ask(CUdevice_attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?;
        Ok(major * 10 + minor)
    }

    /// Whether the device has managed memory.
    pub fn has_managed_memory(&self) -> Result<bool> {
        let attribute = CUdevice_attribute::CU_DEVICE_ATTRIBUTE_MANAGED_MEMORY;
        Ok(self.attribute(attribute, "managed memory")? != 0)
    }

    /// Whether host and device may use managed memory at the same time. Where they may not, pages
    /// can be neither advised about nor prefetched.
    pub fn has_concurrent_access(&self) -> Result<bool> {
        let attribute = CUdevice_attribute::CU_DEVICE_ATTRIBUTE_CONCURRENT_MANAGED_ACCESS;
        Ok(self.attribute(attribute, "concurrent managed access")? != 0)
    }

    fn attribute(&self, attribute: CUdevice_attribute, what: &str) -> Result<u32> {
        let mut value = 0;
        // SAFETY: writes an int.
        let code = unsafe {
            (self.driver.api.cuDeviceGetAttribute)(&raw mut value, attribute, self.device)
        };
        self.check(code, || format!("asking for {what}"))?;
        Ok(u32::try_from(value).unwrap_or(0))
    }

    /// [`Driver::check`], naming the device.
    pub fn check(&self, code: u32, doing: impl FnOnce() -> String) -> Result<()> {
        self.driver.check(code, || format!("{} on device {}", doing(), self.ordinal))
    }

    /// Makes the context current for the calling thread until the guard is dropped.
    pub fn enter(&'static self) -> Result<Current> {
        // SAFETY: the context is retained for the life of the process.
        let code = unsafe { (self.driver.api.cuCtxPushCurrent_v2)(self.handle) };
        self.check(code, || "making the context current".to_owned())?;
        Ok(Current { context: self, thread: std::marker::PhantomData })
    }

    /// Whether `stream` is being captured into a graph.
    ///
    /// # Safety
    /// The context is current and `stream` is one of its streams.
    pub(super) unsafe fn is_capturing(&self, stream: CUstream) -> Result<bool> {
        // A number, because a newer driver may know more states than the enum.
        let mut status = MaybeUninit::zeroed();
        // SAFETY: writes a status; the stream is valid by contract.
        let code = unsafe { (self.driver.api.cuStreamIsCapturing)(stream, status.as_mut_ptr()) };
        self.check(code, || "asking whether the stream is being captured".to_owned())?;
        // SAFETY: 4 bytes, zeroed or written by the driver.
        Ok(unsafe { status.as_ptr().cast::<u32>().read() } != 0)
    }
}

/// A context is current for the thread that has this; the one before comes back when it is dropped.
#[derive(Debug)]
pub(crate) struct Current {
    context: &'static Context,
    /// Contexts are current in one thread: not `Send`.
    thread: std::marker::PhantomData<*const ()>,
}

impl Drop for Current {
    fn drop(&mut self) {
        let mut popped = null_mut();
        // SAFETY: writes a handle; pops what `enter` pushed. Where this fails nothing can be done.
        let _ = unsafe { (self.context.driver.api.cuCtxPopCurrent_v2)(&raw mut popped) };
    }
}
