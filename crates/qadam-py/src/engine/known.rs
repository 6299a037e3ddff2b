//! What is remembered of a tensor that was checked, so that it need not be checked again.

use std::cell::Cell;

use pyo3::intern;
use pyo3::prelude::*;

use crate::exchange::{Exchange, Seen};
use crate::impression::Impression;
use crate::place::Place;
use crate::tensor::{Device, Element, Tensor, Torch, is_freed, is_negated};

/// Whether two short lists are equal: without a call, as slices are compared.
pub fn is_same(a: &[i64], b: &[i64]) -> bool {
    a.len() == b.len() && a.iter().zip(b).all(|(a, b)| a == b)
}

/// A tensor as it was when it was checked.
pub struct Known {
    pub object: Py<PyAny>,
    pub pointer: usize,
    pub device: Device,
    /// What it was when it was last found to be unchanged.
    impression: Cell<Option<Impression>>,
    rest: Box<Rest>,
}

/// What is looked at only where there is no impression, or another one.
struct Rest {
    element: Element,
    shape: Box<[i64]>,
    strides: Box<[i64]>,
}

impl Known {
    /// Remembers `object`, which has memory or no element, and is not lazily negated.
    pub fn new(
        object: Bound<'_, PyAny>,
        pointer: usize,
        (device, element): (Device, Element),
        shape: &[usize],
        strides: &[isize],
    ) -> Self {
        let shape = shape.iter().map(|&size| size as i64).collect();
        let strides = strides.iter().map(|&stride| stride as i64).collect();
        let rest = Box::new(Rest { element, shape, strides });
        Self { object: object.unbind(), pointer, device, impression: Cell::default(), rest }
    }

    /// What [`is_unchanged`](Self::is_unchanged) reads, as far as there is an impression.
    pub fn places(&self) -> impl Iterator<Item = Place> + use<> {
        self.impression.get().into_iter().flat_map(|impression| impression.places())
    }

    pub fn shape(&self) -> &[i64] {
        &self.rest.shape
    }

    pub fn strides(&self) -> &[i64] {
        &self.rest.strides
    }

    /// Whether `object` is the same tensor with the same memory, which it sees in the same way: then
    /// all that was found of it still holds.
    pub fn is_unchanged(&self, object: &Bound<'_, PyAny>) -> PyResult<bool> {
        if !object.is(&self.object) {
            return Ok(false);
        }
        if self.impression.get().is_some_and(|impression| impression.holds(object)) {
            return Ok(true);
        }
        match Exchange::get(object.py()).and_then(|exchange| exchange.see(object)) {
            Some(seen) if self.looks_like(&seen) => {
                self.impression.set(Impression::take(object, &seen));
                Ok(true)
            }
            Some(_) => Ok(false),
            None => self.has_attributes_of(object),
        }
    }

    fn looks_like(&self, seen: &Seen<'_>) -> bool {
        seen.pointer == self.pointer
            && seen.device == self.device
            && seen.element == self.rest.element
            && is_same(seen.shape, self.shape())
            && is_same(seen.strides, self.strides())
    }

    /// [`is_unchanged`](Self::is_unchanged) where a glance does not do.
    fn has_attributes_of(&self, object: &Bound<'_, PyAny>) -> PyResult<bool> {
        let py = object.py();
        let list = |values: Bound<'_, PyAny>| values.extract::<Vec<i64>>();
        let dtype = object.getattr(intern!(py, "dtype"))?;
        Ok(Tensor::pointer_of(object)? == self.pointer
            && (self.shape().contains(&0) || !is_freed(object, self.pointer)?)
            && !is_negated(object)?
            && Device::of(object)? == Some(self.device)
            && Torch::get(py)?.element(&dtype) == Some(self.rest.element)
            && list(object.getattr(intern!(py, "shape"))?)? == self.shape()
            && list(object.call_method0(intern!(py, "stride"))?)? == self.strides())
    }
}
