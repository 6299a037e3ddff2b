//! What single operations compute: pure functions of bits, after the PTX ISA 8.0 manual.

pub mod convert;
pub mod float;
pub mod int;
