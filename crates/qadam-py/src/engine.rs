//! One optimizer's tensors: read once, checked at every step, stepped in one call.
//!
//! Users may replace what an optimizer refers to between any two steps: `p.data`, a gradient, an
//! entry of `optimizer.state`. Every step therefore compares identities, addresses, shapes and
//! strides with what was registered, and reads anew what differs; a stale pointer is never used.

use std::ops::Range;
use std::sync::Mutex;

use pyo3::exceptions::{
    PyKeyError, PyNotImplementedError, PyRuntimeError, PyTypeError, PyValueError,
};
use pyo3::gc::{PyTraverseError, PyVisit};
use pyo3::intern;
use pyo3::prelude::*;
use pyo3::types::{PyDict, PyList, PyString, PyTuple};
use qadam_core::cpu::{self, Backend};
use qadam_core::rule::Coefficients;
use qadam_core::{
    BufferSpec, DType, Decay, Error, Hyper, Moments8, Moments32, NonFinite, Per, RawState,
    StateFormat, StateType, TensorStep, Walk, is_dense_like,
};

use crate::error::to_python;
use crate::tensor::{Tensor, Torch};

/// Steps all tensors of an optimizer.
#[pyclass(module = "qadam._core", frozen)]
pub struct Engine(Mutex<Tensors>);

/// What an engine knows of an optimizer's tensors.
struct Tensors {
    decay: Decay,
    nonfinite: NonFinite,
    /// One for each parameter, in the order of the groups, once it has state.
    slots: Vec<Option<Slot>>,
    /// Keys and values of `optimizer.state`, by identity, when the slots were last current.
    entries: Vec<(usize, usize)>,
    /// The parameters for which memory was last found to be in order, and how many runs they take:
    /// those that share memory take turns.
    arranged: Vec<usize>,
    waves: usize,
}

/// A parameter that has state.
struct Slot {
    param: Py<PyAny>,
    dtype: DType,
    pointer: usize,
    shape: Py<PyTuple>,
    strides: Py<PyTuple>,
    /// For gradients with the parameter's strides.
    walk: Walk,
    /// In which run of a step its turn is.
    wave: usize,
    entry: Py<PyDict>,
    count: StateTensor,
    moments: Vec<StateTensor>,
    format: StateFormat,
}

/// A tensor of the state.
struct StateTensor {
    key: Py<PyString>,
    object: Py<PyAny>,
    pointer: usize,
    bytes: usize,
}

/// A gradient that passed every check.
struct Pending<'py> {
    /// Of the parameter, counted through all groups.
    index: usize,
    grad: Tensor<'py>,
    hyper: Hyper,
}

/// Tensors that do not overlap, and which of the pending gradients they belong to.
#[derive(Default)]
struct Wave {
    steps: Vec<TensorStep>,
    pending: Vec<usize>,
}

#[pymethods]
impl Engine {
    /// `decoupled`: whether weight decay is `AdamW`'s. `nonfinite`: `"skip"`, `"propagate"` or
    /// `"raise"`.
    #[new]
    fn new(decoupled: bool, nonfinite: &str) -> PyResult<Self> {
        let nonfinite = match nonfinite {
            "skip" => NonFinite::Skip,
            "propagate" => NonFinite::Propagate,
            "raise" => NonFinite::Raise,
            other => {
                let accepted = "\"skip\", \"propagate\" or \"raise\"";
                let text = format!("nonfinite must be {accepted}, got {other:?}");
                return Err(PyValueError::new_err(text));
            }
        };
        let decay = if decoupled { Decay::Decoupled } else { Decay::Coupled };
        let (slots, entries, arranged) = (Vec::new(), Vec::new(), Vec::new());
        let tensors = Tensors { decay, nonfinite, slots, entries, arranged, waves: 1 };
        Ok(Self(Mutex::new(tensors)))
    }

    /// Updates every parameter of `groups` (an optimizer's `param_groups`) that has a gradient, on
    /// `threads` threads, and returns how many elements had a non-finite gradient.
    ///
    /// `state` is the optimizer's; `make_state(params)` must give each of `params` an entry that
    /// fits it. It is called only once all gradients have passed their checks.
    fn step(
        &self,
        py: Python<'_>,
        groups: &Bound<'_, PyList>,
        state: &Bound<'_, PyDict>,
        make_state: &Bound<'_, PyAny>,
        threads: usize,
    ) -> PyResult<usize> {
        let backend = Backend::current().map_err(|error| to_python(&error))?;
        let threads = cpu::pool::threads(threads).map_err(|error| to_python(&error))?;
        let Ok(mut tensors) = self.0.try_lock() else {
            let text = "this optimizer is in the middle of a step on another thread";
            return Err(PyRuntimeError::new_err(text));
        };
        let mut created = Vec::new();
        let outcome = tensors.run(py, groups, state, make_state, threads, backend, &mut created);
        if outcome.is_err() {
            // a step that failed leaves no state behind
            for param in created {
                if state.contains(&param)? {
                    state.del_item(param)?;
                }
            }
            tensors.forget();
        }
        outcome
    }

