//! The CUDA back end: all tensors of an optimizer in one launch, on the caller's stream.
//!
//! Nothing here is needed to build: the driver is found when it is first asked for
//! ([`availability`]), and the kernels are PTX that it compiles. `driver` speaks to it, `module`
//! loads the kernels, `request` is what they are asked for, `table` the memory that host and kernels
//! share, `plan` fills it, `memory` and `staging` own and upload it, `capture` keeps what CUDA graphs
//! refer to, and [`Launcher`] puts them together. [`Stepper`] does so for state that may be paged,
//! `window` cutting its steps and `prefetch` bringing their pages, and for gradients that are cut.

mod api;
mod capture;
mod driver;
mod launch;
mod memory;
mod module;
mod plan;
mod prefetch;
mod request;
mod staging;
mod stepper;
mod table;
mod window;
mod work;

pub use driver::availability;
pub(crate) use driver::{Context, consequence};
pub use launch::Launcher;
pub(crate) use memory::ManagedMemory;
pub use request::{DeviceClip, DeviceCoded, DevicePercentile, DeviceState, DeviceStep};
pub use stepper::Stepper;
pub use work::Work;
