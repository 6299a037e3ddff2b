//! 8-bit codes for the moments: a byte a moment and element, and a few floats a block.
//!
//! * [`dynamic`] maps each moment by itself to bitsandbytes' 256 values, scaled by [`block`];
//! * [`ratio`] keeps the root of the second moment on a logarithmic grid, and the first moment as its
//!   ratio to that root.
//!
//! A further code is a file here, a line in [`Code`], and what the compiler then asks for.

pub mod block;
pub mod dynamic;
pub mod ratio;

pub use block::BLOCK;

/// Which code.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Code {
    /// [`dynamic`].
    Dynamic,
    /// [`ratio`].
    Ratio,
}

impl Code {
    /// All of them.
    pub const ALL: [Self; 2] = [Self::Dynamic, Self::Ratio];

    /// What `state_code` calls it.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Dynamic => "dynamic",
            Self::Ratio => "ratio",
        }
    }

    /// The code with which the state of a moment begins: that of zero.
    #[must_use]
    pub const fn zero(self, moment: Moment) -> u8 {
        match (self, moment) {
            (Self::Dynamic, Moment::First) => dynamic::zero_code(dynamic::Sign::Signed),
            (Self::Dynamic, _) => dynamic::zero_code(dynamic::Sign::Unsigned),
            (Self::Ratio, Moment::First) => ratio::ZERO_RATIO,
            (Self::Ratio, _) => ratio::ZERO_ROOT,
        }
    }

    /// How many floats a block has of a moment: a scale, or the two ends of a range.
    #[must_use]
    pub const fn scales(self, moment: Moment) -> usize {
        match (self, moment) {
            (Self::Ratio, Moment::Second | Moment::Largest) => 2,
            _ => 1,
        }
    }
}

/// Which moment.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Moment {
    /// `exp_avg`.
    First,
    /// `exp_avg_sq`.
    Second,
    /// `max_exp_avg_sq`, with `AMSGrad`.
    Largest,
}

impl Moment {
    /// In the order in which state has them.
    pub const ALL: [Self; 3] = [Self::First, Self::Second, Self::Largest];
}

/// What the codes of a moment are relative to, in a block or in a whole tensor.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct Scale {
    /// The lower end, of a range that has one.
    pub low: f32,
    /// The upper end, or the only scale.
    pub high: f32,
}

impl Scale {
    /// As it is in memory, [`Code::scales`] floats long.
    ///
    /// # Panics
    /// If there are neither one nor two.
    #[must_use]
    pub fn read(from: &[f32]) -> Self {
        match *from {
            [high] => Self { low: 0.0, high },
            [low, high] => Self { low, high },
            _ => panic!("{} floats are no scale", from.len()),
        }
    }

    /// Writes it as [`Scale::read`] reads it.
    ///
    /// # Panics
    /// As there.
    pub fn write(self, to: &mut [f32]) {
        match to {
            [high] => *high = self.high,
            [low, high] => (*low, *high) = (self.low, self.high),
            _ => panic!("{} floats are no scale", to.len()),
        }
    }

    /// Whether both have the same bits.
    pub(crate) const fn is(self, other: Self) -> bool {
        self.low.to_bits() == other.low.to_bits() && self.high.to_bits() == other.high.to_bits()
    }
}

/// The scales of the moments, the third of no account without one.
pub type Scales = [Scale; 3];
