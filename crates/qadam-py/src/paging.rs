//! Paged state for Python: arenas handed out as tensors, and which tier a tensor lives in.

use std::sync::Arc;

use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;
use pyo3::types::PyDict;
use qadam_core::StateFormat;
use qadam_core::codec::Code;
use qadam_core::paging::{Extents, managed, mapped};

use crate::dlpack;
use crate::error::to_python;
use crate::software;
use crate::tensor::{Device, Tensor};

/// Memory one tier below that of a device.
#[derive(Clone)]
enum Arena {
    /// Below host memory: a file.
    Mapped(Arc<mapped::Arena>),
    /// Below a device's memory: what the driver moves between it and the host.
    Managed(Arc<managed::Arena>),
}

impl Arena {
    fn new(device: Device, params: &[(StateFormat, usize)]) -> qadam_core::Result<Self> {
        match device {
            Device::Cpu => mapped::Arena::new(params).map(Self::Mapped),
            Device::Cuda(number) => managed::Arena::new(number, params).map(Self::Managed),
        }
    }

    fn find(address: usize) -> Option<Self> {
        let mapped = mapped::find(address).map(Self::Mapped);
        mapped.or_else(|| managed::find(address as u64).map(Self::Managed))
    }

    const fn tier(&self) -> &'static str {
        match self {
            Self::Mapped(_) => "mapped",
            Self::Managed(_) => "managed",
        }
    }

    fn address(&self) -> usize {
        match self {
            Self::Mapped(arena) => arena.address(),
            Self::Managed(arena) => arena.address() as usize,
        }
    }

    fn bytes(&self) -> usize {
        match self {
            Self::Mapped(arena) => arena.bytes(),
            Self::Managed(arena) => arena.bytes(),
        }
    }

    fn extents(&self) -> &Extents {
        match self {
            Self::Mapped(arena) => arena.extents(),
            Self::Managed(arena) => arena.extents(),
        }
    }
}

fn device_of(tensor: &Bound<'_, PyAny>) -> PyResult<Device> {
    let unknown = || PyValueError::new_err("a tensor on cpu or cuda is accepted");
    Device::of(tensor)?.ok_or_else(unknown)
}

/// Raises unless state can be paged for a parameter on `like`'s device: `OSError` where files of
/// `QADAM_PAGE_DIR` cannot be made, `RuntimeError` where a device has no managed memory.
#[pyfunction]
pub fn check_paging(like: &Bound<'_, PyAny>) -> PyResult<()> {
    let checked = match device_of(like)? {
        Device::Cpu => mapped::check(),
        Device::Cuda(number) => managed::check(number),
    };
    checked.map_err(|error| to_python(&error))
}

/// Paged memory for the state of parameters on `like`'s device: for each length in elements, name of the
/// 8-bit code (None at 32 bits), whether there is AMSGrad's moment and whether codes have a scale a
/// block, uint8 vectors under the names of its buffers. In a file they are zero, in managed memory arbitrary.
#[pyfunction]
pub fn page_state<'py>(
    py: Python<'py>,
    like: &Bound<'py, PyAny>,
    params: Vec<(usize, Option<String>, bool, bool)>,
) -> PyResult<Vec<Bound<'py, PyDict>>> {
    let device = device_of(like)?;
    let with_format = |(len, code, amsgrad, block_wise): (_, Option<String>, _, _)| {
        let format = match code {
            None => StateFormat::F32,
            Some(name) => StateFormat::coded(code_of(&name)?),
        };
        Ok((format.with_amsgrad(amsgrad).with_block_wise(block_wise), len))
    };
    let params = params.into_iter().map(with_format).collect::<PyResult<Vec<_>>>()?;
    let arena = py.detach(|| Arena::new(device, &params)).map_err(|error| to_python(&error))?;
    let mut made = Vec::with_capacity(params.len());
    for (&(format, len), buffers) in params.iter().zip(arena.extents().buffers()) {
        let tensors = PyDict::new(py);
        for (spec, range) in format.buffers(len).iter().zip(buffers) {
            let number = match device {
                Device::Cuda(number) if !software::in_use() => Some(number),
                _ => None, // the software device's memory is the host's
            };
            let address = arena.address() + range.start;
            // SAFETY: the range lies within the arena, which lives as long as this clone of it.
            let tensor =
                unsafe { dlpack::tensor(py, address, range.len(), number, arena.clone())? };
            tensors.set_item(spec.name, tensor)?;
        }
        made.push(tensors);
    }
    Ok(made)
}

/// The code of this name.
fn code_of(name: &str) -> PyResult<Code> {
    Code::ALL.into_iter().find(|code| code.name() == name).ok_or_else(|| {
        let accepted = Code::ALL.map(Code::name).join(" or ");
        PyValueError::new_err(format!("the code must be {accepted}, got {name:?}"))
    })
}

/// Sets every byte of `pages`, fresh from [`page_state`], to `value`.
#[pyfunction]
pub fn initialise_pages(py: Python<'_>, pages: &Bound<'_, PyAny>, value: u8) -> PyResult<()> {
    match mapped_range(pages)? {
        Some(_) if value == 0 => Ok(()), // a fresh file is
        Some((arena, range)) => {
            py.detach(|| arena.fill(range, value)).map_err(|error| to_python(&error))
        }
        None => pages.call_method1("fill_", (value,)).map(|_| ()),
    }
}

/// Writes `pages` to the disk and gives their memory back, if they are a file's and not all of it
/// may stay in memory. For pages just filled, which no step has gone through.
#[pyfunction]
pub fn settle_pages(py: Python<'_>, pages: &Bound<'_, PyAny>) -> PyResult<()> {
    match mapped_range(pages)? {
        Some((arena, range)) => {
            py.detach(|| arena.settle(&range)).map_err(|error| to_python(&error))
        }
        None => Ok(()),
    }
}

/// The arena in which a tensor of bytes lies, and where there, if it is a file.
fn mapped_range(
    pages: &Bound<'_, PyAny>,
) -> PyResult<Option<(Arc<mapped::Arena>, std::ops::Range<usize>)>> {
    let address = Tensor::pointer_of(pages)?;
    let bytes: usize = pages.getattr("nbytes")?.extract()?;
    Ok(mapped::find(address).map(|arena| {
        let start = address - arena.address();
        (arena, start..start + bytes)
    }))
}

/// Where a tensor's memory is: its tier ("device", "managed", "host" or "mapped") and, if it is
/// paged, its arena's address and size in bytes.
#[pyfunction]
pub fn memory_tier(tensor: &Bound<'_, PyAny>) -> PyResult<(&'static str, Option<(usize, usize)>)> {
    if let Some(arena) = Arena::find(Tensor::pointer_of(tensor)?) {
        return Ok((arena.tier(), Some((arena.address(), arena.bytes()))));
    }
    let tier = if matches!(Device::of(tensor)?, Some(Device::Cuda(_))) { "device" } else { "host" };
    Ok((tier, None))
}
