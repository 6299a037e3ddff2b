//! The vector kernels, written once over the operations of [`Lanes`].
//!
//! Each line mirrors one of [`rule`](crate::rule) or [`codec`](crate::codec); the tests compare the
//! two bit for bit. Every function here is inlined into a caller that enables the instruction set
//! (see [`avx2`](super::avx2), [`avx512`](super::avx512)): that, and the validity of the pointers, is
//! what the `unsafe` asks for.

use std::mem::MaybeUninit;

use half::{bf16, f16};

use super::kernels::Coded8;
use super::measure::Gauge;
use crate::codec::BLOCK;
use crate::codec::block::{self, Normalizer};
use crate::codec::dynamic::{self, Map, SIGNED, Sign, UNSIGNED};
use crate::dtype::Float;
use crate::norm::LANES;
use crate::rule::{Coefficients, GRADIENT_LIMIT};
use crate::tensor::{Moments8, Moments32, RawCoded};

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

/// What makes a gradient effective. Usually it is nothing, for which there is one test, not two.
#[derive(Clone, Copy)]
enum Gradient {
    AsItIs,
    Multiplied,
    MultipliedAndDecayed,
}

impl Gradient {
    const fn of(c: &Coefficients) -> Self {
        match (c.l2 == 0.0, c.factor == 1.0) {
            (true, true) => Self::AsItIs,
            (true, false) => Self::Multiplied,
            (false, _) => Self::MultipliedAndDecayed,
        }
    }
}

/// [`Coefficients`] in every lane.
#[expect(clippy::struct_excessive_bools, reason = "what a step asks for, not states")]
#[derive(Clone, Copy)]
struct Splat<L: Lanes> {
    w1: L::F,
    w2: L::F,
    step: L::F,
    eps: L::F,
    l2: L::F,
    shrink: L::F,
    factor: L::F,
    /// Gradients of at most this magnitude need no second look.
    usual: L::F,
    gradient: Gradient,
    has_shrink: bool,
    propagate: bool,
    skip_zeros: bool,
    /// Whether the update's norm is limited.
    is_limited: bool,
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
                factor: L::splat(c.factor),
                usual: L::splat(if c.skip_zeros { -1.0 } else { GRADIENT_LIMIT }),
                gradient: Gradient::of(c),
                has_shrink: c.shrink != 0.0,
                propagate: c.propagate,
                skip_zeros: c.skip_zeros,
                is_limited: c.max_unorm > 0.0,
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
    /// Of no account without `AMSGRAD`.
    max_v: L::F,
}

/// What became of `N` elements.
#[derive(Clone, Copy)]
struct Fate<L: Lanes> {
    /// How many gradients were finite.
    finite: usize,
    /// How many elements came back as they were.
    kept: usize,
    /// Which did not.
    moved: L::M,
}

/// [`rule::update`](crate::rule::update), but for [`canonical`] moments. `AMSGRAD` says whether there
/// is a third moment.
#[inline(always)]
unsafe fn update<L: Lanes, const AMSGRAD: bool>(
    e: Elements<L>,
    given: L::F,
    c: &Splat<L>,
) -> (Elements<L>, Fate<L>) {
    // SAFETY: the caller enables the instruction set.
    unsafe {
        let g = match c.gradient {
            Gradient::AsItIs => given,
            Gradient::Multiplied => L::mul(given, c.factor),
            Gradient::MultipliedAndDecayed => L::fma(c.l2, e.p, L::mul(given, c.factor)),
        };
        let (zero, one) = (L::splat(0.0), L::splat(1.0));
        if L::all(L::at_most(L::abs(g), c.usual)) {
            let fate = Fate { finite: L::N, kept: 0, moved: L::at_most(zero, zero) };
            return (updated::<L, AMSGRAD>(e, g, c), fate);
        }
        let finite = L::is_finite(g);
        let limit = L::splat(GRADIENT_LIMIT);
        let clamped = L::max(L::min(g, limit), L::splat(-GRADIENT_LIMIT));
        let new = updated::<L, AMSGRAD>(e, L::select(finite, clamped, g), c);
        // as numbers, 1 or 0, lane by lane
        let mut is_finite = L::select(finite, one, zero);
        let mut moving = if c.propagate { one } else { is_finite };
        if c.skip_zeros {
            let is_zero = L::at_most(L::abs(given), zero);
            is_finite = L::select(is_zero, one, is_finite);
            moving = L::select(is_zero, zero, moving);
        }
        let moved = L::less(zero, moving);
        let kept = Elements {
            p: L::select(moved, new.p, e.p),
            m: L::select(moved, new.m, e.m),
            v: L::select(moved, new.v, e.v),
            max_v: L::select(moved, new.max_v, e.max_v),
        };
        let finite = L::count(L::less(zero, is_finite));
        (kept, Fate { finite, kept: L::N - L::count(moved), moved })
    }
}

