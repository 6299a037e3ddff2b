//! `qadam._core`: converts torch tensors to pointers and calls [`qadam_core`]. No arithmetic here.
//!
//! * `engine` steps all tensors of an optimizer in one call, with the GIL released;
//! * `paging` hands out paged memory as tensors (`dlpack`);
//! * `quantize` encodes and decodes state for checkpoints of another width;
//! * `software` lets the tests stand CPU memory in for a GPU's;
//! * `tensor` reads what is needed of a torch tensor, `exchange` the same at a glance,
//!   `impression` whether anything of one has changed, `place` asks for its memory ahead.

mod dlpack;
mod engine;
mod error;
mod exchange;
mod impression;
mod paging;
mod place;
mod quantize;
mod software;
mod tensor;

use pyo3::prelude::*;
use qadam_core::Hyper;

/// The Rust core of qadam.
#[pymodule]
mod _core {
    #[pymodule_export]
    use super::cpu_backend;
    #[pymodule_export]
    use super::engine::Engine;
    #[pymodule_export]
    use super::error::CudaError;
    #[pymodule_export]
    use super::impression::takes_impressions;
    #[pymodule_export]
    use super::paging::{check_paging, initialise_pages, memory_tier, page_state, settle_pages};
    #[pymodule_export]
    use super::quantize::{
        decode_blocks, decode_ratio, dynamic_map, encode_blocks, encode_ratio, encode_tensor,
    };
    #[pymodule_export]
    use super::software::use_software_device;
    #[pymodule_export]
    use super::tensor::check_parameter;
    #[pymodule_export]
    use super::{advise_huge_pages, check_hyper, check_max_grad_norm, cuda_availability, version};
}

/// Raises `ValueError` unless gradients can be cut to this norm: at least 0; infinity is no limit.
#[pyfunction]
fn check_max_grad_norm(max_norm: f64) -> PyResult<()> {
    qadam_core::clip::check_max_grad_norm(max_norm).map_err(|error| error::to_python(&error))
}

/// Raises `ValueError`, naming the argument and its value, unless all are in range: `lr`, `eps` and
/// `weight_decay` finite and at least 0, betas in [0, 1).
#[pyfunction]
fn check_hyper(lr: f64, beta1: f64, beta2: f64, eps: f64, weight_decay: f64) -> PyResult<()> {
    let hyper = Hyper { lr, beta1, beta2, eps, weight_decay, ..Hyper::adam() };
    hyper.validate().map_err(|error| error::to_python(&error))
}

/// Asks for huge pages under a CPU tensor without gaps, best before it is first written.
#[pyfunction]
fn advise_huge_pages(tensor: &Bound<'_, PyAny>) -> PyResult<()> {
    let start = tensor::Tensor::pointer_of(tensor)?;
    let bytes: usize = tensor.getattr("nbytes")?.extract()?;
    qadam_core::cpu::advise_huge_pages(&(start..start.saturating_add(bytes)));
    Ok(())
}

/// The instruction set in use: `"scalar"`, `"avx2"`, `"avx512"` or `"avx512vbmi"`.
///
/// # Errors
/// `ValueError` if `QADAM_CPU` names one that this machine does not have.
#[pyfunction]
fn cpu_backend() -> PyResult<&'static str> {
    Ok(qadam_core::cpu::Backend::current().map_err(|error| error::to_python(&error))?.name())
}

/// The package's version.
#[pyfunction]
const fn version() -> &'static str {
    env!("CARGO_PKG_VERSION")
}

/// How many CUDA devices there are, and why none where there is none.
#[pyfunction]
fn cuda_availability() -> (u32, Option<String>) {
    match qadam_core::cuda::availability() {
        Ok(count) => (count, None),
        Err(error) => (0, Some(error.to_string())),
    }
}
