//! What the core must know of a torch tensor: address, type, shape and strides.

use pyo3::exceptions::{PyTypeError, PyValueError};
use pyo3::intern;
use pyo3::prelude::*;
use pyo3::sync::PyOnceLock;
use pyo3::types::PyTuple;
use qadam_core::{DType, check_distinct};

use crate::software;

/// Objects of the torch module, looked up once.
pub struct Torch {
    strided: Py<PyAny>,
    dtypes: [(Py<PyAny>, DType); 3],
    pub float32: Py<PyAny>,
    pub uint8: Py<PyAny>,
    /// Tells autograd that tensors were written in place.
    pub increment_version: Py<PyAny>,
    /// `torch.cuda.current_stream`.
    current_stream: Py<PyAny>,
}

impl Torch {
    pub fn get(py: Python<'_>) -> PyResult<&'static Self> {
        static TORCH: PyOnceLock<Torch> = PyOnceLock::new();
        TORCH.get_or_try_init(py, || {
            let torch = py.import("torch")?;
            let get = |name: &str| torch.getattr(name).map(Bound::unbind);
            let dtype = |dtype: DType| Ok::<_, PyErr>((get(dtype.name())?, dtype));
            let dtypes = [dtype(DType::F32)?, dtype(DType::BF16)?, dtype(DType::F16)?];
            let (float32, uint8) = (get("float32")?, get("uint8")?);
            let graph = py.import("torch.autograd.graph")?;
            let increment_version = graph.getattr("increment_version")?.unbind();
            let current_stream = py.import("torch.cuda")?.getattr("current_stream")?.unbind();
            let strided = get("strided")?;
            Ok(Self { strided, dtypes, float32, uint8, increment_version, current_stream })
        })
    }

    /// The handle of torch's current stream on a device; the software device has its default one.
    pub fn stream(&self, py: Python<'_>, device: usize) -> PyResult<u64> {
        if software::in_use() {
            return Ok(0);
        }
        self.current_stream.call1(py, (device,))?.getattr(py, "cuda_stream")?.extract(py)
    }

    /// The type of a tensor's elements, if there are such in parameters or state.
    pub fn element(&self, dtype: &Bound<'_, PyAny>) -> Option<Element> {
        match self.dtype(dtype) {
            Some(known) => Some(Element::Float(known)),
            None => self.uint8.is(dtype).then_some(Element::U8),
        }
    }

    /// The core's name for a torch dtype, if it has one.
    pub fn dtype(&self, object: &Bound<'_, PyAny>) -> Option<DType> {
        self.dtypes.iter().find(|(known, _)| known.is(object)).map(|&(_, dtype)| dtype)
    }
}

/// The type of a tensor's elements.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Element {
    /// Parameters, gradients, moments.
    Float(DType),
    /// Codes.
    U8,
}

/// Where a tensor's memory is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Device {
    Cpu,
    /// By its number.
    Cuda(usize),
}

impl Device {
    /// Where torch's CPU tensors are.
    pub fn host() -> Self {
        if software::in_use() { Self::Cuda(0) } else { Self::Cpu }
    }

    /// Where `object` is; `None` for devices that qadam does not know.
    pub fn of(object: &Bound<'_, PyAny>) -> PyResult<Option<Self>> {
        let py = object.py();
        if object.getattr(intern!(py, "is_cpu"))?.is_truthy()? {
            return Ok(Some(Self::host()));
        }
        if object.getattr(intern!(py, "is_cuda"))?.is_truthy()? {
            let number = object.call_method0(intern!(py, "get_device"))?.extract()?;
            return Ok(Some(Self::Cuda(number)));
        }
        Ok(None)
    }
}

/// A strided tensor of a supported type, on a supported device.
pub struct Tensor<'py> {
    pub object: Bound<'py, PyAny>,
    pub device: Device,
    pub dtype: DType,
    pub pointer: usize,
    pub shape: Bound<'py, PyTuple>,
    pub strides: Bound<'py, PyTuple>,
}

/// Why a tensor will not do.
pub struct Refusal {
    kind: Kind,
    reason: String,
}

enum Kind {
    Type,
    Value,
}

impl Refusal {
    /// The exception, with `subject` before the reason.
    pub fn to_python(&self, subject: &str) -> PyErr {
        let text = format!("{subject} {}", self.reason);
        match self.kind {
            Kind::Type => PyTypeError::new_err(text),
            Kind::Value => PyValueError::new_err(text),
        }
    }
}

