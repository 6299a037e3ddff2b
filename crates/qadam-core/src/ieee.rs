//! IEEE arithmetic for the length of a kernel, whatever the calling thread has set.
//!
//! `torch.set_flush_denormal(True)` makes a thread flush subnormals to zero, and new threads inherit
//! that; the bits of a step must not depend on it. On processors other than x86-64 and AArch64, where
//! torch does not offer it, nothing is done.

use std::hint::black_box;

/// While it lives, this thread rounds to nearest even and keeps subnormals.
pub(crate) struct Ieee {
    saved: control::Word,
}

impl Ieee {
    /// For work whose results are in memory before this ends; for values there is [`compute`].
    pub(crate) fn enter() -> Self {
        let saved = control::get();
        control::set(control::IEEE);
        Self { saved }
    }
}

/// What `work` returns, computed in IEEE arithmetic.
///
/// The compiler does not know that arithmetic depends on a control register, and moves what has no
/// effect on memory across a change of it. It cannot here: what goes in and what comes out are opaque
/// to it.
pub(crate) fn compute<T>(work: impl FnOnce() -> T) -> T {
    #[inline(never)]
    fn call<T>(work: impl FnOnce() -> T) -> T {
        work()
    }
    let _ieee = Ieee::enter();
    black_box(call(black_box(work)))
}

impl Drop for Ieee {
    fn drop(&mut self) {
        control::set(self.saved);
    }
}

#[cfg(target_arch = "x86_64")]
mod control {
    //! MXCSR.

    pub(super) type Word = u32;

    /// Round to nearest, no flush to zero, subnormal inputs kept, all exceptions masked.
    pub(super) const IEEE: Word = 0x1F80;

    pub(super) fn get() -> Word {
        let mut word = 0;
        // SAFETY: SSE is part of x86-64; the pointer is to a live u32.
        unsafe { std::arch::asm!("stmxcsr [{}]", in(reg) &raw mut word, options(nostack)) };
        word
    }

    pub(super) fn set(word: Word) {
        let word = &raw const word;
        // SAFETY: as in `get`; the word is the default or was read from the register.
        unsafe { std::arch::asm!("ldmxcsr [{}]", in(reg) word, options(nostack, readonly)) };
    }
}

#[cfg(target_arch = "aarch64")]
mod control {
    //! FPCR.

    pub(super) type Word = u64;

    /// Round to nearest, no flush to zero, no traps.
    pub(super) const IEEE: Word = 0;

    pub(super) fn get() -> Word {
        let word;
        // SAFETY: every AArch64 has the register, readable in user mode.
        unsafe { std::arch::asm!("mrs {}, fpcr", out(reg) word, options(nomem, nostack)) };
        word
    }

    pub(super) fn set(word: Word) {
        // SAFETY: as in `get`, writable too; the word is the default or was read from it.
        unsafe { std::arch::asm!("msr fpcr, {}", in(reg) word, options(nomem, nostack)) };
    }
}

#[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
mod control {
    //! Nothing to set.

    pub(super) type Word = ();
    pub(super) const IEEE: Word = ();
    pub(super) fn get() -> Word {}
    pub(super) fn set((): Word) {}
}
