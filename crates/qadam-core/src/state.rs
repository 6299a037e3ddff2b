//! What buffers the state of one parameter has: their names, element types and lengths.
//!
//! The names at 32 bits are those of `torch.optim`, which can load such state as it is. The names
//! at 8 bits are unlike any other optimizer's, so that nobody takes a code for a value.

use crate::codec::BLOCK;

/// How the moments of a parameter are stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum StateFormat {
    /// Two f32 an element: 8 bytes.
    F32,
    /// Two 8-bit codes of bitsandbytes' dynamic map an element and two f32 scales a block: 2.03
    /// bytes.
    Dynamic8,
}

/// Element type of a state buffer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum StateType {
    /// f32 values.
    F32,
    /// 8-bit codes.
    U8,
}

/// One buffer of a parameter's state.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct BufferSpec {
    /// Its key in a state dict.
    pub name: &'static str,
    /// Its element type.
    pub dtype: StateType,
    /// Its length in elements.
    pub len: usize,
}

impl StateFormat {
    /// The format's name in messages.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::F32 => "32-bit",
            Self::Dynamic8 => "8-bit (dynamic)",
        }
    }

    /// The buffers of a parameter of `len` elements.
    #[must_use]
    pub fn buffers(self, len: usize) -> Vec<BufferSpec> {
        let spec = |name, dtype, len| BufferSpec { name, dtype, len };
        let blocks = len.div_ceil(BLOCK);
        match self {
            Self::F32 => {
                vec![spec("exp_avg", StateType::F32, len), spec("exp_avg_sq", StateType::F32, len)]
            }
            Self::Dynamic8 => vec![
                spec("exp_avg_code", StateType::U8, len),
                spec("exp_avg_scale", StateType::F32, blocks),
                spec("exp_avg_sq_code", StateType::U8, len),
                spec("exp_avg_sq_scale", StateType::F32, blocks),
            ],
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bytes(format: StateFormat, len: usize) -> usize {
        let size = |dtype| if dtype == StateType::F32 { 4 } else { 1 };
        format.buffers(len).iter().map(|buffer| buffer.len * size(buffer.dtype)).sum()
    }

    #[test]
    fn bytes_an_element() {
        assert_eq!(bytes(StateFormat::F32, 1_000), 8_000);
        assert_eq!(bytes(StateFormat::Dynamic8, 256_000), 256_000 * 2 + 8_000);
        assert_eq!(bytes(StateFormat::Dynamic8, 257), 257 * 2 + 16);
        assert_eq!(bytes(StateFormat::Dynamic8, 0), 0);
    }
}
