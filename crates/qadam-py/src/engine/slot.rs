//! A parameter and its state, checked once and compared at every step.

use std::ops::Range;

use pyo3::exceptions::{PyKeyError, PyTypeError, PyValueError};
use pyo3::intern;
use pyo3::prelude::*;
use pyo3::types::{PyDict, PyString};
use qadam_core::clip::HISTORY;
use qadam_core::codec::Code;
use qadam_core::cuda::DeviceState;
use qadam_core::{
    BufferSpec, DType, Per, RawState, StateCode, StateFormat, StateType, Walk, is_dense_like,
};
use smallvec::SmallVec;

use super::gradient::Last;
use super::items::{self, Item, holds, identities};
use super::known::Known;
use crate::place::Place;
use crate::tensor::{Device, Element, Tensor, Torch, is_freed, is_negated};

/// A parameter that has state.
pub struct Slot {
    pub param: Known,
    pub dtype: DType,
    /// For gradients with the parameter's strides.
    pub walk: Walk,
    /// In which run of a step its turn is.
    pub wave: usize,
    /// Where its gradient was when it was last found to share no memory with what steps write; empty
    /// where that is to be found out.
    pub apart: Range<usize>,
    /// Of its last gradient.
    pub gradient: Last,
    /// How many steps it was for.
    pub steps: u32,
    pub entry: Py<PyDict>,
    entry_places: [Place; 2],
    /// What `entry` held when it was checked.
    items: SmallVec<[Item; 5]>,
    /// Its keys, so that no others get their addresses; the tensors are kept below.
    _keys: Box<[Py<PyAny>]>,
    pub count: StateTensor,
    pub moments: SmallVec<[StateTensor; 4]>,
    /// The norms of its gradients, where they limit the next one.
    pub history: Option<StateTensor>,
    pub format: StateFormat,
}

/// What a group asks of a parameter's state.
#[derive(Clone, Copy)]
pub struct Wanted {
    /// AMSGrad's moment.
    pub amsgrad: bool,
    /// The history of its gradients' norms.
    pub history: bool,
}

/// A tensor of the state.
pub struct StateTensor {
    pub key: Py<PyString>,
    pub known: Known,
    pub bytes: usize,
}

/// A device address. An empty tensor has none, and nothing is read or written there.
pub const fn address(pointer: usize) -> u64 {
    if pointer == 0 { 16 } else { pointer as u64 }
}

impl Slot {
    /// Checks the state that `entry` holds for `param`.
    pub fn new(
        index: usize,
        param: &Tensor<'_>,
        walk: &Walk,
        entry: &Bound<'_, PyDict>,
        wanted: Wanted,
    ) -> PyResult<Self> {
        let format = match (entry.contains("exp_avg_code")?, entry.contains("exp_avg_sq_range")?) {
            (false, _) => StateFormat::F32,
            (true, false) => StateFormat::DYNAMIC8,
            (true, true) => StateFormat::RATIO8,
        };
        // first moments in the ratio code are relative to AMSGrad's moment where there is one
        let is_coupled = matches!(format.code, StateCode::Coded(Code::Ratio));
        if is_coupled && !wanted.amsgrad && entry.contains("max_exp_avg_sq_code")? {
            let text = format!("the state of parameter {index} is AMSGrad's; without is accepted");
            return Err(PyValueError::new_err(text));
        }
        let format = format.with_amsgrad(wanted.amsgrad);
        let format = format.with_block_wise(is_block_wise(entry, format, walk.len())?);
        let (shape, strides) = param.geometry()?;
        let mut moments = SmallVec::new();
        for spec in format.buffers(walk.len()) {
            moments.push(StateTensor::new(index, &spec, param, &shape, &strides, entry)?);
        }
        let single = |name, len| {
            let spec = BufferSpec { name, dtype: StateType::F32, per: Per::Tensor, len };
            StateTensor::new(index, &spec, param, &shape, &strides, entry)
        };
        let history = if wanted.history { Some(single("gnorm_vec", HISTORY)?) } else { None };
        Ok(Self {
            param: Known::new(
                param.object.clone(),
                param.pointer,
                (param.device, Element::Float(param.dtype)),
                &shape,
                &strides,
            ),
            dtype: param.dtype,
            walk: walk.clone(),
            wave: 0,
            apart: 0..0,
            gradient: Last::default(),
            steps: 0,
            count: single("step", 1)?,
            moments,
            history,
            format,
            items: identities(entry).collect(),
            _keys: entry.iter().map(|(key, _)| key.unbind()).collect(),
            entry: entry.clone().unbind(),
            entry_places: items::places(entry),
        })
    }

