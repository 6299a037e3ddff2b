//! Rust errors as Python exceptions.

use pyo3::exceptions::{PyOSError, PyRuntimeError, PyValueError};
use pyo3::prelude::*;
use qadam_core::Error;

pyo3::create_exception!(
    qadam,
    CudaError,
    PyRuntimeError,
    "A call of the CUDA driver failed: `name`, `code`, and what it was `doing`."
);

/// The exception for an error of the core: `RuntimeError` for what the machine or the data did,
/// `OSError` for what a disk did, `ValueError` for what the caller gave.
pub fn to_python(error: &Error) -> PyErr {
    let text = error.to_string();
    match error {
        Error::Cuda { name, code, doing } => Python::attach(|py| {
            let exception = CudaError::new_err(text);
            let value = exception.value(py);
            let set = value
                .setattr("name", name)
                .and_then(|()| value.setattr("code", code))
                .and_then(|()| value.setattr("doing", doing));
            set.err().unwrap_or(exception)
        }),
        // with its number, Python makes it a FileNotFoundError, a PermissionError, ...
        Error::PageFile { errno: 0, .. } => PyOSError::new_err(text),
        Error::PageFile { errno, .. } => PyOSError::new_err((*errno, text)),
        Error::CudaUnavailable { .. }
        | Error::NoManagedMemory { .. }
        | Error::Forked { .. }
        | Error::Capture { .. }
        | Error::NonFiniteGradient { .. }
        | Error::ThreadPool { .. } => PyRuntimeError::new_err(text),
        _ => PyValueError::new_err(text),
    }
}
