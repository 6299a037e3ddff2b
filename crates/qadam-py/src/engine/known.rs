//! What is remembered of a tensor that was checked, so that it need not be checked again.

use pyo3::intern;
use pyo3::prelude::*;

use super::nearby::Nearby;
use crate::exchange::{Exchange, Seen};
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
    element: Element,
    /// Shape and strides, one after the other.
    geometry: Box<[i64]>,
    nearby: Nearby,
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
        let sizes = shape.iter().map(|&size| size as i64);
        let geometry = sizes.chain(strides.iter().map(|&stride| stride as i64)).collect();
        let nearby = Nearby::new(&object);
        Self { object: object.unbind(), pointer, device, element, geometry, nearby }
    }

    /// Announces that [`is_unchanged`](Self::is_unchanged) will be asked.
    pub fn prefetch(&self) {
        self.nearby.prefetch();
    }

    pub fn shape(&self) -> &[i64] {
        self.geometry.split_at(self.geometry.len() / 2).0
    }

    pub fn strides(&self) -> &[i64] {
        self.geometry.split_at(self.geometry.len() / 2).1
    }

    /// Whether `object` is the same tensor with the same memory, which it sees in the same way: then
    /// all that was found of it still holds.
    pub fn is_unchanged(&self, object: &Bound<'_, PyAny>) -> PyResult<bool> {
        if !object.is(&self.object) {
            return Ok(false);
        }
        match Exchange::get(object.py()).and_then(|exchange| exchange.see(object)) {
            Some(seen) => Ok(self.looks_like(&seen)),
            None => self.has_attributes_of(object),
        }
    }

    fn looks_like(&self, seen: &Seen<'_>) -> bool {
        seen.pointer == self.pointer
            && seen.device == self.device
            && seen.element == self.element
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
            && Torch::get(py)?.element(&dtype) == Some(self.element)
            && list(object.getattr(intern!(py, "shape"))?)? == self.shape()
            && list(object.call_method0(intern!(py, "stride"))?)? == self.strides())
    }
}
