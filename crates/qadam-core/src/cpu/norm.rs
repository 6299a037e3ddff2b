//! Sums of squares of gradients, over threads: [`norm`](crate::norm) says in which order.

use half::{bf16, f16};

use super::Backend;
use super::folds::{self, Chunk};
use crate::dtype::{DType, Float};
use crate::error::Result;
use crate::norm::{self, CHUNK, LANES, Lanes};
use crate::tensor::TensorStep;

/// The sum of the squares of each gradient's elements, as f64; its bits do not depend on `backend`
/// or `threads`. NaN and infinite elements count as 0, unless the step lets them through.
///
/// # Errors
/// [`Error::ThreadPool`](crate::Error::ThreadPool).
///
/// # Safety
/// The contract of [`TensorStep::new`] holds for each of `steps`; gradients are only read.
///
/// # Panics
/// If `backend` is not [available](Backend::is_available).
pub unsafe fn squared_norms(
    steps: &[TensorStep],
    backend: Backend,
    threads: usize,
) -> Result<Vec<f64>> {
    assert!(backend.is_available(), "{backend:?} on a processor without it");
    let chunks = folds::chunks(steps.iter().enumerate(), CHUNK);
    let sums = folds::each(&chunks, threads, |chunk| {
        let step = &steps[chunk.tensor];
        // SAFETY: the chunk lies within its tensor, whose gradient is valid by contract; the
        // instruction set is there.
        unsafe { of_chunk(step, chunk, !step.coefficients.propagate, backend) }
    })?;
    let of_tensors = folds::of_tensors(steps.iter().map(TensorStep::len));
    Ok(of_tensors.map(|own| norm::total(&sums[own])).collect())
}

/// The sum of a chunk.
///
/// # Safety
/// The chunk lies within the step's tensor, and the processor has the instruction set.
unsafe fn of_chunk(step: &TensorStep, chunk: &Chunk, finite_only: bool, backend: Backend) -> f64 {
    // SAFETY: this function's contract.
    unsafe {
        match step.grad_dtype {
            DType::F32 => typed::<f32>(step, chunk, finite_only, backend),
            DType::BF16 => typed::<bf16>(step, chunk, finite_only, backend),
            DType::F16 => typed::<f16>(step, chunk, finite_only, backend),
        }
    }
}

/// [`of_chunk`] for gradients of `G`.
///
/// # Safety
/// As [`of_chunk`].
unsafe fn typed<G: Float>(
    step: &TensorStep,
    chunk: &Chunk,
    finite_only: bool,
    backend: Backend,
) -> f64 {
    let grad = step.grad.cast::<G>();
    if step.walk.is_flat() {
        // SAFETY: the chunk's elements follow each other, by contract within the gradient.
        let values = unsafe { std::slice::from_raw_parts(grad.add(chunk.start), chunk.len) };
        // SAFETY: the instruction set is there, by contract.
        return unsafe { sum(values, finite_only, backend) };
    }
    let (mut values, mut at) = ([G::default(); CHUNK], 0);
    step.walk.runs(chunk.start, chunk.len, |run| {
        for i in 0..run.len as isize {
            // SAFETY: the walk's offsets are within the gradient, by `TensorStep::new`.
            values[at] = unsafe { *grad.offset(run.grad + i * run.grad_stride) };
            at += 1;
        }
    });
    // SAFETY: the instruction set is there, by contract.
    unsafe { sum(&values[..chunk.len], finite_only, backend) }
}

/// The squares of `values`, folded.
///
/// # Safety
/// The processor has the instruction set.
unsafe fn sum<G: Float>(values: &[G], finite_only: bool, backend: Backend) -> f64 {
    match backend {
        Backend::Scalar => fold(values, finite_only),
        // SAFETY: this function's contract.
        #[cfg(target_arch = "x86_64")]
        Backend::Avx2 => unsafe { fold_avx2(values, finite_only) },
        // SAFETY: this function's contract.
        #[cfg(target_arch = "x86_64")]
        Backend::Avx512 | Backend::Avx512Vbmi => unsafe { fold_avx512(values, finite_only) },
        #[cfg(not(target_arch = "x86_64"))]
        Backend::Avx2 | Backend::Avx512 | Backend::Avx512Vbmi => {
            unreachable!("not available on this processor")
        }
    }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma,f16c")]
fn fold_avx2<G: Float>(values: &[G], finite_only: bool) -> f64 {
    fold(values, finite_only)
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
fn fold_avx512<G: Float>(values: &[G], finite_only: bool) -> f64 {
    fold(values, finite_only)
}

/// The definition; IEEE arithmetic has the same bits however it is compiled.
#[inline(always)]
fn fold<G: Float>(values: &[G], finite_only: bool) -> f64 {
    let mut lanes = Lanes::ZERO;
    for values in values.chunks(LANES) {
        let mut wide = [0.0; LANES]; // which add nothing where the last is not full
        for (wide, value) in wide.iter_mut().zip(values) {
            let value = value.widen();
            *wide = if finite_only && !value.is_finite() { 0.0 } else { value };
        }
        lanes.add_squares(&wide);
    }
    lanes.total()
}
