//! The memory that host and kernels share, as `kernels/adam.cu` and `rule.cuh` declare it.

use std::mem::{offset_of, size_of};

/// How many dimensions a [`Strides`] has.
pub(super) const DIMS: usize = 8;

/// How a chunk's parameter and gradient are reached (`enum Access`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
pub(super) enum Access {
    /// Dense and alike, aligned to four elements.
    Vector = 0,
    /// Dense and alike.
    Scalar = 1,
    /// By [`Strides`].
    Strided = 2,
}

/// Dimensions from the innermost outwards; strides in elements.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(C)]
pub(super) struct Strides {
    pub size: [u64; DIMS],
    pub param: [i64; DIMS],
    pub grad: [i64; DIMS],
}

/// What stays the same from step to step.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(C)]
pub(super) struct Tensor {
    pub param: u64,
    pub m: u64,
    pub v: u64,
    pub m_scale: u64,
    pub v_scale: u64,
    pub max_v: u64,
    pub max_v_scale: u64,
    pub step: u64,
    pub len: u64,
    pub history: u64,
    pub hyper: u32,
    pub param_dtype: u8,
    pub grad_dtype: u8,
    pub flags: u8,
    pub percentile: u8,
}

/// Of a [`Tensor`] (`enum Flag`).
pub(super) mod flag {
    /// Moments are codes.
    pub const IS_8BIT: u8 = 1;
    /// Each moment has one scale for the whole tensor.
    pub const ONE_SCALE: u8 = 2;
    /// The tensor is measured before it is stepped.
    pub const MEASURED: u8 = 4;
    /// Codes are those of the ratio code.
    pub const IS_RATIO: u8 = 8;
    /// There is a third moment.
    pub const IS_AMSGRAD: u8 = 16;
}

/// A gradient; address 0 skips the tensor.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(C)]
pub(super) struct Grad {
    pub address: u64,
    pub strides: u64,
    pub cut: u64,
    pub access: u32,
    pub guarded: u32,
}

/// What one warp does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(C)]
pub(super) struct Chunk {
    pub start: u64,
    pub len: u32,
    pub tensor: u32,
}

/// Where a tensor that is being measured has got to. All but the first two are 0 between launches.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(C)]
pub(super) struct Tally {
    pub fold: u32,
    pub segment: u32,
    pub arrived: u32,
    pub keeps: u32,
    pub reach: [u32; 5],
    pub unused: u32,
}

/// What the kernels find of a tensor that is to be measured: the size of a `Found`.
pub(super) const FOUND: usize = 32;
/// And of a gradient that may be cut: of a `Cut`.
pub(super) const CUT: usize = 16;

/// What gradients are cut to.
#[derive(Debug, Clone, Copy, PartialEq)]
#[repr(C)]
pub(super) struct Clip {
    pub max_norm: f64,
    pub norm: u64,
    pub is_limited: u32,
    pub unused: u32,
}

/// Hyperparameters.
#[derive(Debug, Clone, Copy, PartialEq)]
#[repr(C)]
pub(super) struct Hyper {
    pub lr: f64,
    pub beta1: f64,
    pub beta2: f64,
    pub eps: f64,
    pub weight_decay: f64,
    pub max_unorm: f64,
    pub lr_address: u64,
    pub grad_scale: u64,
    pub found_inf: u64,
    pub decoupled: u32,
    pub propagate: u32,
    pub maximize: u32,
    pub skip_zeros: u32,
}

/// What a launch is given the address of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(C)]
pub(super) struct Table {
    pub tensors: u64,
    pub grads: u64,
    pub chunks: u64,
    pub hypers: u64,
    pub nonfinite: u64,
    pub arrived: u64,
    pub tallies: u64,
    pub segments: u64,
    pub sums: u64,
    pub nodes: u64,
    pub found: u64,
    pub squares: u64,
    pub clip: u64,
    pub chunk_count: u64,
    pub tensor_count: u64,
}

/// A structure without padding, all of whose bytes may be copied and compared.
///
/// # Safety
/// The sum of the fields' sizes is the structure's size.
pub(super) unsafe trait Plain: Copy {}

macro_rules! plain {
    ($($name:ident { $($field:ident: $at:literal),* } $size:literal)*) => {$(
        const _: () = {
            assert!(size_of::<$name>() == $size);
            $(assert!(offset_of!($name, $field) == $at);)*
        };
        // SAFETY: the offsets and the size asserted above leave no gap between the fields.
        unsafe impl Plain for $name {}
    )*};
}

plain! {
    Strides { size: 0, param: 64, grad: 128 } 192
    Tensor {
        param: 0, m: 8, v: 16, m_scale: 24, v_scale: 32, max_v: 40, max_v_scale: 48, step: 56,
        len: 64, history: 72, hyper: 80, param_dtype: 84, grad_dtype: 85, flags: 86, percentile: 87
    } 88
    Grad { address: 0, strides: 8, cut: 16, access: 24, guarded: 28 } 32
    Chunk { start: 0, len: 8, tensor: 12 } 16
    Tally { fold: 0, segment: 4, arrived: 8, keeps: 12, reach: 16, unused: 36 } 40
    Clip { max_norm: 0, norm: 8, is_limited: 16, unused: 20 } 24
    Hyper {
        lr: 0, beta1: 8, beta2: 16, eps: 24, weight_decay: 32, max_unorm: 40, lr_address: 48,
        grad_scale: 56, found_inf: 64, decoupled: 72, propagate: 76, maximize: 80, skip_zeros: 84
    } 88
    Table {
        tensors: 0, grads: 8, chunks: 16, hypers: 24, nonfinite: 32, arrived: 40, tallies: 48,
        segments: 56, sums: 64, nodes: 72, found: 80, squares: 88, clip: 96, chunk_count: 104,
        tensor_count: 112
    } 120
}

// SAFETY: a number.
unsafe impl Plain for u32 {}

/// The bytes of a list.
pub(super) const fn bytes<T: Plain>(list: &[T]) -> &[u8] {
    // SAFETY: `Plain` has no padding, so all bytes of the list are initialised.
    unsafe { std::slice::from_raw_parts(list.as_ptr().cast(), size_of_val(list)) }
}
