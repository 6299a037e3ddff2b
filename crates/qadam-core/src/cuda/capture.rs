//! Tables of captured steps.
//!
//! A captured step is replayed at times of which nobody tells, so it has a table and staging memory
//! of its own that never change again, and its graph begins by copying the one to the other. Both
//! live as long as the [`Launcher`](super::Launcher). Nothing may be allocated during a capture:
//! what one will need is kept ready.

use std::ffi::c_void;

use cudarc::driver::sys::CUstream;

use super::driver::Context;
use super::memory::{DeviceMemory, Pinned};
use super::plan::{Plan, Room};
use super::work::Work;
use crate::error::{Error, Result};

/// Memory for one captured step.
#[derive(Debug)]
struct Pair {
    table: DeviceMemory,
    staging: Pinned,
}

impl Pair {
    const fn room(&self) -> Room {
        Room { image: self.staging.bytes, device: self.table.bytes }
    }
}

/// What captured steps use, and what the next ones will.
#[derive(Debug)]
pub(super) struct Captures {
    context: &'static Context,
    spare: Vec<Pair>,
    frozen: Vec<(Plan, Pair)>,
}

impl Captures {
    /// Nothing captured, nothing ready.
    pub const fn new(context: &'static Context) -> Self {
        Self { context, spare: Vec::new(), frozen: Vec::new() }
    }

    /// Sees to it that `count` steps whose tables take so much can be captured. The context is
    /// current, and no stream is being captured.
    pub fn prepare(&mut self, room: Room, count: usize) -> Result<()> {
        let Room { image, device } = room;
        let fitting = |pair: &Pair| pair.room().holds(room);
        while self.spare.iter().filter(|pair| fitting(pair)).count() < count {
            let table = DeviceMemory::new(self.context, device, "the table of a captured step")?;
            let staging = Pinned::new(self.context, image, "a captured step")?;
            // A smaller spare was never used, and would not be.
            self.spare.retain(fitting);
            self.spare.push(Pair { table, staging });
        }
        Ok(())
    }

    /// How much memory is held.
    pub fn work(&self) -> Work {
        let pairs = self.spare.iter().chain(self.frozen.iter().map(|(_, pair)| pair));
        pairs.map(|pair| Work { device: pair.table.bytes, host: pair.staging.bytes }).sum()
    }

    /// Captures the upload of a table and gives its device address.
    ///
    /// # Safety
    /// The context is current and `stream` is one of its streams, being captured.
    pub unsafe fn upload(&mut self, plan: &Plan, nonfinite: u64, stream: CUstream) -> Result<u64> {
        let bytes = plan.room().image;
        let index = match self.frozen.iter().position(|(old, _)| plan.changed(old).is_empty()) {
            Some(index) => index,
            None => self.freeze(plan, nonfinite)?,
        };
        let Pair { table, staging } = &self.frozen[index].1;
        let (target, source) = (table.address, staging.host::<c_void>().cast_const());
        let api = &self.context.driver.api;
        // SAFETY: both hold at least `bytes`; neither is written by the host nor freed before the
        // launcher is dropped, before which its user destroys the graph.
        let code = unsafe { (api.cuMemcpyHtoDAsync_v2)(target, source, bytes, stream) };
        self.context.check(code, || format!("capturing the upload of {bytes} bytes"))?;
        Ok(target)
    }

    /// Fills a spare pair, for good.
    fn freeze(&mut self, plan: &Plan, nonfinite: u64) -> Result<usize> {
        let room = plan.room();
        let bytes = room.image;
        let fits = |pair: &Pair| pair.room().holds(room);
        let Some(index) = self.spare.iter().position(fits) else {
            let reason = format!(
                "no memory is ready for its table of {} bytes; run a step with the same \
                 tensors before each captured step, or reserve memory for several",
                room.device
            );
            return Err(Error::Capture { reason });
        };
        let pair = self.spare.swap_remove(index);
        // SAFETY: initialised memory of `bytes` or more, which nothing else refers to yet.
        let image = unsafe { std::slice::from_raw_parts_mut(pair.staging.host(), bytes) };
        plan.write(&(0..bytes), pair.table.address, nonfinite, image);
        self.frozen.push((plan.clone(), pair));
        Ok(self.frozen.len() - 1)
    }
}
