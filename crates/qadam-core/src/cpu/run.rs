//! Runs the steps of many tensors: cut into chunks of whole blocks, spread over threads.
//!
//! Elements (and blocks) do not depend on each other, so neither the cut nor the number of threads
//! changes a bit.

use std::mem::MaybeUninit;
use std::ops::Range;
use std::process;
use std::sync::Arc;

use super::folds::{Chunk, chunks};
use super::kernels::{Coded8, Kernels};
use super::measure::{Measured, measure};
use super::prefetch::prefetch_tensor;
use super::{Backend, pool};
use crate::codec::{BLOCK, Scales};
use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::ieee::Ieee;
use crate::paging::mapped::{self, Arena};
use crate::paging::stream::Windows;
use crate::rule::Coefficients;
use crate::tensor::{RawState, TensorStep};

/// Elements a chunk, and of the shortest turns: 128 blocks, small enough to balance threads, large enough to
/// hide the hand-over.
const CHUNK: usize = 128 * BLOCK;

/// Elements a thread takes at a turn at most, or little more.
const LONGEST: usize = 32 * CHUNK;

/// Runs `work` for all elements of `chunks`, which are in order, on `threads` threads and adds up what it
/// returns.
fn over_chunks(
    steps: &[TensorStep],
    chunks: &[Chunk],
    threads: usize,
    work: impl Fn(&TensorStep, Chunk) -> usize + Sync,
) -> Result<usize> {
    let run = |chunks: &[Chunk]| -> usize {
        let _ieee = Ieee::enter();
        let mut joined = joined(chunks).peekable();
        let mut nonfinite = 0;
        while let Some(chunk) = joined.next() {
            if let Some(next) = joined.peek() {
                prefetch_tensor(&steps[next.tensor], *next);
            }
            nonfinite += work(&steps[chunk.tensor], chunk);
        }
        nonfinite
    };
    if threads == 1 || elements(chunks) <= CHUNK {
        return Ok(run(chunks));
    }
    pool::sum(turns(chunks, threads).into_iter(), threads, run)
}

/// Cuts `chunks` into what threads take at a turn: half a thread's share of what is left, but at least
/// [`CHUNK`] elements, the last turn excepted, and not beyond [`LONGEST`] by a whole chunk.
///
/// However small the tensors are, a turn is worth taking. Long turns spare a large tensor the seams, where
/// memory's stream breaks off and what was asked for ahead is another thread's. Not all elements take
/// equally long, nor are all processors equally fast: short turns at the end even that out.
fn turns(chunks: &[Chunk], threads: usize) -> Vec<&[Chunk]> {
    let mut left = elements(chunks);
    let (mut turns, mut start, mut taken) = (Vec::new(), 0, 0);
    for (index, chunk) in chunks.iter().enumerate() {
        taken += chunk.len;
        let enough = (left / threads / 2).clamp(CHUNK, LONGEST);
        if taken >= enough || index + 1 == chunks.len() {
            turns.push(&chunks[start..=index]);
            left -= taken;
            (start, taken) = (index + 1, 0);
        }
    }
    turns
}

/// The same elements, with neighbouring chunks of a tensor made one.
fn joined(chunks: &[Chunk]) -> impl Iterator<Item = Chunk> {
    let tensors = chunks.chunk_by(|a, b| a.tensor == b.tensor);
    tensors.map(|chunks| Chunk { len: elements(chunks), ..chunks[0] })
}

fn elements(chunks: &[Chunk]) -> usize {
    chunks.iter().map(|chunk| chunk.len).sum()
}

/// Returns an error where paged state cannot be stepped: it belongs to another process, or an
/// earlier step could not write it out.
///
/// # Errors
/// [`Error::Forked`], [`Error::PageFile`].
pub fn check(steps: &[TensorStep]) -> Result<()> {
    arenas(steps)?.iter().flatten().try_for_each(|arena| arena.check())
}

