#![doc = include_str!("../README.md")]
#![deny(missing_docs, clippy::undocumented_unsafe_blocks)]
// A dev-only crate: nobody outside the workspace calls these, and every error type explains itself.
#![allow(clippy::must_use_candidate, clippy::missing_errors_doc)]
// Faults travel boxed on purpose: they are large, and the way without one should not be.
#![allow(clippy::unnecessary_box_returns)]
// Tables read as the manual has them, equal rows and all; two loops over them are long.
#![allow(clippy::match_same_arms, clippy::too_many_lines)]
// A decoder's helpers are called alike, whether they look at its state or not.
#![allow(clippy::unused_self)]

pub mod alu;
pub mod decode;
pub mod driver;
pub mod error;
pub mod exec;
pub mod fault;
pub mod inst;
pub mod memory;
pub mod module;
pub mod ptx;
pub mod regs;
pub mod shared;
