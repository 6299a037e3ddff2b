//! The codec for Python: state dicts of another width are converted with these.

use pyo3::exceptions::{PyTypeError, PyValueError};
use pyo3::prelude::*;
use pyo3::{PyErr, intern};
use qadam_core::codec::block::{self, BLOCK};
use qadam_core::codec::dynamic::{self, Sign};

use crate::tensor::{is_freed, is_negated};

const fn sign(signed: bool) -> Sign {
    if signed { Sign::Signed } else { Sign::Unsigned }
}

/// The 256 values of the dynamic map, ascending: index `code` holds the value of `code`.
#[pyfunction]
pub fn dynamic_map(signed: bool) -> Vec<f32> {
    (0..=255).map(|code| dynamic::decode(code, sign(signed))).collect()
}

/// Address of a contiguous one-dimensional CPU tensor of `len` elements of `dtype`.
fn vector(
    name: &str,
    tensor: &Bound<'_, PyAny>,
    dtype: &str,
    len: Option<usize>,
) -> PyResult<(usize, usize)> {
    let py = tensor.py();
    let wrong = |what: String| -> PyErr {
        PyTypeError::new_err(format!(
            "{name} {what}; a contiguous CPU vector of {dtype} is accepted"
        ))
    };
    let Ok(got) = tensor.getattr(intern!(py, "dtype")) else {
        return Err(wrong(format!("is {}", tensor.get_type().name()?)));
    };
    if !got.is(py.import(intern!(py, "torch"))?.getattr(dtype)?) {
        return Err(wrong(format!("has dtype {got}")));
    }
    let shape = tensor.getattr(intern!(py, "shape"))?;
    let contiguous = tensor.call_method0(intern!(py, "is_contiguous"))?.is_truthy()?;
    let on_cpu = tensor.getattr(intern!(py, "is_cpu"))?.is_truthy()?;
    let Ok([got]) = shape.extract::<Vec<usize>>().map(<[usize; 1]>::try_from)? else {
        return Err(wrong(format!("has shape {shape}")));
    };
    if !contiguous || !on_cpu {
        return Err(wrong("is not contiguous or not on the CPU".to_owned()));
    }
    if let Some(expected) = len
        && got != expected
    {
        let text = format!("{name} has {got} elements, {expected} are needed");
        return Err(PyValueError::new_err(text));
    }
    let pointer: usize = tensor.call_method0(intern!(py, "data_ptr"))?.extract()?;
    let size: usize = tensor.call_method0(intern!(py, "element_size"))?.extract()?;
    if got > 0 && (is_freed(tensor, pointer)? || !pointer.is_multiple_of(size)) {
        return Err(wrong(format!("lies at {pointer:#x}, without memory or not aligned")));
    }
    if is_negated(tensor)? {
        return Err(wrong("is a lazily negated view".to_owned()));
    }
    Ok((pointer, got))
}

/// Raises `ValueError` where one tensor's bytes are another's too.
fn apart(a: usize, a_bytes: usize, b: usize, b_bytes: usize) -> PyResult<()> {
    if a < b + b_bytes && b < a + a_bytes {
        let text = "values, codes and scales share memory; each must have its own";
        return Err(PyValueError::new_err(text));
    }
    Ok(())
}

/// A slice over memory that torch owns. An empty tensor has no address.
///
/// # Safety
/// `pointer` comes from [`vector`] for a tensor of `T`, and nobody writes it for the life of the
/// slice.
unsafe fn slice<'a, T>(pointer: usize, len: usize) -> &'a [T] {
    if len == 0 {
        return &[];
    }
    // SAFETY: `vector` found the address aligned and its memory there; torch's are initialised.
    unsafe { std::slice::from_raw_parts(pointer as *const T, len) }
}

/// As [`slice`], to write.
///
/// # Safety
/// As [`slice`], and nobody else reads it either.
unsafe fn slice_mut<'a, T>(pointer: usize, len: usize) -> &'a mut [T] {
    if len == 0 {
        return &mut [];
    }
    // SAFETY: as in `slice`; exclusive by contract.
    unsafe { std::slice::from_raw_parts_mut(pointer as *mut T, len) }
}

/// Encodes `values` (float32, n) into `codes` (uint8, n) and `scales` (float32, one for each 256
/// elements). With `signed=False` a positive value never takes the code of zero.
#[pyfunction]
pub fn encode_blocks(
    values: &Bound<'_, PyAny>,
    codes: &Bound<'_, PyAny>,
    scales: &Bound<'_, PyAny>,
    signed: bool,
) -> PyResult<()> {
    let (values, n) = vector("values", values, "float32", None)?;
    let (codes, _) = vector("codes", codes, "uint8", Some(n))?;
    let (scales, blocks) = vector("scales", scales, "float32", Some(n.div_ceil(BLOCK)))?;
    apart(values, 4 * n, codes, n)?;
    apart(values, 4 * n, scales, 4 * blocks)?;
    apart(codes, n, scales, 4 * blocks)?;
    // SAFETY: `vector` checked types and lengths, `apart` that the tensors do not overlap; the GIL
    // is held.
    unsafe {
        let (codes, scales) = (slice_mut(codes, n), slice_mut(scales, blocks));
        block::encode_blocks(slice(values, n), sign(signed), codes, scales);
    }
    Ok(())
}

/// Encodes `values` (float32, n) into `codes` (uint8, n) with one scale for all of them, which goes into
/// `scales` (float32, one element, or none where n is 0). Codes as in [`encode_blocks`].
#[pyfunction]
pub fn encode_tensor(
    values: &Bound<'_, PyAny>,
    codes: &Bound<'_, PyAny>,
    scales: &Bound<'_, PyAny>,
    signed: bool,
) -> PyResult<()> {
    let (values, n) = vector("values", values, "float32", None)?;
    let (codes, _) = vector("codes", codes, "uint8", Some(n))?;
    let (scales, count) = vector("scales", scales, "float32", Some(n.min(1)))?;
    apart(values, 4 * n, codes, n)?;
    apart(values, 4 * n, scales, 4 * count)?;
    apart(codes, n, scales, 4 * count)?;
    // SAFETY: as in `encode_blocks`.
    unsafe {
        let (codes, scales) = (slice_mut(codes, n), slice_mut(scales, count));
        let scale = block::encode_tensor(slice(values, n), sign(signed), codes);
        scales.fill(scale);
    }
    Ok(())
}

/// Decodes `codes` (uint8, n) with `scales` (float32, one for each 256 elements) into `values`
/// (float32, n).
#[pyfunction]
pub fn decode_blocks(
    codes: &Bound<'_, PyAny>,
    scales: &Bound<'_, PyAny>,
    values: &Bound<'_, PyAny>,
    signed: bool,
) -> PyResult<()> {
    let (codes, n) = vector("codes", codes, "uint8", None)?;
    let (scales, blocks) = vector("scales", scales, "float32", Some(n.div_ceil(BLOCK)))?;
    let (values, _) = vector("values", values, "float32", Some(n))?;
    apart(values, 4 * n, codes, n)?;
    apart(values, 4 * n, scales, 4 * blocks)?;
    // SAFETY: as in `encode_blocks`.
    unsafe {
        block::decode_blocks(
            slice(codes, n),
            slice(scales, blocks),
            sign(signed),
            slice_mut(values, n),
        );
    }
    Ok(())
}