    /// For Python's garbage collector: a parameter may lead back to its optimizer.
    #[expect(clippy::needless_pass_by_value, reason = "the signature is PyO3's")]
    fn __traverse__(&self, visit: PyVisit<'_>) -> Result<(), PyTraverseError> {
        let Ok(tensors) = self.0.try_lock() else {
            return Ok(()); // in the middle of a step, all of it is in use
        };
        for slot in tensors.slots.iter().flatten() {
            visit.call(&slot.param)?;
            visit.call(&slot.entry)?;
            for tensor in slot.moments.iter().chain([&slot.count]) {
                visit.call(&tensor.object)?;
            }
        }
        Ok(())
    }

    fn __clear__(&self) {
        if let Ok(mut tensors) = self.0.try_lock() {
            tensors.forget();
        }
    }
}

impl Tensors {
    /// The slot of a parameter that `gather` has registered.
    fn slot(&self, index: usize) -> &Slot {
        self.slots[index].as_ref().expect("gather registers every parameter with a gradient")
    }

    /// Reads everything anew at the next step.
    fn forget(&mut self) {
        self.slots.clear();
        self.entries.clear();
        self.arranged.clear();
    }

    /// A step; parameters whose state it makes are added to `created`.
    #[expect(clippy::too_many_arguments, reason = "`step`'s, and what it derives from them")]
    fn run<'py>(
        &mut self,
        py: Python<'py>,
        groups: &Bound<'py, PyList>,
        state: &Bound<'py, PyDict>,
        make_state: &Bound<'py, PyAny>,
        threads: usize,
        backend: Backend,
        created: &mut Vec<Bound<'py, PyAny>>,
    ) -> PyResult<usize> {
        let pending = self.gather(groups, state, make_state, created)?;
        let waves = self.prepare(py, &pending)?;
        let raise = self.nonfinite == NonFinite::Raise;
        let run = || {
            // SAFETY: `gather` and `prepare` checked addresses, alignment, types, shapes and
            // strides in this very call; `pending` and the slots keep the tensors alive; members
            // of a wave do not overlap.
            unsafe {
                if raise {
                    for wave in &waves {
                        cpu::count_nonfinite(&wave.steps, threads).map_err(|e| (e, wave))?;
                    }
                }
                let mut nonfinite = 0;
                for wave in &waves {
                    nonfinite += cpu::run(&wave.steps, backend, threads).map_err(|e| (e, wave))?;
                }
                Ok(nonfinite)
            }
        };
        let nonfinite = py.detach(run).map_err(|(error, wave)| match error {
            Error::NonFiniteGradient { index, count } => {
                let index = pending[wave.pending[index]].index;
                to_python(&Error::NonFiniteGradient { index, count })
            }
            other => to_python(&other),
        })?;
        let updated = PyList::empty(py);
        for item in &pending {
            let slot = self.slot(item.index);
            // SAFETY: a float32 tensor of one element, checked when it was registered and, by
            // address, in this call; the GIL is held.
            unsafe { *(slot.count.pointer as *mut f32) += 1.0 };
            updated.append(&slot.param)?;
        }
        Torch::get(py)?.increment_version.call1(py, (updated,))?;
        Ok(nonfinite)
    }

    /// Checks every gradient, then sees to it that every parameter with one has a current slot.
    fn gather<'py>(
        &mut self,
        groups: &Bound<'py, PyList>,
        state: &Bound<'py, PyDict>,
        make_state: &Bound<'py, PyAny>,
        created: &mut Vec<Bound<'py, PyAny>>,
    ) -> PyResult<Vec<Pending<'py>>> {
        let py = groups.py();
        if !self.entries.iter().copied().eq(identities(state)) {
            self.slots.clear();
        }
        let mut pending = Vec::new();
        let mut fresh = Vec::new();
        let mut index = 0;
        for (group_index, group) in groups.iter().enumerate() {
            let group = group.cast_into::<PyDict>()?;
            let hyper = self.hyper(&group, group_index)?;
            let params = item(&group, intern!(py, "params"))?.cast_into::<PyList>()?;
            for (place, param) in params.iter().enumerate() {
                if self.slots.len() == index {
                    self.slots.push(None);
                }
                let grad = param.getattr(intern!(py, "grad"))?;
                if !grad.is_none() {
                    let subject = || subject(&param, index, group_index, place);
                    let grad = Tensor::read_gradient(&grad)?
                        .map_err(|refusal| refusal.to_python(&format!("{} gradient", subject())))?;
                    let known = self.slots[index].as_ref();
                    if known.map_or(Ok(false), |slot| slot.is_current(&param))? {
                        let shape = self.slot(index).shape.bind(py);
                        same_shape(&grad, shape, subject)?;
                    } else {
                        let tensor = Tensor::read(&param)?
                            .map_err(|refusal| refusal.to_python(&subject()))?;
                        same_shape(&grad, &tensor.shape, subject)?;
                        let (shape, strides) = tensor.geometry()?;
                        let walk = Walk::new(&shape, &strides, &strides).map_err(|error| {
                            PyValueError::new_err(format!("{} {error}", subject()))
                        })?;
                        fresh.push((index, tensor, walk));
                    }
                    pending.push(Pending { index, grad, hyper });
                }
                index += 1;
            }
        }
        self.slots.truncate(index);
        if !fresh.is_empty() {
            self.register(&fresh, state, make_state, created)?;
        }
        let indices = pending.iter().map(|item| item.index);
        if !fresh.is_empty() || !indices.clone().eq(self.arranged.iter().copied()) {
            self.arrange(indices.collect())?;
        }
        Ok(pending)
    }

    /// Gives each of `fresh` a slot. Where state is missing, or lies in another memory order since
    /// the parameter's changed, `make_state` sees to it.
    fn register<'py>(
        &mut self,
        fresh: &[(usize, Tensor<'py>, Walk)],
        state: &Bound<'py, PyDict>,
        make_state: &Bound<'py, PyAny>,
        created: &mut Vec<Bound<'py, PyAny>>,
    ) -> PyResult<()> {
        let wanting = PyList::empty(state.py());
        let mut missing = Vec::new();
        for (index, param, walk) in fresh {
            let fits = if let Some(entry) = state.get_item(&param.object)? {
                Slot::new(*index, param, walk, entry.cast::<PyDict>()?).is_ok()
            } else {
                missing.push(param.object.clone());
                false
            };
            if !fits {
                wanting.append(&param.object)?;
            }
        }
        if !wanting.is_empty() {
            make_state.call1((wanting,))?;
        }
        *created = missing;
        let mut slots = Vec::with_capacity(fresh.len());
        for (index, param, walk) in fresh {
            let entry = item(state, &param.object)?.cast_into::<PyDict>()?;
            slots.push((*index, Slot::new(*index, param, walk, &entry)?));
        }
        for (index, slot) in slots {
            self.slots[index] = Some(slot);
        }
        self.entries = identities(state).collect();
        Ok(())
    }

    /// Finds the waves of the parameters at `indices`, and refuses state that shares memory with
    /// anything else.
    fn arrange(&mut self, indices: Vec<usize>) -> PyResult<()> {
        let mut ranges: Vec<(Range<usize>, usize, bool)> = Vec::new();
        let mut params = Vec::with_capacity(indices.len());
        for &index in &indices {
            let slot = self.slot(index);
            let bytes = slot.walk.param_span() * slot.dtype.size();
            params.push(slot.pointer..slot.pointer + bytes);
            ranges.push((slot.pointer..slot.pointer + bytes, index, false));
            for tensor in slot.moments.iter().chain([&slot.count]) {
                ranges.push((tensor.pointer..tensor.pointer + tensor.bytes, index, true));
            }
        }
        ranges.retain(|(range, ..)| !range.is_empty());
        ranges.sort_unstable_by_key(|(range, ..)| range.start);
        // for parameters and for state: how far memory is taken, and by whom
        let (mut param_end, mut state_end) = ((0, 0), (0, 0));
        for (range, index, is_state) in ranges {
            let (end, other) = if is_state { state_end.max(param_end) } else { state_end };
            if range.start < end {
                let text = format!(
                    "parameters {} and {} share memory that holds state; each state tensor must \
                     have its own",
                    other.min(index),
                    other.max(index),
                );
                return Err(PyValueError::new_err(text));
            }
            let reach = if is_state { &mut state_end } else { &mut param_end };
            *reach = (*reach).max((range.end, index));
        }
        self.waves = 1;
        for (&index, wave) in indices.iter().zip(cpu::disjoint_waves(&params)) {
            self.waves = self.waves.max(wave + 1);
            self.slots[index].as_mut().expect("read above").wave = wave;
        }
        self.arranged = indices;
        Ok(())
    }

    /// What the core needs to update the pending parameters.
    fn prepare(&self, py: Python<'_>, pending: &[Pending<'_>]) -> PyResult<Vec<Wave>> {
        let mut waves: Vec<Wave> = (0..self.waves).map(|_| Wave::default()).collect();
        let mut last: Option<(Hyper, u64, Coefficients)> = None;
        for (position, item) in pending.iter().enumerate() {
            let slot = self.slot(item.index);
            let t = slot.next_step(item.index)?;
            let coefficients = match last {
                Some((hyper, step, coefficients)) if hyper == item.hyper && step == t => {
                    coefficients
                }
                _ => Coefficients::new(&item.hyper, t),
            };
            last = Some((item.hyper, t, coefficients));
            let walk = if item.grad.strides.eq(slot.strides.bind(py))? {
                slot.walk.clone()
            } else {
                let shape: Vec<usize> = slot.shape.extract(py)?;
                let strides: Vec<isize> = slot.strides.extract(py)?;
                Walk::new(&shape, &strides, &item.grad.strides.extract::<Vec<isize>>()?)
                    .map_err(|error| to_python(&error))?
            };
            let param = (slot.pointer as *mut u8, slot.dtype);
            let grad = (item.grad.pointer as *const u8, item.grad.dtype);
            // SAFETY: `Tensor::read` and `Slot::new` checked both tensors and the state, whose
            // addresses `gather` compared in this call; the run ends before the call does.
            let step = unsafe { TensorStep::new(param, grad, walk, slot.raw(), coefficients) };
            waves[slot.wave].steps.push(step);
            waves[slot.wave].pending.push(position);
        }
        Ok(waves)
    }

    /// The hyperparameters of a group. As in torch, their ranges are checked when a group is added
    /// and not again: a schedule may pass a little below zero.
    fn hyper(&self, group: &Bound<'_, PyDict>, index: usize) -> PyResult<Hyper> {
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
            decay: self.decay,
            nonfinite: self.nonfinite,
        })
    }
}

