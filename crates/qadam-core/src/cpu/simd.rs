//! The vector kernels, written once over the operations of [`Lanes`].
//!
//! Each line mirrors one of [`rule`](crate::rule) or [`codec`](crate::codec); the tests compare the
//! two bit for bit. Every function here is inlined into a caller that enables the instruction set
//! (see [`avx2`](super::avx2), [`avx512`](super::avx512)): that, and the validity of the pointers, is
//! what the `unsafe` asks for.

use std::mem::MaybeUninit;

use half::{bf16, f16};

use crate::codec::BLOCK;
use crate::codec::block::{self, Normalizer};
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
    /// For numbers that are not NaN.
    unsafe fn min(a: Self::F, b: Self::F) -> Self::F;
    /// For numbers that are not NaN.
    unsafe fn max(a: Self::F, b: Self::F) -> Self::F;
    /// The largest lane, none of which is NaN.
    unsafe fn reduce_max(a: Self::F) -> f32;

    unsafe fn less(a: Self::F, b: Self::F) -> Self::M;
    unsafe fn at_most(a: Self::F, b: Self::F) -> Self::M;
    unsafe fn is_finite(a: Self::F) -> Self::M;
    unsafe fn is_nan(a: Self::F) -> Self::M;
    /// `mask ? a : b`.
    unsafe fn select(mask: Self::M, a: Self::F, b: Self::F) -> Self::F;
    unsafe fn select_i(mask: Self::M, a: Self::I, b: Self::I) -> Self::I;
    unsafe fn all(mask: Self::M) -> bool;
    /// How many lanes of the mask are set.
    unsafe fn count(mask: Self::M) -> usize;

    unsafe fn splat_i(x: i32) -> Self::I;
    unsafe fn add_i(a: Self::I, b: Self::I) -> Self::I;
    unsafe fn sub_i(a: Self::I, b: Self::I) -> Self::I;
    unsafe fn min_i(a: Self::I, b: Self::I) -> Self::I;
    unsafe fn max_i(a: Self::I, b: Self::I) -> Self::I;
    /// To nearest; exact below 2^24.
    unsafe fn to_float(a: Self::I) -> Self::F;
    /// Toward zero; the numbers here are below 2^24.
    unsafe fn truncate(a: Self::F) -> Self::I;
    /// The bits of each lane.
    unsafe fn bits(a: Self::F) -> Self::I;
    /// The sign bit of `sign`, the rest of the positive `magnitude`.
    unsafe fn with_sign(magnitude: Self::F, sign: Self::F) -> Self::F;
    /// Exponent field of a positive number, with its bias.
    unsafe fn exponent(a: Self::F) -> Self::I;
    /// A positive number's power of two: its mantissa set to 1.
    unsafe fn power_of_two(a: Self::F) -> Self::F;
    /// `table[index % 16]`.
    unsafe fn lookup(table: &[f32; 16], index: Self::I) -> Self::F;
    /// The same for a table of integers.
    unsafe fn lookup_i(table: &[i32; 16], index: Self::I) -> Self::I;
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

/// [`rule::update`](crate::rule::update), but for [`canonical`] moments; also how many gradients were
/// finite.
#[inline(always)]
unsafe fn update<L: Lanes>(e: Elements<L>, g: L::F, c: &Splat<L>) -> (Elements<L>, usize) {
    // SAFETY: the caller enables the instruction set.
    unsafe {
        let g = if c.has_l2 { L::fma(c.l2, e.p, g) } else { g };
        let limit = L::splat(GRADIENT_LIMIT);
        if L::all(L::at_most(L::abs(g), limit)) {
            return (updated::<L>(e, g, c), L::N);
        }
        let finite = L::is_finite(g);
        let clamped = L::max(L::min(g, limit), L::splat(-GRADIENT_LIMIT));
        let new = updated::<L>(e, L::select(finite, clamped, g), c);
        let count = L::count(finite);
        if c.propagate {
            return (new, count);
        }
        let kept = Elements {
            p: L::select(finite, new.p, e.p),
            m: L::select(finite, new.m, e.m),
            v: L::select(finite, new.v, e.v),
        };
        (kept, count)
    }
}

