//! What the kernel reads, as `kernels/adam.cu` declares it.
//! (`src/cuda/table.rs` has the same structures, and keeps them to itself.)

pub const VECTOR: u32 = 0;
pub const SCALAR: u32 = 1;
pub const STRIDED: u32 = 2;

pub const DIMS: usize = 8;

#[repr(C)]
#[derive(Clone, Copy)]
pub struct Hyper {
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

#[repr(C)]
#[derive(Clone, Copy)]
pub struct Strides {
    pub size: [u64; DIMS],
    pub param: [i64; DIMS],
    pub grad: [i64; DIMS],
}

#[repr(C)]
#[derive(Clone, Copy)]
pub struct Tensor {
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

pub const IS_8BIT: u8 = 1;
pub const ONE_SCALE: u8 = 2;
pub const MEASURED: u8 = 4;
pub const IS_RATIO: u8 = 8;
pub const IS_AMSGRAD: u8 = 16;

#[repr(C)]
#[derive(Clone, Copy, Default)]
pub struct Grad {
    pub address: u64,
    pub strides: u64,
    pub cut: u64,
    pub access: u32,
    pub guarded: u32,
}

/// Elements whose squares are added up by a warp, and sums that are added up in turn.
pub const FOLD: usize = 4096;

#[repr(C)]
#[derive(Clone, Copy, Default, PartialEq, Eq, Debug)]
pub struct Tally {
    pub fold: u32,
    pub segment: u32,
    pub arrived: u32,
    pub keeps: u32,
    pub reach: [u32; 5],
    pub unused: u32,
}

#[repr(C)]
#[derive(Clone, Copy, Default)]
pub struct Found {
    pub update_scale: f32,
    pub unused: u32,
    /// Lower and upper ends.
    pub scale: [[f32; 2]; 3],
}

#[repr(C)]
#[derive(Clone, Copy, Default, PartialEq, Debug)]
pub struct Cut {
    pub factor: f32,
    pub squares: f32,
    pub slot: u32,
    pub unused: u32,
}

#[repr(C)]
#[derive(Clone, Copy)]
pub struct Clip {
    pub max_norm: f64,
    pub norm: u64,
    pub is_limited: u32,
    pub unused: u32,
}

#[repr(C)]
#[derive(Clone, Copy)]
pub struct Chunk {
    pub start: u64,
    pub len: u32,
    pub tensor: u32,
}

#[repr(C)]
#[derive(Clone, Copy, Default)]
pub struct Table {
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
