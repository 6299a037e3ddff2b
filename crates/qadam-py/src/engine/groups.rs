//! Parameter groups: their hyperparameters, as they are at this step.

use pyo3::exceptions::{PyKeyError, PyTypeError, PyValueError};
use pyo3::intern;
use pyo3::prelude::*;
use pyo3::types::{PyBool, PyDict, PyString};
use qadam_core::clip::HISTORY;
use qadam_core::{Decay, Hyper, NonFinite};

use crate::tensor::{Device, Tensor, Torch};

/// What an optimizer was given that holds for every group that does not say otherwise.
#[derive(Debug, Clone, Copy)]
pub struct Defaults {
    pub decay: Decay,
    /// The same for all groups.
    pub nonfinite: NonFinite,
    /// To which percentile of its history each gradient is cut, if it is.
    pub percentile: Option<usize>,
    pub max_unorm: f64,
    pub skip_zeros: bool,
}

/// A group's hyperparameters.
#[derive(Debug, Clone, Copy)]
pub struct Group {
    pub hyper: Hyper,
    /// Whether state has AMSGrad's moment.
    pub amsgrad: bool,
    /// To which percentile of its history each gradient is cut, if it is.
    pub percentile: Option<usize>,
    /// Device and address of a float32 learning rate that the device reads when the step runs.
    pub lr_address: Option<(Device, usize)>,
}

impl Group {
    /// Reads a group. As in torch, the ranges of what schedules change are checked when a group is
    /// added and not again: they may pass a little below zero.
    pub fn read(group: &Bound<'_, PyDict>, index: usize, defaults: &Defaults) -> PyResult<Self> {
        let py = group.py();
        for name in ["args", "nonfinite", "max_grad_norm"] {
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
        let decay = if flag("decoupled_weight_decay")? { Decay::Decoupled } else { defaults.decay };
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
                nonfinite: defaults.nonfinite,
                maximize: flag("maximize")?,
                skip_zeros: match group.get_item("skip_zeros")? {
                    Some(value) => yes_or_no("skip_zeros", index, &value)?,
                    None => defaults.skip_zeros,
                },
                max_unorm: match group.get_item("max_unorm")? {
                    Some(value) => max_unorm(index, value)?,
                    None => defaults.max_unorm,
                },
            },
            amsgrad: flag("amsgrad")?,
            percentile: match group.get_item("percentile_clipping")? {
                Some(value) => percentile(index, &value)?,
                None => defaults.percentile,
            },
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

/// True or False.
fn yes_or_no(name: &str, group: usize, value: &Bound<'_, PyAny>) -> PyResult<bool> {
    if let Ok(number @ 0..=1) = value.extract::<i64>() {
        return Ok(number == 1); // True and False are numbers
    }
    let text = format!("{name} of group {group} is {}; True or False is accepted", value.repr()?);
    Err(PyTypeError::new_err(text))
}

/// A limit of the update's norm.
fn max_unorm(group: usize, value: Bound<'_, PyAny>) -> PyResult<f64> {
    let number = number("max_unorm", group, value)?;
    if number >= 0.0 {
        return Ok(number);
    }
    let text = format!("max_unorm of group {group} is {number}; at least 0 is accepted");
    Err(PyValueError::new_err(text))
}

/// A percentile of a gradient's history; 100 for none.
fn percentile(group: usize, value: &Bound<'_, PyAny>) -> PyResult<Option<usize>> {
    let whole = if value.is_instance_of::<PyBool>() { None } else { value.extract::<usize>().ok() };
    match whole {
        Some(HISTORY) => Ok(None),
        Some(percentile @ 1..HISTORY) => Ok(Some(percentile)),
        _ => {
            let text = format!(
                "percentile_clipping of group {group} is {value}; a whole number from 1 to 100 is \
                 accepted"
            );
            Err(PyValueError::new_err(text))
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
    let Ok(number) = value.extract::<f64>() else {
        let text = format!("{name} of group {group} is {}; a number is accepted", value.repr()?);
        return Err(PyTypeError::new_err(text));
    };
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
