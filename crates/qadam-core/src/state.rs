//! What buffers the state of one parameter has: their names, element types and lengths.
//!
//! The names at 32 bits are those of `torch.optim`, which can load such state as it is. The names
//! at 8 bits are unlike any other optimizer's, so that nobody takes a code for a value.

use std::fmt;

use crate::codec::{BLOCK, Code, Moment};

/// How a moment is stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum StateCode {
    /// An f32 an element.
    F32,
    /// An 8-bit code an element, and f32 scales.
    Coded(Code),
}

/// How the state of a parameter is stored, and what belongs to it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct StateFormat {
    /// How each moment is stored.
    pub code: StateCode,
    /// Whether there is a third moment: the largest second moment so far, by which `AMSGrad` divides.
    pub amsgrad: bool,
    /// Whether codes have a scale a block, as they should; else each moment has one scale for the
    /// whole tensor (bitsandbytes' `block_wise=False`). Of no account at 32 bits.
    pub block_wise: bool,
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
    /// The whole parameter.
    Tensor,
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
    /// Two f32 an element: 8 bytes.
    pub const F32: Self = Self { code: StateCode::F32, amsgrad: false, block_wise: true };
    /// Two 8-bit codes an element and two f32 scales a block: 2.03 bytes an element.
    pub const DYNAMIC8: Self = Self::coded(Code::Dynamic);
    /// Two bytes an element and three f32 a block: 2.05 bytes an element.
    pub const RATIO8: Self = Self::coded(Code::Ratio);

    /// 8 bits a moment and element, in this code.
    #[must_use]
    pub const fn coded(code: Code) -> Self {
        Self { code: StateCode::Coded(code), amsgrad: false, block_wise: true }
    }

    /// The same with or without the third moment: half as many bytes more.
    #[must_use]
    pub const fn with_amsgrad(self, amsgrad: bool) -> Self {
        Self { amsgrad, ..self }
    }

    /// The same with a scale a block or, if it has codes, one scale for the whole tensor.
    #[must_use]
    pub const fn with_block_wise(self, block_wise: bool) -> Self {
        let has_codes = matches!(self.code, StateCode::Coded(_));
        Self { block_wise: block_wise || !has_codes, ..self }
    }

    /// The buffers of a parameter of `len` elements, moment by moment; the third moment's come last.
    #[must_use]
    pub fn buffers(self, len: usize) -> Vec<BufferSpec> {
        let values = |name| BufferSpec { name, dtype: StateType::F32, per: Per::Element, len };
        let codes = |name| BufferSpec { name, dtype: StateType::U8, per: Per::Element, len };
        let (per, count) = if self.block_wise {
            (Per::Block, len.div_ceil(BLOCK))
        } else {
            (Per::Tensor, len.min(1))
        };
        let mut buffers = match self.code {
            StateCode::F32 => {
                vec![values("exp_avg"), values("exp_avg_sq"), values("max_exp_avg_sq")]
            }
            StateCode::Coded(code) => {
                let scales = |moment| {
                    let (name, len) = (scale_name(code, moment), count * code.scales(moment));
                    BufferSpec { name, dtype: StateType::F32, per, len }
                };
                vec![
                    codes("exp_avg_code"),
                    scales(Moment::First),
                    codes("exp_avg_sq_code"),
                    scales(Moment::Second),
                    codes("max_exp_avg_sq_code"),
                    scales(Moment::Largest),
                ]
            }
        };
        if !self.amsgrad {
            buffers.truncate(buffers.len() / 3 * 2);
        }
        buffers
    }
}

/// The key of the scales of a moment: a range is named as such, so that state says which code it is in.
const fn scale_name(code: Code, moment: Moment) -> &'static str {
    match (moment, code.scales(moment)) {
        (Moment::First, _) => "exp_avg_scale",
        (Moment::Second, 1) => "exp_avg_sq_scale",
        (Moment::Second, _) => "exp_avg_sq_range",
        (Moment::Largest, 1) => "max_exp_avg_sq_scale",
        (Moment::Largest, _) => "max_exp_avg_sq_range",
    }
}

impl fmt::Display for StateFormat {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.code {
            StateCode::F32 => f.write_str("32-bit")?,
            StateCode::Coded(code) => write!(f, "8-bit ({})", code.name())?,
        }
        f.write_str(if self.block_wise { "" } else { ", one scale" })?;
        f.write_str(if self.amsgrad { " with AMSGrad" } else { "" })
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
        assert_eq!(bytes(StateFormat::F32.with_amsgrad(true), 1_000), 12_000);
        for (amsgrad, moments) in [(false, 2), (true, 3)] {
            let format = StateFormat::DYNAMIC8.with_amsgrad(amsgrad);
            assert_eq!(bytes(format, 256_000), (256_000 + 4_000) * moments);
            assert_eq!(bytes(format, 257), (257 + 8) * moments);
            assert_eq!(bytes(format, 0), 0);
            let whole = format.with_block_wise(false);
            assert_eq!(bytes(whole, 256_000), (256_000 + 4) * moments);
            assert_eq!(bytes(whole, 0), 0);
            let ratio = StateFormat::RATIO8.with_amsgrad(amsgrad);
            let scales = moments * 2 - 1;
            assert_eq!(bytes(ratio, 256_000), 256_000 * moments + 4_000 * scales);
            assert_eq!(bytes(ratio, 257), 257 * moments + 8 * scales);
            assert_eq!(bytes(ratio.with_block_wise(false), 257), 257 * moments + 4 * scales);
            assert_eq!(bytes(ratio, 0), 0);
        }
        assert_eq!(StateFormat::F32.with_block_wise(false), StateFormat::F32);
    }

    #[test]
    fn the_third_moment_comes_last() {
        let whole = StateFormat::DYNAMIC8.with_block_wise(false);
        for format in [StateFormat::F32, StateFormat::DYNAMIC8, StateFormat::RATIO8, whole] {
            let (two, three) = (format.buffers(300), format.with_amsgrad(true).buffers(300));
            let third = three.strip_prefix(&two[..]).unwrap();
            assert!(third.iter().all(|buffer| buffer.name.starts_with("max_exp_avg_sq")));
            let second = two[two.len() / 2..].iter();
            let second: Vec<_> = second.map(|b| (b.dtype, b.per, b.len)).collect();
            assert_eq!(third.iter().map(|b| (b.dtype, b.per, b.len)).collect::<Vec<_>>(), second);
        }
    }

    #[test]
    fn messages_name_what_differs() {
        let text = StateFormat::DYNAMIC8.with_amsgrad(true).to_string();
        assert_eq!(text, "8-bit (dynamic) with AMSGrad");
        let text = StateFormat::DYNAMIC8.with_block_wise(false).to_string();
        assert_eq!(text, "8-bit (dynamic), one scale");
        assert_eq!(StateFormat::F32.to_string(), "32-bit");
    }
}
