//! The definition: one element after the other, by [`rule`](crate::rule) and
//! [`codec`](crate::codec).

use std::slice::{from_raw_parts, from_raw_parts_mut};

use super::kernels::Coded8;
use super::measure::Gauge;
use crate::codec::block::{self, BLOCK};
use crate::codec::dynamic::Sign;
use crate::dtype::Float;
use crate::norm::LANES;
use crate::rule::{self, Coefficients, Element, Outcome};
use crate::tensor::{Moments8, Moments32, RawCoded};

/// The moments of one element.
struct Moments<'a> {
    m: &'a mut f32,
    v: &'a mut f32,
    max_v: Option<&'a mut f32>,
}

/// Updates the moments of one element in place; also returns the new parameter.
fn update(p: f32, g: f32, moments: Moments<'_>, c: &Coefficients) -> (f32, Outcome) {
    let Moments { m, v, max_v } = moments;
    let e = Element { p, m: *m, v: *v, max_v: max_v.as_deref().copied() };
    let (e, outcome) = rule::update(e, g, c);
    (*m, *v) = (e.m, e.v);
    if let (Some(max_v), Some(new)) = (max_v, e.max_v) {
        *max_v = new;
    }
    (e.p, outcome)
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
        let (new, outcome) = update(p.widen(), g.widen(), Moments { m, v, max_v }, c);
        *p = P::round(new);
        nonfinite += usize::from(!outcome.finite);
    }
    nonfinite
}

/// One moment of a block: where its codes are, and its values while the block is updated.
struct Moment {
    coded: RawCoded,
    sign: Sign,
    len: usize,
    values: [f32; BLOCK],
}

impl Moment {
    /// Decodes the first `len` elements of the moment.
    ///
    /// # Safety
    /// As long as this lives, so many codes and their scale are valid and aligned, and nobody else
    /// writes them.
    unsafe fn decode(coded: RawCoded, sign: Sign, len: usize) -> Self {
        // SAFETY: this function's contract.
        let (bytes, scale) = unsafe { (from_raw_parts(coded.code, len), *coded.scale) };
        let scale = block::usable_scale(scale);
        let mut values = [0.0; BLOCK];
        for (value, &code) in values.iter_mut().zip(bytes) {
            *value = block::decode(code, scale, sign);
        }
        Self { coded, sign, len, values }
    }

    fn values(&self) -> &[f32] {
        &self.values[..self.len]
    }

    /// Encodes the values; with `keep`, the scale does not fall.
    ///
    /// # Safety
    /// Nobody else uses the block's codes and scale.
    unsafe fn encode(self, keep: bool) {
        // SAFETY: valid by the contract of `decode`, exclusive by this one's.
        let (codes, scale) =
            unsafe { (from_raw_parts_mut(self.coded.code, self.len), &mut *self.coded.scale) };
        let least = if keep { block::usable_scale(*scale) } else { 0.0 };
        *scale = block::encode_block(self.values(), self.sign, least, codes);
    }

    /// Encodes the values for a scale that somebody else will write.
    ///
    /// # Safety
    /// Nobody else uses the block's codes.
    unsafe fn encode_scaled(self, scale: f32) {
        // SAFETY: as in `encode`.
        let codes = unsafe { from_raw_parts_mut(self.coded.code, self.len) };
        block::encode_scaled(self.values(), self.sign, scale, codes);
    }
}

/// The moments of a block.
struct Block {
    m: Moment,
    v: Moment,
    max_v: Option<Moment>,
}

impl Block {
    /// Decodes the moments of the first `len` elements.
    ///
    /// # Safety
    /// As [`Moment::decode`], for each moment.
    unsafe fn decode(moments: Moments8, len: usize) -> Self {
        // SAFETY: this function's contract.
        unsafe {
            let third = |max_v| Moment::decode(max_v, Sign::Unsigned, len);
            Self {
                m: Moment::decode(moments.m, Sign::Signed, len),
                v: Moment::decode(moments.v, Sign::Unsigned, len),
                max_v: moments.max_v.map(third),
            }
        }
    }

    fn element(&mut self, i: usize) -> Moments<'_> {
        let max_v = self.max_v.as_mut().map(|max_v| &mut max_v.values[i]);
        Moments { m: &mut self.m.values[i], v: &mut self.v.values[i], max_v }
    }

    /// The two or three moments.
    fn each(self) -> impl Iterator<Item = Moment> {
        [self.m, self.v].into_iter().chain(self.max_v)
    }
}

