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
pub(super) type Kernel<S> = unsafe fn(*mut u8, *const u8, S, usize, &Coefficients) -> usize;

/// Gauges what a step of `len` consecutive elements would do; writes nothing.
///
/// # Safety (of each function of this type)
/// As [`Kernel`], but everything may be read by others. 8-bit moments begin at a block.
pub(super) type GaugeKernel<S> =
    unsafe fn(*const u8, *const u8, S, usize, &Coefficients, &mut Gauge);

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
        use DType::{BF16, F16, F32};
        match (param, grad) {
            (F32, F32) => Self::alike::<f32>(backend),
            (BF16, BF16) => Self::alike::<bf16>(backend),
            (F16, F16) => Self::alike::<f16>(backend),
            (F32, BF16) => Self::mixed::<f32, bf16>(backend),
            (F32, F16) => Self::mixed::<f32, f16>(backend),
            (BF16, F32) => Self::mixed::<bf16, f32>(backend),
            (BF16, F16) => Self::mixed::<bf16, f16>(backend),
            (F16, F32) => Self::mixed::<f16, f32>(backend),
            (F16, BF16) => Self::mixed::<f16, bf16>(backend),
        }
    }

    fn alike<T: VectorFloat>(backend: Backend) -> Self {
        macro_rules! of {
            ($($path:ident)::+) => {
                Self {
                    step32: $($path)::+::step32::<T, T>,
                    step8: $($path)::+::step8::<T, T>,
                    gauge32: $($path)::+::gauge32::<T, T>,
                    gauge8: $($path)::+::gauge8::<T, T>,
                    count: scalar::count_nonfinite::<T, T>,
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

    fn mixed<P: VectorFloat, G: VectorFloat>(backend: Backend) -> Self {
        #[cfg(target_arch = "x86_64")]
        macro_rules! of {
            ($($path:ident)::+) => {
                Self {
                    step32: $($path)::+::step32::<P, G>,
                    step8: $($path)::+::mixed_step8::<P, G>,
                    gauge32: $($path)::+::gauge32::<P, G>,
                    gauge8: $($path)::+::mixed_gauge8::<P, G>,
                    count: scalar::count_nonfinite::<P, G>,
                }
            };
        }
        match backend {
            Backend::Scalar => Self {
                step32: scalar::step32::<P, G>,
                step8: scalar::step8::<P, G>,
                gauge32: scalar::gauge32::<P, G>,
                gauge8: scalar::gauge8::<P, G>,
                count: scalar::count_nonfinite::<P, G>,
            },
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
