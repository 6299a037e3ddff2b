//! What `torch.amp.GradScaler` says: by what gradients were scaled, and whether any overflowed.
//!
//! For CPU parameters both are read here; a device reads them when the step runs there.

use std::collections::BTreeMap;

use pyo3::exceptions::{PyTypeError, PyValueError};
use pyo3::intern;
use pyo3::prelude::*;
use pyo3::types::PyList;
use qadam_core::rule::check_grad_scale;

use crate::error::to_python;
use crate::tensor::{Device, Tensor, Torch};

/// Addresses on a device: of the scale and of the flag.
type Addresses = (Option<u64>, Option<u64>);

/// The scaler's word, device by device; nothing where there is no scaler.
#[derive(Default)]
pub struct Amp {
    grad_scale: Option<f32>,
    found_inf: bool,
    devices: BTreeMap<usize, Addresses>,
}

impl Amp {
    /// Reads the pairs of scale and flag, one for each device.
    pub fn read(pairs: &Bound<'_, PyList>) -> PyResult<Self> {
        let mut amp = Self::default();
        for pair in pairs {
            let (grad_scale, found_inf) = pair.extract::<(Bound<'_, PyAny>, Bound<'_, PyAny>)>()?;
            let scale = Value::read("grad_scale", &grad_scale)?;
            let found = Value::read("found_inf", &found_inf)?;
            for device in [&scale, &found].into_iter().flatten().filter_map(Value::device) {
                let address = |value: &Option<Value>| value.as_ref().and_then(Value::address);
                amp.devices.insert(device, (address(&scale), address(&found)));
            }
            if let Some(Value::Host(found)) = found {
                amp.found_inf |= found != 0.0;
            }
            if let Some(Value::Host(scale)) = scale {
                check_grad_scale(scale).map_err(|error| to_python(&error))?;
                amp.grad_scale = Some(scale);
            }
        }
        Ok(amp)
    }

    /// Whether a step leaves `param` as it is, as the CPU knows it beforehand.
    pub fn skips(&self, param: &Bound<'_, PyAny>) -> PyResult<bool> {
        Ok(self.found_inf && Device::of(param)? == Some(Device::Cpu))
    }

    /// By what the gradients of CPU parameters were multiplied.
    pub const fn grad_scale(&self) -> Option<f32> {
        self.grad_scale
    }

    /// Where a device finds the scale and the flag.
    pub fn on_device(&self, device: usize) -> Addresses {
        self.devices.get(&device).copied().unwrap_or_default()
    }

    /// All addresses on devices.
    pub fn addresses(&self) -> impl Iterator<Item = u64> {
        self.devices.values().flat_map(|&(scale, found)| [scale, found]).flatten()
    }
}

/// A float32 of one element.
enum Value {
    Host(f32),
    /// On the device of this number, at this address.
    Device(usize, u64),
}

impl Value {
    /// Reads a tensor, or None.
    fn read(name: &str, tensor: &Bound<'_, PyAny>) -> PyResult<Option<Self>> {
        if tensor.is_none() {
            return Ok(None);
        }
        let py = tensor.py();
        let dtype = tensor.getattr(intern!(py, "dtype"))?;
        if !dtype.is(&Torch::get(py)?.float32) {
            let text = format!("{name} has dtype {dtype}; torch.float32 is accepted");
            return Err(PyTypeError::new_err(text));
        }
        let count: usize = tensor.call_method0(intern!(py, "numel"))?.extract()?;
        if count != 1 {
            let text = format!("{name} has {count} elements; one is accepted");
            return Err(PyValueError::new_err(text));
        }
        match Device::of(tensor)? {
            Some(Device::Cpu) => {
                let value = tensor.call_method0(intern!(py, "item"))?.extract()?;
                Ok(Some(Self::Host(value)))
            }
            Some(Device::Cuda(device)) => {
                Ok(Some(Self::Device(device, Tensor::pointer_of(tensor)? as u64)))
            }
            None => {
                let device = tensor.getattr(intern!(py, "device"))?;
                let text = format!("{name} is on {device}; cpu and cuda are accepted");
                Err(PyValueError::new_err(text))
            }
        }
    }

    const fn device(&self) -> Option<usize> {
        match self {
            Self::Host(_) => None,
            Self::Device(device, _) => Some(*device),
        }
    }

    const fn address(&self) -> Option<u64> {
        match self {
            Self::Host(_) => None,
            Self::Device(_, address) => Some(*address),
        }
    }
}