/// 8-bit moments. A block without a single element that moves keeps its codes and scales as they
/// are; otherwise every element of the block is encoded anew for its new scale. Where some elements
/// are kept, the scale does not fall, so that theirs stay what they were. Where the tensor has one
/// scale, every block is encoded for the new one, which comes with the moments.
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
    Coded8 { moments, new_scales }: Coded8,
    len: usize,
    c: &Coefficients,
) -> usize {
    // SAFETY: valid, aligned, exclusive and of these types, by this function's contract.
    let (param, grad) = unsafe {
        (from_raw_parts_mut(param.cast::<P>(), len), from_raw_parts(grad.cast::<G>(), len))
    };
    let mut nonfinite = 0;
    for (index, (p, g)) in param.chunks_mut(BLOCK).zip(grad.chunks(BLOCK)).enumerate() {
        // SAFETY: the elements of this block, whose moments nobody else writes by this function's
        // contract.
        let mut block = unsafe { Block::decode(moments.skip(index * BLOCK), p.len()) };
        let mut kept = 0;
        for (i, (p, &g)) in p.iter_mut().zip(g).enumerate() {
            let (new, outcome) = update(p.widen(), g.widen(), block.element(i), c);
            *p = P::round(new);
            nonfinite += usize::from(!outcome.finite);
            kept += usize::from(outcome.kept);
        }
        // SAFETY: this block's codes, and its scales where it has its own, are this call's.
        unsafe {
            if let Some(scales) = new_scales {
                block.each().zip(scales).for_each(|(moment, scale)| moment.encode_scaled(scale));
            } else if kept < p.len() {
                block.each().for_each(|moment| moment.encode(kept > 0));
            }
        }
    }
    nonfinite
}

/// Gauges what a step with 32-bit moments would do.
///
/// # Safety
/// As [`Kernel`](super::kernels) says, for elements of `P` and `G`, all of which are only read.
pub(super) unsafe fn gauge32<P: Float, G: Float>(
    param: *const u8,
    grad: *const u8,
    moments: Moments32,
    len: usize,
    c: &Coefficients,
    gauge: &mut Gauge,
) {
    // SAFETY: valid, aligned and of these types, by this function's contract.
    let (param, grad, m, v) = unsafe {
        (
            from_raw_parts(param.cast::<P>(), len),
            from_raw_parts(grad.cast::<G>(), len),
            from_raw_parts(moments.m, len),
            from_raw_parts(moments.v, len),
        )
    };
    // SAFETY: as above, where there is a third moment.
    let max_v = moments.max_v.map(|max_v| unsafe { from_raw_parts(max_v, len) });
    for start in (0..len).step_by(LANES) {
        let (mut params, mut updates) = ([0.0; LANES], [0.0; LANES]);
        for i in start..len.min(start + LANES) {
            let (mut m, mut v, mut max_v) = (m[i], v[i], max_v.map(|max_v| max_v[i]));
            let moments = Moments { m: &mut m, v: &mut v, max_v: max_v.as_mut() };
            let p = param[i].widen();
            let (_, outcome) = update(p, grad[i].widen(), moments, c);
            params[i - start] = p;
            if !outcome.kept {
                updates[i - start] = rule::direction(m, max_v.unwrap_or(v), c);
            }
        }
        gauge.params.add_squares(&params);
        gauge.updates.add_squares(&updates);
    }
}

/// Gauges what a step with 8-bit moments would do.
///
/// # Safety
/// As [`Kernel`](super::kernels) says, for elements of `P` and `G`, all of which are only read.
pub(super) unsafe fn gauge8<P: Float, G: Float>(
    param: *const u8,
    grad: *const u8,
    moments: Moments8,
    len: usize,
    c: &Coefficients,
    gauge: &mut Gauge,
) {
    // SAFETY: valid, aligned and of these types, by this function's contract.
    let (param, grad) =
        unsafe { (from_raw_parts(param.cast::<P>(), len), from_raw_parts(grad.cast::<G>(), len)) };
    for (index, (p, g)) in param.chunks(BLOCK).zip(grad.chunks(BLOCK)).enumerate() {
        // SAFETY: the elements of this block, which nobody writes by this function's contract.
        let mut block = unsafe { Block::decode(moments.skip(index * BLOCK), p.len()) };
        let (mut params, mut updates) = ([0.0; BLOCK], [0.0; BLOCK]);
        for (i, (p, g)) in p.iter().zip(g).enumerate() {
            params[i] = p.widen();
            let (_, outcome) = update(params[i], g.widen(), block.element(i), c);
            gauge.keeps |= outcome.kept;
            if !outcome.kept {
                let Moments { m, v, max_v } = block.element(i);
                updates[i] = rule::direction(*m, max_v.map_or(*v, |max_v| *max_v), c);
            }
        }
        for (largest, moment) in gauge.largest.iter_mut().zip(block.each()) {
            *largest = block::largest(moment.values(), *largest);
        }
        for (params, updates) in params.as_chunks().0.iter().zip(updates.as_chunks().0) {
            gauge.params.add_squares(params);
            gauge.updates.add_squares(updates);
        }
    }
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
    let finite = |(p, g): (&P, &G)| {
        let (p, g) = (p.widen(), g.widen());
        (c.skip_zeros && g == 0.0) || rule::effective_gradient(p, g, c).is_finite()
    };
    len - param.iter().zip(grad).filter(|&pair| finite(pair)).count()
}
