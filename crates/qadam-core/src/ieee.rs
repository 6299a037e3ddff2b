//! IEEE arithmetic for the length of a kernel, whatever the calling thread has set.
//!
//! `torch.set_flush_denormal(True)` makes a thread flush subnormals to zero, and new threads inherit
//! that; the bits of a step must not depend on it.

/// While it lives, this thread rounds to nearest even and keeps subnormals.
pub(crate) struct Ieee {
    #[cfg(target_arch = "x86_64")]
    saved: u32,
}

/// Round to nearest, no flush to zero, subnormal inputs kept, all exceptions masked.
#[cfg(target_arch = "x86_64")]
static DEFAULT: u32 = 0x1F80;

impl Ieee {
    #[cfg(target_arch = "x86_64")]
    pub(crate) fn enter() -> Self {
        let mut saved = 0_u32;
        // SAFETY: SSE is part of x86-64; both pointers are to live u32.
        unsafe {
            std::arch::asm!("stmxcsr [{}]", in(reg) &raw mut saved, options(nostack));
            std::arch::asm!("ldmxcsr [{}]", in(reg) &raw const DEFAULT, options(nostack, readonly));
        }
        Self { saved }
    }

    #[cfg(not(target_arch = "x86_64"))]
    pub(crate) fn enter() -> Self {
        Self {}
    }
}

#[cfg(target_arch = "x86_64")]
impl Drop for Ieee {
    fn drop(&mut self) {
        // SAFETY: as in `enter`; the value was read from the register there.
        unsafe {
            let saved = &raw const self.saved;
            std::arch::asm!("ldmxcsr [{}]", in(reg) saved, options(nostack, readonly));
        }
    }
}
