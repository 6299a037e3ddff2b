//! The vector kernels, written once over the operations of [`Lanes`].
//!
//! Each line mirrors one of [`rule`](crate::rule) or [`codec`](crate::codec); the tests compare the
//! two bit for bit. Every function here is inlined into a caller that enables the instruction set
//! (see [`avx2`](super::avx2), [`avx512`](super::avx512)): that, and the validity of the pointers, is
//! what the `unsafe` asks for.

use std::mem::MaybeUninit;

use half::{bf16, f16};

use crate::codec::BLOCK;
use crate::codec::block::Normalizer;
use crate::codec::dynamic::{self, Map, SIGNED, Sign, UNSIGNED};
use crate::dtype::Float;
use crate::rule::{Coefficients, GRADIENT_LIMIT};
use crate::tensor::{Moments8, Moments32};

/// `N` f32 lanes, with the i32 lanes and masks that go with them.
///
/// # Safety
/// Methods may be called only where the processor has the instruction set of the implementation.
/// Pointers must be valid for `N` elements; they need no more alignment than an element.
pub(super) unsafe trait Lanes: Copy {
    const N: usize;
    type F: Copy;
    type I: Copy;
    type M: Copy;

    unsafe fn splat(x: f32) -> Self::F;
    unsafe fn load(from: *const f32) -> Self::F;
    unsafe fn load_bf16(from: *const bf16) -> Self::F;
    unsafe fn load_f16(from: *const f16) -> Self::F;
    unsafe fn store(x: Self::F, to: *mut f32);
    unsafe fn store_bf16(x: Self::F, to: *mut bf16);
    unsafe fn store_f16(x: Self::F, to: *mut f16);

    unsafe fn add(a: Self::F, b: Self::F) -> Self::F;
    unsafe fn sub(a: Self::F, b: Self::F) -> Self::F;
    unsafe fn mul(a: Self::F, b: Self::F) -> Self::F;
    unsafe fn div(a: Self::F, b: Self::F) -> Self::F;
    unsafe fn sqrt(a: Self::F) -> Self::F;
    /// `a * b + c`, rounded once.
    unsafe fn fma(a: Self::F, b: Self::F, c: Self::F) -> Self::F;
    /// `-a * b + c`, rounded once.
    unsafe fn fnma(a: Self::F, b: Self::F, c: Self::F) -> Self::F;
    unsafe fn abs(a: Self::F) -> Self::F;
    unsafe fn neg(a: Self::F) -> Self::F;
    /// For numbers that are not NaN.
    unsafe fn min(a: Self::F, b: Self::F) -> Self::F;
    /// For numbers that are not NaN.
    unsafe fn max(a: Self::F, b: Self::F) -> Self::F;
    /// The largest lane, none of which is NaN.
    unsafe fn reduce_max(a: Self::F) -> f32;

    unsafe fn less(a: Self::F, b: Self::F) -> Self::M;
    unsafe fn is_finite(a: Self::F) -> Self::M;
    unsafe fn is_nan(a: Self::F) -> Self::M;
    /// `mask ? a : b`.
    unsafe fn select(mask: Self::M, a: Self::F, b: Self::F) -> Self::F;
    unsafe fn select_i(mask: Self::M, a: Self::I, b: Self::I) -> Self::I;
    /// How many lanes of the mask are set.
    unsafe fn count(mask: Self::M) -> usize;

