//! What an instruction set supplies.

use half::{bf16, f16};

use super::dynamic;
use crate::dtype::Float;

/// An array of what is said of 0, 1, 2 and 3. (Closures do not have their function's instruction set.)
macro_rules! each_of_4 {
    ($i:ident => $of:expr) => {
        [
            {
                const $i: usize = 0;
                $of
            },
            {
                const $i: usize = 1;
                $of
            },
            {
                const $i: usize = 2;
                $of
            },
            {
                const $i: usize = 3;
                $of
            },
        ]
    };
}

pub(in crate::cpu) use each_of_4;

/// `N` f32 lanes, with the i32 lanes and masks that go with them.
///
/// # Safety
/// Methods may be called only where the processor has the instruction set of the implementation.
/// Pointers must be valid for `N` elements; they need no more alignment than an element.
pub(in crate::cpu) unsafe trait Lanes: Copy {
    const N: usize;
    type F: Copy;
    type I: Copy;
    type M: Copy;

    unsafe fn splat(x: f32) -> Self::F;
    unsafe fn load(from: *const f32) -> Self::F;
    unsafe fn load_bf16(from: *const bf16) -> Self::F;
    unsafe fn load_f16(from: *const f16) -> Self::F;
    unsafe fn store(x: Self::F, to: *mut f32);
    /// NaN must be such that its lower half is 0, as that of every parameter is that was loaded, or made
    /// [`canonical`](crate::rule::canonical), or made by the processor.
    unsafe fn store_bf16(x: Self::F, to: *mut bf16);
    unsafe fn store_f16(x: Self::F, to: *mut f16);

    /// [`Lanes::load_bf16`] of `4 N` elements.
    #[inline(always)]
    unsafe fn load_bf16_4(from: *const bf16) -> [Self::F; 4] {
        // SAFETY: this trait's contract, for `4 N` elements.
        unsafe { each_of_4!(I => Self::load_bf16(from.add(I * Self::N))) }
    }
    /// [`Lanes::store_bf16`] of `4 N` elements.
    unsafe fn store_bf16_4(x: [Self::F; 4], to: *mut bf16);

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
    /// The larger magnitude of numbers that are not NaN.
    #[inline(always)]
    unsafe fn max_magnitude(a: Self::F, b: Self::F) -> Self::F {
        // SAFETY: this trait's contract.
        unsafe { Self::max(Self::abs(a), Self::abs(b)) }
    }
    /// The largest lane, none of which is NaN.
    unsafe fn reduce_max(a: Self::F) -> f32;

    unsafe fn less(a: Self::F, b: Self::F) -> Self::M;
    unsafe fn at_most(a: Self::F, b: Self::F) -> Self::M;
    unsafe fn is_finite(a: Self::F) -> Self::M;
    unsafe fn is_nan(a: Self::F) -> Self::M;
    /// `mask ? a : b`.
    unsafe fn select(mask: Self::M, a: Self::F, b: Self::F) -> Self::F;
    unsafe fn all(mask: Self::M) -> bool;
    /// How many lanes of the mask are set.
    unsafe fn count(mask: Self::M) -> usize;

