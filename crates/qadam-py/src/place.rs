//! Memory that is going to be read.

/// Bytes that a processor brings near at a time.
#[cfg(target_arch = "x86_64")]
const LINE: usize = 64;

/// Some bytes at an address, which need not be there: nothing is read.
#[derive(Debug, Clone, Copy)]
pub struct Place {
    pub start: usize,
    pub bytes: usize,
}

impl Place {
    /// Whether [`prefetch`](Self::prefetch) does anything on this processor.
    pub const MATTERS: bool = cfg!(target_arch = "x86_64");

    /// Asks for the memory.
    pub fn prefetch(self) {
        #[cfg(target_arch = "x86_64")]
        {
            use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
            let last = self.start.saturating_add(self.bytes.saturating_sub(1));
            for line in self.start / LINE..=last / LINE {
                // SAFETY: every processor of this architecture has the instruction, which takes any
                // address and neither reads nor faults.
                unsafe { _mm_prefetch::<_MM_HINT_T0>(std::ptr::without_provenance(line * LINE)) };
            }
        }
    }
}