    /// The state's addresses, as the core wants them on a device.
    pub fn device_state(&self) -> DeviceState {
        let addresses = self.moments.iter().map(|moment| address(moment.known.pointer));
        DeviceState::from_buffers(self.format, addresses)
            .expect("`Slot::new` makes as many tensors as the format has")
    }

    /// All tensors of the state.
    pub fn tensors(&self) -> impl Iterator<Item = &StateTensor> {
        self.moments.iter().chain([&self.count]).chain(&self.history)
    }

    /// The bytes of the parameter from its first element to behind its last.
    pub fn param_range(&self) -> Range<usize> {
        let start = self.param.pointer;
        start..start + self.walk.param_span() * self.dtype.size()
    }

    /// Addresses and sizes of the parameter and its state.
    pub fn memory(&self) -> impl Iterator<Item = (usize, usize)> {
        let param = (self.param.pointer, self.param_range().len());
        let state = self.tensors().map(|tensor| (tensor.known.pointer, tensor.bytes));
        std::iter::once(param).chain(state)
    }

    /// The state's addresses, as the core wants them.
    pub fn raw(&self) -> RawState {
        let pointers = self.moments.iter().map(|moment| moment.known.pointer as *mut u8);
        RawState::from_buffers(self.format, pointers)
            .expect("`Slot::new` makes as many tensors as the format has")
    }

    /// What is read to look at the parameter, its gradient and its state.
    pub fn places(&self) -> impl Iterator<Item = Place> {
        self.param_places().chain(self.state_places().flatten())
    }

    /// The parameter's, its gradient's and its entry's part of [`places`](Self::places).
    pub fn param_places(&self) -> impl Iterator<Item = Place> {
        let count = Place { start: self.count.known.pointer, bytes: size_of::<f32>() };
        let tensors = self.param.places().chain(self.gradient.places());
        tensors.chain(self.entry_places).chain([count])
    }

    /// The state's part, tensor by tensor.
    fn state_places(&self) -> impl Iterator<Item = impl Iterator<Item = Place> + use<>> {
        self.tensors().map(|tensor| tensor.known.places())
    }