/// The update itself, for gradients that pass.
#[inline(always)]
unsafe fn updated<L: Lanes>(e: Elements<L>, g: L::F, c: &Splat<L>) -> Elements<L> {
    // SAFETY: the caller enables the instruction set.
    unsafe {
        let m = L::fma(c.w1, g, L::fnma(c.w1, e.m, e.m));
        let v = L::fma(c.w2, L::mul(g, g), L::fnma(c.w2, e.v, e.v));
        let p = if c.has_shrink { L::fnma(c.shrink, e.p, e.p) } else { e.p };
        let p = L::fnma(c.step, L::div(m, L::add(L::sqrt(v), c.eps)), p);
        Elements { p: canonical::<L>(p), m, v }
    }
}

/// [`rule::canonical`](crate::rule::canonical).
#[inline(always)]
unsafe fn canonical<L: Lanes>(x: L::F) -> L::F {
    // SAFETY: the caller enables the instruction set.
    unsafe { L::select(L::is_nan(x), L::splat(f32::from_bits(0x7FC0_0000)), x) }
}

/// The end of a tensor, padded to whole vectors.
#[repr(align(64))]
struct Padded<T, const LEN: usize>([T; LEN]);

impl<T: Copy, const LEN: usize> Padded<T, LEN> {
    /// # Safety
    /// `from` is valid for `len` elements, at most `LEN`.
    #[inline(always)]
    unsafe fn load(from: *const T, len: usize, padding: T) -> Self {
        let mut padded = Self([padding; LEN]);
        // SAFETY: `len` elements are valid at the source and fit the array.
        unsafe { from.copy_to_nonoverlapping(padded.0.as_mut_ptr(), len) };
        padded
    }

    /// # Safety
    /// `to` is valid for `len` elements, at most `LEN`.
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
            let mut p = Padded::<_, 16>::load(param.add(at), rest, P::default());
            let g = Padded::<_, 16>::load(grad.add(at), rest, G::default());
            let mut m = Padded::<_, 16>::load(moments.m.add(at), rest, 0.0);
            let mut v = Padded::<_, 16>::load(moments.v.add(at), rest, 0.0);
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
        L::store(canonical::<L>(e.m), m);
        L::store(canonical::<L>(e.v), v);
        finite
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
    // SAFETY: whole blocks lie within `len` valid elements, a scale each; the rest of the codes and
    // elements goes through padded copies of a whole block, its scales are the last ones.
    unsafe {
        let c = Splat::<L>::new(c);
        let whole = len / BLOCK * BLOCK;
        let mut nonfinite = 0;
        for start in (0..whole).step_by(BLOCK) {
            let moments = moments.skip(start);
            nonfinite += block8::<L, P, G>(param.add(start), grad.add(start), moments, BLOCK, &c);
        }
        let rest = len - whole;
        if rest > 0 {
            let (param, tail) = (param.add(whole), moments.skip(whole));
            let zero = dynamic::zero_code;
            let mut p = Padded::<_, BLOCK>::load(param, rest, P::default());
            let g = Padded::<_, BLOCK>::load(grad.add(whole), rest, G::default());
            let mut m = Padded::<_, BLOCK>::load(tail.m_code, rest, zero(Sign::Signed));
            let mut v = Padded::<_, BLOCK>::load(tail.v_code, rest, zero(Sign::Unsigned));
            let moments = Moments8 { m_code: m.0.as_mut_ptr(), v_code: v.0.as_mut_ptr(), ..tail };
            nonfinite += block8::<L, P, G>(p.0.as_mut_ptr(), g.0.as_ptr(), moments, rest, &c);
            p.store(param, rest);
            m.store(tail.m_code, rest);
            v.store(tail.v_code, rest);
        }
        nonfinite
    }
}