    unsafe fn splat_i(x: i32) -> Self::I;
    unsafe fn add_i(a: Self::I, b: Self::I) -> Self::I;
    unsafe fn sub_i(a: Self::I, b: Self::I) -> Self::I;
    unsafe fn abs_i(a: Self::I) -> Self::I;
    unsafe fn min_i(a: Self::I, b: Self::I) -> Self::I;
    unsafe fn max_i(a: Self::I, b: Self::I) -> Self::I;
    unsafe fn shift_left(a: Self::I, by: Self::I) -> Self::I;
    /// Half of a non-negative number, rounded down.
    unsafe fn half_i(a: Self::I) -> Self::I;
    unsafe fn less_i(a: Self::I, b: Self::I) -> Self::M;
    /// Exact: the integers here are below 2^24.
    unsafe fn to_float(a: Self::I) -> Self::F;
    /// Toward zero; the numbers here are below 2^24.
    unsafe fn truncate(a: Self::F) -> Self::I;
    /// Exponent field of a positive number, less the bias.
    unsafe fn exponent(a: Self::F) -> Self::I;
    /// A positive number's power of two: its mantissa set to 1.
    unsafe fn power_of_two(a: Self::F) -> Self::F;
    /// `table[index]` for indices 0 to 8.
    unsafe fn lookup(table: &[f32; 16], index: Self::I) -> Self::F;
    /// How many of the ascending `thresholds` are at or below each lane.
    unsafe fn levels(x: Self::F, thresholds: &[f32; 8]) -> Self::I;
    /// `N` bytes, widened.
    unsafe fn load_codes(from: *const u8) -> Self::I;
    /// The low byte of each lane.
    unsafe fn store_codes(codes: Self::I, to: *mut u8);
}

