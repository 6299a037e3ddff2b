#![doc = include_str!("../README.md")]

pub mod clip;
pub mod codec;
pub mod cpu;
pub mod cuda;
mod dtype;
mod error;
mod ieee;
mod layout;
pub mod norm;
mod optimizer;
pub mod paging;
pub mod rule;
mod state;
mod tensor;

pub use dtype::{DType, Float};
pub use error::{Error, Result};
pub use half::{bf16, f16};
pub use layout::{Walk, check_distinct, is_dense_like};
pub use optimizer::{
    Adam, Buffer, Coded, GradRef, ParamId, ParamMut, Report, State, StepOptions, Update,
};
pub use rule::{Decay, Hyper, NonFinite};
pub use state::{BufferSpec, Per, StateCode, StateFormat, StateType};
pub use tensor::{Moments8, Moments32, RawCoded, RawState, TensorStep};
