//! One tensor's step by raw pointers: what the safe API and the Python binding both hand to a back
//! end.

use std::ops::Range;
use std::slice::{from_raw_parts, from_raw_parts_mut};

use crate::codec::{BLOCK, Code, Moment, Scale, Scales};
use crate::dtype::DType;
use crate::layout::Walk;
use crate::rule::Coefficients;
use crate::state::{StateCode, StateFormat};

/// Pointers to 32-bit moments, dense in the parameter's memory order.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Moments32 {
    /// First moments, one f32 an element.
    pub m: *mut f32,
    /// Second moments, one f32 an element.
    pub v: *mut f32,
    /// Largest second moments so far, one f32 an element, by which the update divides (`AMSGrad`).
    pub max_v: Option<*mut f32>,
}

/// Pointers to one moment in an 8-bit code, dense in the parameter's memory order.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RawCoded {
    /// Codes, one byte an element.
    pub code: *mut u8,
    /// [`Code::scales`] f32 a block, or so many in all.
    pub scale: *mut f32,
}

/// Pointers to 8-bit moments.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Moments8 {
    /// The code that they are in.
    pub code: Code,
    /// First moments.
    pub m: RawCoded,
    /// Second moments.
    pub v: RawCoded,
    /// Largest second moments so far, by which the update divides (`AMSGrad`).
    pub max_v: Option<RawCoded>,
    /// Whether there is a scale a block.
    pub block_wise: bool,
}

impl Moments32 {
    /// The moments from element `start` on.
    ///
    /// # Safety
    /// `start` is at most the length of the buffers.
    pub(crate) unsafe fn skip(self, start: usize) -> Self {
        // SAFETY: `start` is within all buffers, by this function's contract.
        unsafe {
            let max_v = self.max_v.map(|max_v| max_v.add(start));
            Self { m: self.m.add(start), v: self.v.add(start), max_v }
        }
    }
}

impl RawCoded {
    /// The moment from element `start` on, which begins a block.
    ///
    /// # Safety
    /// `start` is a multiple of [`BLOCK`] and at most the number of codes; each block has so many
    /// `scales`.
    unsafe fn skip(self, start: usize, scales: usize) -> Self {
        debug_assert_eq!(start % BLOCK, 0);
        let scales = start / BLOCK * scales;
        // SAFETY: element `start` and its block are within the buffers, by contract.
        unsafe { Self { code: self.code.add(start), scale: self.scale.add(scales) } }
    }
}

impl Moments8 {
    /// The moments from element `start` on, which begins a block.
    ///
    /// # Safety
    /// `start` is a multiple of [`BLOCK`] and at most the length of the code buffers.
    pub(crate) unsafe fn skip(self, start: usize) -> Self {
        let skip = |coded: RawCoded, moment| {
            let scales = if self.block_wise { self.code.scales(moment) } else { 0 };
            // SAFETY: this function's contract.
            unsafe { coded.skip(start, scales) }
        };
        Self {
            m: skip(self.m, Moment::First),
            v: skip(self.v, Moment::Second),
            max_v: self.max_v.map(|max_v| skip(max_v, Moment::Largest)),
            ..self
        }
    }

    /// The scales of the first block, or the only ones.
    ///
    /// # Safety
    /// There are some, and nobody writes them.
    pub(crate) unsafe fn scales(self) -> Scales {
        let mut scales = Scales::default();
        for ((coded, moment), scale) in self.each().zip(Moment::ALL).zip(&mut scales) {
            // SAFETY: this function's contract.
            let from = unsafe { from_raw_parts(coded.scale, self.code.scales(moment)) };
            *scale = Scale::read(from);
        }
        scales
    }

    /// Writes what [`Moments8::scales`] reads.
    ///
    /// # Safety
    /// There are some, and nobody else uses them.
    pub(crate) unsafe fn set_scales(self, scales: &Scales) {
        for ((coded, moment), scale) in self.each().zip(Moment::ALL).zip(scales) {
            // SAFETY: this function's contract.
            let to = unsafe { from_raw_parts_mut(coded.scale, self.code.scales(moment)) };
            scale.write(to);
        }
    }

    /// The two or three moments.
    pub(crate) fn each(self) -> impl Iterator<Item = RawCoded> {
        [self.m, self.v].into_iter().chain(self.max_v)
    }
}

/// Pointers to a parameter's state.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RawState {
    /// [`StateCode::F32`].
    F32(Moments32),
    /// [`StateCode::Coded`].
    Coded(Moments8),
}