/// The update itself, for gradients that pass.
#[inline(always)]
unsafe fn updated<L: Lanes, const AMSGRAD: bool>(
    e: Elements<L>,
    g: L::F,
    c: &Splat<L>,
) -> Elements<L> {
    // SAFETY: the caller enables the instruction set.
    unsafe {
        let m = L::fma(c.w1, g, L::fnma(c.w1, e.m, e.m));
        let v = L::fma(c.w2, L::mul(g, g), L::fnma(c.w2, e.v, e.v));
        let max_v = if AMSGRAD { maximum::<L>(e.max_v, v) } else { v };
        let p = if c.has_shrink { L::fnma(c.shrink, e.p, e.p) } else { e.p };
        let p = L::fnma(c.step, direction::<L>(m, max_v, c), p);
        Elements { p: canonical::<L>(p), m, v, max_v }
    }
}

/// [`rule::direction`](crate::rule::direction).
#[inline(always)]
unsafe fn direction<L: Lanes>(m: L::F, v: L::F, c: &Splat<L>) -> L::F {
    // SAFETY: the caller enables the instruction set.
    unsafe { L::div(m, L::add(L::sqrt(v), c.eps)) }
}

/// `rule::maximum`.
#[inline(always)]
unsafe fn maximum<L: Lanes>(old: L::F, new: L::F) -> L::F {
    // SAFETY: the caller enables the instruction set.
    unsafe { L::select(L::is_nan(new), new, L::select(L::less(old, new), new, old)) }
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
    Moments32 { m, v, max_v }: Moments32,
    len: usize,
    c: &Coefficients,
) -> usize {
    let (param, grad) = (param.cast::<P>(), grad.cast::<G>());
    // SAFETY: this function's contract.
    unsafe {
        match max_v {
            None => all32::<L, P, G, false>(param, grad, [m, v, v], len, c),
            Some(max_v) => all32::<L, P, G, true>(param, grad, [m, v, max_v], len, c),
        }
    }
}

/// The first two, or with `AMSGRAD` all three of the moments.
///
/// # Safety
/// The pointers are valid for `len` elements; the caller enables the instruction set.
#[inline(always)]
unsafe fn all32<L: Lanes, P: VectorFloat, G: VectorFloat, const AMSGRAD: bool>(
    param: *mut P,
    grad: *const G,
    [m, v, max_v]: [*mut f32; 3],
    len: usize,
    c: &Coefficients,
) -> usize {
    // SAFETY: whole vectors lie within `len` valid elements; the rest goes through padded copies.
    unsafe {
        let c = Splat::<L>::new(c);
        let vectors = len / L::N;
        let mut finite = 0;
        for i in 0..vectors {
            let at = i * L::N;
            let moments = [m.add(at), v.add(at), max_v.add(at)];
            finite += vector32::<L, P, G, AMSGRAD>(param.add(at), grad.add(at), moments, &c);
        }
        let (at, rest) = (vectors * L::N, len % L::N);
        if rest > 0 {
            let mut p = Padded::<_, 16>::load(param.add(at), rest, P::default());
            let g = Padded::<_, 16>::load(grad.add(at), rest, G::default());
            let tails = [m.add(at), v.add(at), max_v.add(at)];
            let mut padded = [
                Padded::<_, 16>::load(tails[0], rest, 0.0),
                Padded::<_, 16>::load(tails[1], rest, 0.0),
                Padded::<_, 16>::load(tails[2], rest, 0.0),
            ];
            let moments = padded.each_mut().map(|padded| padded.0.as_mut_ptr());
            let (p_at, g_at) = (p.0.as_mut_ptr(), g.0.as_ptr());
            let of_tail = vector32::<L, P, G, AMSGRAD>(p_at, g_at, moments, &c);
            // The padding's zeros are finite, unless a coefficient is infinite: then nothing is.
            finite += of_tail.saturating_sub(L::N - rest);
            p.store(param.add(at), rest);
            padded[0].store(tails[0], rest);
            padded[1].store(tails[1], rest);
            if AMSGRAD {
                padded[2].store(tails[2], rest);
            }
        }
        len - finite
    }
}

