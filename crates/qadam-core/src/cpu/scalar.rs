//! The definition: one element after the other, by [`rule`](crate::rule) and
//! [`codec`](crate::codec).

use std::slice::{from_raw_parts, from_raw_parts_mut};

use crate::codec::block::{self, BLOCK};
use crate::codec::dynamic::Sign;
use crate::dtype::Float;
use crate::rule::{self, Coefficients, Element};
use crate::tensor::{Moments8, Moments32, RawCoded};

/// The moments of one element.
struct Moments<'a> {
    m: &'a mut f32,
    v: &'a mut f32,
    max_v: Option<&'a mut f32>,
}

/// Updates one element in place; false if its gradient was not finite.
fn update<P: Float, G: Float>(p: &mut P, g: G, moments: Moments<'_>, c: &Coefficients) -> bool {
    let Moments { m, v, max_v } = moments;
    let e = Element { p: p.widen(), m: *m, v: *v, max_v: max_v.as_deref().copied() };
    let (e, finite) = rule::update(e, g.widen(), c);
    *p = P::round(e.p);
    (*m, *v) = (e.m, e.v);
    if let (Some(max_v), Some(new)) = (max_v, e.max_v) {
        *max_v = new;
    }
    finite
}

/// 32-bit moments.
///
/// # Safety
/// As [`Kernel`](super::kernels) says, for elements of `P` and `G`.
pub(super) unsafe fn step32<P: Float, G: Float>(
    param: *mut u8,
    grad: *const u8,
    moments: Moments32,
    len: usize,
    c: &Coefficients,
) -> usize {
    // SAFETY: valid, aligned, exclusive and of these types, by this function's contract.
    let (param, grad, m, v) = unsafe {
        (
            from_raw_parts_mut(param.cast::<P>(), len),
            from_raw_parts(grad.cast::<G>(), len),
            from_raw_parts_mut(moments.m, len),
            from_raw_parts_mut(moments.v, len),
        )
    };
    // SAFETY: as above, where there is a third moment.
    let mut max_v = moments.max_v.map(|max_v| unsafe { from_raw_parts_mut(max_v, len) });
    let mut nonfinite = 0;
    for (i, (((p, &g), m), v)) in param.iter_mut().zip(grad).zip(m).zip(v).enumerate() {
        let max_v = max_v.as_deref_mut().map(|max_v| &mut max_v[i]);
        nonfinite += usize::from(!update(p, g, Moments { m, v, max_v }, c));
    }
    nonfinite
}

/// One moment of a block: where its codes are, and its values while the block is updated.
struct Moment<'a> {
    code: &'a mut [u8],
    scale: &'a mut f32,
    sign: Sign,
    values: [f32; BLOCK],
}

impl Moment<'_> {
    /// Decodes the moment of the `len` elements from `start` on.
    ///
    /// # Safety
    /// The codes of these elements, and the scale of the block that they are, are valid, aligned
    /// and not used by anybody else while this lives.
    unsafe fn decode(coded: RawCoded, sign: Sign, start: usize, len: usize) -> Self {
        // SAFETY: this function's contract.
        let (code, scale) = unsafe {
            let RawCoded { code, scale } = coded.skip(start);
            (from_raw_parts_mut(code, len), &mut *scale)
        };
        let old = block::usable_scale(*scale);
        let mut values = [0.0; BLOCK];
        for (value, &code) in values.iter_mut().zip(code.iter()) {
            *value = block::decode(code, old, sign);
        }
        Self { code, scale, sign, values }
    }

    /// Encodes the values; with `keep`, the scale does not fall.
    fn encode(self, keep: bool) {
        let least = if keep { block::usable_scale(*self.scale) } else { 0.0 };
        let values = &self.values[..self.code.len()];
        *self.scale = block::encode_block(values, self.sign, least, self.code);
    }
}

/// 8-bit moments. A block without a single finite gradient keeps its codes and scales as they are;
/// otherwise every element of the block is encoded anew for its new scale. Where some elements are
/// skipped, the scale does not fall, so that theirs stay what they were.
///
/// The update divides by the largest second moment as it is before it is encoded. Its scale is among
/// the values that it decodes to, so it never falls; and while the scale stays, a value that is not
/// exceeded keeps its code. What is stored can therefore fall only where the scale grows, and then by
/// the encoding's rounding: half the distance between neighbouring codes.
///
/// # Safety
/// As [`Kernel`](super::kernels) says, for elements of `P` and `G`.
pub(super) unsafe fn step8<P: Float, G: Float>(
    param: *mut u8,
    grad: *const u8,
    moments: Moments8,
    len: usize,
    c: &Coefficients,
) -> usize {
    // SAFETY: valid, aligned, exclusive and of these types, by this function's contract.
    let (param, grad) = unsafe {
        (from_raw_parts_mut(param.cast::<P>(), len), from_raw_parts(grad.cast::<G>(), len))
    };
    let mut nonfinite = 0;
    for (block, (p, g)) in param.chunks_mut(BLOCK).zip(grad.chunks(BLOCK)).enumerate() {
        let decode = |coded, sign| {
            // SAFETY: the elements of this block, whose moments nobody else has by this function's
            // contract; each moment is decoded once.
            unsafe { Moment::decode(coded, sign, block * BLOCK, p.len()) }
        };
        let mut m = decode(moments.m, Sign::Signed);
        let mut v = decode(moments.v, Sign::Unsigned);
        let mut max_v = moments.max_v.map(|max_v| decode(max_v, Sign::Unsigned));
        let mut skipped = 0;
        for (i, (p, &g)) in p.iter_mut().zip(g).enumerate() {
            let max_v = max_v.as_mut().map(|max_v| &mut max_v.values[i]);
            let moments = Moments { m: &mut m.values[i], v: &mut v.values[i], max_v };
            skipped += usize::from(!update(p, g, moments, c));
        }
        nonfinite += skipped;
        if skipped < p.len() || c.propagate {
            let keep = skipped > 0 && !c.propagate;
            for moment in [m, v].into_iter().chain(max_v) {
                moment.encode(keep);
            }
        }
    }
    nonfinite
}

/// How many effective gradients are not finite.
///
/// # Safety
/// As [`Kernel`](super::kernels) says, for elements of `P` and `G`, which are only read.
pub(super) unsafe fn count_nonfinite<P: Float, G: Float>(
    param: *const u8,
    grad: *const u8,
    len: usize,
    c: &Coefficients,
) -> usize {
    // SAFETY: valid, aligned and of these types, by this function's contract.
    let (param, grad) =
        unsafe { (from_raw_parts(param.cast::<P>(), len), from_raw_parts(grad.cast::<G>(), len)) };
    let finite = |(p, g): (&P, &G)| rule::effective_gradient(p.widen(), g.widen(), c).is_finite();
    len - param.iter().zip(grad).filter(|&pair| finite(pair)).count()
}
