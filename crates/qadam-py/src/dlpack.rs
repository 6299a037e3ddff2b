//! Memory of the core as a torch tensor that keeps it alive, by the DLPack protocol
//! (<https://dmlc.github.io/dlpack/latest/c_api.html>).

use std::any::Any;
use std::ffi::{CStr, c_void};

use pyo3::prelude::*;
use pyo3::{ffi, intern};

const NAME: &CStr = c"dltensor";
pub const CPU: i32 = 1;
pub const CUDA: i32 = 2;
pub const UNSIGNED: u8 = 1;
pub const FLOAT: u8 = 2;
pub const BFLOAT: u8 = 4;

/// The protocol's description of a tensor's memory.
#[repr(C)]
pub struct DLTensor {
    pub data: *mut c_void,
    pub device_type: i32,
    pub device_id: i32,
    pub ndim: i32,
    pub dtype_code: u8,
    pub dtype_bits: u8,
    pub dtype_lanes: u16,
    pub shape: *mut i64,
    pub strides: *mut i64,
    pub byte_offset: u64,
}

impl DLTensor {
    /// Describes nothing; for others to fill in.
    pub const EMPTY: Self = Self {
        data: std::ptr::null_mut(),
        device_type: 0,
        device_id: 0,
        ndim: 0,
        dtype_code: 0,
        dtype_bits: 0,
        dtype_lanes: 0,
        shape: std::ptr::null_mut(),
        strides: std::ptr::null_mut(),
        byte_offset: 0,
    };
}

#[repr(C)]
struct DLManagedTensor {
    tensor: DLTensor,
    context: *mut c_void,
    deleter: unsafe extern "C" fn(*mut DLManagedTensor),
}

/// What a tensor refers to, freed by its deleter.
struct Shared {
    managed: DLManagedTensor,
    shape: [i64; 1],
    strides: [i64; 1],
    _keeper: Box<dyn Any + Send + Sync>,
}

/// A contiguous uint8 tensor of `bytes` elements at `address`, on the CPU or a CUDA device, which
/// keeps `keeper` until the last tensor on this memory is gone.
///
/// # Safety
/// The memory is valid for reads and writes as long as `keeper` lives; what it holds is torch's matter.
pub unsafe fn tensor(
    py: Python<'_>,
    address: usize,
    bytes: usize,
    device: Option<usize>,
    keeper: impl Any + Send + Sync,
) -> PyResult<Bound<'_, PyAny>> {
    let tensor = DLTensor {
        data: address as *mut c_void,
        device_type: if device.is_some() { CUDA } else { CPU },
        device_id: device.unwrap_or(0) as i32,
        ndim: 1,
        dtype_code: UNSIGNED,
        dtype_bits: 8,
        dtype_lanes: 1,
        shape: std::ptr::null_mut(),
        strides: std::ptr::null_mut(),
        byte_offset: 0,
    };
    let managed = DLManagedTensor { tensor, context: std::ptr::null_mut(), deleter: delete };
    let shared = Box::new(Shared {
        managed,
        shape: [bytes as i64],
        strides: [1],
        _keeper: Box::new(keeper),
    });
    let shared = Box::into_raw(shared);
    // SAFETY: just made, referred to by nothing else. The capsule owns it until torch takes it; its
    // destructor and torch both free it through `delete`, and only one of them does.
    let capsule = unsafe {
        (*shared).managed.tensor.shape = (&raw mut (*shared).shape).cast();
        (*shared).managed.tensor.strides = (&raw mut (*shared).strides).cast();
        (*shared).managed.context = shared.cast();
        let managed = &raw mut (*shared).managed;
        let capsule = ffi::PyCapsule_New(managed.cast(), NAME.as_ptr(), Some(destroy));
        if capsule.is_null() {
            delete(managed);
        }
        Bound::from_owned_ptr_or_err(py, capsule)?
    };
    let dlpack = py.import(intern!(py, "torch.utils.dlpack"))?;
    dlpack.call_method1(intern!(py, "from_dlpack"), (capsule,))
}

/// Frees what a tensor referred to; called without the GIL at times.
unsafe extern "C" fn delete(managed: *mut DLManagedTensor) {
    // SAFETY: `context` came from `Box::into_raw`, and a deleter is called once.
    drop(unsafe { Box::from_raw((*managed).context.cast::<Shared>()) });
}

/// Frees what a capsule holds that nobody has taken: whoever takes it changes its name.
unsafe extern "C" fn destroy(capsule: *mut ffi::PyObject) {
    // SAFETY: called with a capsule made above, whose pointer is a `DLManagedTensor`.
    unsafe {
        if ffi::PyCapsule_IsValid(capsule, NAME.as_ptr()) == 1 {
            delete(ffi::PyCapsule_GetPointer(capsule, NAME.as_ptr()).cast());
        }
    }
}
