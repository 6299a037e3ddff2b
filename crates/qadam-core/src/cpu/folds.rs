//! Work over chunks of [`CHUNK`] elements, whose results are folded in order.

use std::ops::Range;

use super::pool;
use crate::error::Result;
use crate::ieee::Ieee;
use crate::norm::CHUNK;
use crate::tensor::TensorStep;

/// Chunks that a thread takes at a time.
const GRAIN: usize = 8;

/// Part of a tensor: `len` elements from `start` on.
#[derive(Debug, Clone, Copy)]
pub(super) struct Chunk {
    pub tensor: usize,
    pub start: usize,
    pub len: usize,
}

/// All chunks of the tensors, in order: of `size` elements, but for the last of each tensor.
pub(super) fn chunks<'a>(
    steps: impl Iterator<Item = (usize, &'a TensorStep)>,
    size: usize,
) -> Vec<Chunk> {
    let of_tensor = |(tensor, step): (usize, &TensorStep)| {
        let total = step.len();
        let chunk = move |start| Chunk { tensor, start, len: size.min(total - start) };
        (0..total).step_by(size).map(chunk)
    };
    steps.flat_map(of_tensor).collect()
}

/// What `work` returns for each chunk, in order.
pub(super) fn each<T: Clone + Default + Send>(
    chunks: &[Chunk],
    threads: usize,
    work: impl Fn(&Chunk) -> T + Sync,
) -> Result<Vec<T>> {
    let mut results = vec![T::default(); chunks.len()];
    let part = |(results, chunks): (&mut [T], &[Chunk])| {
        let _ieee = Ieee::enter();
        for (result, chunk) in results.iter_mut().zip(chunks) {
            *result = work(chunk);
        }
    };
    if threads == 1 || chunks.len() <= GRAIN {
        part((&mut results, chunks));
    } else {
        let parts = results.chunks_mut(GRAIN).zip(chunks.chunks(GRAIN));
        pool::share(parts, threads, part)?;
    }
    Ok(results)
}

/// The results of each tensor of `lengths` elements.
pub(super) fn of_tensors(
    lengths: impl Iterator<Item = usize>,
) -> impl Iterator<Item = Range<usize>> {
    lengths.scan(0, |end, len| {
        let start = *end;
        *end += len.div_ceil(CHUNK);
        Some(start..*end)
    })
}
