//! An anonymous mapping whose pages cost nothing until touched.

/// Owned pages.
pub struct Mapping {
    at: *mut libc::c_void,
    len: usize,
}

// SAFETY: the mapping is plain memory owned by this value; nothing about it belongs to a thread.
unsafe impl Send for Mapping {}

impl Mapping {
    /// `len` zero bytes, page-aligned, or `None` if the kernel has no address space for them.
    pub fn new(len: usize) -> Option<Mapping> {
        // One page more than needed, which no region covers: neighbours never touch, so that an access
        // one element past an allocation cannot land in the next.
        let len = len.checked_next_multiple_of(4096)?.checked_add(4096)?;
        // SAFETY: a fresh anonymous mapping at an address of the kernel's choice touches nothing.
        let at = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                len,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE,
                -1,
                0,
            )
        };
        (at != libc::MAP_FAILED).then_some(Mapping { at, len })
    }

    /// First address.
    pub fn addr(&self) -> u64 {
        self.at as u64
    }

    /// Zeroes a range; whole pages are given back to the kernel instead of written.
    pub fn zero(&self, off: usize, len: usize) {
        const PAGE: usize = 4096;
        let end = off.saturating_add(len).min(self.len);
        let off = off.min(end);
        let (first, last) = (off.next_multiple_of(PAGE), end / PAGE * PAGE);
        let base = self.at.cast::<u8>();
        if first >= last {
            // SAFETY: `off <= end <= self.len`.
            unsafe { std::ptr::write_bytes(base.add(off), 0, end - off) };
            return;
        }
        // SAFETY: `off <= first < last <= end <= self.len`; the advised range is page-aligned and ours,
        // and private anonymous pages read as zero after MADV_DONTNEED.
        unsafe {
            std::ptr::write_bytes(base.add(off), 0, first - off);
            std::ptr::write_bytes(base.add(last), 0, end - last);
            if libc::madvise(base.add(first).cast(), last - first, libc::MADV_DONTNEED) != 0 {
                std::ptr::write_bytes(base.add(first), 0, last - first);
            }
        }
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: `at` and `len` are what mmap returned, and nobody maps over them before this.
        unsafe { libc::munmap(self.at, self.len) };
    }
}
