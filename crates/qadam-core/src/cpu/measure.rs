//! What has to be known of a whole tensor before any of it is written: how long its update is, where
//! that is limited ([`clip::update`]), and its new scales, where it has one a moment.
//!
//! A tensor of which that is asked takes a pass more, which does what the step will do and keeps
//! nothing of it but a [`Gauge`].

use super::folds::{self, Chunk};
use super::kernels::Kernels;
use super::{Backend, run};
use crate::clip;
use crate::codec::block::usable_scale;
use crate::error::Result;
use crate::ieee;
use crate::norm::{self, Lanes};
use crate::tensor::{RawState, TensorStep};

/// What a pass over some elements finds.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Gauge {
    /// Of the parameter's elements.
    pub params: Lanes,
    /// Of [`direction`](crate::rule::direction), 0 for elements that are kept.
    pub updates: Lanes,
    /// The largest magnitudes of the new moments that are finite; 8 bits only.
    pub largest: [f32; 3],
    /// Whether elements are kept; 8 bits only.
    pub keeps: bool,
}

/// The same of a chunk or a tensor.
#[derive(Debug, Clone, Copy, Default)]
struct Found {
    param_squares: f64,
    update_squares: f64,
    largest: [f32; 3],
    keeps: bool,
}

/// What a step is told.
#[derive(Debug, Clone, Copy)]
pub(super) struct Measured {
    /// What the update is multiplied by.
    pub update_scale: f32,
    /// The new scales of the moments, where they have one each.
    pub new_scales: Option<[f32; 3]>,
}

const fn has_one_scale(step: &TensorStep) -> bool {
    matches!(step.state, RawState::Dynamic8(moments) if !moments.block_wise)
}

fn is_to_measure(step: &TensorStep) -> bool {
    step.coefficients.max_unorm > 0.0 || has_one_scale(step)
}

/// Measures those of `steps` that ask for it. The result has no element if none does, else one for
/// each step.
///
/// # Safety
/// As [`run::run`]; nothing is written.
pub(super) unsafe fn measure(
    steps: &[TensorStep],
    backend: Backend,
    threads: usize,
) -> Result<Vec<Option<Measured>>> {
    let asking = || steps.iter().enumerate().filter(|(_, step)| is_to_measure(step));
    if asking().next().is_none() {
        return Ok(Vec::new());
    }
    let chunks = folds::chunks(asking(), norm::CHUNK);
    let gauge = |chunk: &Chunk| {
        let step = &steps[chunk.tensor];
        let kernels = Kernels::select(backend, step.param_dtype, step.grad_dtype);
        // SAFETY: the chunk lies within the tensor, whose pointers are valid by `TensorStep::new`.
        unsafe { gauge(step, chunk, kernels) }
    };
    let tensor = |chunk: usize| (chunks[chunk].tensor, chunks[chunk].start, chunks[chunk].len);
    let found = std::sync::Mutex::new(Vec::with_capacity(chunks.len()));
    run::through_pages(steps, chunks.len(), tensor, threads, |part| {
        let part = folds::each(&chunks[part], threads, gauge)?;
        found.lock().expect("no other thread").extend(part);
        Ok(0)
    })?;
    let found = found.into_inner().expect("no other thread");
    let mut measured = vec![None; steps.len()];
    let of_tensors = folds::of_tensors(asking().map(|(_, step)| step.len()));
    for ((index, step), own) in asking().zip(of_tensors) {
        // SAFETY: by contract.
        measured[index] = Some(unsafe { of_tensor(step, &found[own]) });
    }
    Ok(measured)
}

/// Gauges a chunk.
///
/// # Safety
/// It lies within `step`, whose pointers are valid, and nobody writes there.
unsafe fn gauge(step: &TensorStep, chunk: &Chunk, kernels: Kernels) -> Found {
    let c = &step.coefficients;
    let mut gauge = Gauge::default();
    // SAFETY: this function's contract; `visit` gives contiguous elements of the step's types.
    unsafe {
        run::visit(step, chunk.start, chunk.len, |param, grad, start, len| match step.state {
            RawState::F32(moments) => {
                (kernels.gauge32)(param, grad, moments.skip(start), len, c, &mut gauge);
            }
            RawState::Dynamic8(moments) => {
                (kernels.gauge8)(param, grad, moments.skip(start), len, c, &mut gauge);
            }
        });
    }
    Found {
        param_squares: gauge.params.total(),
        update_squares: gauge.updates.total(),
        largest: gauge.largest,
        keeps: gauge.keeps,
    }
}

/// What is found of a tensor, by its chunks in order.
///
/// # Safety
/// The step's state is valid, and nobody writes there.
unsafe fn of_tensor(step: &TensorStep, chunks: &[Found]) -> Measured {
    let c = &step.coefficients;
    let sum = |of: fn(&Found) -> f64| norm::total(&chunks.iter().map(of).collect::<Vec<_>>());
    let (params, updates) = (sum(|found| found.param_squares), sum(|found| found.update_squares));
    let update_scale = clip::update(c.max_unorm, params, updates, c.correction);
    let new_scales = match step.state {
        RawState::Dynamic8(moments) if !moments.block_wise && !chunks.is_empty() => {
            let keeps = chunks.iter().any(|found| found.keeps);
            let mut scales = [0.0; 3];
            for (index, (scale, moment)) in scales.iter_mut().zip(moments.each()).enumerate() {
                // SAFETY: this function's contract; the tensor has an element, so there is a scale.
                let old = unsafe { usable_scale(*moment.scale) };
                let largest = chunks.iter().map(|found| found.largest[index]);
                // a -0 from elsewhere is no least: which zero is the larger is left open
                let least = if keeps && old.is_sign_positive() { old } else { 0.0 };
                *scale = ieee::compute(|| largest.fold(least, f32::max));
            }
            Some(scales)
        }
        _ => None,
    };
    Measured { update_scale, new_scales }
}
