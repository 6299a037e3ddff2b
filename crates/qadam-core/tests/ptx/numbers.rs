//! Numbers to try: ordinary ones mostly, with every kind of trouble among them.

use qadam_core::clip::HISTORY;
use qadam_core::{DType, StateFormat, StateType};

use crate::model::{Buffer, Place, Tensor, encode};

/// SplitMix64: the same numbers on every machine.
#[derive(Clone)]
pub struct Numbers(pub u64);

/// How bad the numbers are.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// Finite, within [-1, 1].
    Ordinary,
    /// Any bits now and then.
    Adversarial,
}

const TROUBLE: [u32; 18] = [
    0x0000_0000, // 0
    0x8000_0000, // -0
    0x7FC0_0000, // NaN
    0x7F80_0001, // signalling NaN
    0xFFC1_2345, // NaN with a payload
    0x7F80_0000, // infinity
    0xFF80_0000, // -infinity
    0x0000_0001, // smallest subnormal
    0x8000_0001,
    0x007F_FFFF, // largest subnormal
    0x0080_0000, // smallest normal
    0x7F7F_FFFF, // largest
    0xFF7F_FFFF,
    0x5F00_0000, // the limit of gradients, 2^63
    0x5F00_0001,
    0x477F_E000, // largest f16
    0x477F_F000, // rounds to an infinite f16
    0x3300_0000, // half the smallest f16
];

impl Numbers {
    pub fn bits(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let z = (self.0 ^ self.0 >> 30).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        let z = (z ^ z >> 27).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ z >> 31
    }

    pub fn below(&mut self, n: usize) -> usize {
        (self.bits() % n as u64) as usize
    }

    pub fn float(&mut self, kind: Kind) -> f32 {
        let ordinary = (self.bits() >> 40) as f32 / 8_388_608.0 - 1.0;
        match (kind, self.below(16)) {
            (Kind::Ordinary, _) | (_, 0..=9) => ordinary,
            (_, 10..=12) => ordinary * (self.below(80) as f32 - 40.0).exp2(),
            (_, 13..=14) => f32::from_bits(self.bits() as u32),
            _ => f32::from_bits(TROUBLE[self.below(TROUBLE.len())]),
        }
    }

    pub fn floats(&mut self, kind: Kind, len: usize) -> Vec<f32> {
        (0..len).map(|_| self.float(kind)).collect()
    }

    /// Elements of `dtype`; also NaNs that no rounding gives.
    pub fn elements(&mut self, kind: Kind, dtype: DType, len: usize) -> Vec<u8> {
        let mut bytes = encode(&self.floats(kind, len), dtype);
        if kind == Kind::Adversarial {
            for element in bytes.chunks_mut(dtype.size()) {
                if self.below(20) == 0 {
                    element.copy_from_slice(&self.bits().to_le_bytes()[..dtype.size()]);
                }
            }
        }
        bytes
    }

    /// Squared norms: none yet, or some.
    pub fn history(&mut self) -> [f32; HISTORY] {
        match self.below(4) {
            0 => [0.0; HISTORY],
            1 => std::array::from_fn(|_| self.float(Kind::Adversarial)),
            n => std::array::from_fn(|_| self.float(Kind::Ordinary).abs() * [1.0, 1e4][n - 2]),
        }
    }

    pub fn grad(&mut self, kind: Kind, tensor: &Tensor) -> Buffer {
        Buffer::new(&self.elements(kind, tensor.grad_dtype, tensor.place.grad_span()))
    }

    /// A tensor with state that may come from anywhere.
    pub fn tensor(
        &mut self,
        kind: Kind,
        place: Place,
        (param_dtype, grad_dtype): (DType, DType),
        format: StateFormat,
    ) -> Tensor {
        let len = place.len();
        let param = Buffer::new(&self.elements(kind, param_dtype, place.param_span()));
        let state = format.buffers(len).into_iter().map(|spec| {
            if spec.dtype == StateType::U8 {
                let codes: Vec<u8> = (0..spec.len).map(|_| self.bits() as u8).collect();
                return Buffer::new(&codes);
            }
            let values = self.floats(kind, spec.len).into_iter().map(|x| match spec.name {
                "exp_avg" => x,
                // second moments and scales
                _ if kind == Kind::Ordinary => x * x,
                _ => x,
            });
            Buffer::floats(&values.collect::<Vec<_>>())
        });
        let state = state.collect();
        let step = self.below(50) as f32;
        let percentile = None;
        Tensor { place, param_dtype, grad_dtype, format, group: 0, step, param, state, percentile }
    }
}
