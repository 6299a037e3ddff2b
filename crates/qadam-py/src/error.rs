//! Rust errors as Python exceptions.

use pyo3::PyErr;
use pyo3::exceptions::{PyRuntimeError, PyValueError};
use qadam_core::Error;

/// The exception for an error of the core: `RuntimeError` for what the machine or the data did,
/// `ValueError` for what the caller gave.
pub fn to_python(error: &Error) -> PyErr {
    let text = error.to_string();
    match error {
        Error::NonFiniteGradient { .. } | Error::ThreadPool { .. } => PyRuntimeError::new_err(text),
        _ => PyValueError::new_err(text),
    }
}