/// Writes the methods of a [`Lanes`] implementation.
macro_rules! lanes {
    ($($(#[$doc:meta])* fn $name:ident($($arg:ident: $type:ty),*) $(-> $out:ty)? $body:block)*) => {
        $($(#[$doc])*
        #[inline(always)]
        unsafe fn $name($($arg: $type),*) $(-> $out)? {
            // SAFETY: the contract of `Lanes`: the instruction set is there, pointers are valid.
            unsafe { $body }
        })*
    };
}
pub(super) use lanes;

/// A type that [`Lanes`] can load and store.
pub(super) trait VectorFloat: Float {
    /// # Safety
    /// As [`Lanes`].
    unsafe fn load<L: Lanes>(from: *const Self) -> L::F;
    /// # Safety
    /// As [`Lanes`].
    unsafe fn store<L: Lanes>(x: L::F, to: *mut Self);
}

macro_rules! vector_float {
    ($type:ty, $load:ident, $store:ident) => {
        impl VectorFloat for $type {
            #[inline(always)]
            unsafe fn load<L: Lanes>(from: *const Self) -> L::F {
                // SAFETY: the same contract.
                unsafe { L::$load(from) }
            }
            #[inline(always)]
            unsafe fn store<L: Lanes>(x: L::F, to: *mut Self) {
                // SAFETY: the same contract.
                unsafe { L::$store(x, to) }
            }
        }
    };
}
vector_float!(f32, load, store);
vector_float!(bf16, load_bf16, store_bf16);
vector_float!(f16, load_f16, store_f16);

/// [`Coefficients`] in every lane.
#[derive(Clone, Copy)]
struct Splat<L: Lanes> {
    w1: L::F,
    w2: L::F,
    step: L::F,
    eps: L::F,
    l2: L::F,
    shrink: L::F,
    has_l2: bool,
    has_shrink: bool,
    propagate: bool,
}

impl<L: Lanes> Splat<L> {
    #[inline(always)]
    unsafe fn new(c: &Coefficients) -> Self {
        // SAFETY: the caller enables the instruction set.
        unsafe {
            Self {
                w1: L::splat(c.w1),
                w2: L::splat(c.w2),
                step: L::splat(c.step),
                eps: L::splat(c.eps),
                l2: L::splat(c.l2),
                shrink: L::splat(c.shrink),
                has_l2: c.l2 != 0.0,
                has_shrink: c.shrink != 0.0,
                propagate: c.propagate,
            }
        }
    }
}

/// Parameter and moments of `N` elements.
#[derive(Clone, Copy)]
struct Elements<L: Lanes> {
    p: L::F,
    m: L::F,
    v: L::F,
}

/// [`rule::update`](crate::rule::update).
#[inline(always)]
unsafe fn update<L: Lanes>(e: Elements<L>, g: L::F, c: &Splat<L>) -> (Elements<L>, L::M) {
    // SAFETY: the caller enables the instruction set.
    unsafe {
        let g = if c.has_l2 { L::fma(c.l2, e.p, g) } else { g };
        let finite = L::is_finite(g);
        let limit = L::splat(GRADIENT_LIMIT);
        let clamped = L::max(L::min(g, limit), L::splat(-GRADIENT_LIMIT));
        let g = if c.propagate { L::select(finite, clamped, g) } else { clamped };
        let m = L::fma(c.w1, g, L::fnma(c.w1, e.m, e.m));
        let v = L::fma(c.w2, L::mul(g, g), L::fnma(c.w2, e.v, e.v));
        let p = if c.has_shrink { L::fnma(c.shrink, e.p, e.p) } else { e.p };
        let p = L::fnma(c.step, L::div(m, L::add(L::sqrt(v), c.eps)), p);
        let new = Elements { p: canonical::<L>(p), m: canonical::<L>(m), v: canonical::<L>(v) };
        if c.propagate {
            return (new, finite);
        }
        let kept = Elements {
            p: L::select(finite, new.p, e.p),
            m: L::select(finite, new.m, e.m),
            v: L::select(finite, new.v, e.v),
        };
        (kept, finite)
    }
}

/// [`rule::canonical`](crate::rule::canonical).
#[inline(always)]
unsafe fn canonical<L: Lanes>(x: L::F) -> L::F {
    // SAFETY: the caller enables the instruction set.
    unsafe { L::select(L::is_nan(x), L::splat(f32::from_bits(0x7FC0_0000)), x) }
}

/// `N` elements at most, padded with zeros, for the end of a tensor.
struct Padded<T>([T; 16]);

impl<T: Copy + Default> Padded<T> {
    /// # Safety
    /// `from` is valid for `len` elements, at most 16.
    #[inline(always)]
    unsafe fn load(from: *const T, len: usize) -> Self {
        let mut padded = Self([T::default(); 16]);
        // SAFETY: `len` elements are valid at the source and fit the array.
        unsafe { from.copy_to_nonoverlapping(padded.0.as_mut_ptr(), len) };
        padded
    }

    /// # Safety
    /// `to` is valid for `len` elements, at most 16.
    #[inline(always)]
    unsafe fn store(&self, to: *mut T, len: usize) {
        // SAFETY: `len` elements are valid at the target and in the array.
        unsafe { self.0.as_ptr().copy_to_nonoverlapping(to, len) };
    }
}

/// 32-bit moments.
///
/// # Safety
/// As [`Kernel`](super::kernels) says, and the caller enables the instruction set of `L`.
#[inline(always)]
pub(super) unsafe fn step32<L: Lanes, P: VectorFloat, G: VectorFloat>(
    param: *mut u8,
    grad: *const u8,
    moments: Moments32,
    len: usize,
    c: &Coefficients,
) -> usize {
    let (param, grad) = (param.cast::<P>(), grad.cast::<G>());
    // SAFETY: whole vectors lie within `len` valid elements; the rest goes through padded copies.
    unsafe {
        let c = Splat::<L>::new(c);
        let vectors = len / L::N;
        let mut finite = 0;
        for i in 0..vectors {
            let at = i * L::N;
            let (p, g) = (param.add(at), grad.add(at));
            finite += vector32::<L, P, G>(p, g, moments.m.add(at), moments.v.add(at), &c);
        }
        let (at, rest) = (vectors * L::N, len % L::N);
        if rest > 0 {
            let mut p = Padded::load(param.add(at), rest);
            let g = Padded::load(grad.add(at), rest);
            let mut m = Padded::load(moments.m.add(at), rest);
            let mut v = Padded::load(moments.v.add(at), rest);
            let (p_at, g_at) = (p.0.as_mut_ptr(), g.0.as_ptr());
            finite += vector32::<L, P, G>(p_at, g_at, m.0.as_mut_ptr(), v.0.as_mut_ptr(), &c);
            finite -= L::N - rest; // the padding's zeros are finite
            p.store(param.add(at), rest);
            m.store(moments.m.add(at), rest);
            v.store(moments.v.add(at), rest);
        }
        len - finite
    }
}

/// Updates `N` elements and returns how many gradients were finite.
///
/// # Safety
/// The pointers are valid for `N` elements; the caller enables the instruction set.
#[inline(always)]
unsafe fn vector32<L: Lanes, P: VectorFloat, G: VectorFloat>(
    p: *mut P,
    g: *const G,
    m: *mut f32,
    v: *mut f32,
    c: &Splat<L>,
) -> usize {
    // SAFETY: this function's contract.
    unsafe {
        let e = Elements { p: P::load::<L>(p), m: L::load(m), v: L::load(v) };
        let (e, finite) = update::<L>(e, G::load::<L>(g), c);
        P::store::<L>(e.p, p);
        L::store(e.m, m);
        L::store(e.v, v);
        L::count(finite)
    }
}

/// 8-bit moments.
///
/// # Safety
/// As [`Kernel`](super::kernels) says, and the caller enables the instruction set of `L`.
#[inline(always)]
pub(super) unsafe fn step8<L: Lanes, P: VectorFloat, G: VectorFloat>(
    param: *mut u8,
    grad: *const u8,
    moments: Moments8,
    len: usize,
    c: &Coefficients,
) -> usize {
    let (param, grad) = (param.cast::<P>(), grad.cast::<G>());
    // SAFETY: whole blocks lie within `len` valid elements, a scale each; the tail's whole vectors
    // do too, and what remains of it goes through padded copies.
    unsafe {
        let c = Splat::<L>::new(c);
        let mut nonfinite = 0;
        for start in (0..len).step_by(BLOCK) {
            let block = Block {
                p: param.add(start),
                g: grad.add(start),
                moments: moments.skip(start),
                len: BLOCK.min(len - start),
            };
            nonfinite += block8::<L, P, G>(&block, &c);
        }
        nonfinite
    }
}

/// One block of at most [`BLOCK`] elements.
struct Block<P, G> {
    p: *mut P,
    g: *const G,
    moments: Moments8,
    len: usize,
}

/// The new moments of a block, between the pass that finds the scales and the pass that encodes.
#[repr(align(64))]
struct Values(MaybeUninit<[f32; BLOCK]>);

/// Updates a block and returns how many gradients were not finite.
///
/// # Safety
/// The block's pointers are valid; the caller enables the instruction set.
#[inline(always)]
unsafe fn block8<L: Lanes, P: VectorFloat, G: VectorFloat>(
    block: &Block<P, G>,
    c: &Splat<L>,
) -> usize {
    let Moments8 { m_code, m_scale, v_code, v_scale } = block.moments;
    let (mut new_m, mut new_v) = (Values(MaybeUninit::uninit()), Values(MaybeUninit::uninit()));
    let (new_m, new_v) = (new_m.0.as_mut_ptr().cast::<f32>(), new_v.0.as_mut_ptr().cast::<f32>());
    let (vectors, rest) = (block.len / L::N, block.len % L::N);
    let tail = vectors * L::N;
    // SAFETY: vector `i` starts at element `i * N` of a block that holds it whole, the last one in
    // the padded copies; `new_m` and `new_v` hold a whole block, of which the second pass reads
    // what the first wrote.
    unsafe {
        let mut pass = FirstPass::<L> {
            m_scale: L::splat(*m_scale),
            v_scale: L::splat(*v_scale),
            m_max: L::splat(0.0),
            v_max: L::splat(0.0),
            finite: 0,
        };
        for i in 0..vectors {
            let at = i * L::N;
            let codes = (m_code.add(at).cast_const(), v_code.add(at).cast_const());
            let values = (new_m.add(at), new_v.add(at));
            pass.vector::<P, G>(block.p.add(at), block.g.add(at), codes, values, c);
        }
        if rest > 0 {
            let mut p = Padded::load(block.p.add(tail), rest);
            let g = Padded::load(block.g.add(tail), rest);
            let mut m = [dynamic::zero_code(Sign::Signed); 16];
            let mut v = [dynamic::zero_code(Sign::Unsigned); 16];
            m_code.add(tail).copy_to_nonoverlapping(m.as_mut_ptr(), rest);
            v_code.add(tail).copy_to_nonoverlapping(v.as_mut_ptr(), rest);
            let values = (new_m.add(tail), new_v.add(tail));
            let (p_at, g_at) = (p.0.as_mut_ptr(), g.0.as_ptr());
            pass.vector::<P, G>(p_at, g_at, (m.as_ptr(), v.as_ptr()), values, c);
            pass.finite -= L::N - rest; // the padding's zeros are finite
            p.store(block.p.add(tail), rest);
        }
        if pass.finite == 0 && !c.propagate {
            return block.len;
        }
        let (m_max, v_max) = (L::reduce_max(pass.m_max), L::reduce_max(pass.v_max));
        (*m_scale, *v_scale) = (m_max, v_max);
        let m_encoder = Encoder::<L>::new(m_max);
        let v_encoder = Encoder::<L>::new(v_max);
        for i in 0..vectors {
            let at = i * L::N;
            L::store_codes(m_encoder.signed(L::load(new_m.add(at))), m_code.add(at));
            L::store_codes(v_encoder.unsigned(L::load(new_v.add(at))), v_code.add(at));
        }
        if rest > 0 {
            let mut codes = [0_u8; 16];
            L::store_codes(m_encoder.signed(L::load(new_m.add(tail))), codes.as_mut_ptr());
            codes.as_ptr().copy_to_nonoverlapping(m_code.add(tail), rest);
            L::store_codes(v_encoder.unsigned(L::load(new_v.add(tail))), codes.as_mut_ptr());
            codes.as_ptr().copy_to_nonoverlapping(v_code.add(tail), rest);
        }
        block.len - pass.finite
    }
}

/// The pass over a block that updates it and finds the new scales.
struct FirstPass<L: Lanes> {
    m_scale: L::F,
    v_scale: L::F,
    m_max: L::F,
    v_max: L::F,
    finite: usize,
}

impl<L: Lanes> FirstPass<L> {
    /// # Safety
    /// The pointers are valid for `N` elements; the caller enables the instruction set.
    #[inline(always)]
    unsafe fn vector<P: VectorFloat, G: VectorFloat>(
        &mut self,
        p: *mut P,
        g: *const G,
        (m_code, v_code): (*const u8, *const u8),
        (new_m, new_v): (*mut f32, *mut f32),
        c: &Splat<L>,
    ) {
        // SAFETY: this function's contract.
        unsafe {
            let e = Elements {
                p: P::load::<L>(p),
                m: L::mul(decode_signed::<L>(L::load_codes(m_code)), self.m_scale),
                v: L::mul(decode_unsigned::<L>(L::load_codes(v_code)), self.v_scale),
            };
            let (e, finite) = update::<L>(e, G::load::<L>(g), c);
            P::store::<L>(e.p, p);
            self.finite += L::count(finite);
            let m = zero_unless_finite::<L>(e.m);
            let v = zero_unless_finite::<L>(e.v);
            self.m_max = L::max(self.m_max, L::abs(m));
            self.v_max = L::max(self.v_max, L::abs(v));
            L::store(m, new_m);
            L::store(v, new_v);
        }
    }
}

#[inline(always)]
unsafe fn zero_unless_finite<L: Lanes>(x: L::F) -> L::F {
    // SAFETY: the caller enables the instruction set.
    unsafe { L::select(L::is_finite(x), x, L::splat(0.0)) }
}

/// `Map::value` for `odd = 2k + 1`.
#[inline(always)]
unsafe fn decode<L: Lanes>(odd: L::I, map: &Map) -> L::F {
    // SAFETY: the caller enables the instruction set; levels are 0 to 8.
    unsafe {
        let odd = L::to_float(odd);
        let level = L::sub_i(L::exponent(odd), L::splat_i(1 + map.first_exponent));
        let cell = L::sub(odd, L::power_of_two(odd));
        L::fma(cell, L::lookup(&map.slope, level), L::lookup(&map.offset, level))
    }
}

/// [`dynamic::decode`] of signed codes.
#[inline(always)]
unsafe fn decode_signed<L: Lanes>(code: L::I) -> L::F {
    // SAFETY: the caller enables the instruction set.
    unsafe {
        let k = L::sub_i(code, L::splat_i(127));
        let magnitude = L::abs_i(k);
        let odd = L::add_i(L::add_i(magnitude, magnitude), L::splat_i(1));
        let value = decode::<L>(odd, &SIGNED);
        L::select(L::less_i(k, L::splat_i(0)), L::neg(value), value)
    }
}

/// [`dynamic::decode`] of unsigned codes.
#[inline(always)]
unsafe fn decode_unsigned<L: Lanes>(code: L::I) -> L::F {
    // SAFETY: the caller enables the instruction set.
    unsafe {
        let odd = L::add_i(L::add_i(code, code), L::splat_i(3));
        decode::<L>(odd, &UNSIGNED)
    }
}

/// [`encode_block`](crate::codec::block::encode_block) for finite values whose scale is known.
struct Encoder<L: Lanes> {
    power: L::F,
    reciprocal: L::F,
}

impl<L: Lanes> Encoder<L> {
    #[inline(always)]
    unsafe fn new(scale: f32) -> Self {
        let Normalizer { power, reciprocal } = Normalizer::new(scale);
        // SAFETY: the caller enables the instruction set.
        unsafe { Self { power: L::splat(power), reciprocal: L::splat(reciprocal) } }
    }

    #[inline(always)]
    unsafe fn normalize(&self, value: L::F) -> L::F {
        // SAFETY: the caller enables the instruction set.
        unsafe { L::mul(L::mul(value, self.power), self.reciprocal) }
    }

    #[inline(always)]
    unsafe fn signed(&self, value: L::F) -> L::I {
        // SAFETY: the caller enables the instruction set.
        unsafe {
            let x = self.normalize(value);
            let k = nearest::<L>(L::abs(x), &SIGNED);
            let zero = L::splat_i(127);
            let negative = L::sub_i(zero, L::min_i(k, zero));
            L::select_i(L::less(x, L::splat(0.0)), negative, L::add_i(zero, k))
        }
    }

    #[inline(always)]
    unsafe fn unsigned(&self, value: L::F) -> L::I {
        // SAFETY: the caller enables the instruction set.
        unsafe {
            let k = nearest::<L>(self.normalize(value), &UNSIGNED);
            let positive = L::less(L::splat(0.0), value);
            let smallest = L::select_i(positive, L::splat_i(2), L::splat_i(1));
            L::sub_i(L::max_i(k, smallest), L::splat_i(1))
        }
    }
}

/// `Map::nearest`.
#[inline(always)]
unsafe fn nearest<L: Lanes>(magnitude: L::F, map: &Map) -> L::I {
    // SAFETY: the caller enables the instruction set; levels are 0 to 8.
    unsafe {
        let level = L::levels(magnitude, &map.thresholds);
        let gain = L::lookup(&map.gain, level);
        let j = L::truncate(L::fma(magnitude, gain, L::lookup(&map.base, level)));
        let cells = L::half_i(L::shift_left(L::splat_i(2 + map.first_exponent), level));
        let last = L::sub_i(cells, L::splat_i(1));
        L::add_i(cells, L::max_i(L::min_i(j, last), L::splat_i(0)))
    }
}
