//! Parameter groups: their hyperparameters, as they are at this step.

use pyo3::exceptions::{PyKeyError, PyNotImplementedError, PyValueError};
use pyo3::intern;
use pyo3::prelude::*;
use pyo3::types::{PyDict, PyString};
use qadam_core::{Decay, Hyper, NonFinite};

/// The hyperparameters of a group. As in torch, their ranges are checked when a group is added
/// and not again: a schedule may pass a little below zero.
pub fn hyper(
    group: &Bound<'_, PyDict>,
    index: usize,
    decay: Decay,
    nonfinite: NonFinite,
) -> PyResult<Hyper> {
    let py = group.py();
    for name in ["amsgrad", "maximize", "differentiable"] {
        if group.get_item(name)?.is_some_and(|value| value.is_truthy().unwrap_or(true)) {
            let text = format!("{name} of group {index} is set; it is not implemented yet");
            return Err(PyNotImplementedError::new_err(text));
        }
    }
    let number = |name: &str, value: Bound<'_, PyAny>| {
        // a tensor's item(), as float() of one that requires a gradient warns
        let value = match value.getattr_opt(intern!(py, "item"))? {
            Some(item) => item.call0()?,
            None => value,
        };
        let number: f64 = value.extract()?;
        if number.is_finite() {
            return Ok(number);
        }
        let text = format!("{name} of group {index} is {number}; a finite number is accepted");
        Err(PyValueError::new_err(text))
    };
    let get = |name: &Bound<'_, PyString>| number(&name.to_string(), item(group, name)?);
    let betas = item(group, intern!(py, "betas"))?;
    Ok(Hyper {
        lr: get(intern!(py, "lr"))?,
        beta1: number("betas[0]", betas.get_item(0)?)?,
        beta2: number("betas[1]", betas.get_item(1)?)?,
        eps: get(intern!(py, "eps"))?,
        weight_decay: get(intern!(py, "weight_decay"))?,
        decay,
        nonfinite,
    })
}

/// A dictionary's item, or `KeyError`.
pub fn item<'py>(
    dict: &Bound<'py, PyDict>,
    key: &Bound<'py, impl Sized>,
) -> PyResult<Bound<'py, PyAny>> {
    let key = key.as_any();
    dict.get_item(key)?.ok_or_else(|| PyKeyError::new_err(key.clone().unbind()))
}