/// The arena of each tensor's state, none where its buffers are not all in one; nothing at all where
/// there is no arena.
///
/// # Errors
/// [`Error::Forked`] where a buffer is in another process's.
fn arenas(steps: &[TensorStep]) -> Result<Vec<Option<Arc<Arena>>>> {
    if mapped::is_unused() {
        return Ok(Vec::new());
    }
    let process = process::id();
    let of_step = |(index, step): (usize, &TensorStep)| {
        let ranges = step.state.addresses(0, step.len());
        let mut first = None;
        for (place, range) in ranges.iter().enumerate() {
            let Some(arena) = mapped::find(range.start) else { continue };
            if arena.owner() != process {
                return Err(Error::Forked { index, owner: arena.owner(), process });
            }
            let end = arena.address() + arena.bytes();
            let is_within =
                |range: &Range<usize>| arena.address() <= range.start && range.end <= end;
            if place == 0 && ranges.iter().all(is_within) {
                first = Some(arena);
                break;
            }
        }
        Ok(first)
    };
    steps.iter().enumerate().map(of_step).collect()
}

/// Updates every tensor and returns how many elements had a non-finite gradient.
///
/// # Errors
/// [`Error::Forked`] and [`Error::ThreadPool`], before anything is written. Call [`check`] before the
/// first run of a step.
///
/// # Safety
/// No two of `steps` share an element of a parameter or of state (see [`disjoint_waves`]), and the
/// contract of [`TensorStep::new`] still holds for each.
///
/// # Panics
/// If `backend` is not [available](Backend::is_available).
pub unsafe fn run(steps: &[TensorStep], backend: Backend, threads: usize) -> Result<usize> {
    assert!(backend.is_available(), "{backend:?} on a processor without it");
    let arenas = arenas(steps)?;
    // SAFETY: by contract.
    let measured = unsafe { measure(steps, backend, threads)? };
    let of = |tensor: usize| measured.get(tensor).copied().flatten();
    let update = |step: &TensorStep, chunk: Chunk| {
        let kernels = Kernels::select(backend, step.param_dtype, step.grad_dtype);
        let measured = of(chunk.tensor);
        let scaled = measured.map(|found| step.coefficients.with_update_scale(found.update_scale));
        let told = Told {
            coefficients: scaled.as_ref().unwrap_or(&step.coefficients),
            new_scales: measured.and_then(|found| found.new_scales),
        };
        // SAFETY: the chunk lies within the tensor, whose pointers are valid and exclusive by
        // `TensorStep::new`; chunks are disjoint and begin at blocks; the types select the kernels.
        unsafe { apply_to_chunk(step, chunk, &told, kernels) }
    };
    let chunks = chunks(steps.iter().enumerate(), CHUNK);
    let of_chunk = |chunk: usize| (chunks[chunk].tensor, chunks[chunk].start, chunks[chunk].len);
    let nonfinite = through_arenas(steps, &arenas, chunks.len(), of_chunk, threads, |part| {
        over_chunks(steps, &chunks[part], threads, update)
    })?;
    for (tensor, step) in steps.iter().enumerate() {
        if let (RawState::Coded(moments), Some(Measured { new_scales: Some(scales), .. })) =
            (step.state, of(tensor))
        {
            // SAFETY: the moments' only scales, valid and exclusive by `TensorStep::new`.
            unsafe { moments.set_scales(&scales) };
        }
    }
    Ok(nonfinite)
}

/// Does `work` for ranges of `count` chunks that together are all of them, in order, while the pages
/// of their state are moved where it has pages; adds up what it returns. `chunk` says which tensor a
/// chunk belongs to, where it starts and how long it is.
pub(super) fn through_pages(
    steps: &[TensorStep],
    count: usize,
    chunk: impl Fn(usize) -> (usize, usize, usize),
    threads: usize,
    work: impl Fn(Range<usize>) -> Result<usize>,
) -> Result<usize> {
    through_arenas(steps, &arenas(steps)?, count, chunk, threads, work)
}