impl Slot {
    /// Checks the state that `entry` holds for `param`.
    fn new(
        index: usize,
        param: &Tensor<'_>,
        walk: &Walk,
        entry: &Bound<'_, PyDict>,
    ) -> PyResult<Self> {
        let format =
            if entry.contains("exp_avg_code")? { StateFormat::Dynamic8 } else { StateFormat::F32 };
        let (shape, strides) = param.geometry()?;
        let mut moments = Vec::new();
        for spec in format.buffers(walk.len()) {
            moments.push(StateTensor::new(index, &spec, &shape, &strides, entry)?);
        }
        let count = BufferSpec { name: "step", dtype: StateType::F32, per: Per::Block, len: 1 };
        Ok(Self {
            param: param.object.clone().unbind(),
            dtype: param.dtype,
            pointer: param.pointer,
            shape: param.shape.clone().unbind(),
            strides: param.strides.clone().unbind(),
            walk: walk.clone(),
            wave: 0,
            count: StateTensor::new(index, &count, &shape, &strides, entry)?,
            moments,
            format,
            entry: entry.clone().unbind(),
        })
    }

    /// The state's addresses, as the core wants them.
    fn raw(&self) -> RawState {
        match (self.format, &self.moments[..]) {
            (StateFormat::F32, [m, v]) => {
                RawState::F32(Moments32 { m: m.pointer as *mut f32, v: v.pointer as *mut f32 })
            }
            (StateFormat::Dynamic8, [m_code, m_scale, v_code, v_scale]) => {
                RawState::Dynamic8(Moments8 {
                    m_code: m_code.pointer as *mut u8,
                    m_scale: m_scale.pointer as *mut f32,
                    v_code: v_code.pointer as *mut u8,
                    v_scale: v_scale.pointer as *mut f32,
                })
            }
            _ => unreachable!("`Slot::new` makes as many tensors as the format has"),
        }
    }

