//! All of an optimizer's tensors: gathered and checked, given state, stepped.

use std::ops::Range;
use std::rc::Rc;

use pyo3::exceptions::PyValueError;
use pyo3::intern;
use pyo3::prelude::*;
use pyo3::types::{PyDict, PyList};
use qadam_core::cpu::{self, Backend};
use qadam_core::cuda::{DevicePercentile, DeviceStep};
use qadam_core::rule::Coefficients;
use qadam_core::{Hyper, NonFinite, TensorStep, Walk};

use super::amp::Amp;
use super::clip::{Clip, Own, Shared};
use super::gradient::Gradient;
use super::groups::{Defaults, Group, item};
use super::items::{Item, holds, identities};
use super::run::{self, Devices, Wave};
use super::slot::{Slot, Wanted, address};
use super::trail::Trail;
use crate::error::to_python;
use crate::place::Place;
use crate::software::{self, Adopted};
use crate::tensor::{Device, Tensor, Torch};

/// What an engine knows of an optimizer's tensors.
pub struct Tensors {
    defaults: Defaults,
    /// One for each parameter, in the order of the groups, once it has state.
    slots: Vec<Option<Slot>>,
    /// Keys and values of `optimizer.state`, by identity, when the slots were last current.
    entries: Vec<Item>,
    /// The parameters for which memory was last found to be in order, and how many runs they take:
    /// those that share memory take turns.
    arranged: Vec<usize>,
    /// These parameters, if the list was asked for since.
    pub updated: Option<Py<PyList>>,
    /// What the arranged parameters and their state take of memory: ascending, not overlapping.
    taken: Vec<Range<usize>>,
    waves: usize,
    devices: Devices,
    /// Host memory that the coming step moves into huge pages.
    settled: Vec<Range<usize>>,
    trail: Trail,
}

/// What a step is told of hyperparameters.
#[derive(Clone, Copy)]
pub struct Options<'a, 'py> {
    /// The optimizer's `param_groups`.
    pub groups: &'a Bound<'py, PyList>,
    /// A group for each parameter that does not follow its own.
    pub overrides: &'a Bound<'py, PyDict>,
    /// What `torch.amp.GradScaler` says.
    pub amp: &'a Amp,
    /// How all gradients together are cut, if they are.
    pub clip: Option<Shared>,
}

/// A parameter and its entry in `optimizer.state`, if it had one.
pub type Before<'py> = (Bound<'py, PyAny>, Option<Bound<'py, PyAny>>);

/// A gradient that passed every check.
struct Pending<'py> {
    /// Of the parameter, counted through all groups.
    index: usize,
    grad: Gradient<'py>,
    group: Rc<Group>,
}

/// A parameter that needs a slot.
struct Fresh<'py> {
    index: usize,
    param: Tensor<'py>,
    walk: Walk,
    wanted: Wanted,
}

impl Tensors {
    /// Nothing known yet.
    pub fn new(defaults: Defaults) -> Self {
        Self {
            defaults,
            slots: Vec::new(),
            entries: Vec::new(),
            arranged: Vec::new(),
            updated: None,
            taken: Vec::new(),
            waves: 1,
            devices: Devices::default(),
            settled: Vec::new(),
            trail: Trail::new(),
        }
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
        self.updated = None;
        self.settled.clear();
        self.trail = Trail::new();
    }

