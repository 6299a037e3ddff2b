//! Why a module is refused at load, with the line and the text.

use thiserror::Error;

/// A refusal of PTX: nothing unknown is ever skipped.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
#[error("PTX line {line}: {why}: `{text}`")]
pub struct PtxError {
    /// 1-based PTX line.
    pub line: u32,
    /// What is wrong with it.
    pub why: String,
    /// The offending text.
    pub text: String,
    /// The CUDA error code a driver gives.
    pub code: i32,
}

/// `CUDA_ERROR_INVALID_PTX`.
pub const INVALID_PTX: i32 = 218;
/// `CUDA_ERROR_UNSUPPORTED_PTX_VERSION`.
pub const UNSUPPORTED_PTX_VERSION: i32 = 222;

impl PtxError {
    /// A refusal with `CUDA_ERROR_INVALID_PTX`.
    pub fn new(line: u32, why: &str, text: &str) -> PtxError {
        PtxError { line, why: why.to_string(), text: text.to_string(), code: INVALID_PTX }
    }
}
