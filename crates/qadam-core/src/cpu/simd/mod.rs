//! The vector kernels, written once over the operations of [`Lanes`].
//!
//! Each line mirrors one of [`rule`](crate::rule) or [`codec`](crate::codec); the tests compare the
//! two bit for bit. Every function here is inlined into a caller that enables the instruction set
//! (see [`avx2`](super::avx2), [`avx512`](super::avx512)): that, and the validity of the pointers, is
//! what the `unsafe` asks for.
//!
//! * [`lanes`] is what an instruction set supplies;
//! * [`update`] is the rule, [`dynamic`] the dynamic code's decoding;
//! * [`moments32`] and [`moments8`] are the step at either width; the latter goes through blocks, which
//!   are [`dynamic8`]'s or [`ratio8`]'s, and of [`mixed`] types through f32; [`pass`] is what these share with [`gauge`], which measures what
//!   a step would do.

#[cfg(test)]
mod codes;
mod dynamic;
mod dynamic8;
mod entry;
mod gauge;
mod lanes;
pub(super) mod mixed;
mod moments32;
mod moments8;
mod padded;
mod pass;
mod ratio8;
mod update;

#[cfg(test)]
pub(super) use codes::{decode, encode};
pub(super) use dynamic::{decode_signed, decode_unsigned};
pub(super) use entry::kernels;
pub(super) use gauge::{gauge8, gauge32};
pub(super) use lanes::{Lanes, VectorFloat, each_of_4, lanes};
pub(super) use moments8::step8;
pub(super) use moments32::step32;
