//! The codec for Python: state dicts of another width are converted with these.

use pyo3::exceptions::{PyTypeError, PyValueError};
use pyo3::prelude::*;
use pyo3::{PyErr, intern};
use qadam_core::codec::block::{self, BLOCK};
use qadam_core::codec::dynamic::{self, Sign};
use qadam_core::codec::{Code, Moment, Scale, Scales, ratio};

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

/// Addresses and lengths of vectors of two or three moments, as long as `len` says of each.
fn moments(
    name: &str,
    tensors: &[Bound<'_, PyAny>],
    dtype: &str,
    len: impl Fn(Moment) -> Option<usize>,
) -> PyResult<Vec<(usize, usize)>> {
    if !(2..=3).contains(&tensors.len()) {
        let text = format!("{name} has {} tensors; those of 2 or 3 moments are", tensors.len());
        return Err(PyValueError::new_err(format!("{text} accepted")));
    }
    let each = tensors.iter().zip(Moment::ALL);
    each.map(|(tensor, moment)| vector(name, tensor, dtype, len(moment))).collect()
}

/// Raises `ValueError` where one of these shares memory with an earlier one, unless both are `read`.
fn all_apart(vectors: &[(usize, usize)], read: usize) -> PyResult<()> {
    for (i, &(a, a_bytes)) in vectors.iter().enumerate().skip(read) {
        for &(b, b_bytes) in &vectors[..i] {
            apart(a, a_bytes, b, b_bytes)?;
        }
    }
    Ok(())
}

/// The tensors of a call, checked.
struct RatioTensors {
    values: Vec<(usize, usize)>,
    codes: Vec<(usize, usize)>,
    scales: Vec<(usize, usize)>,
}

impl RatioTensors {
    fn new(
        values: &[Bound<'_, PyAny>],
        codes: &[Bound<'_, PyAny>],
        scales: &[Bound<'_, PyAny>],
        block_wise: bool,
        reads_values: bool,
    ) -> PyResult<Self> {
        if values.len() != codes.len() || values.len() != scales.len() {
            let (v, c, s) = (values.len(), codes.len(), scales.len());
            let text = format!("values, codes and scales are of {v}, {c} and {s} moments");
            return Err(PyValueError::new_err(format!("{text}; as many of each are accepted")));
        }
        let first = values.first().map(|first| vector("values", first, "float32", None));
        let n = first.transpose()?.map_or(0, |(_, n)| n);
        let blocks = if block_wise { n.div_ceil(BLOCK) } else { n.min(1) };
        let tensors = Self {
            values: moments("values", values, "float32", |_| Some(n))?,
            codes: moments("codes", codes, "uint8", |_| Some(n))?,
            scales: moments("scales", scales, "float32", |moment| {
                Some(blocks * Code::Ratio.scales(moment))
            })?,
        };
        let of = [(&tensors.values, 4), (&tensors.codes, 1), (&tensors.scales, 4)];
        let bytes = |(vectors, size): (&Vec<(usize, usize)>, usize)| {
            vectors.iter().map(|&(at, len)| (at, len * size)).collect::<Vec<_>>()
        };
        let all: Vec<_> = of.into_iter().flat_map(bytes).collect();
        all_apart(&all, if reads_values { values.len() } else { 0 })?;
        Ok(tensors)
    }

    /// Where scale `index` of each moment is, and how many floats.
    fn scale(&self, index: usize) -> impl Iterator<Item = (usize, usize)> {
        self.scales.iter().zip(Moment::ALL).map(move |(&(at, _), moment)| {
            let width = Code::Ratio.scales(moment);
            (at + 4 * index * width, width)
        })
    }
}

/// Encodes `values`, the moments of the same elements (float32, n each: first, second and, with
/// AMSGrad, third), in the ratio code: into `codes` (uint8, n each) and `scales` (float32, for each 256
/// elements or, unless `block_wise`, for all: one of the first moment, two of each other). Roots take
/// the nearest code.
#[pyfunction]
#[expect(clippy::needless_pass_by_value, reason = "as PyO3 hands lists over")]
pub fn encode_ratio(
    values: Vec<Bound<'_, PyAny>>,
    codes: Vec<Bound<'_, PyAny>>,
    scales: Vec<Bound<'_, PyAny>>,
    block_wise: bool,
) -> PyResult<()> {
    let of = RatioTensors::new(&values, &codes, &scales, block_wise, true)?;
    let mut index = 0;
    let mut write = |found: Scales| {
        for ((at, width), scale) in of.scale(index).zip(found) {
            // SAFETY: within a vector of scales, apart from all others; the GIL is held.
            scale.write(unsafe { slice_mut(at, width) });
        }
        index += 1;
    };
    // SAFETY: `RatioTensors` checked types and lengths, and that the tensors do not overlap; the GIL is
    // held.
    unsafe {
        let v = |i: usize| of.values.get(i).map_or(&[][..], |&(at, n)| slice(at, n));
        let c = |i: usize| of.codes.get(i).map_or(&mut [][..], |&(at, n)| slice_mut(at, n));
        let (values, codes) = ([v(0), v(1), v(2)], [c(0), c(1), c(2)]);
        if block_wise {
            ratio::encode_blocks(values, codes, write);
        } else if !values[0].is_empty() {
            write(ratio::encode(values, codes));
        }
    }
    Ok(())
}

/// Decodes `codes` (uint8, n each) in the ratio code with `scales` for each 256 elements into `values`
/// (float32, n each): the other way round of [`encode_ratio`].
#[pyfunction]
#[expect(clippy::needless_pass_by_value, reason = "as PyO3 hands lists over")]
pub fn decode_ratio(
    codes: Vec<Bound<'_, PyAny>>,
    scales: Vec<Bound<'_, PyAny>>,
    values: Vec<Bound<'_, PyAny>>,
) -> PyResult<()> {
    let of = RatioTensors::new(&values, &codes, &scales, true, false)?;
    let n = of.values[0].1;
    for (index, start) in (0..n).step_by(BLOCK).enumerate() {
        let len = BLOCK.min(n - start);
        let mut found = Scales::default();
        // SAFETY: as in `encode_ratio`; elements `start..start + len` are within the vectors.
        unsafe {
            for ((at, width), scale) in of.scale(index).zip(&mut found) {
                *scale = Scale::read(slice(at, width));
            }
            let c = |i: usize| of.codes.get(i).map_or(&[][..], |&(at, _)| slice(at + start, len));
            let decoded = ratio::decode_block([c(0), c(1), c(2)], &found);
            for (moment, &(at, _)) in of.values.iter().enumerate() {
                let to: &mut [f32] = slice_mut(at + 4 * start, len);
                for (to, element) in to.iter_mut().zip(&decoded) {
                    *to = element[moment];
                }
            }
        }
    }
    Ok(())
}
