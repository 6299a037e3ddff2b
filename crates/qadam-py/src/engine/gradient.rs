//! Gradients, which are read anew at every step.

use std::ops::Range;

use pyo3::prelude::*;
use qadam_core::{DType, Walk};

use super::known::{Known, is_same};
use super::slot::Slot;
use crate::error::to_python;
use crate::exchange::Exchange;
use crate::impression::Impression;
use crate::place::Place;
use crate::tensor::{Element, Tensor};

/// A gradient that passed every check.
pub struct Gradient<'py> {
    pub object: Bound<'py, PyAny>,
    pub pointer: usize,
    pub dtype: DType,
    /// `None` where they are the parameter's.
    strides: Option<Vec<isize>>,
    /// To be kept for the next step.
    pub last: Last,
}

/// What is remembered of a parameter's gradient from one step to the next.
#[derive(Clone, Copy, Default)]
pub struct Last {
    /// Where the object was: most gradients are new at every step, of which no impression is worth
    /// taking.
    object: usize,
    /// What it was, its address and type, if its strides were the parameter's and it had been there before.
    known: Option<(Impression, usize, DType)>,
    /// Whether it has been the same since then.
    pub has_stayed: bool,
}

impl Last {
    /// What will be read of the next one, if it is the same.
    pub fn places(&self) -> impl Iterator<Item = Place> + use<> {
        self.known.into_iter().flat_map(|(impression, ..)| impression.places())
    }
}

impl<'py> Gradient<'py> {
    /// The gradient that `object` is, if it is seen at a glance to fit `param`. If not, its attributes
    /// say what it is ([`Tensor::read_gradient`]). `last` is what was kept of the one before.
    pub fn at_a_glance(object: &Bound<'py, PyAny>, param: &Known, last: &Last) -> Option<Self> {
        if let Some((impression, pointer, dtype)) = last.known
            && impression.holds(object)
        {
            let last = Last { has_stayed: true, ..*last };
            return Some(Self { object: object.clone(), pointer, dtype, strides: None, last });
        }
        let seen = Exchange::get(object.py())?.see(object)?;
        let Element::Float(dtype) = seen.element else {
            return None;
        };
        let fits = seen.device == param.device && is_same(seen.shape, param.shape());
        if !fits || !seen.pointer.is_multiple_of(dtype.size()) {
            return None;
        }
        let strides = (!is_same(seen.strides, param.strides()))
            .then(|| seen.strides.iter().map(|&stride| stride as isize).collect());
        let (pointer, place) = (seen.pointer, object.as_ptr().addr());
        let comes_back = strides.is_none() && last.object == place;
        let impression = if comes_back { Impression::take(object, &seen) } else { None };
        let known = impression.map(|impression| (impression, pointer, dtype));
        let last = Last { object: place, known, has_stayed: false };
        Some(Self { object: object.clone(), pointer, dtype, strides, last })
    }

    /// The gradient that `tensor` is, of a parameter of these strides and its shape.
    pub fn new(tensor: Tensor<'py>, param_strides: &[i64]) -> PyResult<Self> {
        let strides: Vec<isize> = tensor.strides.extract()?;
        let is_alike =
            strides.iter().map(|&stride| stride as i64).eq(param_strides.iter().copied());
        let Tensor { object, pointer, dtype, .. } = tensor;
        let strides = (!is_alike).then_some(strides);
        Ok(Self { object, pointer, dtype, strides, last: Last::default() })
    }

    /// The bytes from its first element to behind its last; `slot` is its parameter's.
    pub fn range(&self, slot: &Slot) -> Range<usize> {
        let elements = match &self.strides {
            _ if slot.walk.is_empty() => 0,
            None => slot.walk.param_span(),
            Some(strides) => {
                let dims = slot.param.shape().iter().zip(strides);
                dims.map(|(&n, stride)| (n as usize - 1) * stride.unsigned_abs()).sum::<usize>() + 1
            }
        };
        self.pointer..self.pointer + elements * self.dtype.size()
    }

    /// How it and its parameter, which is `slot`'s, are gone through.
    pub fn walk(&self, slot: &Slot) -> PyResult<Walk> {
        let Some(strides) = &self.strides else {
            return Ok(slot.walk.clone());
        };
        let shape: Vec<usize> = slot.param.shape().iter().map(|&size| size as usize).collect();
        let of_param: Vec<isize> = slot.param.strides().iter().map(|&s| s as isize).collect();
        Walk::new(&shape, &of_param, strides).map_err(|error| to_python(&error))
    }
}