/// [`through_pages`], with the [`arenas`] of the steps.
fn through_arenas(
    steps: &[TensorStep],
    arenas: &[Option<Arc<Arena>>],
    count: usize,
    chunk: impl Fn(usize) -> (usize, usize, usize),
    threads: usize,
    work: impl Fn(Range<usize>) -> Result<usize>,
) -> Result<usize> {
    let paged: Vec<&Arena> = arenas.iter().flatten().map(AsRef::as_ref).collect();
    if paged.is_empty() {
        return work(0..count);
    }
    pool::start(threads)?;
    let ranges = |index: usize| {
        let (tensor, start, len) = chunk(index);
        steps[tensor].state.addresses(start, len)
    };
    Windows::new(count, &paged, |index| arenas[chunk(index).0].clone(), ranges).run(work)
}

/// How many effective gradients of each tensor are not finite, before anything is written: the
/// index of the first tensor that has any, and its count.
///
/// # Errors
/// [`Error::NonFiniteGradient`] if there is one, [`Error::ThreadPool`].
///
/// # Safety
/// As [`run`].
pub unsafe fn count_nonfinite(steps: &[TensorStep], threads: usize) -> Result<()> {
    let count = |step: &TensorStep, chunk: Chunk| {
        let kernels = Kernels::select(Backend::Scalar, step.param_dtype, step.grad_dtype);
        let (p_size, g_size) = (step.param_dtype.size() as isize, step.grad_dtype.size() as isize);
        let mut total = 0;
        step.walk.runs(chunk.start, chunk.len, |run| {
            if run.param_stride == 1 && run.grad_stride == 1 {
                // SAFETY: the run lies within both tensors, which are valid by `TensorStep::new`.
                total += unsafe {
                    let param = step.param.offset(run.param * p_size);
                    let grad = step.grad.offset(run.grad * g_size);
                    (kernels.count)(param, grad, run.len, &step.coefficients)
                };
                return;
            }
            for i in 0..run.len as isize {
                // SAFETY: as above, one element at a time.
                total += unsafe {
                    let param = step.param.offset((run.param + i * run.param_stride) * p_size);
                    let grad = step.grad.offset((run.grad + i * run.grad_stride) * g_size);
                    (kernels.count)(param, grad, 1, &step.coefficients)
                };
            }
        });
        total
    };
    if over_chunks(steps, &chunks(steps.iter().enumerate(), CHUNK), threads, count)? == 0 {
        return Ok(());
    }
    for (index, step) in steps.iter().enumerate() {
        let step = std::slice::from_ref(step);
        let count = over_chunks(step, &chunks(step.iter().enumerate(), CHUNK), threads, count)?;
        if count > 0 {
            return Err(Error::NonFiniteGradient { index, count });
        }
    }
    Ok(())
}

/// What a tensor's kernels are told.
struct Told<'a> {
    coefficients: &'a Coefficients,
    new_scales: Option<Scales>,
}

impl Told<'_> {
    /// Updates `len` contiguous elements from `start` on.
    ///
    /// # Safety
    /// `param` and `grad` hold `len` contiguous elements of the step's types; `start` begins a block
    /// and `start + len` is within the state, which no other thread has.
    unsafe fn apply(
        &self,
        step: &TensorStep,
        (start, len): (usize, usize),
        param: *mut u8,
        grad: *const u8,
        kernels: Kernels,
    ) -> usize {
        let c = self.coefficients;
        // SAFETY: this function's contract is the kernels'.
        unsafe {
            match step.state {
                RawState::F32(moments) => {
                    (kernels.step32)(param, grad, moments.skip(start), len, c)
                }
                RawState::Coded(moments) => {
                    let coded = Coded8 { moments, start: 0, told: self.new_scales }.skip(start);
                    (kernels.step8)(param, grad, coded, len, c)
                }
            }
        }
    }
}

/// Updates a chunk.
///
/// # Safety
/// It lies within `step`, begins at a block, and no other thread has it.
unsafe fn apply_to_chunk(
    step: &TensorStep,
    chunk: Chunk,
    told: &Told<'_>,
    kernels: Kernels,
) -> usize {
    let Chunk { start, len, .. } = chunk;
    let mut nonfinite = 0;
    // SAFETY: by contract.
    unsafe {
        gather(step, start, len, true, |param, grad, start, len| {
            nonfinite += told.apply(step, (start, len), param, grad, kernels);
        });
    }
    nonfinite
}

