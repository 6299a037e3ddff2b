//! All of an optimizer's tensors: gathered and checked, given state, stepped.

use std::ops::Range;

use pyo3::exceptions::PyValueError;
use pyo3::intern;
use pyo3::prelude::*;
use pyo3::types::{PyDict, PyList, PyTuple};
use qadam_core::cpu::{self, Backend};
use qadam_core::rule::Coefficients;
use qadam_core::{Decay, Error, Hyper, NonFinite, TensorStep, Walk};

use super::groups::{hyper, item};
use super::slot::Slot;
use crate::error::to_python;
use crate::tensor::{Tensor, Torch};

/// What an engine knows of an optimizer's tensors.
pub struct Tensors {
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

impl Tensors {
    /// Nothing known yet.
    pub fn new(decay: Decay, nonfinite: NonFinite) -> Self {
        let (slots, entries, arranged) = (Vec::new(), Vec::new(), Vec::new());
        Self { decay, nonfinite, slots, entries, arranged, waves: 1 }
    }

    /// The parameters that have state.
    pub fn slots(&self) -> impl Iterator<Item = &Slot> {
        self.slots.iter().flatten()
    }

    /// The slot of a parameter that `gather` has registered.
    fn slot(&self, index: usize) -> &Slot {
        self.slots[index].as_ref().expect("gather registers every parameter with a gradient")
    }

    /// Reads everything anew at the next step.
    pub fn forget(&mut self) {
        self.slots.clear();
        self.entries.clear();
        self.arranged.clear();
    }

    /// A step; parameters whose state it makes are added to `created`.
    #[expect(clippy::too_many_arguments, reason = "`step`'s, and what it derives from them")]
    pub fn run<'py>(
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
                if waves.len() > 1 {
                    cpu::pool::start(threads).map_err(|e| (e, &waves[0]))?;
                }
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
            let hyper = hyper(&group, group_index, self.decay, self.nonfinite)?;
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
