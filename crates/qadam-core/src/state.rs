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

/// What one element of a state buffer belongs to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Per {
    /// One element of the parameter.
    Element,
    /// One block of the parameter's elements.
    Block,
}

/// One buffer of a parameter's state.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct BufferSpec {
    /// Its key in a state dict.
    pub name: &'static str,
    /// Its element type.
    pub dtype: StateType,
    /// What its elements belong to.
    pub per: Per,
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
        let values = |name| BufferSpec { name, dtype: StateType::F32, per: Per::Element, len };
        let codes = |name| BufferSpec { name, dtype: StateType::U8, per: Per::Element, len };
        let blocks = len.div_ceil(BLOCK);
        let scales =
            |name| BufferSpec { name, dtype: StateType::F32, per: Per::Block, len: blocks };
        match self {
            Self::F32 => vec![values("exp_avg"), values("exp_avg_sq")],
            Self::Dynamic8 => vec![
                codes("exp_avg_code"),
                scales("exp_avg_scale"),
                codes("exp_avg_sq_code"),
                scales("exp_avg_sq_scale"),
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