    unsafe fn splat_i(x: i32) -> Self::I;
    unsafe fn add_i(a: Self::I, b: Self::I) -> Self::I;
    unsafe fn sub_i(a: Self::I, b: Self::I) -> Self::I;
    unsafe fn and_i(a: Self::I, b: Self::I) -> Self::I;
    unsafe fn or_i(a: Self::I, b: Self::I) -> Self::I;
    unsafe fn not_i(a: Self::I) -> Self::I;
    /// Shifted by `BY` bits to the left, and to the right as unsigned numbers.
    unsafe fn left<const BY: u32>(a: Self::I) -> Self::I;
    unsafe fn right<const BY: u32>(a: Self::I) -> Self::I;
    unsafe fn max_i(a: Self::I, b: Self::I) -> Self::I;
    unsafe fn min_i(a: Self::I, b: Self::I) -> Self::I;
    /// The smallest lane.
    unsafe fn reduce_min_i(a: Self::I) -> i32;
    unsafe fn load_i(from: *const i32) -> Self::I;
    /// To the nearest integer, of two the even one.
    unsafe fn round(a: Self::F) -> Self::I;
    /// The larger of each two of `2 N` words, without the upper bits of those loaded.
    unsafe fn max_words(a: Self::I, from: *const u16) -> Self::I;
    unsafe fn store_words(a: Self::I, to: *mut u16);
    /// To nearest; exact below 2^24.
    unsafe fn to_float(a: Self::I) -> Self::F;
    /// The bits of each lane.
    unsafe fn bits(a: Self::F) -> Self::I;
    /// The number of these bits.
    unsafe fn from_bits(a: Self::I) -> Self::F;
    /// The sign bit of `sign`, the rest of the positive `magnitude`.
    unsafe fn with_sign(magnitude: Self::F, sign: Self::F) -> Self::F;
    /// Exponent field of a positive number, with its bias.
    unsafe fn exponent(a: Self::F) -> Self::I;
    /// A positive number's power of two: its mantissa set to 1.
    unsafe fn power_of_two(a: Self::F) -> Self::F;
    /// `table[index % 8]` of a table that says everything twice.
    unsafe fn lookup(table: &'static [f32; 16], index: Self::I) -> Self::F;
    /// `N` bytes, widened.
    unsafe fn load_codes(from: *const u8) -> Self::I;
    /// `4 N` numbers from 0 to 255 as bytes.
    unsafe fn store_codes(codes: [Self::I; 4], to: *mut u8);
    /// 511 less `4 N` numbers from 0 to 511: the upper eight bits to `upper`, the lowest to `lowest`, in
    /// the order that [`join_codes`](Lanes::join_codes) takes them in.
    unsafe fn split_codes(down: [Self::I; 4], upper: *mut u8, lowest: *mut u8);
    /// `4 N` numbers from -64 to 63, and 64, in the upper seven bits of bytes, and `lowest`.
    unsafe fn join_codes(codes: [Self::I; 4], lowest: *const u8, to: *mut u8);

    /// [`decode`](crate::codec::dynamic::decode) of `4 N` signed codes.
    #[inline(always)]
    unsafe fn decode_signed(from: *const u8) -> [Self::F; 4] {
        // SAFETY: this trait's contract, for `4 N` elements.
        unsafe { dynamic::decode_signed::<Self>(from) }
    }
    /// [`decode`](crate::codec::dynamic::decode) of `4 N` unsigned codes.
    #[inline(always)]
    unsafe fn decode_unsigned(from: *const u8) -> [Self::F; 4] {
        // SAFETY: as above.
        unsafe { dynamic::decode_unsigned::<Self>(from) }
    }
    /// [`encode`](crate::codec::dynamic::encode) of `4 N` finite normalized values with a sign.
    unsafe fn encode_signed(x: [Self::F; 4], to: *mut u8);
    /// [`encode`](crate::codec::dynamic::encode) of `4 N` finite normalized values without a sign,
    /// or, where the `values` themselves are positive,
    /// [`encode_positive`](crate::codec::dynamic::encode_positive).
    unsafe fn encode_unsigned(x: [Self::F; 4], values: [Self::F; 4], to: *mut u8);
}

/// Writes the methods of a [`Lanes`] implementation.
macro_rules! lanes {
    ($(
        $(#[$doc:meta])*
        fn $name:ident $(<const $by:ident: u32>)? ($($arg:tt: $type:ty),*) $(-> $out:ty)?
            $body:block
    )*) => {
        $($(#[$doc])*
        #[inline(always)]
        unsafe fn $name $(<const $by: u32>)? ($($arg: $type),*) $(-> $out)? {
            // SAFETY: the contract of `Lanes`: the instruction set is there, pointers are valid.
            unsafe { $body }
        })*
    };
}
pub(in crate::cpu) use lanes;

/// A type that [`Lanes`] can load and store.
pub(in crate::cpu) trait VectorFloat: Float {
    /// # Safety
    /// As [`Lanes`].
    unsafe fn load<L: Lanes>(from: *const Self) -> L::F;
    /// # Safety
    /// As [`Lanes`].
    unsafe fn store<L: Lanes>(x: L::F, to: *mut Self);
    /// What a kept element becomes, as [`Float::widen`] makes signaling NaNs of 16-bit types quiet, and
    /// loading need not.
    ///
    /// # Safety
    /// As [`Lanes`].
    #[inline(always)]
    unsafe fn kept<L: Lanes>(x: L::F) -> L::F {
        x
    }
    /// [`VectorFloat::load`] of `4 N` elements.
    ///
    /// # Safety
    /// As [`Lanes`], for `4 N` elements.
    #[inline(always)]
    unsafe fn load_4<L: Lanes>(from: *const Self) -> [L::F; 4] {
        // SAFETY: this function's contract.
        unsafe { each_of_4!(I => Self::load::<L>(from.add(I * L::N))) }
    }
    /// [`VectorFloat::store`] of `4 N` elements.
    ///
    /// # Safety
    /// As [`Lanes`], for `4 N` elements.
    #[inline(always)]
    unsafe fn store_4<L: Lanes>(x: [L::F; 4], to: *mut Self) {
        // SAFETY: this function's contract.
        unsafe {
            each_of_4!(I => Self::store::<L>(x[I], to.add(I * L::N)));
        }
    }
    /// Of `len` elements a magnitude in each lane, such that the largest is among them; NaN is larger
    /// than numbers.
    ///
    /// # Safety
    /// As [`Lanes`], for `len` elements, a multiple of `2 N`.
    unsafe fn largest<L: Lanes>(from: *const Self, len: usize) -> L::F;
}

macro_rules! vector_float {
    ($type:ty, $load:ident, $store:ident, $largest:ident $(, $kept:ident, $load_4:ident, $store_4:ident)?) => {
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
            #[inline(always)]
            unsafe fn largest<L: Lanes>(from: *const Self, len: usize) -> L::F {
                // SAFETY: the same contract.
                unsafe { $largest::<L, Self>(from, len) }
            }
            $(#[inline(always)]
            unsafe fn kept<L: Lanes>(x: L::F) -> L::F {
                // SAFETY: the same contract.
                unsafe { $kept::<L>(x) }
            }
            #[inline(always)]
            unsafe fn load_4<L: Lanes>(from: *const Self) -> [L::F; 4] {
                // SAFETY: the same contract.
                unsafe { L::$load_4(from) }
            }
            #[inline(always)]
            unsafe fn store_4<L: Lanes>(x: [L::F; 4], to: *mut Self) {
                // SAFETY: the same contract.
                unsafe { L::$store_4(x, to) }
            })?
        }
    };
}
vector_float!(f32, load, store, largest_of_lanes);
vector_float!(bf16, load_bf16, store_bf16, largest_of_words, quiet, load_bf16_4, store_bf16_4);
vector_float!(f16, load_f16, store_f16, largest_of_words);

/// The same number, and NaN without a signal.
#[inline(always)]
unsafe fn quiet<L: Lanes>(x: L::F) -> L::F {
    // SAFETY: the contract of `Lanes`.
    unsafe {
        let quiet = L::from_bits(L::or_i(L::bits(x), L::splat_i(0x40_0000)));
        L::select(L::is_nan(x), quiet, x)
    }
}

/// [`VectorFloat::largest`], vector by vector.
#[inline(always)]
unsafe fn largest_of_lanes<L: Lanes, T: VectorFloat>(from: *const T, len: usize) -> L::F {
    // SAFETY: the contract of `VectorFloat::largest`.
    unsafe {
        // as integers, magnitudes are in order, and NaN is the largest
        let mut largest = L::splat_i(0);
        for at in (0..len).step_by(L::N) {
            largest = L::max_i(largest, L::bits(L::abs(T::load::<L>(from.add(at)))));
        }
        L::from_bits(largest)
    }
}

/// [`VectorFloat::largest`] of 16-bit types, which are in the same order as words.
#[inline(always)]
unsafe fn largest_of_words<L: Lanes, T: VectorFloat>(from: *const T, len: usize) -> L::F {
    // SAFETY: the contract of `VectorFloat::largest`; `2 N` is at most 32.
    unsafe {
        let mut largest = L::splat_i(0);
        for at in (0..len).step_by(2 * L::N) {
            largest = L::max_words(largest, from.add(at).cast());
        }
        let mut words = [0_u16; 32];
        L::store_words(largest, words.as_mut_ptr());
        largest_of_lanes::<L, T>(words.as_ptr().cast(), 2 * L::N)
    }
}