/// Updates `N` elements and returns how many gradients were finite.
///
/// # Safety
/// The pointers are valid for `N` elements; the caller enables the instruction set.
#[inline(always)]
unsafe fn vector32<L: Lanes, P: VectorFloat, G: VectorFloat, const AMSGRAD: bool>(
    p: *mut P,
    g: *const G,
    [m, v, max_v]: [*mut f32; 3],
    c: &Splat<L>,
) -> usize {
    // SAFETY: this function's contract.
    unsafe {
        let third = if AMSGRAD { L::load(max_v) } else { L::splat(0.0) };
        let e = Elements { p: P::load::<L>(p), m: L::load(m), v: L::load(v), max_v: third };
        let (e, fate) = update::<L, AMSGRAD>(e, G::load::<L>(g), c);
        P::store::<L>(e.p, p);
        L::store(canonical::<L>(e.m), m);
        L::store(canonical::<L>(e.v), v);
        if AMSGRAD {
            L::store(canonical::<L>(e.max_v), max_v);
        }
        fate.finite
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
    coded: Coded8,
    len: usize,
    c: &Coefficients,
) -> usize {
    let (param, grad) = (param.cast::<P>(), grad.cast::<G>());
    // SAFETY: this function's contract.
    unsafe {
        if coded.moments.max_v.is_none() {
            all8::<L, P, G, false>(param, grad, coded, len, c)
        } else {
            all8::<L, P, G, true>(param, grad, coded, len, c)
        }
    }
}

/// The first two, or with `AMSGRAD` all three of the moments.
///
/// # Safety
/// The pointers are valid for `len` elements and a scale for each block of them; the caller enables
/// the instruction set.
#[inline(always)]
unsafe fn all8<L: Lanes, P: VectorFloat, G: VectorFloat, const AMSGRAD: bool>(
    param: *mut P,
    grad: *const G,
    Coded8 { moments, new_scales }: Coded8,
    len: usize,
    c: &Coefficients,
) -> usize {
    // SAFETY: whole blocks lie within `len` valid elements, a scale each or one for all; the rest of
    // the codes and elements goes through padded copies of a whole block, its scales are the last
    // ones.
    unsafe {
        let c = Splat::<L>::new(c);
        let whole = len / BLOCK * BLOCK;
        let mut nonfinite = 0;
        for start in (0..whole).step_by(BLOCK) {
            let (p, g) = (param.add(start), grad.add(start));
            let moments = three(moments.skip(start));
            nonfinite += block8::<L, P, G, AMSGRAD>(p, g, moments, new_scales, BLOCK, &c);
        }
        let rest = len - whole;
        if rest > 0 {
            let param = param.add(whole);
            let mut tail = Tail::load(param, grad.add(whole), moments.skip(whole), rest);
            let moments = tail.moments();
            let (p, g) = (tail.p.0.as_mut_ptr(), tail.g.0.as_ptr());
            nonfinite += block8::<L, P, G, AMSGRAD>(p, g, moments, new_scales, rest, &c);
            tail.p.store(param, rest);
            for (codes, coded) in tail.codes.iter().zip(tail.of.each()) {
                codes.store(coded.code, rest);
            }
        }
        nonfinite
    }
}

/// The moments of a kernel, of which the third is of no account without `AMSGRAD`.
fn three(moments: Moments8) -> [RawCoded; 3] {
    [moments.m, moments.v, moments.max_v.unwrap_or(moments.v)]
}

/// The last elements, padded to a whole block with zeros.
struct Tail<P, G> {
    p: Padded<P, BLOCK>,
    g: Padded<G, BLOCK>,
    codes: [Padded<u8, BLOCK>; 3],
    /// Where the moments are.
    of: Moments8,
}

impl<P: VectorFloat, G: VectorFloat> Tail<P, G> {
    /// # Safety
    /// The pointers are valid for `rest` elements, less than a block.
    #[inline(always)]
    unsafe fn load(param: *const P, grad: *const G, of: Moments8, rest: usize) -> Self {
        let [m, v, max_v] = three(of);
        let (signed, unsigned) =
            (dynamic::zero_code(Sign::Signed), dynamic::zero_code(Sign::Unsigned));
        // SAFETY: this function's contract.
        unsafe {
            Self {
                p: Padded::load(param, rest, P::default()),
                g: Padded::load(grad, rest, G::default()),
                codes: [
                    Padded::load(m.code, rest, signed),
                    Padded::load(v.code, rest, unsigned),
                    Padded::load(max_v.code, rest, unsigned),
                ],
                of,
            }
        }
    }

    /// The padded codes, with the scales that the moments have.
    #[inline(always)]
    fn moments(&mut self) -> [RawCoded; 3] {
        let mut moments = three(self.of);
        for (moment, codes) in moments.iter_mut().zip(&mut self.codes) {
            moment.code = codes.0.as_mut_ptr();
        }
        moments
    }
}

/// The new values of a moment of a block, between the pass that finds the scale and the pass that
/// encodes.
#[repr(align(64))]
struct Values(MaybeUninit<[f32; BLOCK]>);

impl Values {
    const fn new() -> Self {
        Self(MaybeUninit::uninit())
    }

    const fn pointer(&mut self) -> *mut f32 {
        self.0.as_mut_ptr().cast()
    }
}

/// Updates a block of `len` elements, padded with zeros to whole vectors, and returns how many
/// gradients were not finite. `moments` are the first, the second and, with `AMSGRAD`, the third.
///
/// # Safety
/// The pointers are valid for `len` elements rounded up to whole vectors, and a scale each, which is
/// written unless there are `new_scales`; the caller enables the instruction set.
#[inline(always)]
unsafe fn block8<L: Lanes, P: VectorFloat, G: VectorFloat, const AMSGRAD: bool>(
    p: *mut P,
    g: *const G,
    [m, v, max_v]: [RawCoded; 3],
    new_scales: Option<[f32; 3]>,
    len: usize,
    c: &Splat<L>,
) -> usize {
    let (mut new_m, mut new_v, mut new_max) = (Values::new(), Values::new(), Values::new());
    let (new_m, new_v, new_max) = (new_m.pointer(), new_v.pointer(), new_max.pointer());
    let padded = len.next_multiple_of(L::N);
    // SAFETY: vectors start at multiples of `N` below `padded`; the new values hold a whole block,
    // of which the second pass reads what the first wrote.
    unsafe {
        let mut pass = FirstPass::<L>::new::<AMSGRAD>([m, v, max_v]);
        for at in (0..padded).step_by(L::N) {
            let codes = [m.code.add(at), v.code.add(at), max_v.code.add(at)];
            let vector = pass.vector::<P, G, AMSGRAD>(p.add(at), g.add(at), codes, c);
            P::store::<L>(vector.new.p, p.add(at));
            L::store(vector.finite[0], new_m.add(at));
            L::store(vector.finite[1], new_v.add(at));
            if AMSGRAD {
                L::store(vector.finite[2], new_max.add(at));
            }
        }
        let (nonfinite, kept) = pass.counts(len, padded, c);
        let scales = match new_scales {
            Some(scales) => scales,
            None if kept == len => return nonfinite,
            None => {
                let keep = kept > 0;
                let third = if AMSGRAD { pass.max_v.renew(max_v.scale, keep) } else { 0.0 };
                [pass.m.renew(m.scale, keep), pass.v.renew(v.scale, keep), third]
            }
        };
        let m_encoder = Encoder::<L>::new(scales[0]);
        let v_encoder = Encoder::<L>::new(scales[1]);
        for at in (0..padded).step_by(L::N) {
            L::store_codes(m_encoder.signed(L::load(new_m.add(at))), m.code.add(at));
            L::store_codes(v_encoder.unsigned(L::load(new_v.add(at))), v.code.add(at));
        }
        if AMSGRAD {
            let encoder = Encoder::<L>::new(scales[2]);
            for at in (0..padded).step_by(L::N) {
                L::store_codes(encoder.unsigned(L::load(new_max.add(at))), max_v.code.add(at));
            }
        }
        nonfinite
    }
}

/// The old scale of a moment of a block, and the largest magnitudes among its new values.
#[derive(Clone, Copy)]
struct Range<L: Lanes> {
    scale: L::F,
    max: L::F,
}

impl<L: Lanes> Range<L> {
    #[inline(always)]
    unsafe fn new(scale: f32) -> Self {
        // SAFETY: the caller enables the instruction set.
        unsafe { Self { scale: L::splat(scale), max: L::splat(0.0) } }
    }

    /// Takes note of new values, none of which is NaN.
    #[inline(always)]
    unsafe fn extend(&mut self, values: L::F) {
        // SAFETY: the caller enables the instruction set.
        unsafe { self.max = L::max(self.max, L::abs(values)) };
    }

    /// Writes the new scale, which with `keep` does not fall, and returns it.
    ///
    /// # Safety
    /// The pointer is valid; the caller enables the instruction set.
    #[inline(always)]
    unsafe fn renew(&self, scale: *mut f32, keep: bool) -> f32 {
        // SAFETY: this function's contract.
        unsafe {
            let mut max = L::reduce_max(self.max);
            if keep {
                max = max.max(block::usable_scale(*scale));
            }
            *scale = max;
            max
        }
    }
}

/// The pass over a block that updates it and finds the new scales.
struct FirstPass<L: Lanes> {
    m: Range<L>,
    v: Range<L>,
    max_v: Range<L>,
    finite: usize,
    kept: usize,
}

/// What the pass makes of `N` elements.
struct Passed<L: Lanes> {
    /// The parameter as it was.
    p: L::F,
    new: Elements<L>,
    /// The moments as they are to be stored.
    finite: [L::F; 3],
    moved: L::M,
}

impl<L: Lanes> FirstPass<L> {
    /// # Safety
    /// Each scale is valid; the caller enables the instruction set.
    #[inline(always)]
    unsafe fn new<const AMSGRAD: bool>([m, v, max_v]: [RawCoded; 3]) -> Self {
        // SAFETY: this function's contract.
        unsafe {
            let scale = |coded: RawCoded| block::usable_scale(*coded.scale);
            Self {
                m: Range::new(scale(m)),
                v: Range::new(scale(v)),
                max_v: Range::new(if AMSGRAD { scale(max_v) } else { 0.0 }),
                finite: 0,
                kept: 0,
            }
        }
    }

    /// # Safety
    /// The pointers are valid for `N` elements; the caller enables the instruction set.
    #[inline(always)]
    unsafe fn vector<P: VectorFloat, G: VectorFloat, const AMSGRAD: bool>(
        &mut self,
        p: *const P,
        g: *const G,
        [m_code, v_code, max_code]: [*mut u8; 3],
        c: &Splat<L>,
    ) -> Passed<L> {
        // SAFETY: this function's contract.
        unsafe {
            let third = if AMSGRAD {
                L::mul(decode_unsigned::<L>(L::load_codes(max_code)), self.max_v.scale)
            } else {
                L::splat(0.0)
            };
            let e = Elements {
                p: P::load::<L>(p),
                m: L::mul(decode_signed::<L>(L::load_codes(m_code)), self.m.scale),
                v: L::mul(decode_unsigned::<L>(L::load_codes(v_code)), self.v.scale),
                max_v: third,
            };
            let (new, fate) = update::<L, AMSGRAD>(e, G::load::<L>(g), c);
            self.finite += fate.finite;
            self.kept += fate.kept;
            // usable scales and finite gradients make finite moments
            let passed = c.propagate && fate.finite < L::N;
            let m = if passed { zero_unless_finite::<L>(new.m) } else { new.m };
            let v = if passed { zero_unless_finite::<L>(new.v) } else { new.v };
            let max_v =
                if AMSGRAD && passed { zero_unless_finite::<L>(new.max_v) } else { new.max_v };
            self.m.extend(m);
            self.v.extend(v);
            if AMSGRAD {
                self.max_v.extend(max_v);
            }
            Passed { p: e.p, new, finite: [m, v, max_v], moved: fate.moved }
        }
    }

    /// How many of the block's `len` gradients were not finite, and how many elements were kept.
    #[inline(always)]
    fn counts(&self, len: usize, padded: usize, c: &Splat<L>) -> (usize, usize) {
        // The padding's zeros are finite, unless a coefficient is infinite: then nothing is. Where
        // zeros are skipped, they are kept.
        let nonfinite = (padded - self.finite).min(len);
        let kept = match (c.skip_zeros, c.propagate) {
            (true, _) => self.kept - (padded - len),
            (false, true) => 0,
            (false, false) => nonfinite,
        };
        (nonfinite, kept)
    }
}

/// [`Gauge`]s a step with 32-bit moments.
///
/// # Safety
/// As [`GaugeKernel`](super::kernels) says, and the caller enables the instruction set of `L`.
#[inline(always)]
pub(super) unsafe fn gauge32<L: Lanes, P: VectorFloat, G: VectorFloat>(
    param: *const u8,
    grad: *const u8,
    moments: Moments32,
    len: usize,
    c: &Coefficients,
    gauge: &mut Gauge,
) {
    let (param, grad) = (param.cast::<P>(), grad.cast::<G>());
    // SAFETY: this function's contract; the rest goes through padded copies.
    unsafe {
        let c = Splat::<L>::new(c);
        let whole = len / LANES * LANES;
        for start in (0..whole).step_by(LANES) {
            let (p, g) = (param.add(start), grad.add(start));
            let Moments32 { m, v, max_v } = moments.skip(start);
            lanes32::<L, P, G>(p, g, (m, v, max_v.map(<*mut f32>::cast_const)), LANES, &c, gauge);
        }
        let rest = len - whole;
        if rest > 0 {
            let of = moments.skip(whole);
            let p = Padded::<P, LANES>::load(param.add(whole), rest, P::default());
            let g = Padded::<G, LANES>::load(grad.add(whole), rest, G::default());
            let m = Padded::<f32, LANES>::load(of.m, rest, 0.0);
            let v = Padded::<f32, LANES>::load(of.v, rest, 0.0);
            let max_v = of.max_v.map(|max_v| Padded::<f32, LANES>::load(max_v, rest, 0.0));
            let moments =
                (m.0.as_ptr(), v.0.as_ptr(), max_v.as_ref().map(|max_v| max_v.0.as_ptr()));
            lanes32::<L, P, G>(p.0.as_ptr(), g.0.as_ptr(), moments, rest, &c, gauge);
        }
    }
}

/// The first, the second and, with AMSGrad, the third moment, to be read.
type Read32 = (*const f32, *const f32, Option<*const f32>);

/// [`gauge32`] of up to [`LANES`] elements, padded to so many.
///
/// # Safety
/// The pointers are valid for [`LANES`] elements; the caller enables the instruction set.
#[inline(always)]
unsafe fn lanes32<L: Lanes, P: VectorFloat, G: VectorFloat>(
    p: *const P,
    g: *const G,
    (m, v, max_v): Read32,
    len: usize,
    c: &Splat<L>,
    gauge: &mut Gauge,
) {
    let mut group = Group::new();
    // SAFETY: this function's contract.
    unsafe {
        for at in (0..LANES).step_by(L::N) {
            let (p, g) = (P::load::<L>(p.add(at)), G::load::<L>(g.add(at)));
            let (m, v) = (L::load(m.add(at)), L::load(v.add(at)));
            match max_v {
                None => {
                    let e = Elements { p, m, v, max_v: v };
                    let (new, fate) = update::<L, false>(e, g, c);
                    group.set::<L, false>(at, p, new, fate.moved, c);
                }
                Some(max_v) => {
                    let e = Elements { p, m, v, max_v: L::load(max_v.add(at)) };
                    let (new, fate) = update::<L, true>(e, g, c);
                    group.set::<L, true>(at, p, new, fate.moved, c);
                }
            }
        }
    }
    group.enter(len, gauge);
}

/// Parameters and updates whose squares are to be added.
struct Group {
    params: [f32; LANES],
    updates: [f32; LANES],
}

impl Group {
    #[inline(always)]
    const fn new() -> Self {
        Self { params: [0.0; LANES], updates: [0.0; LANES] }
    }

    /// Takes note of the `N` elements from `at` on.
    ///
    /// # Safety
    /// `at + N` is at most [`LANES`]; the caller enables the instruction set.
    #[inline(always)]
    unsafe fn set<L: Lanes, const AMSGRAD: bool>(
        &mut self,
        at: usize,
        p: L::F,
        new: Elements<L>,
        moved: L::M,
        c: &Splat<L>,
    ) {
        // SAFETY: this function's contract.
        unsafe {
            let by = direction::<L>(new.m, if AMSGRAD { new.max_v } else { new.v }, c);
            L::store(p, self.params.as_mut_ptr().add(at));
            L::store(L::select(moved, by, L::splat(0.0)), self.updates.as_mut_ptr().add(at));
        }
    }

    /// Adds the squares of the first `len`.
    #[inline(always)]
    fn enter(mut self, len: usize, gauge: &mut Gauge) {
        self.params[len..].fill(0.0);
        self.updates[len..].fill(0.0);
        gauge.params.add_squares(&self.params);
        gauge.updates.add_squares(&self.updates);
    }
}

/// [`Gauge`]s a step with 8-bit moments.
///
/// # Safety
/// As [`GaugeKernel`](super::kernels) says, and the caller enables the instruction set of `L`.
#[inline(always)]
pub(super) unsafe fn gauge8<L: Lanes, P: VectorFloat, G: VectorFloat>(
    param: *const u8,
    grad: *const u8,
    moments: Moments8,
    len: usize,
    c: &Coefficients,
    gauge: &mut Gauge,
) {
    let (param, grad) = (param.cast::<P>(), grad.cast::<G>());
    // SAFETY: this function's contract.
    unsafe {
        if moments.max_v.is_none() {
            gauge_all8::<L, P, G, false>(param, grad, moments, len, c, gauge);
        } else {
            gauge_all8::<L, P, G, true>(param, grad, moments, len, c, gauge);
        }
    }
}

/// # Safety
/// As [`gauge8`]; `AMSGRAD` says whether there is a third moment.
#[inline(always)]
unsafe fn gauge_all8<L: Lanes, P: VectorFloat, G: VectorFloat, const AMSGRAD: bool>(
    param: *const P,
    grad: *const G,
    moments: Moments8,
    len: usize,
    c: &Coefficients,
    gauge: &mut Gauge,
) {
    // SAFETY: this function's contract; the rest goes through a padded copy.
    unsafe {
        let c = Splat::<L>::new(c);
        let whole = len / BLOCK * BLOCK;
        for start in (0..whole).step_by(BLOCK) {
            let moments = three(moments.skip(start));
            let (p, g) = (param.add(start), grad.add(start));
            gauge_block8::<L, P, G, AMSGRAD>(p, g, moments, BLOCK, &c, gauge);
        }
        let rest = len - whole;
        if rest > 0 {
            let moments = moments.skip(whole);
            let mut tail = Tail::load(param.add(whole), grad.add(whole), moments, rest);
            let moments = tail.moments();
            let (p, g) = (tail.p.0.as_ptr(), tail.g.0.as_ptr());
            gauge_block8::<L, P, G, AMSGRAD>(p, g, moments, rest, &c, gauge);
        }
    }
}

/// # Safety
/// The pointers are valid for a block and a scale each; the caller enables the instruction set.
#[inline(always)]
unsafe fn gauge_block8<L: Lanes, P: VectorFloat, G: VectorFloat, const AMSGRAD: bool>(
    p: *const P,
    g: *const G,
    [m, v, max_v]: [RawCoded; 3],
    len: usize,
    c: &Splat<L>,
    gauge: &mut Gauge,
) {
    let padded = len.next_multiple_of(LANES);
    // SAFETY: this function's contract.
    unsafe {
        let mut pass = FirstPass::<L>::new::<AMSGRAD>([m, v, max_v]);
        for start in (0..padded).step_by(LANES) {
            let mut group = Group::new();
            for at in (0..LANES).step_by(L::N) {
                let i = start + at;
                let codes = [m.code.add(i), v.code.add(i), max_v.code.add(i)];
                let vector = pass.vector::<P, G, AMSGRAD>(p.add(i), g.add(i), codes, c);
                if c.is_limited {
                    group.set::<L, AMSGRAD>(at, vector.p, vector.new, vector.moved, c);
                }
            }
            if c.is_limited {
                group.enter(LANES.min(len - start), gauge);
            }
        }
        let (_, kept) = pass.counts(len, padded, c);
        gauge.keeps |= kept > 0;
        for (largest, range) in gauge.largest.iter_mut().zip([pass.m, pass.v, pass.max_v]) {
            *largest = largest.max(L::reduce_max(range.max));
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
#[derive(Clone, Copy)]
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