impl<'py> Tensor<'py> {
    /// Reads a gradient; the inner result says why it is refused.
    pub fn read_gradient(object: &Bound<'py, PyAny>) -> PyResult<Result<Self, Refusal>> {
        // as it is only read, a copy will do for a lazily negated one
        Self::read(&object.call_method0(intern!(object.py(), "resolve_neg"))?)
    }

    /// Reads `object`; the inner result says why it is refused.
    pub fn read(object: &Bound<'py, PyAny>) -> PyResult<Result<Self, Refusal>> {
        let py = object.py();
        let torch = Torch::get(py)?;
        let refuse = |kind, reason| Ok(Err(Refusal { kind, reason }));
        let layout = object.getattr(intern!(py, "layout"))?;
        if !layout.is(&torch.strided) {
            return refuse(Kind::Type, format!("has layout {layout}; torch.strided is accepted"));
        }
        let Some(device) = Device::of(object)? else {
            let device = object.getattr(intern!(py, "device"))?;
            return refuse(Kind::Value, format!("is on {device}; cpu and cuda are accepted"));
        };
        let dtype = object.getattr(intern!(py, "dtype"))?;
        let Some(dtype) = torch.dtype(&dtype) else {
            return refuse(Kind::Type, format!("has dtype {dtype}; {} are accepted", DType::NAMES));
        };
        if is_negated(object)? {
            let reason = "is a lazily negated view; a tensor that holds its values is accepted";
            return refuse(Kind::Value, reason.to_owned());
        }
        let shape = object.getattr(intern!(py, "shape"))?.cast_into::<PyTuple>()?;
        let strides = object.call_method0(intern!(py, "stride"))?.cast_into::<PyTuple>()?;
        let pointer: usize = object.call_method0(intern!(py, "data_ptr"))?.extract()?;
        if !pointer.is_multiple_of(dtype.size()) {
            let size = dtype.size();
            let reason = format!(
                "is not aligned: it lies at {pointer:#x}, a multiple of {size} is accepted"
            );
            return refuse(Kind::Value, reason);
        }
        if numel(&shape)? > 0 && is_freed(object, pointer)? {
            let reason =
                "has no memory, or its memory has been freed; a tensor with memory is accepted";
            return refuse(Kind::Value, reason.to_owned());
        }
        Ok(Ok(Self { object: object.clone(), device, dtype, pointer, shape, strides }))
    }

    /// The address of a tensor that was read before.
    pub fn pointer_of(object: &Bound<'py, PyAny>) -> PyResult<usize> {
        object.call_method0(intern!(object.py(), "data_ptr"))?.extract()
    }

    /// Shape and strides as vectors.
    pub fn geometry(&self) -> PyResult<(Vec<usize>, Vec<isize>)> {
        Ok((self.shape.extract()?, self.strides.extract()?))
    }
}

/// Whether the memory behind a tensor that is not empty is gone (`untyped_storage().resize_(0)`, as
/// FSDP does). The address of a view into such a storage is its offset, not null.
pub fn is_freed(object: &Bound<'_, PyAny>, pointer: usize) -> PyResult<bool> {
    let py = object.py();
    if pointer == 0 {
        return Ok(true);
    }
    let offset: usize = object.call_method0(intern!(py, "storage_offset"))?.extract()?;
    if offset == 0 {
        return Ok(false);
    }
    let storage = object.call_method0(intern!(py, "untyped_storage"))?;
    Ok(storage.call_method0(intern!(py, "nbytes"))?.extract::<usize>()? == 0)
}

/// Whether a tensor is a lazily negated view, whose memory holds the opposite values.
pub fn is_negated(object: &Bound<'_, PyAny>) -> PyResult<bool> {
    object.call_method0(intern!(object.py(), "is_neg"))?.is_truthy()
}

fn numel(shape: &Bound<'_, PyTuple>) -> PyResult<usize> {
    Ok(shape.extract::<Vec<usize>>()?.into_iter().product())
}

/// Raises unless `param` can be optimized: `TypeError` for its layout or dtype, `ValueError` for
/// its device or for elements that share an address. `subject` begins the message.
#[pyfunction]
pub fn check_parameter(param: &Bound<'_, PyAny>, subject: &str) -> PyResult<()> {
    let tensor = Tensor::read(param)?.map_err(|refusal| refusal.to_python(subject))?;
    let (shape, strides) = tensor.geometry()?;
    check_distinct(&shape, &strides)
        .map_err(|error| PyValueError::new_err(format!("{subject} cannot be updated: {error}")))
}
