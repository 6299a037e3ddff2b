//! Asking memory for what is to be read a little later.
//!
//! The hardware's own prefetchers stop at every page of 4 KiB.

use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};

/// Asks for `len` elements. That is never a fault, wherever they are.
#[inline(always)]
pub(super) fn prefetch<T>(from: *const T, len: usize) {
    for line in (0..len * size_of::<T>()).step_by(64) {
        // SAFETY: SSE is part of x86-64, and a prefetch reads nothing.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(from.cast::<i8>().wrapping_add(line)) };
    }
}
