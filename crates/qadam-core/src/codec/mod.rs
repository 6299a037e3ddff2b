//! 8-bit codes for the moments.
//!
//! A code maps a number of at most 1 in magnitude to a byte and back; [`block`] scales 256
//! consecutive elements to that range. [`dynamic`] is the one code so far.

pub mod block;
pub mod dynamic;

pub use block::BLOCK;