/// Calls `visit` with contiguous elements of the parameter and the gradient that together are
/// elements `start..start + len`; with where they start and how many they are.
///
/// # Safety
/// As [`gather`].
pub(super) unsafe fn visit(
    step: &TensorStep,
    start: usize,
    len: usize,
    mut visit: impl FnMut(*const u8, *const u8, usize, usize),
) {
    // SAFETY: by contract.
    unsafe {
        gather(step, start, len, false, |param, grad, start, len| visit(param, grad, start, len));
    }
}

/// One block of elements of any type, aligned for each.
#[repr(align(64))]
struct Scratch(MaybeUninit<[f32; BLOCK]>);

impl Scratch {
    const fn new() -> Self {
        Self(MaybeUninit::uninit())
    }

    const fn pointer(&mut self) -> *mut u8 {
        self.0.as_mut_ptr().cast()
    }
}

/// [`visit`], for what changes the parameter's elements if `scatter` is set. Where elements do not
/// follow each other, they are gathered block by block, and the parameter's scattered back.
///
/// # Safety
/// The elements lie within `step`, begin at a block, and no other thread writes them, or reads them
/// where they are changed.
unsafe fn gather(
    step: &TensorStep,
    start: usize,
    len: usize,
    scatter: bool,
    mut visit: impl FnMut(*mut u8, *const u8, usize, usize),
) {
    if step.walk.is_flat() {
        // SAFETY: offsets up to `start + len` are valid for both tensors, by contract.
        let (param, grad) = unsafe {
            let param = step.param.add(start * step.param_dtype.size());
            (param, step.grad.add(start * step.grad_dtype.size()))
        };
        return visit(param, grad, start, len);
    }
    let (mut param, mut grad) = (Scratch::new(), Scratch::new());
    let (param, grad) = (param.pointer(), grad.pointer());
    let end = start + len;
    for start in (start..end).step_by(BLOCK) {
        let len = BLOCK.min(end - start);
        let mut at = 0;
        step.walk.runs(start, len, |run| {
            let source = (step.param.cast_const(), run.param, run.param_stride);
            let grads = (step.grad, run.grad, run.grad_stride);
            // SAFETY: the walk's offsets are within both tensors by `TensorStep::new`; the scratch
            // holds `BLOCK` elements of at most 4 bytes, and `at + run.len <= len`.
            unsafe {
                copy(step.param_dtype, source, (param, at, 1), run.len);
                copy(step.grad_dtype, grads, (grad, at, 1), run.len);
            }
            at += run.len as isize;
        });
        visit(param, grad, start, len);
        let mut at = 0;
        step.walk.runs(start, if scatter { len } else { 0 }, |run| {
            let target = (step.param, run.param, run.param_stride);
            // SAFETY: as above, the other way round; parameter elements are distinct.
            unsafe { copy(step.param_dtype, (param, at, 1), target, run.len) };
            at += run.len as isize;
        });
    }
}

/// Copies `len` elements of `dtype`; each end is a base pointer, an offset and a stride, in
/// elements.
///
/// # Safety
/// Every offset is valid for reads at the source and for writes at the target, aligned to an
/// element; the two do not overlap.
unsafe fn copy(
    dtype: DType,
    source: (*const u8, isize, isize),
    target: (*mut u8, isize, isize),
    len: usize,
) {
    /// # Safety
    /// As [`copy`], for elements of `T`.
    unsafe fn typed<T: Copy>(
        (source, source_at, source_stride): (*const u8, isize, isize),
        (target, target_at, target_stride): (*mut u8, isize, isize),
        len: usize,
    ) {
        // SAFETY: valid offsets, by contract.
        unsafe {
            let source = source.cast::<T>().offset(source_at);
            let target = target.cast::<T>().offset(target_at);
            if source_stride == 1 && target_stride == 1 {
                source.copy_to_nonoverlapping(target, len);
                return;
            }
            for i in 0..len as isize {
                *target.offset(i * target_stride) = *source.offset(i * source_stride);
            }
        }
    }
    // SAFETY: this function's contract; u32 and u16 have the sizes and alignments of the types.
    unsafe {
        match dtype {
            DType::F32 => typed::<u32>(source, target, len),
            DType::BF16 | DType::F16 => typed::<u16>(source, target, len),
        }
    }
}

