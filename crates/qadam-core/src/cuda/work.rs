//! How much memory stepping itself takes.

use std::iter::Sum;
use std::ops::Add;

/// Memory held for tables and for what uploads them, in bytes; state is not counted.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Work {
    /// On the device.
    pub device: usize,
    /// Pinned, on the host.
    pub host: usize,
}

impl Add for Work {
    type Output = Self;

    fn add(self, other: Self) -> Self {
        Self { device: self.device + other.device, host: self.host + other.host }
    }
}

impl Sum for Work {
    fn sum<I: Iterator<Item = Self>>(parts: I) -> Self {
        parts.fold(Self::default(), Self::add)
    }
}
