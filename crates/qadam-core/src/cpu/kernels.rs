//! Which function serves a back end and a pair of element types.

use half::{bf16, f16};

use super::{Backend, scalar};
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

/// The functions for one pair of element types.
#[derive(Clone, Copy)]
pub(super) struct Kernels {
    pub step32: Kernel<Moments32>,
    pub step8: Kernel<Moments8>,
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
        let (step32, step8): (Kernel<Moments32>, Kernel<Moments8>) = match backend {
            Backend::Scalar => (scalar::step32::<P, G>, scalar::step8::<P, G>),
            #[cfg(target_arch = "x86_64")]
            Backend::Avx2 => (super::avx2::step32::<P, G>, super::avx2::step8::<P, G>),
            #[cfg(target_arch = "x86_64")]
            Backend::Avx512 => (super::avx512::step32::<P, G>, super::avx512::step8::<P, G>),
            #[cfg(not(target_arch = "x86_64"))]
            Backend::Avx2 | Backend::Avx512 => unreachable!("not available on this processor"),
        };
        Self { step32, step8, count: scalar::count_nonfinite::<P, G> }
    }
}

#[cfg(target_arch = "x86_64")]
use super::simd::VectorFloat;

/// Without vector kernels, any [`Float`] will do.
#[cfg(not(target_arch = "x86_64"))]
trait VectorFloat: crate::dtype::Float {}
#[cfg(not(target_arch = "x86_64"))]
impl<T: crate::dtype::Float> VectorFloat for T {}