/// The new moments of a block, between the pass that finds the scales and the pass that encodes.
#[repr(align(64))]
struct Values(MaybeUninit<[f32; BLOCK]>);

/// Updates a block of `len` elements, padded with zeros to whole vectors, and returns how many
/// gradients were not finite.
///
/// # Safety
/// The pointers are valid for `len` elements rounded up to whole vectors, and a scale each; the
/// caller enables the instruction set.
#[inline(always)]
unsafe fn block8<L: Lanes, P: VectorFloat, G: VectorFloat>(
    p: *mut P,
    g: *const G,
    moments: Moments8,
    len: usize,
    c: &Splat<L>,
) -> usize {
    let Moments8 { m_code, m_scale, v_code, v_scale } = moments;
    let (mut new_m, mut new_v) = (Values(MaybeUninit::uninit()), Values(MaybeUninit::uninit()));
    let (new_m, new_v) = (new_m.0.as_mut_ptr().cast::<f32>(), new_v.0.as_mut_ptr().cast::<f32>());
    let padded = len.next_multiple_of(L::N);
    // SAFETY: vectors start at multiples of `N` below `padded`; `new_m` and `new_v` hold a whole
    // block, of which the second pass reads what the first wrote.
    unsafe {
        let mut pass = FirstPass::<L> {
            m_scale: L::splat(block::usable_scale(*m_scale)),
            v_scale: L::splat(block::usable_scale(*v_scale)),
            m_max: L::splat(0.0),
            v_max: L::splat(0.0),
            finite: 0,
        };
        for at in (0..padded).step_by(L::N) {
            let codes = (m_code.add(at).cast_const(), v_code.add(at).cast_const());
            let values = (new_m.add(at), new_v.add(at));
            pass.vector::<P, G>(p.add(at), g.add(at), codes, values, c);
        }
        let nonfinite = padded - pass.finite; // the padding is finite
        if nonfinite == len && !c.propagate {
            return nonfinite;
        }
        let (mut m_max, mut v_max) = (L::reduce_max(pass.m_max), L::reduce_max(pass.v_max));
        if nonfinite > 0 && !c.propagate {
            m_max = m_max.max(block::usable_scale(*m_scale));
            v_max = v_max.max(block::usable_scale(*v_scale));
        }
        (*m_scale, *v_scale) = (m_max, v_max);
        let m_encoder = Encoder::<L>::new(m_max);
        let v_encoder = Encoder::<L>::new(v_max);
        for at in (0..padded).step_by(L::N) {
            L::store_codes(m_encoder.signed(L::load(new_m.add(at))), m_code.add(at));
            L::store_codes(v_encoder.unsigned(L::load(new_v.add(at))), v_code.add(at));
        }
        nonfinite
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
            self.finite += finite;
            // usable scales and finite gradients make finite moments
            let passed = c.propagate && finite < L::N;
            let m = if passed { zero_unless_finite::<L>(e.m) } else { e.m };
            let v = if passed { zero_unless_finite::<L>(e.v) } else { e.v };
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
unsafe fn decode<L: Lanes>(odd: L::F, map: &Map) -> L::F {
    // SAFETY: the caller enables the instruction set.
    unsafe {
        let exponent = L::exponent(odd);
        let cell = L::sub(odd, L::power_of_two(odd));
        L::fma(cell, L::lookup(&map.slope, exponent), L::lookup(&map.offset, exponent))
    }
}

/// [`dynamic::decode`] of signed codes.
#[inline(always)]
unsafe fn decode_signed<L: Lanes>(code: L::I) -> L::F {
    // SAFETY: the caller enables the instruction set.
    unsafe {
        let k = L::sub(L::to_float(code), L::splat(127.0));
        let odd = L::fma(L::abs(k), L::splat(2.0), L::splat(1.0));
        L::with_sign(decode::<L>(odd, &SIGNED), k)
    }
}

/// [`dynamic::decode`] of unsigned codes.
#[inline(always)]
unsafe fn decode_unsigned<L: Lanes>(code: L::I) -> L::F {
    // SAFETY: the caller enables the instruction set.
    unsafe {
        let odd = L::fma(L::to_float(code), L::splat(2.0), L::splat(3.0));
        decode::<L>(odd, &UNSIGNED)
    }
}

/// [`encode_block`](crate::codec::block::encode_block) for finite values whose scale is known.
struct Encoder<L: Lanes> {
    power: L::F,
    reciprocal: L::F,
    has_power: bool,
}

impl<L: Lanes> Encoder<L> {
    #[inline(always)]
    unsafe fn new(scale: f32) -> Self {
        let Normalizer { power, reciprocal } = Normalizer::new(scale);
        let has_power = power != 1.0;
        // SAFETY: the caller enables the instruction set.
        unsafe { Self { power: L::splat(power), reciprocal: L::splat(reciprocal), has_power } }
    }

    #[inline(always)]
    unsafe fn normalize(&self, value: L::F) -> L::F {
        // SAFETY: the caller enables the instruction set.
        unsafe {
            let value = if self.has_power { L::mul(value, self.power) } else { value };
            L::mul(value, self.reciprocal)
        }
    }

    #[inline(always)]
    unsafe fn signed(&self, value: L::F) -> L::I {
        // SAFETY: the caller enables the instruction set.
        unsafe {
            let x = self.normalize(value);
            let k = nearest::<L>(L::abs(x), &SIGNED);
            let zero = L::splat_i(127);
            let negative = L::max_i(L::sub_i(zero, k), L::splat_i(0));
            L::select_i(L::less(x, L::splat(0.0)), negative, L::add_i(zero, k))
        }
    }

    #[inline(always)]
    unsafe fn unsigned(&self, value: L::F) -> L::I {
        // SAFETY: the caller enables the instruction set.
        unsafe {
            let code = L::sub_i(nearest::<L>(self.normalize(value), &UNSIGNED), L::splat_i(1));
            let positive = L::less(L::splat(0.0), value);
            L::select_i(positive, L::max_i(code, L::splat_i(1)), code)
        }
    }
}

/// `Map::nearest`.
#[inline(always)]
unsafe fn nearest<L: Lanes>(magnitude: L::F, map: &Map) -> L::I {
    // SAFETY: the caller enables the instruction set.
    unsafe {
        // One threshold lies between the levels that the guess leaves open.
        let log =
            L::fma(L::to_float(L::bits(magnitude)), L::splat(LOG_SLOPE), L::splat(LOG_OFFSET));
        let guess = L::truncate(L::max(log, L::splat(0.0)));
        let reached = L::at_most(L::lookup(&map.thresholds, guess), magnitude);
        let level = L::select_i(reached, L::add_i(guess, L::splat_i(1)), guess);
        let gain = L::lookup(&map.gain, level);
        let j = L::truncate(L::fma(magnitude, gain, L::lookup(&map.base, level)));
        let last = L::lookup_i(&map.last, level);
        let j = L::max_i(L::min_i(j, last), L::splat_i(0));
        L::add_i(L::add_i(j, last), L::splat_i(1))
    }
}

/// `trunc(bits * LOG_SLOPE + LOG_OFFSET)` guesses a number's level, or one less: a positive float's
/// bits are `2^23 * (log2(x) + 127)` within 0.09, so the guess passes from `i - 1` to `i` near
/// `10^(i - 7.3)`, well between thresholds `i - 1` and `i`.
const LOG_SLOPE: f32 = std::f32::consts::LOG10_2 / 8_388_608.0;
const LOG_OFFSET: f32 = 7.3 - 127.0 * std::f32::consts::LOG10_2;
