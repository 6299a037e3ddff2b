//! A tensor's memory at a glance, by DLPack's C exchange API
//! (<https://dmlc.github.io/dlpack/latest/c_api.html>): one call fills in what would otherwise take six
//! attributes.
//!
//! It sees only tensors with which nothing is unusual: of torch's own two types, with memory, not
//! lazily negated, of a device and a type that qadam knows. Of all others it says nothing, and their
//! attributes are read instead ([`Tensor`](crate::tensor::Tensor)), which also know why one is refused.
//! So it is with a torch that lacks the API.

use std::ffi::{CStr, c_int, c_void};

use pyo3::prelude::*;
use pyo3::sync::PyOnceLock;
use pyo3::types::{IntoPyDict, PyBool, PyBoolMethods};
use pyo3::{ffi, intern};
use qadam_core::DType;

use crate::dlpack::{BFLOAT, CPU, CUDA, DLTensor, FLOAT, UNSIGNED};
use crate::software;
use crate::tensor::{Device, Element, is_freed};

const NAME: &CStr = c"dlpack_exchange_api";

/// The version whose [`DLPackExchangeAPI`] this is.
const MAJOR: u32 = 1;

/// No storage is as long as addresses from here on are high: such an address is no offset into memory
/// that is gone.
const HIGH: usize = 1 << 40;

/// Writes what a tensor refers to; returns 0, or -1 with an exception set.
type Fill = unsafe extern "C" fn(*mut c_void, *mut DLTensor) -> c_int;

#[repr(C)]
struct DLPackExchangeAPI {
    major: u32,
    minor: u32,
    older: *const Self,
    allocate: *const c_void,
    from_object: *const c_void,
    to_object: *const c_void,
    fill: Option<Fill>,
    stream: *const c_void,
}

/// The functions that are called, and the types of tensors that they are called for.
pub struct Exchange {
    fill: Fill,
    /// `torch.Tensor.is_neg`, which is in C.
    is_neg: ffi::PyCFunction,
    types: [Py<PyAny>; 2],
}

/// What is seen of a tensor. The slices are torch's own: compare, or copy, before any Python runs.
pub struct Seen<'a> {
    pub pointer: usize,
    pub device: Device,
    pub element: Element,
    pub shape: &'a [i64],
    pub strides: &'a [i64],
}

