//! Runs the prepared steps, on every device that has some.

use std::collections::{BTreeMap, BTreeSet};

use pyo3::prelude::*;
use qadam_core::cpu::{self, Backend};
use qadam_core::cuda::{DeviceStep, Stepper, Work};
use qadam_core::{Error, Result, TensorStep};

use super::clip::Clip;
use crate::error::to_python;
use crate::tensor::Torch;

/// Steps that do not overlap.
#[derive(Default)]
pub struct Wave {
    pub cpu: Part<TensorStep>,
    /// By the device's number.
    pub cuda: BTreeMap<usize, Part<DeviceStep>>,
}

/// The steps of one device, and which of the pending gradients they belong to.
pub struct Part<S> {
    pub steps: Vec<S>,
    pub pending: Vec<usize>,
}

impl<S> Default for Part<S> {
    fn default() -> Self {
        Self { steps: Vec::new(), pending: Vec::new() }
    }
}

impl<S> Part<S> {
    pub fn reserve(&mut self, count: usize) {
        self.steps.reserve(count);
        self.pending.reserve(count);
    }

    pub fn push(&mut self, step: S, position: usize) {
        self.steps.push(step);
        self.pending.push(position);
    }

    /// The same error, of a position in `pending`.
    fn locate(&self, error: Error) -> Error {
        relabel(error, |index| self.pending[index])
    }
}

/// The same error, with `of` the position that it names.
pub fn relabel(error: Error, of: impl Fn(usize) -> usize) -> Error {
    match error {
        Error::NonFiniteGradient { index, count } => {
            Error::NonFiniteGradient { index: of(index), count }
        }
        Error::Forked { index, owner, process } => {
            Error::Forked { index: of(index), owner, process }
        }
        other => other,
    }
}

/// The CUDA devices of an optimizer.
#[derive(Default)]
pub struct Devices(BTreeMap<usize, OnDevice>);

struct OnDevice {
    stepper: Stepper,
    /// torch's current stream, of this step.
    stream: u64,
    /// How much of the stepper's count was returned already.
    counted: u64,
}

impl Devices {
    /// Sees to a stepper and the current stream of each device that `waves` need.
    pub fn open(&mut self, py: Python<'_>, waves: &[Wave]) -> PyResult<()> {
        for &number in waves.iter().flat_map(|wave| wave.cuda.keys()) {
            let stream = Torch::get(py)?.stream(py, number)?;
            if let Some(device) = self.0.get_mut(&number) {
                device.stream = stream;
                continue;
            }
            let stepper = Stepper::new(number).map_err(|error| to_python(&error))?;
            self.0.insert(number, OnDevice { stepper, stream, counted: 0 });
        }
        Ok(())
    }

    /// Bytes of device and of pinned host memory that launches use.
    pub fn work(&self) -> (usize, usize) {
        let Work { device, host } = self.0.values().map(|device| device.stepper.memory()).sum();
        (device, host)
    }

    /// What the devices have counted since the last call, as far as they have got.
    pub fn poll(&mut self) -> usize {
        let mut new = 0;
        for device in self.0.values_mut() {
            let count = device.stepper.nonfinite();
            new += count - std::mem::replace(&mut device.counted, count);
        }
        new as usize
    }
}

/// Runs all waves and returns how many elements of CPU gradients were not finite.
///
/// # Errors
/// What the back ends return; [`Error::NonFiniteGradient`] has a position in `pending`.
///
/// # Safety
/// The contracts of [`TensorStep::new`], [`cpu::run`] and [`Stepper::step`] hold for every wave.
pub unsafe fn run(
    waves: &mut [Wave],
    clip: Option<&Clip>,
    devices: &mut Devices,
    threads: usize,
    backend: Backend,
    raise: bool,
) -> Result<usize> {
    let has_cuda = |wave: &Wave| !wave.cuda.is_empty();
    let has_cpu = |wave: &Wave| !wave.cpu.steps.is_empty();
    if waves.len() > 1 || (waves.iter().any(has_cuda) && waves.iter().any(has_cpu)) {
        cpu::pool::start(threads)?; // later, something would have been written
    }
    for wave in &*waves {
        cpu::check(&wave.cpu.steps).map_err(|error| wave.cpu.locate(error))?;
    }
    // SAFETY: this function's contract.
    unsafe {
        if raise {
            for wave in &*waves {
                count(wave, devices, threads)?;
            }
        }
        let cut = match clip {
            Some(clip) => {
                measure_on_devices(waves, clip, devices)?;
                Some(clip.cut(waves, backend, threads)?)
            }
            None => None,
        };
        let mut nonfinite = 0;
        for wave in &*waves {
            for (number, part) in &wave.cuda {
                let device = devices.0.get_mut(number).expect("`open` was called for these waves");
                device.stepper.step(&part.steps, device.stream)?;
            }
            nonfinite += cpu::run(&wave.cpu.steps, backend, threads)?;
        }
        if let Some(cut) = cut {
            cut.write();
        }
        Ok(nonfinite)
    }
}

/// Enqueues the measuring of the gradients on each device, and tells the steps there how they will be
/// cut.
///
/// # Safety
/// As [`run`].
unsafe fn measure_on_devices(waves: &mut [Wave], clip: &Clip, devices: &mut Devices) -> Result<()> {
    let numbers: BTreeSet<usize> =
        waves.iter().flat_map(|wave| wave.cuda.keys().copied()).collect();
    for number in numbers {
        let device = devices.0.get_mut(&number).expect("`open` was called for these waves");
        let parts = waves.iter_mut().filter_map(|wave| wave.cuda.get_mut(&number));
        let each = parts.flat_map(|part| part.pending.iter().copied().zip(&mut part.steps));
        // the norm is a sum in the parameters' order
        let in_order: BTreeMap<usize, &mut DeviceStep> = each.collect();
        if clip.shared.is_none() && in_order.values().all(|step| step.percentile.is_none()) {
            continue;
        }
        let steps: Vec<DeviceStep> = in_order.values().map(|step| (**step).clone()).collect();
        // SAFETY: by contract.
        let cuts = unsafe { device.stepper.clip(&steps, &clip.on_device(), device.stream)? };
        for (step, cut) in in_order.into_values().zip(cuts) {
            step.cut = Some(cut);
        }
    }
    Ok(())
}

/// Returns [`Error::NonFiniteGradient`] for the first gradient of `wave` that is not finite.
///
/// # Safety
/// As [`run`].
unsafe fn count(wave: &Wave, devices: &mut Devices, threads: usize) -> Result<()> {
    // SAFETY: this function's contract.
    unsafe {
        for (number, part) in &wave.cuda {
            let device = devices.0.get_mut(number).expect("`open` was called for these waves");
            let found = device.stepper.count_nonfinite(&part.steps, device.stream)?;
            if let Some((index, count)) = found {
                return Err(part.locate(Error::NonFiniteGradient { index, count }));
            }
        }
        cpu::count_nonfinite(&wave.cpu.steps, threads).map_err(|error| wave.cpu.locate(error))
    }
}