    /// Whether everything is where it was when the slot was made, and what is needed. Meanwhile asks for
    /// the state of `next`, tensor by tensor, as a processor waits for so many lines at a time.
    pub fn is_current(
        &self,
        param: &Bound<'_, PyAny>,
        wanted: Wanted,
        next: Option<&Self>,
    ) -> PyResult<bool> {
        if self.format.amsgrad != wanted.amsgrad || self.history.is_some() != wanted.history {
            return Ok(false);
        }
        let py = param.py();
        let entry = self.entry.bind(py);
        if !holds(entry, &self.items) {
            for tensor in self.tensors() {
                match entry.get_item(tensor.key.bind(py))? {
                    Some(object) if object.is(&tensor.known.object) => {}
                    _ => return Ok(false),
                }
            }
        }
        if !self.param.is_unchanged(param)? {
            return Ok(false);
        }
        let mut coming = next.into_iter().flat_map(Self::state_places);
        for tensor in self.tensors() {
            coming.next().into_iter().flatten().for_each(Place::prefetch);
            if !tensor.known.is_unchanged(tensor.known.object.bind(py))? {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// The number of the coming step, counted from 1, of a CPU parameter.
    pub fn next_step(&self, index: usize) -> PyResult<u64> {
        // SAFETY: a float32 CPU tensor of one element, checked when it was registered and, by
        // address, in this call; the GIL is held.
        let count = unsafe { *(self.count.known.pointer as *const f32) };
        if count.is_finite() && count >= 0.0 {
            return Ok(count as u64 + 1);
        }
        let text = format!(
            "state[\"step\"] of parameter {index} is {count}; a count of at least 0 is accepted"
        );
        Err(PyValueError::new_err(text))
    }
}

/// Whether `entry`, of this format but for that, has a scale a block rather than one in all.
fn is_block_wise(entry: &Bound<'_, PyDict>, format: StateFormat, len: usize) -> PyResult<bool> {
    let scales = |format: StateFormat| format.buffers(len).get(1).map_or(0, |spec| spec.len);
    let (blocks, one) = (scales(format), scales(format.with_block_wise(false)));
    if blocks == one {
        return Ok(true);
    }
    let Some(scale) = entry.get_item("exp_avg_scale")? else { return Ok(true) };
    let count = scale.call_method0(intern!(entry.py(), "numel"));
    Ok(count.and_then(|count| count.extract::<usize>()).ok() != Some(one))
}

impl StateTensor {
    /// Checks one tensor of a parameter's state against what the core expects.
    pub fn new(
        index: usize,
        spec: &BufferSpec,
        param: &Tensor<'_>,
        shape: &[usize],
        strides: &[isize],
        entry: &Bound<'_, PyDict>,
    ) -> PyResult<Self> {
        let py = entry.py();
        let torch = Torch::get(py)?;
        let name = spec.name;
        let Some(object) = entry.get_item(name)? else {
            let keys = entry.keys();
            let text = format!("the state of parameter {index} has no {name:?}, only {keys}");
            return Err(PyKeyError::new_err(text));
        };
        let refuse = |what: String, accepted: &str| {
            let text =
                format!("state[{name:?}] of parameter {index} {what}; {accepted} is accepted");
            Err(PyTypeError::new_err(text))
        };
        let (expected, element, size) = match spec.dtype {
            StateType::F32 => (&torch.float32, Element::Float(DType::F32), 4),
            StateType::U8 => (&torch.uint8, Element::U8, 1),
        };
        let Ok(dtype) = object.getattr(intern!(py, "dtype")) else {
            return refuse(format!("is {}", object.repr()?), "a tensor");
        };
        if !dtype.is(expected) {
            return refuse(format!("has dtype {dtype}"), &expected.bind(py).str()?.to_string());
        }
        if Device::of(&object)? != Some(param.device) {
            return refuse(
                format!("is on {}", object.getattr("device")?),
                "the parameter's device",
            );
        }
        let got: Vec<usize> = object.getattr(intern!(py, "shape"))?.extract()?;
        let stride: Vec<isize> = object.call_method0(intern!(py, "stride"))?.extract()?;
        let fits = match spec.per {
            Per::Element => got == shape && is_dense_like(shape, strides, &stride).unwrap_or(false),
            Per::Block | Per::Tensor => {
                got.iter().product::<usize>() == spec.len
                    && got.len() <= 1
                    && (spec.len < 2 || stride == [1])
            }
        };
        if !fits {
            let accepted = match spec.per {
                Per::Element => format!("shape {shape:?}, dense in the parameter's memory order"),
                Per::Block | Per::Tensor => format!("a contiguous vector of {} elements", spec.len),
            };
            return refuse(format!("has shape {got:?} and strides {stride:?}"), &accepted);
        }
        let pointer = Tensor::pointer_of(&object)?;
        let alignment = match param.device {
            Device::Cuda(_) if !matches!(spec.name, "step" | "gnorm_vec") => 16, // for vectors
            _ => size,
        };
        if !pointer.is_multiple_of(alignment) {
            let accepted = format!("an address that is a multiple of {alignment}");
            return refuse(format!("lies at {pointer:#x}"), &accepted);
        }
        if spec.len > 0 && is_freed(&object, pointer)? {
            return refuse("has no memory".to_owned(), "a tensor with memory");
        }
        if is_negated(&object)? {
            return refuse("is a lazily negated view".to_owned(), "a tensor that holds its values");
        }
        let looks = (param.device, element);
        Ok(Self {
            key: PyString::intern(py, name).unbind(),
            known: Known::new(object, pointer, looks, &got, &stride),
            bytes: spec.len * size,
        })
    }
}
