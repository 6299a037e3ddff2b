//! One optimizer's tensors: read once, checked at every step, stepped in one call.
//!
//! Users may replace what an optimizer refers to between any two steps: `p.data`, a gradient, an
//! entry of `optimizer.state`. Every step therefore compares identities, addresses, shapes and
//! strides with what was registered, and reads anew what differs; a stale pointer is never used.
//!
//! * `tensors`: gathers gradients, keeps slots current, finds who shares memory;
//! * `run`: hands them to the devices;
//! * `slot`: one parameter and its state, `known`: what is remembered of a tensor;
//! * `items`: whether a dictionary holds what it held;
//! * `gradient`: what is read of a gradient;
//! * `trail`: what of all this another thread may ask memory for ahead;
//! * `groups`: hyperparameters;
//! * `amp`: what mixed precision's gradient scaler says;
//! * `clip`: how gradients are cut.

mod amp;
mod clip;
mod gradient;
mod groups;
mod items;
mod known;
mod run;
mod slot;
mod tensors;
mod trail;

use std::sync::Mutex;

use pyo3::exceptions::{PyRuntimeError, PyValueError};
use pyo3::gc::{PyTraverseError, PyVisit};
use pyo3::prelude::*;
use pyo3::types::{PyDict, PyList};
use qadam_core::clip::HISTORY;
use qadam_core::cpu::{self, Backend};
use qadam_core::{Decay, NonFinite};

use crate::error::to_python;
use crate::impression;
use amp::Amp;
use clip::Shared;
use groups::Defaults;
use tensors::{Options, Tensors};

/// Steps all tensors of an optimizer.
#[pyclass(module = "qadam._core", frozen)]
pub struct Engine(Mutex<Tensors>);

#[pymethods]
impl Engine {
    /// `decoupled`: whether weight decay is `AdamW`'s. `nonfinite`: `"skip"`, `"propagate"` or
    /// `"raise"`. The others hold for every group that does not say otherwise.
    #[new]
    fn new(
        py: Python<'_>,
        decoupled: bool,
        nonfinite: &str,
        percentile_clipping: usize,
        max_unorm: f64,
        skip_zeros: bool,
    ) -> PyResult<Self> {
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
        impression::prepare(py);
        let decay = if decoupled { Decay::Decoupled } else { Decay::Coupled };
        let percentile = (percentile_clipping < HISTORY).then_some(percentile_clipping);
        let defaults = Defaults { decay, nonfinite, percentile, max_unorm, skip_zeros };
        Ok(Self(Mutex::new(Tensors::new(defaults))))
    }

    /// Updates every parameter of `groups` (an optimizer's `param_groups`) that has a gradient, on
    /// `threads` threads, and returns how many elements had a non-finite gradient.
    ///
    /// `overrides` has a group for each parameter that does not follow its own. `state` is the
    /// optimizer's; `make_state(params)` must give each of `params` an entry that
    /// fits it. It is called only once all gradients have passed their checks. `amp` has, for each
    /// device of the parameters, the scale of the gradients and whether any is infinite, both float32
    /// tensors of one element or None. `clip` is the norm that all gradients together are cut to, and
    /// a float32 tensor of no dimensions on their device, which gets the norm that they had.
    #[expect(clippy::too_many_arguments, reason = "a step's; the caller is `_core`'s Python side")]
    fn step(
        &self,
        py: Python<'_>,
        groups: &Bound<'_, PyList>,
        overrides: &Bound<'_, PyDict>,
        state: &Bound<'_, PyDict>,
        make_state: &Bound<'_, PyAny>,
        threads: usize,
        amp: &Bound<'_, PyList>,
        clip: Option<(f64, Bound<'_, PyAny>)>,
    ) -> PyResult<usize> {
        let backend = Backend::current().map_err(|error| to_python(&error))?;
        let threads = cpu::pool::threads(threads).map_err(|error| to_python(&error))?;
        let Ok(mut tensors) = self.0.try_lock() else {
            let text = "this optimizer is in the middle of a step, on another thread or from within itself";
            return Err(PyRuntimeError::new_err(text));
        };
        let mut before = Vec::new();
        let amp = Amp::read(amp)?;
        let clip = clip.map(|(max_norm, norm)| Shared::read(max_norm, &norm)).transpose()?;
        let options = Options { groups, overrides, amp: &amp, clip };
        let outcome = tensors.run(py, options, state, make_state, threads, backend, &mut before);
        if outcome.is_err() {
            // a step that failed leaves the state as it was
            for (param, entry) in before.into_iter().rev() {
                match entry {
                    Some(entry) => state.set_item(param, entry)?,
                    None if state.contains(&param)? => state.del_item(param)?,
                    None => {}
                }
            }
            tensors.forget();
        }
        outcome
    }

    /// How many elements with a non-finite gradient CUDA devices have met that no step has returned
    /// yet: a step does not wait for the device.
    fn poll(&self) -> usize {
        self.0.try_lock().map_or(0, |mut tensors| tensors.poll())
    }

    /// Bytes of device and of pinned host memory that launches use.
    fn work(&self) -> (usize, usize) {
        self.0.try_lock().map_or((0, 0), |tensors| tensors.work())
    }

    /// For Python's garbage collector: a parameter may lead back to its optimizer.
    #[expect(clippy::needless_pass_by_value, reason = "the signature is PyO3's")]
    fn __traverse__(&self, visit: PyVisit<'_>) -> Result<(), PyTraverseError> {
        let Ok(tensors) = self.0.try_lock() else {
            return Ok(()); // in the middle of a step, all of it is in use
        };
        if let Some(updated) = &tensors.updated {
            visit.call(updated)?;
        }
        for slot in tensors.slots() {
            visit.call(&slot.param.object)?;
            visit.call(&slot.entry)?;
            for tensor in slot.tensors() {
                visit.call(&tensor.known.object)?;
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
