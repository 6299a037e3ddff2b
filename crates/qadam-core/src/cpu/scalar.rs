//! The definition: one element after the other, by [`rule`](crate::rule) and
//! [`codec`](crate::codec).

use std::slice::{from_raw_parts, from_raw_parts_mut};

use crate::codec::block::{self, BLOCK};
use crate::codec::dynamic::Sign;
use crate::dtype::Float;
use crate::rule::{self, Coefficients, Element};
use crate::tensor::{Moments8, Moments32};

/// Updates one element in place; false if its gradient was not finite.
fn update<P: Float, G: Float>(p: &mut P, g: G, m: &mut f32, v: &mut f32, c: &Coefficients) -> bool {
    let (e, finite) = rule::update(Element { p: p.widen(), m: *m, v: *v }, g.widen(), c);
    *p = P::round(e.p);
    (*m, *v) = (e.m, e.v);
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
    let mut nonfinite = 0;
    for (((p, &g), m), v) in param.iter_mut().zip(grad).zip(m).zip(v) {
        nonfinite += usize::from(!update(p, g, m, v, c));
    }
    nonfinite
}

/// 8-bit moments. A block without a single finite gradient keeps its codes and scales as they are;
/// otherwise every element of the block is encoded anew for its new scale. Where some elements are
/// skipped, the scale does not fall, so that theirs stay what they were.
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
    let (param, grad, m_codes, v_codes, m_scales, v_scales) = unsafe {
        (
            from_raw_parts_mut(param.cast::<P>(), len),
            from_raw_parts(grad.cast::<G>(), len),
            from_raw_parts_mut(moments.m_code, len),
            from_raw_parts_mut(moments.v_code, len),
            from_raw_parts_mut(moments.m_scale, len.div_ceil(BLOCK)),
            from_raw_parts_mut(moments.v_scale, len.div_ceil(BLOCK)),
        )
    };
    let (mut m, mut v) = ([0.0_f32; BLOCK], [0.0_f32; BLOCK]);
    let elements = param.chunks_mut(BLOCK).zip(grad.chunks(BLOCK));
    let codes = m_codes.chunks_mut(BLOCK).zip(v_codes.chunks_mut(BLOCK));
    let scales = m_scales.iter_mut().zip(v_scales);
    let mut nonfinite = 0;
    for (((p, g), (m_code, v_code)), (m_scale, v_scale)) in elements.zip(codes).zip(scales) {
        let mut skipped = 0;
        let (m_old, v_old) = (block::usable_scale(*m_scale), block::usable_scale(*v_scale));
        for i in 0..p.len() {
            m[i] = block::decode(m_code[i], m_old, Sign::Signed);
            v[i] = block::decode(v_code[i], v_old, Sign::Unsigned);
            skipped += usize::from(!update(&mut p[i], g[i], &mut m[i], &mut v[i], c));
        }
        nonfinite += skipped;
        if skipped < p.len() || c.propagate {
            let keep = skipped > 0 && !c.propagate;
            let (m_least, v_least) = if keep { (m_old, v_old) } else { (0.0, 0.0) };
            *m_scale = block::encode_block(&m[..p.len()], Sign::Signed, m_least, m_code);
            *v_scale = block::encode_block(&v[..p.len()], Sign::Unsigned, v_least, v_code);
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
