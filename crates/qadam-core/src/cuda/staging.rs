//! Uploading a table: pinned slots that the host fills in turn, never one that is still being read.

use std::ops::Range;

use cudarc::driver::sys::CUstream;

use super::driver::Context;
use super::memory::{DeviceMemory, Event, Pinned};
use crate::error::{Error, Result};

/// How many uploads the host may be ahead of the device.
const SLOTS: usize = 4;

/// `CUDA_ERROR_NOT_READY`.
const NOT_READY: u32 = 600;

/// What a slot's last upload is known to have done.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Upload {
    /// Nothing reads the slot.
    Done,
    /// It has been read when the slot's event has happened.
    Recorded,
    /// A driver call failed: no event tells. The slot is not used again.
    Unknown,
}

#[derive(Debug)]
struct Slot {
    event: Event,
    upload: Upload,
}

/// The slots, one after the other in pinned memory.
#[derive(Debug)]
pub(super) struct Ring {
    context: &'static Context,
    memory: Pinned,
    slots: Vec<Slot>,
    /// The slot whose last upload is the oldest.
    oldest: usize,
}

impl Ring {
    /// Slots of `bytes` each. The context is current.
    pub fn new(context: &'static Context, bytes: usize) -> Result<Self> {
        let memory = Pinned::new(context, bytes * SLOTS, "uploads")?;
        let slot = |_| Ok(Slot { event: Event::new(context)?, upload: Upload::Done });
        let slots = (0..SLOTS).map(slot).collect::<Result<_>>()?;
        Ok(Self { context, memory, slots, oldest: 0 })
    }

    /// How much pinned memory the slots take.
    pub const fn bytes(&self) -> usize {
        self.memory.bytes
    }

    /// How long an upload may be.
    pub const fn slot(&self) -> usize {
        self.memory.bytes / SLOTS
    }

    /// Whether no slot can be used any more.
    pub fn is_lost(&self) -> bool {
        self.slots.iter().all(|slot| slot.upload == Upload::Unknown)
    }

    /// A slot that nothing reads; waits for one only if the host is [`SLOTS`] uploads ahead.
    fn free(&mut self) -> Result<usize> {
        let order = (0..SLOTS).map(|i| (self.oldest + i) % SLOTS);
        let mut waiting = None;
        for index in order {
            let slot = &mut self.slots[index];
            if slot.upload == Upload::Recorded {
                // SAFETY: the event is the slot's own.
                let code = unsafe { (self.context.driver.api.cuEventQuery)(slot.event.handle) };
                if code == NOT_READY {
                    waiting = waiting.or(Some(index));
                    continue;
                }
                self.context.check(code, || "asking whether an upload is done".to_owned())?;
                slot.upload = Upload::Done;
            }
            if slot.upload == Upload::Done {
                return Ok(index);
            }
        }
        let Some(index) = waiting else {
            let doing = "looking for staging memory".to_owned();
            return Err(Error::Cuda { name: "every upload failed".to_owned(), code: 0, doing });
        };
        let slot = &mut self.slots[index];
        // SAFETY: the event is the slot's own.
        let code = unsafe { (self.context.driver.api.cuEventSynchronize)(slot.event.handle) };
        self.context.check(code, || "waiting for an upload".to_owned())?;
        slot.upload = Upload::Done;
        Ok(index)
    }

    /// Lets `fill` write an image of `to`'s beginning, and enqueues the copy of its bytes `range`.
    ///
    /// # Safety
    /// The context is current, `stream` is one of its streams and is not being captured, `range`
    /// lies within `to` and a slot, and no other work uses `to` meanwhile.
    pub unsafe fn upload(
        &mut self,
        to: &DeviceMemory,
        range: Range<usize>,
        stream: CUstream,
        fill: impl FnOnce(&mut [u8]),
    ) -> Result<()> {
        let index = self.free()?;
        let bytes = self.slot();
        // SAFETY: slot `index` of the pinned memory, which is initialised; nothing reads it
        // (`free`), and `&mut self` lends it once.
        let image = unsafe {
            std::slice::from_raw_parts_mut(self.memory.host::<u8>().add(index * bytes), bytes)
        };
        fill(image);
        self.oldest = (index + 1) % SLOTS;
        let slot = &mut self.slots[index];
        slot.upload = Upload::Unknown;
        let api = &self.context.driver.api;
        let target = to.address + range.start as u64;
        let source = image[range.clone()].as_ptr().cast();
        // SAFETY: `range` lies within both (sliced above; contract); the slot is not written again
        // before the event recorded below has happened.
        let code = unsafe { (api.cuMemcpyHtoDAsync_v2)(target, source, range.len(), stream) };
        self.context.check(code, || format!("uploading {} bytes of the table", range.len()))?;
        // SAFETY: the slot's event; a valid stream by contract.
        let code = unsafe { (api.cuEventRecord)(slot.event.handle, stream) };
        self.context.check(code, || "marking the end of an upload".to_owned())?;
        slot.upload = Upload::Recorded;
        Ok(())
    }
}