impl RawState {
    /// The state of this format whose buffers are `pointers`, in [`StateFormat::buffers`]' order;
    /// `None` unless there are as many as that says.
    pub fn from_buffers(
        format: StateFormat,
        pointers: impl IntoIterator<Item = *mut u8>,
    ) -> Option<Self> {
        let mut rest = pointers.into_iter();
        let state = match format.code {
            StateCode::F32 => {
                let mut next = || Some(rest.next()?.cast());
                let (m, v) = (next()?, next()?);
                let max_v = if format.amsgrad { Some(next()?) } else { None };
                Self::F32(Moments32 { m, v, max_v })
            }
            StateCode::Coded(code) => {
                let mut next = || Some(RawCoded { code: rest.next()?, scale: rest.next()?.cast() });
                let (m, v) = (next()?, next()?);
                let max_v = if format.amsgrad { Some(next()?) } else { None };
                Self::Coded(Moments8 { code, m, v, max_v, block_wise: format.block_wise })
            }
        };
        rest.next().is_none().then_some(state)
    }

    /// The format that these pointers belong to.
    #[must_use]
    pub const fn format(self) -> StateFormat {
        match self {
            Self::F32(moments) => StateFormat::F32.with_amsgrad(moments.max_v.is_some()),
            Self::Coded(moments) => StateFormat::coded(moments.code)
                .with_amsgrad(moments.max_v.is_some())
                .with_block_wise(moments.block_wise),
        }
    }

    /// The addresses of what elements `start..start + len` have in each buffer; `start` begins a
    /// block.
    pub(crate) fn addresses(self, start: usize, len: usize) -> Vec<Range<usize>> {
        let blocks = start / BLOCK..(start + len).div_ceil(BLOCK);
        let part = |base: usize, range: &Range<usize>, size: usize| {
            base + range.start * size..base + range.end * size
        };
        let elements = start..start + len;
        match self {
            Self::F32(Moments32 { m, v, max_v }) => {
                let values = [m, v].into_iter().chain(max_v);
                values.map(|moment| part(moment.addr(), &elements, 4)).collect()
            }
            Self::Coded(moments) => {
                let blocks = if moments.block_wise { blocks } else { 0..len.min(1) };
                let of_moment = |(RawCoded { code, scale }, moment)| {
                    let size = 4 * moments.code.scales(moment);
                    [part(code.addr(), &elements, 1), part(scale.addr(), &blocks, size)]
                };
                moments.each().zip(Moment::ALL).flat_map(of_moment).collect()
            }
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

    /// What gradients are multiplied by: [`Coefficients::factor`].
    #[must_use]
    pub const fn factor(&self) -> f32 {
        self.coefficients.factor
    }

    /// Multiplies gradients by `factor` besides, as clipping does: [`Coefficients::with_factor`].
    pub fn multiply(&mut self, factor: f32) {
        self.coefficients = self.coefficients.with_factor(factor);
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

#[cfg(test)]
mod tests {
    use super::*;

    const FORMATS: [StateFormat; 5] = [
        StateFormat::F32,
        StateFormat::DYNAMIC8,
        StateFormat::DYNAMIC8.with_block_wise(false),
        StateFormat::RATIO8,
        StateFormat::RATIO8.with_block_wise(false),
    ];

    #[test]
    fn addresses_are_those_of_the_buffers_in_order() {
        for format in FORMATS.into_iter().flat_map(|f| [f, f.with_amsgrad(true)]) {
            let specs = format.buffers(512 + 77);
            let mut memory: Vec<_> = specs.iter().map(|spec| vec![0_u32; spec.len]).collect();
            let pointers: Vec<*mut u8> = memory.iter_mut().map(|m| m.as_mut_ptr().cast()).collect();
            let state = RawState::from_buffers(format, pointers.iter().copied()).unwrap();
            assert_eq!(state.format(), format);
            let want = |start: usize, len: usize| -> Vec<Range<usize>> {
                let of_buffer = |(base, spec): (usize, &crate::BufferSpec)| {
                    let size = if spec.dtype == crate::StateType::F32 { 4 } else { 1 };
                    let (each, size) = match spec.per {
                        crate::Per::Element => (1, size),
                        crate::Per::Block => (BLOCK, size * spec.len / 3), // there are 3 blocks
                        crate::Per::Tensor => return base..base + size * spec.len,
                    };
                    base + start / each * size..base + (start + len).div_ceil(each) * size
                };
                pointers.iter().map(|p| p.addr()).zip(&specs).map(of_buffer).collect()
            };
            assert_eq!(state.addresses(0, 589), want(0, 589));
            assert_eq!(state.addresses(256, 300), want(256, 300));
            // SAFETY: 256 elements are within the buffers.
            let skipped = unsafe {
                match state {
                    RawState::F32(moments) => RawState::F32(moments.skip(256)),
                    RawState::Coded(moments) => RawState::Coded(moments.skip(256)),
                }
            };
            assert_eq!(skipped.addresses(0, 333), want(256, 333));
        }
    }

    #[test]
    fn a_wrong_number_of_buffers_is_no_state() {
        for format in FORMATS.into_iter().flat_map(|f| [f, f.with_amsgrad(true)]) {
            let count = format.buffers(0).len();
            for given in 0..8 {
                let pointers = std::iter::repeat_n(std::ptr::null_mut(), given);
                assert_eq!(
                    RawState::from_buffers(format, pointers).is_some(),
                    given == count,
                    "{given} buffers, {format}"
                );
            }
        }
    }
}
