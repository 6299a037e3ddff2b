//! The exported driver functions, by subject.

pub mod context;
pub mod device;
pub mod event;
pub mod graph;
pub mod launch;
pub mod memory;
pub mod module;
pub mod proc;
pub mod stream;
