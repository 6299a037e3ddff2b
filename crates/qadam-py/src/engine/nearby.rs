//! Brings what the sweep reads next into the processor's cache.
//!
//! Between two steps a model's passes put its tensors out of the cache. Each is then three objects in
//! three places, of which one says where the next one is: the sweep would wait for memory most of its
//! time. The places are remembered, and asked for one parameter ahead.

use pyo3::intern;
use pyo3::prelude::*;

/// Bytes that a processor brings near at a time.
const LINE: usize = 64;

/// Where torch keeps what is read of a tensor. Only hints: nothing is read there.
pub struct Nearby {
    object: usize,
    tensor: usize,
    storage: usize,
}

impl Nearby {
    pub fn new(object: &Bound<'_, PyAny>) -> Self {
        let py = object.py();
        let place = |object: PyResult<Bound<'_, PyAny>>| {
            let place = object.and_then(|object| object.getattr(intern!(py, "_cdata"))?.extract());
            place.unwrap_or(0) // there is then nothing to hint at
        };
        Self {
            object: object.as_ptr().addr(),
            tensor: place(Ok(object.clone())),
            storage: place(object.call_method0(intern!(py, "untyped_storage"))),
        }
    }

    /// Asks for what a glance at the tensor reads.
    pub fn prefetch(&self) {
        ask(self.object, 1);
        ask(self.tensor, 4);
        ask(self.storage, 2);
    }
}

/// Asks for some lines of the cache.
#[cfg(target_arch = "x86_64")]
fn ask(start: usize, lines: usize) {
    use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
    for line in 0..lines {
        let address = std::ptr::without_provenance::<i8>(start.wrapping_add(line * LINE));
        // SAFETY: every processor of this architecture has the instruction, which takes any address
        // and neither reads nor faults.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(address) };
    }
}

#[cfg(not(target_arch = "x86_64"))]
const fn ask(_start: usize, _lines: usize) {}
