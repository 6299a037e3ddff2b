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
use crate::codec::{Code, Scales, ratio};
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
    /// What the new moments' scales must reach, as [`Gauge::extend`] says; 8 bits only.
    pub reach: Reach,
    /// Whether elements are kept; 8 bits only.
    pub keeps: bool,
}

/// How far the new moments reach that are finite.
#[derive(Debug, Clone, Copy)]
pub(super) struct Reach {
    /// The largest magnitude of each moment; in the ratio code that of the ratios for the first.
    pub largest: [f32; 3],
    /// The smallest one that is not 0, infinite if there is none; of no account in the dynamic code.
    pub least: [f32; 3],
}

impl Default for Reach {
    fn default() -> Self {
        Self { largest: [0.0; 3], least: [f32::INFINITY; 3] }
    }
}

impl Reach {
    /// How far both reach.
    pub(super) fn join(self, other: Self) -> Self {
        let (mut largest, mut least) = (self.largest, self.least);
        for i in 0..3 {
            largest[i] = largest[i].max(other.largest[i]);
            least[i] = least[i].min(other.least[i]);
        }
        Self { largest, least }
    }

    /// The scales for moments that reach so far; `old` ones are joined where elements are kept.
    fn scales(&self, code: Code, old: Option<Scales>) -> Scales {
        let mut scales = Scales::default();
        match code {
            Code::Dynamic => {
                for (i, scale) in scales.iter_mut().enumerate() {
                    let old = old.map_or(0.0, |old| usable_scale(old[i].high));
                    // a -0 from elsewhere is no least: which zero is the larger is left open
                    let least = if old.is_sign_positive() { old } else { 0.0 };
                    scale.high = least.max(self.largest[i]);
                }
            }
            Code::Ratio => {
                scales[0].high = ratio::scale(self.largest[0], old.map(|old| old[0].high));
                for (i, scale) in scales.iter_mut().enumerate().skip(1) {
                    let (least, largest) = (self.least[i].sqrt(), self.largest[i].sqrt());
                    *scale = ratio::range(least, largest, old.map(|old| old[i]));
                }
            }
        }
        scales
    }
}

impl Gauge {
    /// Takes note of new moments in a code: the first, the second and, if it has elements, the third.
    pub(super) fn extend(&mut self, code: Code, [m, v, max_v]: [&[f32]; 3]) {
        let ends = |values: &[f32]| {
            let finite = values.iter().map(|x| x.abs()).filter(|x| x.is_finite());
            finite.fold((f32::INFINITY, 0.0_f32), |(least, largest), x| {
                (if x > 0.0 { least.min(x) } else { least }, largest.max(x))
            })
        };
        let mut reach = Reach::default();
        for (i, values) in [m, v, max_v].into_iter().enumerate() {
            (reach.least[i], reach.largest[i]) = ends(values);
        }
        if code == Code::Ratio {
            let roots = if max_v.is_empty() { v } else { max_v };
            let ratio = |(m, root): (&f32, &f32)| {
                let finite = |x: f32| if x.is_finite() { x } else { 0.0 };
                let ratio = finite(*m) * ratio::inverse(finite(*root).sqrt());
                ratio.clamp(-f32::MAX, f32::MAX)
            };
            let ratios: Vec<f32> = m.iter().zip(roots).map(ratio).collect();
            reach.largest[0] = ends(&ratios).1;
        }
        self.reach = self.reach.join(reach);
    }
}

/// The same of a chunk or a tensor.
#[derive(Debug, Clone, Copy, Default)]
struct Found {
    param_squares: f64,
    update_squares: f64,
    reach: Reach,
    keeps: bool,
}

/// What a step is told.
#[derive(Debug, Clone, Copy)]
pub(super) struct Measured {
    /// What the update is multiplied by.
    pub update_scale: f32,
    /// The new scales of the moments, where they have one each.
    pub new_scales: Option<Scales>,
}

const fn has_one_scale(step: &TensorStep) -> bool {
    matches!(step.state, RawState::Coded(moments) if !moments.block_wise)
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
            RawState::Coded(moments) => {
                (kernels.gauge8)(param, grad, moments.skip(start), len, c, &mut gauge);
            }
        });
    }
    Found {
        param_squares: gauge.params.total(),
        update_squares: gauge.updates.total(),
        reach: gauge.reach,
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
        RawState::Coded(moments) if !moments.block_wise && !chunks.is_empty() => {
            let keeps = chunks.iter().any(|found| found.keeps);
            // SAFETY: this function's contract; the tensor has an element, so there are scales.
            let old = keeps.then(|| unsafe { moments.scales() });
            Some(ieee::compute(|| {
                let all = chunks.iter().fold(Reach::default(), |all, found| all.join(found.reach));
                all.scales(moments.code, old)
            }))
        }
        _ => None,
    };
    Measured { update_scale, new_scales }
}
