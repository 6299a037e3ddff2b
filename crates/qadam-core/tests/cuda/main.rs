//! The CUDA back end on softgpu's stand-in `libcuda.so`: the same bits as the CPU, few driver calls,
//! nothing touched where one fails, nothing left behind.

mod availability;
mod bits;
mod calls;
mod cuts;
mod device;
mod faults;
mod graphs;
mod model;
mod paged;
#[path = "../../../softgpu/tests/common/stand_in.rs"]
mod stand_in;
