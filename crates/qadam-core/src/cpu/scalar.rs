//! The definition: one element after the other, by [`rule`](crate::rule) and
//! [`codec`](crate::codec).

use std::slice::{from_raw_parts, from_raw_parts_mut};

use super::kernels::Coded8;
use super::measure::Gauge;
use crate::codec::block::{self, BLOCK};
use crate::codec::dynamic::Sign;
use crate::codec::ratio::{self, Found};
use crate::codec::{Code, Scale, Scales};
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

/// The moments of a block, as values while the block is updated.
struct Block {
    coded: Moments8,
    len: usize,
    /// The scales that the codes had.
    scales: Scales,
    values: [[f32; BLOCK]; 3],
}

impl Block {
    /// Decodes the moments of the first `len` elements.
    ///
    /// # Safety
    /// As long as this lives, so many codes of each moment and their scales are valid and aligned, and
    /// nobody else writes them.
    unsafe fn decode(coded: Moments8, len: usize) -> Self {
        // SAFETY: this function's contract; a moment that is not there has no codes.
        let (bytes, scales) = unsafe {
            let of_moment = |of: RawCoded| from_raw_parts(of.code.cast_const(), len);
            let third = coded.max_v.map_or(&[][..], of_moment);
            ([of_moment(coded.m), of_moment(coded.v), third], coded.scales())
        };
        let mut values = [[0.0; BLOCK]; 3];
        match coded.code {
            Code::Dynamic => {
                let moments = bytes.into_iter().zip(SIGNS).zip(scales);
                for (values, ((of, sign), scale)) in values.iter_mut().zip(moments) {
                    let scale = block::usable_scale(scale.high);
                    for (value, &code) in values.iter_mut().zip(of) {
                        *value = block::decode(code, scale, sign);
                    }
                }
            }
            Code::Ratio => {
                for (i, element) in ratio::decode(bytes, &scales).enumerate() {
                    [values[0][i], values[1][i], values[2][i]] = element;
                }
            }
        }
        Self { coded, len, scales, values }
    }

    fn element(&mut self, i: usize) -> Moments<'_> {
        let [m, v, max_v] = self.values.each_mut().map(|values| &mut values[i]);
        Moments { m, v, max_v: self.coded.max_v.is_some().then_some(max_v) }
    }

    /// The values of each moment that is there.
    fn values(&self) -> [&[f32]; 3] {
        let [m, v, max_v] = self.values.each_ref().map(|values| &values[..self.len]);
        [m, v, if self.coded.max_v.is_some() { max_v } else { &[] }]
    }

    /// The codes of each moment that is there.
    ///
    /// # Safety
    /// Nobody else uses them, and these are the only ones for as long as they live.
    unsafe fn codes<'a>(&self) -> [&'a mut [u8]; 3] {
        // SAFETY: valid by the contract of `decode`, exclusive by this one's.
        let codes = |of: RawCoded| unsafe { from_raw_parts_mut(of.code, self.len) };
        [codes(self.coded.m), codes(self.coded.v), self.coded.max_v.map_or(&mut [], codes)]
    }

    /// Encodes the values in the dynamic code, for the scales that are told or for new ones; these do
    /// not fall where elements are kept.
    ///
    /// # Safety
    /// Nobody else uses the block's codes, nor its scales unless new ones are told.
    unsafe fn encode_dynamic(&self, keeps: bool, told: Option<&Scales>) {
        let mut scales = self.scales;
        // SAFETY: this function's contract.
        let codes = unsafe { self.codes() };
        let moments = codes.into_iter().zip(self.values()).zip(SIGNS);
        for (index, ((codes, values), sign)) in moments.enumerate() {
            let old = block::usable_scale(scales[index].high);
            let least = if keeps { old } else { 0.0 };
            scales[index].high = match told {
                Some(told) => told[index].high,
                None => block::largest(values, least),
            };
            block::encode_scaled(values, sign, scales[index].high, codes);
        }
        if told.is_none() {
            // SAFETY: this function's contract.
            unsafe { self.coded.set_scales(&scales) };
        }
    }

    /// Encodes the values in the ratio code, likewise; what rounding takes from first moments goes to
    /// the parameters. Elements that are kept keep their codes where the scales stay.
    ///
    /// # Safety
    /// As [`Block::encode_dynamic`].
    unsafe fn encode_ratio(
        &self,
        (kept, index): (&[bool], u64),
        told: Option<&Scales>,
        params: &mut [f32],
        c: &Coefficients,
    ) {
        let keeps = kept.contains(&true);
        let old = self.scales;
        // SAFETY: this function's contract.
        let codes = unsafe { self.codes() };
        let before = codes.each_ref().map(|codes| codes.to_vec());
        let [m, v, max_v] = self.values();
        let root = |v: &f32| if v.is_finite() { v.sqrt() } else { 0.0 };
        let (roots, largest): (Vec<f32>, Vec<f32>) =
            (v.iter().map(root).collect(), max_v.iter().map(root).collect());
        let mut scales = told.copied().unwrap_or_else(|| {
            let range = |roots: &[f32], old: Scale| {
                let (least, largest) = ratio::ends(roots);
                ratio::range(least, largest, keeps.then_some(old))
            };
            [old[0], range(&roots, old[1]), range(&largest, old[2])]
        });
        let key = ratio::key(index);
        let chance = |i: usize| ratio::noise(key, i as u32).wrapping_add(c.dither) >> 16;
        let found = Found { m, roots: &roots, largest: &largest };
        let [first, second, third] = codes;
        let divided = found.encode_roots(&scales, chance, [&mut *first, &mut *second, &mut *third]);
        if told.is_none() {
            let moving = divided.ratios.iter().zip(kept).filter(|(_, kept)| !**kept);
            let largest = moving.fold(0.0_f32, |largest, (ratio, _)| largest.max(ratio.abs()));
            scales[0].high = ratio::scale(largest, keeps.then_some(old[0].high));
        }
        divided.encode(scales[0].high, |i, lost, inverse| {
            if !kept[i] {
                params[i] = rule::carried(params[i], lost, inverse, c);
            }
        });
        let moments = 2 + usize::from(self.coded.max_v.is_some());
        if scales.iter().zip(&old).take(moments).all(|(new, old)| new.is(*old)) {
            for i in (0..self.len).filter(|&i| kept[i]) {
                (first[i], second[i]) = (before[0][i], before[1][i]);
                if let Some(code) = third.get_mut(i) {
                    *code = before[2][i];
                }
            }
        }
        if told.is_none() {
            // SAFETY: this function's contract.
            unsafe { self.coded.set_scales(&scales) };
        }
    }
}