    /// A step; parameters whose state it makes or replaces are added to `before`, with what they had.
    #[expect(clippy::too_many_arguments, reason = "`step`'s, and what it derives from them")]
    pub fn run<'py>(
        &mut self,
        py: Python<'py>,
        options: Options<'_, 'py>,
        state: &Bound<'py, PyDict>,
        make_state: &Bound<'py, PyAny>,
        threads: usize,
        backend: Backend,
        before: &mut Vec<Before<'py>>,
    ) -> PyResult<usize> {
        self.trail.begin();
        let pending = self.gather(options, state, make_state, threads, before)?;
        let mut waves = self.prepare(&pending, options.amp)?;
        let clip = self.clip(&pending, options.clip)?;
        self.devices.open(py, &waves)?;
        let _adopted = self.adopt(&pending, options)?;
        let raise = self.defaults.nonfinite == NonFinite::Raise;
        let devices = &mut self.devices;
        let settled = std::mem::take(&mut self.settled);
        // SAFETY: `gather` and `prepare` checked addresses, alignment, types, shapes, strides and
        // devices in this very call; `pending` and the slots keep the tensors alive; members of a
        // wave do not overlap; the streams are torch's current ones.
        let outcome = py.detach(|| unsafe {
            for memory in &settled {
                cpu::move_into_huge_pages(memory);
            }
            run::run(&mut waves, clip.as_ref(), devices, threads, backend, raise)
        });
        // `run` knows positions in `pending`, users know parameters
        let nonfinite = outcome
            .map_err(|error| to_python(&run::relabel(error, |index| pending[index].index)))?;
        for item in &pending {
            let slot = self.slot(item.index);
            if slot.param.device == Device::Cpu {
                // SAFETY: a float32 CPU tensor of one element, checked when it was registered and,
                // by address, in this call; the GIL is held.
                unsafe { *(slot.count.known.pointer as *mut f32) += 1.0 };
            }
        }
        Torch::get(py)?.increment_version.call1(py, (self.updated(py)?,))?;
        Ok(nonfinite + self.devices.poll())
    }

    /// The arranged parameters, which are those of the step.
    fn updated<'py>(&mut self, py: Python<'py>) -> PyResult<Bound<'py, PyList>> {
        let known = if let Some(known) = self.updated.take() {
            known
        } else {
            let params = self.arranged.iter().map(|&index| &self.slot(index).param.object);
            PyList::new(py, params)?.unbind()
        };
        Ok(self.updated.insert(known).bind(py).clone())
    }

    /// How many non-finite gradients devices have met that no step has returned yet.
    pub fn poll(&mut self) -> usize {
        self.devices.poll()
    }

    /// Bytes of device and of pinned host memory that launches use.
    pub fn work(&self) -> (usize, usize) {
        self.devices.work()
    }

    /// With the software device, declares what the pending steps may touch.
    fn adopt(&self, pending: &[Pending<'_>], options: Options<'_, '_>) -> PyResult<Adopted> {
        let values = options.amp.addresses().chain(options.clip.map(|shared| shared.norm));
        let mut ranges: Vec<_> = values.map(|address| (address as usize, 4)).collect();
        for item in pending.iter().filter(|_| software::in_use()) {
            ranges.extend(self.slot(item.index).memory());
            let grad = item.grad.range(self.slot(item.index));
            ranges.push((grad.start, grad.len()));
            ranges.extend(item.group.lr_address.map(|(_, address)| (address, 4)));
        }
        Adopted::new(ranges)
    }

    /// Checks every gradient, then sees to it that every parameter with one has a current slot.
    fn gather<'py>(
        &mut self,
        Options { groups, overrides, amp, .. }: Options<'_, 'py>,
        state: &Bound<'py, PyDict>,
        make_state: &Bound<'py, PyAny>,
        threads: usize,
        before: &mut Vec<Before<'py>>,
    ) -> PyResult<Vec<Pending<'py>>> {
        let py = groups.py();
        let has_overrides = !overrides.is_empty();
        if !holds(state, &self.entries) {
            self.slots.clear();
        }
        let mut pending = Vec::with_capacity(self.arranged.len()); // usually, as many as at the last step
        let mut fresh = Vec::new();
        let mut index = 0;
        for (group_index, group) in groups.iter().enumerate() {
            let group = group.cast_into::<PyDict>()?;
            let read = Rc::new(Group::read(&group, group_index, &self.defaults)?);
            let params = item(&group, intern!(py, "params"))?.cast_into::<PyList>()?;
            for (place, param) in params.iter().enumerate() {
                if self.slots.len() == index {
                    self.slots.push(None);
                }
                self.trail.announce(index, threads);
                let next = self.slots.get(index + 1).and_then(Option::as_ref);
                next.into_iter().flat_map(Slot::param_places).for_each(Place::prefetch);
                if let Some(later) = self.slots.get(index + 2) {
                    let start = std::ptr::from_ref(later).addr();
                    Place { start, bytes: size_of_val(later) }.prefetch();
                }
                let object = param.getattr(intern!(py, "grad"))?;
                if !object.is_none() {
                    let own = if has_overrides { overrides.get_item(&param)? } else { None };
                    let group = match own {
                        Some(own) => {
                            let own = own.cast_into::<PyDict>()?;
                            Rc::new(Group::read(&own, group_index, &self.defaults)?)
                        }
                        None => Rc::clone(&read),
                    };
                    if amp.skips(&param)? {
                        index += 1;
                        continue;
                    }
                    let subject = || subject(&param, index, group_index, place);
                    let read = || {
                        Tensor::read_gradient(&object)?.map_err(|refusal| {
                            refusal.to_python(&format!("{} gradient", subject()))
                        })
                    };
                    let known = self.slots[index].as_ref();
                    let seen = known.and_then(|slot| {
                        Gradient::at_a_glance(&object, &slot.param, &slot.gradient)
                    });
                    let unseen = if seen.is_none() { Some(read()?) } else { None };
                    let history = group.percentile.is_some();
                    let wanted = Wanted { amsgrad: group.amsgrad, history };
                    let mut current = None;
                    if let Some(slot) = known
                        && slot.is_current(&param, wanted, next)?
                    {
                        current = Some(slot);
                    }
                    let grad = match (current, seen) {
                        (Some(_), Some(seen)) => seen,
                        (Some(slot), None) => {
                            let grad = unseen.map_or_else(read, Ok)?;
                            fits(&grad, slot.param.device, slot.param.shape(), subject)?;
                            Gradient::new(grad, slot.param.strides())?
                        }
                        (None, _) => {
                            let grad = unseen.map_or_else(read, Ok)?;
                            let tensor = Tensor::read(&param)?
                                .map_err(|refusal| refusal.to_python(&subject()))?;
                            let (shape, strides) = tensor.geometry()?;
                            let sizes: Vec<i64> = shape.iter().map(|&size| size as i64).collect();
                            fits(&grad, tensor.device, &sizes, subject)?;
                            let walk = Walk::new(&shape, &strides, &strides).map_err(|error| {
                                PyValueError::new_err(format!("{} {error}", subject()))
                            })?;
                            fresh.push(Fresh { index, param: tensor, walk, wanted });
                            let strides: Vec<i64> = strides.iter().map(|&s| s as i64).collect();
                            Gradient::new(grad, &strides)?
                        }
                    };
                    pending.push(Pending { index, grad, group });
                }
                index += 1;
            }
        }
        self.slots.truncate(index);
        if !fresh.is_empty() {
            self.register(&fresh, state, make_state, before)?;
        }
        let indices = pending.iter().map(|item| item.index);
        if !fresh.is_empty() || !indices.clone().eq(self.arranged.iter().copied()) {
            self.arrange(indices.collect())?;
        }
        for item in &mut pending {
            self.settle(item);
            self.separate(item)?;
        }
        self.trail.end(&self.slots, threads);
        Ok(pending)
    }

    /// Gives each of `fresh` a slot. Where state is missing, or lies in another memory order since
    /// the parameter's changed, `make_state` sees to it.
    fn register<'py>(
        &mut self,
        fresh: &[Fresh<'py>],
        state: &Bound<'py, PyDict>,
        make_state: &Bound<'py, PyAny>,
        before: &mut Vec<Before<'py>>,
    ) -> PyResult<()> {
        let wanting = PyList::empty(state.py());
        for Fresh { index, param, walk, wanted } in fresh {
            let entry = state.get_item(&param.object)?;
            let fits = match &entry {
                Some(entry) => {
                    Slot::new(*index, param, walk, entry.cast::<PyDict>()?, *wanted).is_ok()
                }
                None => false,
            };
            if !fits {
                wanting.append(&param.object)?;
                before.push((param.object.clone(), entry));
            }
        }
        if !wanting.is_empty() {
            make_state.call1((wanting,))?;
        }
        let mut slots = Vec::with_capacity(fresh.len());
        for Fresh { index, param, walk, wanted } in fresh {
            let entry = item(state, &param.object)?.cast_into::<PyDict>()?;
            slots.push((*index, Slot::new(*index, param, walk, &entry, *wanted)?));
        }
        for (index, slot) in slots {
            self.slots[index] = Some(slot);
        }
        self.entries = identities(state).collect();
        self.trail.expect_change();
        Ok(())
    }

    /// Finds the waves of the parameters at `indices`, and refuses state that shares memory with
    /// anything else.
    fn arrange(&mut self, indices: Vec<usize>) -> PyResult<()> {
        let mut ranges: Vec<(Range<usize>, usize, bool)> = Vec::new();
        let mut params = Vec::with_capacity(indices.len());
        for &index in &indices {
            let slot = self.slot(index);
            let param = slot.param_range();
            params.push(param.clone());
            ranges.push((param, index, false));
            for tensor in slot.tensors() {
                let start = tensor.known.pointer;
                ranges.push((start..start + tensor.bytes, index, true));
            }
        }
        ranges.retain(|(range, ..)| !range.is_empty());
        ranges.sort_unstable_by_key(|(range, ..)| range.start);
        // for parameters and for state: how far memory is taken, and by whom
        let (mut param_end, mut state_end) = ((0, 0), (0, 0));
        let mut merged: Vec<Range<usize>> = Vec::with_capacity(ranges.len());
        for (range, index, is_state) in ranges {
            match merged.last_mut() {
                Some(last) if range.start <= last.end => last.end = last.end.max(range.end),
                _ => merged.push(range.clone()),
            }
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
        self.taken = merged;
        self.waves = 1;
        for (&index, wave) in indices.iter().zip(cpu::disjoint_waves(&params)) {
            self.waves = self.waves.max(wave + 1);
            self.slots[index].as_mut().expect("read above").wave = wave;
        }
        for slot in self.slots.iter_mut().flatten() {
            slot.apart = 0..0;
        }
        self.arranged = indices;
        self.updated = None;
        Ok(())
    }

    /// Remembers a gradient, and takes note of host memory of a parameter or a gradient that is where it was
    /// at the step before: it is there to stay, as most gradients and some parameters are not.
    fn settle(&mut self, item: &Pending<'_>) {
        let slot = self.slots[item.index].as_mut().expect("gather registers every pending one");
        let last = std::mem::replace(&mut slot.gradient, item.grad.last);
        if slot.param.device == Device::Cpu {
            if slot.steps == 1 {
                self.settled.push(slot.param_range());
            }
            if item.grad.last.has_stayed && !last.has_stayed {
                self.settled.push(item.grad.range(slot));
            }
        }
        slot.steps = slot.steps.saturating_add(1);
    }

    /// Replaces a gradient by a copy where it shares memory with something that the step writes:
    /// every gradient is read as it is before the step.
    fn separate(&mut self, item: &mut Pending<'_>) -> PyResult<()> {
        let slot = self.slots[item.index].as_mut().expect("gather registers every pending one");
        let range = item.grad.range(slot);
        if range == slot.apart {
            return Ok(());
        }
        let next = self.taken.partition_point(|taken| taken.end <= range.start);
        let is_shared = self.taken.get(next).is_some_and(|taken| taken.start < range.end);
        if is_shared && !range.is_empty() {
            let object = &item.grad.object;
            let copy = object.call_method0(intern!(object.py(), "clone"))?;
            let copy =
                Tensor::read(&copy)?.map_err(|refusal| refusal.to_python("a gradient's copy"))?;
            item.grad = Gradient::new(copy, slot.param.strides())?;
        } else {
            slot.apart = range;
        }
        Ok(())
    }

    /// How the pending gradients are cut; None where nothing is to be measured.
    fn clip(&self, pending: &[Pending<'_>], shared: Option<Shared>) -> PyResult<Option<Clip>> {
        let devices = pending.iter().map(|item| self.slot(item.index).param.device);
        if let Some(shared) = &shared {
            shared.check(devices)?;
        }
        let is_asked = |item: &Pending<'_>| item.group.percentile.is_some();
        if shared.is_none() && !pending.iter().any(is_asked) {
            return Ok(None);
        }
        let own = |item: &Pending<'_>| {
            let slot = self.slot(item.index);
            let (Some(history), Some(percentile)) = (&slot.history, item.group.percentile) else {
                return Ok(None);
            };
            if slot.param.device != Device::Cpu {
                return Ok(None); // the device has its own
            }
            let t = slot.next_step(item.index)?;
            Ok(Some(Own { history: history.known.pointer, t, percentile }))
        };
        Ok(Some(Clip { shared, own: pending.iter().map(own).collect::<PyResult<_>>()? }))
    }

    /// What the core needs to update the pending parameters.
    fn prepare(&self, pending: &[Pending<'_>], amp: &Amp) -> PyResult<Vec<Wave>> {
        let mut waves: Vec<Wave> = (0..self.waves).map(|_| Wave::default()).collect();
        if let [wave] = &mut waves[..] {
            wave.cpu.reserve(pending.len());
        }
        let mut last: Option<(Hyper, u64, Coefficients)> = None;
        for (position, item) in pending.iter().enumerate() {
            let slot = self.slot(item.index);
            let hyper = item.group.hyper;
            let walk = item.grad.walk(slot)?;
            let lr_address = item.group.lr_for(slot.param.device, item.index)?;
            let Device::Cuda(device) = slot.param.device else {
                let t = slot.next_step(item.index)?;
                let coefficients = match last {
                    Some((last, step, coefficients)) if last == hyper && step == t => coefficients,
                    _ => Coefficients::new(&hyper, t),
                };
                last = Some((hyper, t, coefficients));
                let coefficients = match amp.grad_scale() {
                    Some(scale) => coefficients.with_grad_scale(scale),
                    None => coefficients,
                };
                let param = (slot.param.pointer as *mut u8, slot.dtype);
                let grad = (item.grad.pointer as *const u8, item.grad.dtype);
                // SAFETY: `Tensor::read` and `Slot::new` checked both tensors and the state, whose
                // addresses `gather` compared in this call; the run ends before the call does.
                let step = unsafe { TensorStep::new(param, grad, walk, slot.raw(), coefficients) };
                waves[slot.wave].cpu.push(step, position);
                continue;
            };
            let (grad_scale, found_inf) = amp.on_device(device);
            let step = DeviceStep {
                param: address(slot.param.pointer),
                param_dtype: slot.dtype,
                grad: address(item.grad.pointer),
                grad_dtype: item.grad.dtype,
                walk,
                state: slot.device_state(),
                step: slot.count.known.pointer as u64,
                hyper,
                lr_address,
                grad_scale,
                found_inf,
                cut: None,
                percentile: slot.history.as_ref().zip(item.group.percentile).map(
                    |(history, percentile)| DevicePercentile {
                        history: history.known.pointer as u64,
                        percentile,
                    },
                ),
            };
            waves[slot.wave].cuda.entry(device).or_default().push(step, position);
        }
        Ok(waves)
    }
}

/// How messages call a parameter.
fn subject(param: &Bound<'_, PyAny>, index: usize, group: usize, place: usize) -> String {
    let text = |name: &str| param.getattr(name).map_or_else(|_| "?".to_owned(), |x| x.to_string());
    let (shape, dtype) = (text("shape"), text("dtype"));
    format!("parameter {index} (group {group}, position {place}, shape {shape}, dtype {dtype}):")
}

/// Raises unless a gradient has its parameter's device and shape.
fn fits(
    grad: &Tensor<'_>,
    device: Device,
    shape: &[i64],
    subject: impl Fn() -> String,
) -> PyResult<()> {
    if grad.device != device {
        let (subject, got) = (subject(), grad.object.getattr("device")?);
        let text = format!("{subject} gradient is on {got}; the parameter's device is accepted");
        return Err(PyValueError::new_err(text));
    }
    if grad.shape.extract::<Vec<i64>>()? != shape {
        let (subject, got) = (subject(), &grad.shape);
        let text = format!("{subject} gradient has shape {got}; the parameter's shape is accepted");
        return Err(PyValueError::new_err(text));
    }
    Ok(())
}