impl Exchange {
    /// `None` where torch has no such functions.
    pub fn get(py: Python<'_>) -> Option<&'static Self> {
        static EXCHANGE: PyOnceLock<Option<Exchange>> = PyOnceLock::new();
        EXCHANGE.get_or_init(py, || Self::find(py).ok().flatten()).as_ref()
    }

    fn find(py: Python<'_>) -> PyResult<Option<Self>> {
        let torch = py.import(intern!(py, "torch"))?;
        let tensor = torch.getattr(intern!(py, "Tensor"))?;
        let parameter = py.import(intern!(py, "torch.nn"))?.getattr(intern!(py, "Parameter"))?;
        let capsule = tensor.getattr(intern!(py, "__dlpack_c_exchange_api__"))?;
        let cpu = [(intern!(py, "device"), "cpu")].into_py_dict(py)?;
        let one = torch.call_method(intern!(py, "empty"), (0,), Some(&cpu))?;
        let is_neg = one.getattr(intern!(py, "is_neg"))?;
        // SAFETY: any objects will do; what is none of a capsule of that name or a function in C gives
        // null, and an exception that `take` clears. By the protocol the capsule points to the table,
        // which lives as long as the process; what comes before `older` stays the same in all versions.
        unsafe {
            let mut table: *const DLPackExchangeAPI =
                ffi::PyCapsule_GetPointer(capsule.as_ptr(), NAME.as_ptr()).cast();
            while let Some(found) = table.as_ref()
                && found.major != MAJOR
            {
                table = found.older;
            }
            let fill = table.as_ref().and_then(|table| table.fill);
            let in_c = ffi::PyCFunction_GetFunction(is_neg.as_ptr());
            let takes_nothing = ffi::PyCFunction_GetFlags(is_neg.as_ptr()) == ffi::METH_NOARGS;
            PyErr::take(py);
            let types = [tensor.unbind(), parameter.unbind()];
            match (fill, in_c) {
                (Some(fill), Some(is_neg)) if takes_nothing => {
                    Ok(Some(Self { fill, is_neg, types }))
                }
                _ => Ok(None),
            }
        }
    }

    /// What is seen of `tensor`; `None` where its attributes have to say it.
    pub fn see<'a>(&self, tensor: &'a Bound<'_, PyAny>) -> Option<Seen<'a>> {
        // by the protocol, a table is for the type that it was found on; a subclass may have its own
        // idea of its memory
        let own = tensor.get_type_ptr().cast();
        if !self.types.iter().any(|known| known.as_ptr() == own) || self.is_negated(tensor)? {
            return None;
        }
        let seen = self.fill(tensor)?;
        if seen.pointer >= HIGH {
            return Some(seen);
        }
        let pointer = seen.pointer;
        match is_freed(tensor, pointer) {
            Ok(false) => self.fill(tensor).filter(|seen| seen.pointer == pointer),
            _ => None,
        }
    }

    /// `None` where `torch.Tensor.is_neg` does not say.
    fn is_negated(&self, tensor: &Bound<'_, PyAny>) -> Option<bool> {
        // SAFETY: by its flags the function takes the object that it is a method of, which `tensor` is
        // by its type, and nothing else; it returns a new reference, or null with an exception set.
        let answer = unsafe { (self.is_neg)(tensor.as_ptr(), std::ptr::null_mut()) };
        // SAFETY: as it says above.
        let answer = unsafe { Bound::from_owned_ptr_or_opt(tensor.py(), answer) };
        let Some(answer) = answer else {
            drop(PyErr::take(tensor.py()));
            return None;
        };
        answer.cast::<PyBool>().ok().map(PyBoolMethods::is_true)
    }

    /// Asks torch, which keeps nothing, allocates nothing and waits for no device.
    fn fill<'a>(&self, tensor: &'a Bound<'_, PyAny>) -> Option<Seen<'a>> {
        let mut out = DLTensor::EMPTY;
        // SAFETY: a tensor of the type that the function is for, which it keeps no reference to.
        if unsafe { (self.fill)(tensor.as_ptr().cast(), &raw mut out) } != 0 {
            drop(PyErr::take(tensor.py())); // the attributes have a better one
            return None;
        }
        let element = match (out.dtype_code, out.dtype_bits, out.dtype_lanes) {
            (FLOAT, 32, 1) => Element::Float(DType::F32),
            (BFLOAT, 16, 1) => Element::Float(DType::BF16),
            (FLOAT, 16, 1) => Element::Float(DType::F16),
            (UNSIGNED, 8, 1) => Element::U8,
            _ => return None,
        };
        let device = match out.device_type {
            CPU => Device::host(),
            CUDA if !software::in_use() => Device::Cuda(usize::try_from(out.device_id).ok()?),
            _ => return None,
        };
        let dims = usize::try_from(out.ndim).ok()?;
        if out.data.is_null() || out.byte_offset != 0 {
            return None;
        }
        let (shape, strides): (&[i64], &[i64]) = match dims {
            0 => (&[], &[]),
            _ if out.shape.is_null() || out.strides.is_null() => return None,
            // SAFETY: by the protocol, `ndim` numbers each, that belong to the tensor and stay until
            // it changes, which takes Python: the caller compares or copies them at once.
            _ => unsafe {
                let slice = |start: *mut i64| std::slice::from_raw_parts(start.cast_const(), dims);
                (slice(out.shape), slice(out.strides))
            },
        };
        Some(Seen { pointer: out.data.addr(), device, element, shape, strides })
    }
}
