//! Parameter groups: their hyperparameters, as they are at this step.

use pyo3::exceptions::{PyKeyError, PyNotImplementedError, PyValueError};
use pyo3::intern;
use pyo3::prelude::*;
use pyo3::types::{PyDict, PyString};
use qadam_core::{Decay, Hyper, NonFinite};

use crate::tensor::{Device, Tensor, Torch};

/// Flags that would change the update in ways that are not implemented yet, and what they may be.
const LATER: [(&str, bool); 2] = [("skip_zeros", false), ("block_wise", true)];

/// A group's hyperparameters.
#[derive(Debug, Clone, Copy)]
pub struct Group {
    pub hyper: Hyper,
    /// Whether state has AMSGrad's moment.
    pub amsgrad: bool,
    /// Device and address of a float32 learning rate that the device reads when the step runs.
    pub lr_address: Option<(Device, usize)>,
}

impl Group {
    /// Reads a group. As in torch, the ranges of what schedules change are checked when a group is
    /// added and not again: they may pass a little below zero.
    pub fn read(
        group: &Bound<'_, PyDict>,
        index: usize,
        decay: Decay,
        nonfinite: NonFinite,
    ) -> PyResult<Self> {
        let py = group.py();
        let later = |name: &str| {
            let text = format!("{name} of group {index} is set; it is not implemented yet");
            Err(PyNotImplementedError::new_err(text))
        };
        for (name, accepted) in LATER {
            let flag = group.get_item(name)?;
            if flag.is_some_and(|flag| flag.is_truthy().unwrap_or(!accepted) != accepted) {
                return later(name);
            }
        }
        let clipping = group.get_item("percentile_clipping")?;
        if clipping.map_or(Ok(100.0), |clipping| clipping.extract::<f64>())? < 100.0 {
            return later("percentile_clipping");
        }
        let max_unorm = group.get_item("max_unorm")?;
        if max_unorm.map_or(Ok(0.0), |norm| norm.extract::<f64>())? > 0.0 {
            return later("max_unorm");
        }
        for name in ["args", "nonfinite"] {
            if group.contains(name)? {
                let text = format!(
                    "{name} of group {index} is set; it is for all parameters of an optimizer: \
                     give it to the constructor"
                );
                return Err(PyValueError::new_err(text));
            }
        }
        let flag = |name: &str| match group.get_item(name)? {
            Some(value) => value.is_truthy(),
            None => Ok(false),
        };
        if flag("differentiable")? {
            let text = format!(
                "differentiable of group {index} is True; False is accepted: steps run outside \
                 autograd"
            );
            return Err(PyValueError::new_err(text));
        }
        // as torch.optim.Adam obeys it, whatever the class
        let decay = if flag("decoupled_weight_decay")? { Decay::Decoupled } else { decay };
        let get = |name: &Bound<'_, PyString>| number(&name.to_string(), index, item(group, name)?);
        let betas = item(group, intern!(py, "betas"))?;
        let lr = item(group, intern!(py, "lr"))?;
        let lr_address = on_device(&lr)?;
        Ok(Self {
            hyper: Hyper {
                lr: if lr_address.is_some() { 0.0 } else { number("lr", index, lr)? },
                beta1: beta("betas[0]", index, betas.get_item(0)?)?,
                beta2: beta("betas[1]", index, betas.get_item(1)?)?,
                eps: get(intern!(py, "eps"))?,
                weight_decay: get(intern!(py, "weight_decay"))?,
                decay,
                nonfinite,
                maximize: flag("maximize")?,
                skip_zeros: false,
                max_unorm: 0.0,
            },
            amsgrad: flag("amsgrad")?,
            lr_address,
        })
    }

    /// The learning rate's address for a parameter on `device`.
    pub fn lr_for(&self, device: Device, parameter: usize) -> PyResult<Option<u64>> {
        match self.lr_address {
            Some((of, _)) if of != device => {
                let text = format!(
                    "lr of parameter {parameter} is a tensor on {of:?}, the parameter is on \
                     {device:?}; a number or a tensor on the parameter's device is accepted"
                );
                Err(PyValueError::new_err(text))
            }
            other => Ok(other.map(|(_, address)| address as u64)),
        }
    }
}

/// A decay rate: outside its range a moment would be a square root of something negative.
fn beta(name: &str, group: usize, value: Bound<'_, PyAny>) -> PyResult<f64> {
    let number = number(name, group, value)?;
    if (0.0..1.0).contains(&number) {
        return Ok(number);
    }
    let text =
        format!("{name} of group {group} is {number}; at least 0 and less than 1 is accepted");
    Err(PyValueError::new_err(text))
}

/// Device and address of a value that is a float32 tensor on a CUDA device.
fn on_device(value: &Bound<'_, PyAny>) -> PyResult<Option<(Device, usize)>> {
    let py = value.py();
    if value.getattr_opt(intern!(py, "is_cuda"))?.is_none() {
        return Ok(None);
    }
    let dtype = value.getattr(intern!(py, "dtype"))?;
    match Device::of(value)? {
        Some(device @ Device::Cuda(_)) if dtype.is(&Torch::get(py)?.float32) => {
            Ok(Some((device, Tensor::pointer_of(value)?)))
        }
        _ => Ok(None),
    }
}

/// A finite number.
fn number(name: &str, group: usize, value: Bound<'_, PyAny>) -> PyResult<f64> {
    // a tensor's item(), as float() of one that requires a gradient warns
    let value = match value.getattr_opt(intern!(value.py(), "item"))? {
        Some(item) => item.call0()?,
        None => value,
    };
    let number: f64 = value.extract()?;
    if number.is_finite() {
        return Ok(number);
    }
    let text = format!("{name} of group {group} is {number}; a finite number is accepted");
    Err(PyValueError::new_err(text))
}

/// A dictionary's item, or `KeyError`.
pub fn item<'py>(
    dict: &Bound<'py, PyDict>,
    key: &Bound<'py, impl Sized>,
) -> PyResult<Bound<'py, PyAny>> {
    let key = key.as_any();
    dict.get_item(key)?.ok_or_else(|| PyKeyError::new_err(key.clone().unbind()))
}
