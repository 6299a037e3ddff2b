//! Room for whole vectors where a tensor ends.

/// The end of a tensor, padded to whole vectors.
#[repr(align(64))]
pub(super) struct Padded<T, const LEN: usize>(pub [T; LEN]);

impl<T: Copy, const LEN: usize> Padded<T, LEN> {
    /// # Safety
    /// `from` is valid for `len` elements, at most `LEN`.
    #[inline(always)]
    pub(super) unsafe fn load(from: *const T, len: usize, padding: T) -> Self {
        let mut padded = Self([padding; LEN]);
        // SAFETY: `len` elements are valid at the source and fit the array.
        unsafe { from.copy_to_nonoverlapping(padded.0.as_mut_ptr(), len) };
        padded
    }

    /// # Safety
    /// `to` is valid for `len` elements, at most `LEN`.
    #[inline(always)]
    pub(super) unsafe fn store(&self, to: *mut T, len: usize) {
        // SAFETY: `len` elements are valid at the target and in the array.
        unsafe { self.0.as_ptr().copy_to_nonoverlapping(to, len) };
    }
}
