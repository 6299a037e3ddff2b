//! One tensor's step by raw pointers: what the safe API and the Python binding both hand to a back
//! end.

use std::ops::Range;

use crate::codec::BLOCK;
use crate::dtype::DType;
use crate::layout::Walk;
use crate::rule::Coefficients;
use crate::state::StateFormat;

/// Pointers to 32-bit moments, dense in the parameter's memory order.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Moments32 {
    /// First moments, one f32 an element.
    pub m: *mut f32,
    /// Second moments, one f32 an element.
    pub v: *mut f32,
}

/// Pointers to 8-bit moments, dense in the parameter's memory order.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Moments8 {
    /// Codes of the first moments, one byte an element.
    pub m_code: *mut u8,
    /// Scales of the first moments, one f32 a block.
    pub m_scale: *mut f32,
    /// Codes of the second moments, one byte an element.
    pub v_code: *mut u8,
    /// Scales of the second moments, one f32 a block.
    pub v_scale: *mut f32,
}

impl Moments32 {
    /// The moments from element `start` on.
    ///
    /// # Safety
    /// `start` is at most the length of both buffers.
    pub(crate) unsafe fn skip(self, start: usize) -> Self {
        // SAFETY: `start` is within both buffers, by this function's contract.
        unsafe { Self { m: self.m.add(start), v: self.v.add(start) } }
    }
}

impl Moments8 {
    /// The moments from element `start` on, which begins a block.
    ///
    /// # Safety
    /// `start` is a multiple of [`BLOCK`] and at most the length of the code buffers.
    pub(crate) unsafe fn skip(self, start: usize) -> Self {
        debug_assert_eq!(start % BLOCK, 0);
        let block = start / BLOCK;
        // SAFETY: element `start` and block `start / BLOCK` are within the buffers, by contract.
        unsafe {
            Self {
                m_code: self.m_code.add(start),
                m_scale: self.m_scale.add(block),
                v_code: self.v_code.add(start),
                v_scale: self.v_scale.add(block),
            }
        }
    }
}

/// Pointers to a parameter's state.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RawState {
    /// [`StateFormat::F32`].
    F32(Moments32),
    /// [`StateFormat::Dynamic8`].
    Dynamic8(Moments8),
}

impl RawState {
    /// The format that these pointers belong to.
    #[must_use]
    pub const fn format(self) -> StateFormat {
        match self {
            Self::F32(_) => StateFormat::F32,
            Self::Dynamic8(_) => StateFormat::Dynamic8,
        }
    }
}

impl RawState {
    /// The addresses of what elements `start..start + len` have in each buffer; `start` begins a
    /// block.
    pub(crate) fn addresses(self, start: usize, len: usize) -> Vec<Range<usize>> {
        let blocks = start / BLOCK..(start + len).div_ceil(BLOCK);
        let part = |base: usize, range: &Range<usize>, size: usize| {
            base + range.start * size..base + range.end * size
        };
        let elements = start..start + len;
        match self {
            Self::F32(Moments32 { m, v }) => {
                vec![part(m.addr(), &elements, 4), part(v.addr(), &elements, 4)]
            }
            Self::Dynamic8(Moments8 { m_code, m_scale, v_code, v_scale }) => vec![
                part(m_code.addr(), &elements, 1),
                part(m_scale.addr(), &blocks, 4),
                part(v_code.addr(), &elements, 1),
                part(v_scale.addr(), &blocks, 4),
            ],
        }
    }
}

/// The update of one parameter, ready to run.
#[derive(Debug, Clone)]
pub struct TensorStep {
    pub(crate) param: *mut u8,
    pub(crate) param_dtype: DType,
    pub(crate) grad: *const u8,
    pub(crate) grad_dtype: DType,
    pub(crate) walk: Walk,
    pub(crate) state: RawState,
    pub(crate) coefficients: Coefficients,
}

impl TensorStep {
    /// Describes the step of one parameter.
    ///
    /// # Safety
    /// From now until the last run of this step:
    ///
    /// * `param` and `grad` point to the first element of tensors of their dtypes, aligned to the
    ///   element, valid for every offset that `walk` visits, and initialised;
    /// * `state` points to buffers as long as [`StateFormat::buffers`] says for `walk.len()`;
    /// * nothing else reads or writes the parameter or its state, nor writes the gradient, while
    ///   a run is under way.
    #[must_use]
    pub const unsafe fn new(
        (param, param_dtype): (*mut u8, DType),
        (grad, grad_dtype): (*const u8, DType),
        walk: Walk,
        state: RawState,
        coefficients: Coefficients,
    ) -> Self {
        Self { param, param_dtype, grad, grad_dtype, walk, state, coefficients }
    }

    /// How many elements the step updates.
    #[must_use]
    pub const fn len(&self) -> usize {
        self.walk.len()
    }

    /// Whether there is nothing to update.
    #[must_use]
    pub const fn is_empty(&self) -> bool {
        self.walk.is_empty()
    }
}

// SAFETY: the pointers are used only by a back end's run, which gives each range of elements to one
// thread; `TensorStep::new`'s contract excludes every other access meanwhile.
unsafe impl Send for TensorStep {}
// SAFETY: as above; a shared `TensorStep` only lends its pointers to disjoint ranges.
unsafe impl Sync for TensorStep {}
