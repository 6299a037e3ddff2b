//! Test only: CPU tensors stand in for device memory of the software GPU (`crates/softgpu`).
//!
//! The tests load the stand-in driver and hand over its function that declares host memory to be
//! device memory. From then on every CPU tensor counts as one of device 0, and each step declares
//! its tensors for as long as it runs, so that the software GPU traps whatever else is touched.

use std::sync::OnceLock;

use pyo3::exceptions::{PyRuntimeError, PyValueError};
use pyo3::prelude::*;
use qadam_core::paging::managed;

type Adopt = unsafe extern "C" fn(u64, u64, i32) -> i32;
type Unadopt = unsafe extern "C" fn(u64) -> i32;

struct Software {
    adopt: Adopt,
    unadopt: Unadopt,
}

static SOFTWARE: OnceLock<Software> = OnceLock::new();

/// For qadam's own tests: makes CPU tensors stand in for device memory, for the life of the process.
/// `adopt` and `unadopt` are the addresses of `softgpu_adopt` and `softgpu_unadopt`.
#[pyfunction]
pub fn use_software_device(adopt: usize, unadopt: usize) -> PyResult<()> {
    if adopt == 0 || unadopt == 0 {
        let text = format!("adopt is {adopt:#x}, unadopt {unadopt:#x}; functions are accepted");
        return Err(PyValueError::new_err(text));
    }
    // SAFETY: not null, and by the caller's word the functions of that name, whose signatures these
    // are; nobody but the tests calls this.
    let software = unsafe {
        let adopt = std::mem::transmute::<usize, Adopt>(adopt);
        let unadopt = std::mem::transmute::<usize, Unadopt>(unadopt);
        Software { adopt, unadopt }
    };
    SOFTWARE
        .set(software)
        .map_err(|_| PyRuntimeError::new_err("the software device is in use already"))
}

/// Whether CPU tensors stand in for device memory.
pub fn in_use() -> bool {
    SOFTWARE.get().is_some()
}

/// Host memory that counts as device memory while this lives.
pub struct Adopted(Vec<u64>);

impl Adopted {
    /// Declares `ranges` of (address, bytes); nothing where a real device is in use.
    pub fn new(ranges: impl IntoIterator<Item = (usize, usize)>) -> PyResult<Self> {
        let mut adopted = Self(Vec::new());
        let Some(software) = SOFTWARE.get() else {
            return Ok(adopted);
        };
        // managed memory is the device's already
        let is_host = |address: usize| managed::find(address as u64).is_none();
        let taken = ranges.into_iter().filter(|&(start, bytes)| bytes > 0 && is_host(start));
        let mut ranges: Vec<_> = taken.collect();
        ranges.sort_unstable();
        // tensors may share memory: what overlaps becomes one range
        let mut merged: Vec<(usize, usize)> = Vec::new();
        for (start, bytes) in ranges {
            match merged.last_mut() {
                Some((first, size)) if start <= *first + *size => {
                    *size = (*size).max(start + bytes - *first);
                }
                _ => merged.push((start, bytes)),
            }
        }
        for (start, bytes) in merged {
            // SAFETY: the stand-in's function, for memory of tensors that the step refers to.
            let code = unsafe { (software.adopt)(start as u64, bytes as u64, -1) };
            if code != 0 {
                let text =
                    format!("the software device refused {bytes} bytes at {start:#x}: {code}");
                return Err(PyRuntimeError::new_err(text));
            }
            adopted.0.push(start as u64);
        }
        Ok(adopted)
    }
}

impl Drop for Adopted {
    fn drop(&mut self) {
        if let Some(software) = SOFTWARE.get() {
            for &start in &self.0 {
                // SAFETY: adopted in `new`.
                unsafe { (software.unadopt)(start) };
            }
        }
    }
}
