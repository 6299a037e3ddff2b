//! The kernels of a set of instructions.

/// Writes the kernels for `$lanes`, which a processor with `$features` has.
macro_rules! kernels {
    ($features:literal, $lanes:ty, $processor:literal) => {
        #[cfg(test)]
        use crate::codec::dynamic::Sign;
        use crate::cpu::kernels::Coded8;
        use crate::cpu::measure::Gauge;
        use crate::cpu::simd::{self, VectorFloat};
        use crate::rule::Coefficients;
        use crate::tensor::{Moments8, Moments32};

        #[doc = concat!("# Safety\nAs [`simd::step32`], on a processor with ", $processor, ".")]
        #[target_feature(enable = $features)]
        pub(in crate::cpu) unsafe fn step32<P: VectorFloat, G: VectorFloat>(
            param: *mut u8,
            grad: *const u8,
            moments: Moments32,
            len: usize,
            c: &Coefficients,
        ) -> usize {
            // SAFETY: this function's contract; the instruction set is enabled.
            unsafe { simd::step32::<$lanes, P, G>(param, grad, moments, len, c) }
        }

        #[doc = concat!("# Safety\nAs [`simd::step8`], on a processor with ", $processor, ".")]
        #[target_feature(enable = $features)]
        pub(in crate::cpu) unsafe fn step8<P: VectorFloat, G: VectorFloat>(
            param: *mut u8,
            grad: *const u8,
            moments: Coded8,
            len: usize,
            c: &Coefficients,
        ) -> usize {
            // SAFETY: this function's contract; the instruction set is enabled.
            unsafe { simd::step8::<$lanes, P, G>(param, grad, moments, len, c) }
        }

        #[doc = concat!("# Safety\nAs [`simd::mixed::step8`], on a processor with ", $processor, ".")]
        #[target_feature(enable = $features)]
        pub(in crate::cpu) unsafe fn mixed_step8<P: VectorFloat, G: VectorFloat>(
            param: *mut u8,
            grad: *const u8,
            moments: Coded8,
            len: usize,
            c: &Coefficients,
        ) -> usize {
            let kernel = step8::<f32, f32>;
            // SAFETY: this function's contract; the instruction set is enabled.
            unsafe { simd::mixed::step8::<$lanes, P, G>(param, grad, moments, len, c, kernel) }
        }

        #[doc = concat!("# Safety\nAs [`simd::mixed::gauge8`], on a processor with ", $processor, ".")]
        #[target_feature(enable = $features)]
        pub(in crate::cpu) unsafe fn mixed_gauge8<P: VectorFloat, G: VectorFloat>(
            param: *const u8,
            grad: *const u8,
            moments: Moments8,
            len: usize,
            c: &Coefficients,
            gauge: &mut Gauge,
        ) {
            let kernel = gauge8::<f32, f32>;
            // SAFETY: this function's contract; the instruction set is enabled.
            unsafe {
                simd::mixed::gauge8::<$lanes, P, G>(param, grad, moments, len, c, gauge, kernel);
            }
        }

        #[doc = concat!("# Safety\nAs [`simd::gauge32`], on a processor with ", $processor, ".")]
        #[target_feature(enable = $features)]
        pub(in crate::cpu) unsafe fn gauge32<P: VectorFloat, G: VectorFloat>(
            param: *const u8,
            grad: *const u8,
            moments: Moments32,
            len: usize,
            c: &Coefficients,
            gauge: &mut Gauge,
        ) {
            // SAFETY: this function's contract; the instruction set is enabled.
            unsafe { simd::gauge32::<$lanes, P, G>(param, grad, moments, len, c, gauge) }
        }

        #[doc = concat!("# Safety\nAs [`simd::gauge8`], on a processor with ", $processor, ".")]
        #[target_feature(enable = $features)]
        pub(in crate::cpu) unsafe fn gauge8<P: VectorFloat, G: VectorFloat>(
            param: *const u8,
            grad: *const u8,
            moments: Moments8,
            len: usize,
            c: &Coefficients,
            gauge: &mut Gauge,
        ) {
            // SAFETY: this function's contract; the instruction set is enabled.
            unsafe { simd::gauge8::<$lanes, P, G>(param, grad, moments, len, c, gauge) }
        }

        #[doc = concat!("# Safety\nOn a processor with ", $processor, ".")]
        #[cfg(test)]
        #[target_feature(enable = $features)]
        pub(in crate::cpu) unsafe fn encode(x: &[f32; 64], sign: Sign) -> [u8; 64] {
            // SAFETY: the instruction set is enabled.
            unsafe { simd::encode::<$lanes>(x, sign) }
        }

        #[doc = concat!("# Safety\nOn a processor with ", $processor, ".")]
        #[cfg(test)]
        #[target_feature(enable = $features)]
        pub(in crate::cpu) unsafe fn decode(codes: &[u8; 64], sign: Sign) -> [f32; 64] {
            // SAFETY: the instruction set is enabled.
            unsafe { simd::decode::<$lanes>(codes, sign) }
        }
    };
}
pub(in crate::cpu) use kernels;