    /// Whether everything is where it was when the slot was made.
    fn is_current(&self, param: &Bound<'_, PyAny>) -> PyResult<bool> {
        let py = param.py();
        let dtype = param.getattr(intern!(py, "dtype"))?;
        if !self.param.is(param)
            || Tensor::pointer_of(param)? != self.pointer
            || Torch::get(py)?.dtype(&dtype) != Some(self.dtype)
            || !param.getattr(intern!(py, "shape"))?.eq(self.shape.bind(py))?
            || !param.call_method0(intern!(py, "stride"))?.eq(self.strides.bind(py))?
        {
            return Ok(false);
        }
        let entry = self.entry.bind(py);
        for tensor in self.moments.iter().chain([&self.count]) {
            let Some(object) = entry.get_item(tensor.key.bind(py))? else {
                return Ok(false);
            };
            if !object.is(&tensor.object) || Tensor::pointer_of(&object)? != tensor.pointer {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// The number of the coming step, counted from 1.
    fn next_step(&self, index: usize) -> PyResult<u64> {
        // SAFETY: a float32 tensor of one element, checked when it was registered and, by address,
        // in this call; the GIL is held.
        let count = unsafe { *(self.count.pointer as *const f32) };
        if count.is_finite() && count >= 0.0 {
            return Ok(count as u64 + 1);
        }
        let text = format!(
            "state[\"step\"] of parameter {index} is {count}; a count of at least 0 is accepted"
        );
        Err(PyValueError::new_err(text))
    }
}

impl StateTensor {
    /// Checks one tensor of a parameter's state against what the core expects.
    fn new(
        index: usize,
        spec: &BufferSpec,
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
        let (expected, size) = match spec.dtype {
            StateType::F32 => (&torch.float32, 4),
            StateType::U8 => (&torch.uint8, 1),
        };
        let Ok(dtype) = object.getattr(intern!(py, "dtype")) else {
            return refuse(format!("is {}", object.repr()?), "a tensor");
        };
        if !dtype.is(expected) {
            return refuse(format!("has dtype {dtype}"), &expected.bind(py).str()?.to_string());
        }
        if !object.getattr(intern!(py, "is_cpu"))?.is_truthy()? {
            return refuse(
                format!("is on {}", object.getattr("device")?),
                "the parameter's device",
            );
        }
        let got: Vec<usize> = object.getattr(intern!(py, "shape"))?.extract()?;
        let stride: Vec<isize> = object.call_method0(intern!(py, "stride"))?.extract()?;
        let fits = match spec.per {
            Per::Element => got == shape && is_dense_like(shape, strides, &stride).unwrap_or(false),
            Per::Block => {
                got.iter().product::<usize>() == spec.len
                    && got.len() <= 1
                    && (spec.len < 2 || stride == [1])
            }
        };
        if !fits {
            let accepted = match spec.per {
                Per::Element => format!("shape {shape:?}, dense in the parameter's memory order"),
                Per::Block => format!("a contiguous vector of {} elements", spec.len),
            };
            return refuse(format!("has shape {got:?} and strides {stride:?}"), &accepted);
        }
        Ok(Self {
            key: PyString::intern(py, name).unbind(),
            pointer: Tensor::pointer_of(&object)?,
            object: object.unbind(),
            bytes: spec.len * size,
        })
    }
}

/// A dictionary's item, or `KeyError`.
fn item<'py>(
    dict: &Bound<'py, PyDict>,
    key: &Bound<'py, impl Sized>,
) -> PyResult<Bound<'py, PyAny>> {
    let key = key.as_any();
    dict.get_item(key)?.ok_or_else(|| PyKeyError::new_err(key.clone().unbind()))
}

/// Keys and values by identity, in order.
fn identities(dict: &Bound<'_, PyDict>) -> impl Iterator<Item = (usize, usize)> {
    dict.iter().map(|(key, value)| (key.as_ptr() as usize, value.as_ptr() as usize))
}

/// How messages call a parameter.
fn subject(param: &Bound<'_, PyAny>, index: usize, group: usize, place: usize) -> String {
    let text = |name: &str| param.getattr(name).map_or_else(|_| "?".to_owned(), |x| x.to_string());
    let (shape, dtype) = (text("shape"), text("dtype"));
    format!("parameter {index} (group {group}, position {place}, shape {shape}, dtype {dtype}):")
}

fn same_shape(
    grad: &Tensor<'_>,
    shape: &Bound<'_, PyTuple>,
    subject: impl Fn() -> String,
) -> PyResult<()> {
    if grad.shape.eq(shape)? {
        return Ok(());
    }
    let text = format!(
        "{} gradient has shape {}; the parameter's shape is accepted",
        subject(),
        grad.shape
    );
    Err(PyValueError::new_err(text))
}
