//! How gradients are cut before they are used: all together to a norm, and each by its own history.
//!
//! Those on the CPU are measured and cut here, before anything is written; a device measures and cuts
//! its own when the step runs there.

use pyo3::exceptions::{PyTypeError, PyValueError};
use pyo3::intern;
use pyo3::prelude::*;
use qadam_core::clip::{self, Gradient, HISTORY, Percentile};
use qadam_core::cpu::{self, Backend};
use qadam_core::cuda::DeviceClip;
use qadam_core::{Result, TensorStep};

use super::run::Wave;
use crate::error::to_python;
use crate::tensor::{Device, Tensor, Torch};

/// How all gradients together are cut.
#[derive(Clone, Copy)]
pub struct Shared {
    max_norm: f64,
    /// Address of a float32 on the gradients' device, which gets the norm that they had.
    pub norm: u64,
    device: Device,
}

impl Shared {
    /// Reads the largest norm, and the tensor for the norm.
    pub fn read(max_norm: f64, norm: &Bound<'_, PyAny>) -> PyResult<Self> {
        clip::check_max_grad_norm(max_norm).map_err(|error| to_python(&error))?;
        let py = norm.py();
        let dtype = norm.getattr(intern!(py, "dtype"))?;
        let count: usize = norm.call_method0(intern!(py, "numel"))?.extract()?;
        match Device::of(norm)? {
            Some(device) if dtype.is(&Torch::get(py)?.float32) && count == 1 => {
                Ok(Self { max_norm, norm: Tensor::pointer_of(norm)? as u64, device })
            }
            _ => {
                let text = format!(
                    "the norm's tensor has dtype {dtype} and {count} elements; one float32 is \
                     accepted"
                );
                Err(PyTypeError::new_err(text))
            }
        }
    }

    /// Raises unless all gradients are on the norm's device.
    pub fn check(&self, mut devices: impl Iterator<Item = Device>) -> PyResult<()> {
        match devices.find(|&device| device != self.device) {
            None => Ok(()),
            Some(other) => {
                let text = format!(
                    "max_grad_norm is set, and gradients are on {:?} and {other:?}; gradients on \
                     one device are accepted",
                    self.device
                );
                Err(PyValueError::new_err(text))
            }
        }
    }
}

/// How a gradient on the CPU is cut by its history.
pub struct Own {
    /// Address of [`HISTORY`] float32.
    pub history: usize,
    /// The number of the coming step.
    pub t: u64,
    pub percentile: usize,
}

/// How the pending gradients are cut.
pub struct Clip {
    pub shared: Option<Shared>,
    /// One for each.
    pub own: Vec<Option<Own>>,
}

/// What is to be written once the step is done.
pub struct Outcome {
    /// Addresses and contents of histories.
    histories: Vec<(usize, [f32; HISTORY])>,
    /// Address and value of the norm.
    norm: Option<(usize, f32)>,
}

impl Clip {
    /// What a device is told.
    pub fn on_device(&self) -> DeviceClip {
        DeviceClip {
            max_norm: self.shared.map(|shared| shared.max_norm),
            norm: self.shared.map(|shared| shared.norm),
        }
    }

    /// Cuts the gradients on the CPU.
    ///
    /// # Errors
    /// [`ThreadPool`](qadam_core::Error::ThreadPool).
    ///
    /// # Safety
    /// The contract of [`TensorStep::new`] holds for every wave, histories are valid and aligned, and
    /// nobody else writes them.
    pub unsafe fn cut(
        &self,
        waves: &mut [Wave],
        backend: Backend,
        threads: usize,
    ) -> Result<Outcome> {
        let mut squares = vec![None; self.own.len()];
        for wave in waves.iter() {
            // SAFETY: by contract.
            let of_wave = unsafe { cpu::squared_norms(&wave.cpu.steps, backend, threads)? };
            for (&position, norm) in wave.cpu.pending.iter().zip(of_wave) {
                squares[position] = Some(norm);
            }
        }
        let mut steps: Vec<Option<&mut TensorStep>> = squares.iter().map(|_| None).collect();
        for part in waves.iter_mut().map(|wave| &mut wave.cpu) {
            for (&position, step) in part.pending.iter().zip(&mut part.steps) {
                steps[position] = Some(step);
            }
        }
        // SAFETY: by contract.
        let read = |own: &Own| unsafe { *(own.history as *const [f32; HISTORY]) };
        let mut histories: Vec<_> =
            self.own.iter().map(|own| own.as_ref().map(|own| (own, read(own)))).collect();
        let mut gradients = Vec::with_capacity(squares.len());
        for ((step, squares), own) in steps.iter().zip(squares).zip(&mut histories) {
            if let (Some(step), Some(squares)) = (step, squares) {
                let percentile = own.as_mut().map(|(own, history)| Percentile {
                    history,
                    t: own.t,
                    percentile: own.percentile,
                });
                gradients.push(Gradient { squares, factor: step.factor(), percentile });
            }
        }
        let is_on_cpu = |shared: &&Shared| shared.device == Device::Cpu;
        let shared = self.shared.as_ref().filter(is_on_cpu);
        let (norm, factors) = clip::gradients(&mut gradients, shared.map(|shared| shared.max_norm));
        for (step, factor) in steps.into_iter().flatten().zip(factors) {
            step.multiply(factor);
        }
        let histories = histories.into_iter().flatten();
        Ok(Outcome {
            histories: histories.map(|(own, history)| (own.history, history)).collect(),
            norm: shared.map(|shared| (shared.norm as usize, clip::rounded(norm))),
        })
    }
}

impl Outcome {
    /// Writes the histories and the norm.
    ///
    /// # Safety
    /// As [`Clip::cut`]; the norm's address is valid too.
    pub unsafe fn write(self) {
        for (address, history) in self.histories {
            // SAFETY: by contract.
            unsafe { *(address as *mut [f32; HISTORY]) = history };
        }
        if let Some((address, norm)) = self.norm {
            // SAFETY: by contract.
            unsafe { *(address as *mut f32) = norm };
        }
    }
}
