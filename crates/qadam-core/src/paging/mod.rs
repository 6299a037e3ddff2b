//! Where optimizer state lives when it does not fit beside the parameters: one tier below them.
//!
//! * [`managed`]: for CUDA parameters, managed memory whose pages the driver moves to the device and
//!   out of it;
//! * [`mapped`]: for CPU parameters, a file that is mapped into memory and that the kernel can write
//!   out;
//! * `stream`: moves the pages of a step between file and memory, ahead of the arithmetic and
//!   behind it;
//! * `budget`: how much of the state may stay in memory;
//! * `file`: the system calls;
//! * `extents`: where each buffer lies within an arena;
//! * `registry`: finds the arena that an address belongs to.
//!
//! An arena holds the state of many parameters. Steps take addresses as always; the back ends ask
//! here whether an address is paged, and move pages ahead of the arithmetic. Paging never changes a
//! bit. `docs/paging.md` describes what moves when.

mod budget;
mod extents;
mod file;
pub mod managed;
pub mod mapped;
mod registry;
pub(crate) mod stream;

pub use extents::Extents;
pub(crate) use extents::HUGE;