/// Sorts tensors into waves such that the address ranges of one wave do not overlap: parameters
/// that share memory are then updated one after the other, in order, as `torch.optim` does.
///
/// Returns the wave of each range. `ranges` are half-open, in bytes; empty ones overlap nothing.
#[must_use]
pub fn disjoint_waves(ranges: &[Range<usize>]) -> Vec<usize> {
    let mut waves = vec![0; ranges.len()];
    let mut order: Vec<usize> = (0..ranges.len()).filter(|&i| !ranges[i].is_empty()).collect();
    order.sort_unstable_by_key(|&i| ranges[i].start);
    // Clusters of ranges that hang together; within one, the i-th in the given order is wave i.
    let mut cluster: Vec<usize> = Vec::new();
    let mut end = 0;
    let mut close = |cluster: &mut Vec<usize>| {
        cluster.sort_unstable();
        for (wave, i) in cluster.drain(..).enumerate() {
            waves[i] = wave;
        }
    };
    for i in order {
        if ranges[i].start >= end {
            close(&mut cluster);
        }
        cluster.push(i);
        end = end.max(ranges[i].end);
    }
    close(&mut cluster);
    waves
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn overlapping_ranges_go_to_different_waves_in_order() {
        assert_eq!(disjoint_waves(&[0..10, 10..20, 30..40]), [0, 0, 0]);
        assert_eq!(disjoint_waves(&[5..15, 0..10, 20..30]), [0, 1, 0]);
        assert_eq!(disjoint_waves(&[0..10, 0..10, 0..10]), [0, 1, 2]);
        assert_eq!(disjoint_waves(&[0..4, 0..0, 0..0, 2..3]), [0, 0, 0, 1]);
        assert_eq!(disjoint_waves(&[]), Vec::<usize>::new());
    }

    #[test]
    fn turns_are_all_elements_in_order_and_neither_too_few_nor_too_many() {
        let cases: [&[usize]; 7] = [
            &[],
            &[1; 7],
            &[1, CHUNK, 1, 0],
            &[300 * CHUNK],
            &[3000; 1000],
            &[0, 3000, 40 * CHUNK + 77, 3000, 0, 20 * CHUNK, 1],
            &[9 * CHUNK; 9],
        ];
        let cut = |Chunk { tensor, start, len }: Chunk| {
            let end = start + len;
            (start..end).step_by(CHUNK).map(move |start| (tensor, start, CHUNK.min(end - start)))
        };
        for (lens, threads) in
            cases.iter().flat_map(|lens| [1, 2, 7].map(|threads| (lens, threads)))
        {
            let whole = |(tensor, &len)| Chunk { tensor, start: 0, len };
            let all: Vec<_> = lens.iter().enumerate().map(whole).flat_map(cut).collect();
            // paged state is stepped in parts, which begin in the middle of a tensor
            for part in [&all[..], &all[all.len() / 3..]] {
                let of = |&(tensor, start, len)| Chunk { tensor, start, len };
                let chunks: Vec<Chunk> = part.iter().map(of).collect();
                let turns = turns(&chunks, threads);
                let mut left = elements(&chunks);
                for (index, turn) in turns.iter().enumerate() {
                    assert!(joined(turn).is_sorted_by(|a, b| a.tensor < b.tensor), "{lens:?}");
                    let taken = elements(turn);
                    let enough = (left / (2 * threads)).clamp(CHUNK, LONGEST);
                    assert!(taken >= enough || index + 1 == turns.len(), "{taken} of {left}");
                    assert!(taken < enough + CHUNK, "{taken} of {left}");
                    left -= taken;
                }
                let again: Vec<_> =
                    turns.iter().flat_map(|turn| joined(turn)).flat_map(cut).collect();
                assert_eq!(again, part);
            }
        }
    }
}
