//! Element types of parameters and gradients: f32, bf16 and f16, each widened to f32 for the
//! arithmetic and rounded to nearest even on the way back.

use half::{bf16, f16};

use crate::error::{Error, Result};

/// The element type of a parameter or gradient.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum DType {
    /// IEEE binary32.
    F32,
    /// bfloat16.
    BF16,
    /// IEEE binary16.
    F16,
}

impl DType {
    /// Every element type.
    pub const ALL: [Self; 3] = [Self::F32, Self::BF16, Self::F16];
    /// The names that [`DType::from_name`] accepts, for messages.
    pub const NAMES: &str = "float32, bfloat16, float16";

    /// Size of an element in bytes.
    #[must_use]
    pub const fn size(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::BF16 | Self::F16 => 2,
        }
    }

    /// torch's name of the type.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::F32 => "float32",
            Self::BF16 => "bfloat16",
            Self::F16 => "float16",
        }
    }

    /// The type that torch calls `name`.
    ///
    /// # Errors
    /// [`Error::UnknownDType`] for any other name.
    pub fn from_name(name: &str) -> Result<Self> {
        Self::ALL
            .into_iter()
            .find(|dtype| dtype.name() == name)
            .ok_or_else(|| Error::UnknownDType { name: name.to_owned() })
    }
}

mod sealed {
    pub trait Sealed {}
    impl Sealed for f32 {}
    impl Sealed for half::bf16 {}
    impl Sealed for half::f16 {}
}

/// A Rust type that stands for a [`DType`]; sealed, as the kernels are written for these three.
pub trait Float: sealed::Sealed + Copy + Default + Send + Sync + 'static {
    /// The type's tag.
    const DTYPE: DType;
    /// Widens, exactly.
    fn widen(self) -> f32;
    /// Rounds to nearest, ties to even; overflow gives infinity.
    fn round(x: f32) -> Self;
}

impl Float for f32 {
    const DTYPE: DType = DType::F32;
    fn widen(self) -> f32 {
        self
    }
    fn round(x: f32) -> Self {
        x
    }
}

impl Float for bf16 {
    const DTYPE: DType = DType::BF16;
    fn widen(self) -> f32 {
        self.to_f32()
    }
    fn round(x: f32) -> Self {
        Self::from_f32(x)
    }
}

impl Float for f16 {
    const DTYPE: DType = DType::F16;
    fn widen(self) -> f32 {
        self.to_f32()
    }
    fn round(x: f32) -> Self {
        Self::from_f32(x)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_go_both_ways_and_others_are_refused() {
        for dtype in DType::ALL {
            assert_eq!(DType::from_name(dtype.name()), Ok(dtype));
        }
        let text = DType::from_name("float64").unwrap_err().to_string();
        assert_eq!(
            text,
            "\"float64\" is not an element type of qadam; float32, bfloat16, float16 are"
        );
    }
}
