//! The CUDA back end: all tensors of an optimizer in one launch, on the caller's stream.
//!
//! Nothing here is needed to build: the driver is found when it is first asked for
//! ([`availability`]), and the kernels are PTX that it compiles. `driver` speaks to it, `module`
//! loads the kernels, `table` is the memory that host and kernels share, `plan` fills it, `memory`
//! and `staging` own and upload it, `capture` keeps what CUDA graphs refer to, and [`Launcher`]
//! puts them together. [`Stepper`] does so for state that may be paged: `window` cuts its steps,
//! `prefetch` brings their pages.

mod api;
mod capture;
mod driver;
mod launch;
mod memory;
mod module;
mod plan;
mod prefetch;
mod staging;
mod stepper;
mod table;
mod window;
mod work;

pub use driver::availability;
pub(crate) use driver::{Context, consequence};
pub use launch::Launcher;
pub(crate) use memory::ManagedMemory;
pub use plan::{DeviceCoded, DeviceState, DeviceStep};
pub use stepper::Stepper;
pub use work::Work;