/// The signs of the moments.
const SIGNS: [Sign; 3] = [Sign::Signed, Sign::Unsigned, Sign::Unsigned];

/// 8-bit moments. A block without a single element that moves keeps its codes and scales as they
/// are; otherwise every element of the block is encoded anew for its new scale. Where some elements
/// are kept, the scale does not fall, so that theirs stay what they were. Where the tensor has one
/// scale, every block is encoded for the new one, which comes with the moments.
///
/// The update divides by the largest second moment as it is before it is encoded. In the dynamic code,
/// its scale is among the values that it decodes to, so it never falls; and while the scale stays, a
/// value that is not exceeded keeps its code. What is stored can therefore fall only where the scale
/// grows, and then by the encoding's rounding: half the distance between neighbouring codes. In the
/// ratio code, every rounding may go either way, by less than one code.
///
/// # Safety
/// As [`Kernel`](super::kernels) says, for elements of `P` and `G`.
pub(super) unsafe fn step8<P: Float, G: Float>(
    param: *mut u8,
    grad: *const u8,
    coded: Coded8,
    len: usize,
    c: &Coefficients,
) -> usize {
    let (param, grad) = (param.cast::<P>(), grad.cast::<G>());
    let blocks = (0..len).step_by(BLOCK);
    let of_block = |start: usize| {
        let len = BLOCK.min(len - start);
        // SAFETY: the elements of this block, by this function's contract.
        unsafe { block8(param.add(start), grad.add(start), coded.skip(start), len, c) }
    };
    blocks.map(of_block).sum()
}

/// [`step8`] of one block.
///
/// # Safety
/// As [`step8`], for at most [`BLOCK`] elements.
pub(super) unsafe fn block8<P: Float, G: Float>(
    param: *mut P,
    grad: *const G,
    Coded8 { moments, start, told }: Coded8,
    len: usize,
    c: &Coefficients,
) -> usize {
    // SAFETY: valid, aligned and of these types, by this function's contract.
    let (param, grad) = unsafe { (from_raw_parts_mut(param, len), from_raw_parts(grad, len)) };
    // SAFETY: likewise; nobody else writes the moments.
    let mut block = unsafe { Block::decode(moments, len) };
    let (mut params, mut kept) = ([0.0; BLOCK], [false; BLOCK]);
    let (params, kept) = (&mut params[..len], &mut kept[..len]);
    let mut nonfinite = 0;
    for (i, (p, g)) in param.iter().zip(grad).enumerate() {
        let outcome;
        (params[i], outcome) = update(p.widen(), g.widen(), block.element(i), c);
        nonfinite += usize::from(!outcome.finite);
        kept[i] = outcome.kept;
    }
    if told.is_some() || kept.contains(&false) {
        let told = told.as_ref();
        // SAFETY: this block's codes, and its scales where it has its own, are this call's.
        unsafe {
            match moments.code {
                Code::Dynamic => block.encode_dynamic(kept.contains(&true), told),
                Code::Ratio => {
                    block.encode_ratio((kept, start / BLOCK as u64), told, params, c);
                }
            }
        }
    }
    for (p, &new) in param.iter_mut().zip(&*params) {
        *p = P::round(new);
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
        gauge.extend(block.coded.code, block.values());
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
