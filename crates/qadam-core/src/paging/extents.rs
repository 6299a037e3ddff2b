//! Where the buffers of each parameter's state lie within an arena.

use std::ops::Range;

use crate::state::{StateFormat, StateType};

/// A parameter's state begins at a multiple of this: the smallest page that processors have.
const PAGE: usize = 4096;
/// Drivers migrate and processors map this much at a time where they can.
pub(crate) const HUGE: usize = 2 << 20;
/// State of this size begins at a multiple of [`HUGE`]: the gap is an eighth of it at most.
const LARGE: usize = 8 * HUGE;
/// Buffers within a parameter's state begin at multiples of this, as the allocators of torch do.
const BUFFER: usize = 256;

/// Places for the state of parameters, one after the other.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Extents {
    buffers: Vec<Vec<Range<usize>>>,
    bytes: usize,
}

impl Extents {
    /// Places for parameters of these formats and lengths in elements.
    #[must_use]
    pub fn new(params: &[(StateFormat, usize)]) -> Self {
        let mut extents = Self { buffers: Vec::with_capacity(params.len()), bytes: 0 };
        for &(format, len) in params {
            extents.add(format, len);
        }
        extents.bytes = extents.bytes.next_multiple_of(PAGE);
        extents
    }

    fn add(&mut self, format: StateFormat, len: usize) {
        let mut end = 0_usize;
        let mut buffers: Vec<Range<usize>> = Vec::new();
        for spec in format.buffers(len) {
            let size = if spec.dtype == StateType::F32 { 4 } else { 1 };
            let start = end.next_multiple_of(BUFFER);
            end = start + spec.len * size;
            buffers.push(start..end);
        }
        let start = self.bytes.next_multiple_of(if end >= LARGE { HUGE } else { PAGE });
        let place = |buffer: &Range<usize>| start + buffer.start..start + buffer.end;
        self.buffers.push(buffers.iter().map(place).collect());
        self.bytes = start + end;
    }

    /// The buffers of each parameter, in [`StateFormat::buffers`]' order, in bytes from the arena's
    /// beginning.
    #[must_use]
    pub fn buffers(&self) -> &[Vec<Range<usize>>] {
        &self.buffers
    }

    /// How large the arena must be.
    #[must_use]
    pub const fn bytes(&self) -> usize {
        self.bytes
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buffers_are_aligned_apart_and_as_long_as_the_state() {
        let params = [
            (StateFormat::DYNAMIC8, 100_001),
            (StateFormat::F32, 100_000),
            (StateFormat::F32, 3_000_000),
            (StateFormat::DYNAMIC8, 1),
        ];
        let extents = Extents::new(&params);
        let mut end = 0_usize;
        for (&(format, len), buffers) in params.iter().zip(extents.buffers()) {
            assert!(buffers[0].start.is_multiple_of(PAGE));
            for (buffer, spec) in buffers.iter().zip(format.buffers(len)) {
                assert!(buffer.start >= end && buffer.start.is_multiple_of(BUFFER));
                let size = if spec.dtype == StateType::F32 { 4 } else { 1 };
                assert_eq!(buffer.len(), spec.len * size);
                end = buffer.end;
            }
        }
        assert!(extents.buffers()[2][0].start.is_multiple_of(HUGE));
        assert_eq!(extents.bytes(), end.next_multiple_of(PAGE));
        assert_eq!(Extents::new(&[]).bytes(), 0);
    }
}
