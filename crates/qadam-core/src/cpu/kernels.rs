//! Which function serves a back end and a pair of element types.

use half::{bf16, f16};

use super::measure::Gauge;
use super::{Backend, scalar};
use crate::codec::Scales;
use crate::dtype::DType;
use crate::rule::Coefficients;
use crate::tensor::{Moments8, Moments32};

/// Updates `len` consecutive elements and returns how many had a non-finite gradient.
///
/// # Safety (of each function of this type)
/// The pointers are valid for `len` elements of the types that the function was chosen for, aligned
/// to an element, and nothing else accesses them meanwhile (the gradient may be read). 8-bit
/// moments begin at a block.
type Kernel<S> = unsafe fn(*mut u8, *const u8, S, usize, &Coefficients) -> usize;

/// Gauges what a step of `len` consecutive elements would do; writes nothing.
///
/// # Safety (of each function of this type)
/// As [`Kernel`], but everything may be read by others. 8-bit moments begin at a block.
type GaugeKernel<S> = unsafe fn(*const u8, *const u8, S, usize, &Coefficients, &mut Gauge);

/// 8-bit moments, where they are in their tensor, and what becomes of their scales.
#[derive(Clone, Copy)]
pub(super) struct Coded8 {
    pub moments: Moments8,
    /// Which element of the tensor is the first.
    pub start: u64,
    /// Where the tensor has one scale a moment: what the moments are to be encoded for. The caller
    /// writes them, as other threads still read the old ones.
    pub told: Option<Scales>,
}

impl Coded8 {
    /// The same from element `start` on, which begins a block.
    ///
    /// # Safety
    /// `start` is a multiple of a block and at most the number of elements.
    pub(super) unsafe fn skip(self, start: usize) -> Self {
        // SAFETY: this function's contract.
        let moments = unsafe { self.moments.skip(start) };
        Self { moments, start: self.start + start as u64, ..self }
    }
}

/// The functions for one pair of element types.
#[derive(Clone, Copy)]
pub(super) struct Kernels {
    pub step32: Kernel<Moments32>,
    pub step8: Kernel<Coded8>,
    pub gauge32: GaugeKernel<Moments32>,
    pub gauge8: GaugeKernel<Moments8>,
    /// Counts non-finite effective gradients; writes nothing.
    pub count: unsafe fn(*const u8, *const u8, usize, &Coefficients) -> usize,
}

impl Kernels {
    pub(super) fn select(backend: Backend, param: DType, grad: DType) -> Self {
        match param {
            DType::F32 => Self::with_param::<f32>(backend, grad),
            DType::BF16 => Self::with_param::<bf16>(backend, grad),
            DType::F16 => Self::with_param::<f16>(backend, grad),
        }
    }

    fn with_param<P: VectorFloat>(backend: Backend, grad: DType) -> Self {
        match grad {
            DType::F32 => Self::with_types::<P, f32>(backend),
            DType::BF16 => Self::with_types::<P, bf16>(backend),
            DType::F16 => Self::with_types::<P, f16>(backend),
        }
    }

    fn with_types<P: VectorFloat, G: VectorFloat>(backend: Backend) -> Self {
        macro_rules! of {
            ($($path:ident)::+) => {
                Self {
                    step32: $($path)::+::step32::<P, G>,
                    step8: $($path)::+::step8::<P, G>,
                    gauge32: $($path)::+::gauge32::<P, G>,
                    gauge8: $($path)::+::gauge8::<P, G>,
                    count: scalar::count_nonfinite::<P, G>,
                }
            };
        }
        match backend {
            Backend::Scalar => of!(scalar),
            #[cfg(target_arch = "x86_64")]
            Backend::Avx2 => of!(super::avx2),
            #[cfg(target_arch = "x86_64")]
            Backend::Avx512 => of!(super::avx512::base),
            #[cfg(target_arch = "x86_64")]
            Backend::Avx512Vbmi => of!(super::avx512::vbmi),
            #[cfg(not(target_arch = "x86_64"))]
            Backend::Avx2 | Backend::Avx512 | Backend::Avx512Vbmi => {
                unreachable!("not available on this processor")
            }
        }
    }
}

#[cfg(target_arch = "x86_64")]
use super::simd::VectorFloat;

/// Without vector kernels, any [`Float`] will do.
#[cfg(not(target_arch = "x86_64"))]
trait VectorFloat: crate::dtype::Float {}
#[cfg(not(target_arch = "x86_64"))]
impl<T: crate::dtype::Float> VectorFloat for T {}
