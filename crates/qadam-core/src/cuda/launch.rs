//! One launch for all tensors of an optimizer on a device.

use std::any::Any;
use std::ffi::c_void;
use std::ops::Range;
use std::ptr::{null_mut, without_provenance_mut};
use std::sync::atomic::{AtomicU64, Ordering};

use cudarc::driver::sys::{CUfunction, CUstream};

use super::capture::Captures;
use super::driver::Context;
use super::memory::{DeviceMemory, Event, Pinned};
use super::plan::{Plan, Purpose, Room};
use super::request::DeviceStep;
use super::staging::Ring;
use super::table::CUT;
use super::work::Work;
use crate::error::{Error, Result};

/// Threads of a block.
const THREADS: u32 = 256;
/// Chunks of a block: one a warp.
const WARPS: usize = 8;
/// `CUDA_ERROR_INVALID_HANDLE`.
const INVALID_HANDLE: u32 = 400;

/// Steps the tensors of one optimizer on one device.
///
/// What the kernels need to know of the tensors is a table in device memory. A step uploads what
/// changed since the last one and launches once; if nothing changed it only launches. It never
/// waits for the device, except when the tables grow, or the host is four uploads ahead.
///
/// # CUDA graphs
/// A step on a stream that is being captured is recorded together with its own copy of the table,
/// so later steps, captured or not, do not disturb a replay. The copy's memory is taken while
/// nothing is captured: by every step for one capture after it, by [`Launcher::reserve`] for more.
/// It is freed with the launcher, which must therefore outlive the graphs. Replays and other steps
/// on other streams are ordered by their user.
#[derive(Debug)]
pub struct Launcher {
    context: &'static Context,
    /// A u64: non-finite elements so far.
    nonfinite: Pinned,
    /// Orders a stream behind the one used before.
    order: Event,
    tables: Option<Tables>,
    /// What the table holds; nothing is known of it if `None`.
    uploaded: Option<Plan>,
    /// What the table is to hold; kept for its memory.
    next: Plan,
    /// The stream that used the table last.
    stream: Option<u64>,
    captures: Captures,
    /// u64 a tensor: its non-finite gradients.
    counts: Option<Pinned>,
    /// What work may still use: freed at the end.
    retired: Vec<Retired>,
}

/// Memory that is kept only for work that may still use it.
#[derive(Debug)]
struct Retired {
    work: Work,
    _memory: Box<dyn Any + Send + Sync>,
}

/// The table and what fills it.
#[derive(Debug)]
struct Tables {
    device: DeviceMemory,
    ring: Ring,
}

impl Tables {
    fn work(&self) -> Work {
        Work { device: self.device.bytes, host: self.ring.bytes() }
    }

    const fn room(&self) -> Room {
        Room { image: self.ring.slot(), device: self.device.bytes }
    }
}

/// Kernels to be launched one after the other, each over so many blocks.
pub(super) type Launches = [Option<(CUfunction, u32)>; 2];

/// A step that only has to be launched.
#[derive(Debug)]
pub(super) struct Ready {
    table: u64,
    launches: Launches,
    found: Range<usize>,
}

impl Ready {
    /// Where the kernels put what they find of each gradient, if it is to be cut.
    pub fn found(&self) -> Vec<u64> {
        self.found.clone().step_by(CUT).map(|offset| self.table + offset as u64).collect()
    }
}

/// The room to take where `room` is needed and there is `have`.
fn enough(room: Room, have: Room) -> Room {
    let grown = |bytes, have: usize| if bytes > have { capacity(bytes, have) } else { have };
    Room { image: grown(room.image, have.image), device: grown(room.device, have.device) }
}

/// How many bytes to allocate where `bytes` are needed and there are `have`: old tables are kept
/// to the end, so each is at least twice the one before.
fn capacity(bytes: usize, have: usize) -> usize {
    bytes.max(2 * have).next_multiple_of(16 << 10)
}

/// A stream given as an integer.
pub(super) fn handle(stream: u64) -> CUstream {
    without_provenance_mut(stream as usize)
}

impl Launcher {
    /// A launcher for the device of this number, in its primary context.
    ///
    /// # Errors
    /// [`Error::CudaUnavailable`] where there is no such device or it is too old, [`Error::Cuda`].
    pub fn new(ordinal: usize) -> Result<Self> {
        let context = Context::get(ordinal)?;
        let _current = context.enter()?;
        Ok(Self {
            context,
            nonfinite: Pinned::new(context, 8, "a counter")?,
            order: Event::new(context)?,
            tables: None,
            uploaded: None,
            next: Plan::default(),
            stream: None,
            captures: Captures::new(context),
            counts: None,
            retired: Vec::new(),
        })
    }

    /// One launch for all of `steps` on `stream` (a `CUstream` as an integer); two where something has
    /// to be known of a whole tensor first ([`Hyper::max_unorm`](crate::Hyper), or one scale a moment).
    ///
    /// # Errors
    /// [`Error::Address`], [`Error::Dimensions`], [`Error::Hyperparameter`], [`Error::Capture`],
    /// [`Error::Cuda`]; after each, no parameter, state or step count has been touched, and the
    /// launcher can be used again unless the message says that the device cannot.
    ///
    /// # Safety
    /// Until the launch has run (each time, if it is captured):
    ///
    /// * every address in `steps` is that of device memory which holds what [`DeviceStep`] says,
    ///   valid for every offset that its `walk` visits;
    /// * parameters, states and step counts do not overlap each other or a gradient, and nothing
    ///   else writes them.
    ///
    /// `stream` is a stream of the device's primary context, and is not destroyed before the next
    /// step on another stream has returned or the launcher is dropped. (torch never destroys its
    /// streams.)
    pub unsafe fn step(&mut self, steps: &[DeviceStep], stream: u64) -> Result<()> {
        if steps.is_empty() {
            return Ok(());
        }
        let launches = self.plan(steps.iter().enumerate(), Purpose::Step)?;
        let _current = self.context.enter()?;
        // SAFETY: the context is current, the stream valid by contract, which holds for the steps.
        unsafe {
            let capturing = self.context.is_capturing(handle(stream))?;
            let ready = self.prepare(launches, stream, capturing)?;
            self.start(&ready, stream)
        }
    }

    /// Sees to a table of what was planned, so that only the launch is left to fail.
    ///
    /// # Safety
    /// The context is current, `stream` is one of its streams, and is being captured or not as
    /// said; `launches` is what the last plan gave.
    pub(super) unsafe fn prepare(
        &mut self,
        launches: Launches,
        stream: u64,
        capturing: bool,
    ) -> Result<Ready> {
        let found = self.next.found();
        // SAFETY: by contract.
        let table = unsafe {
            if capturing {
                let nonfinite = self.nonfinite.device;
                self.captures.upload(&self.next, nonfinite, handle(stream))?
            } else {
                self.upload(stream)?
            }
        };
        Ok(Ready { table, launches, found })
    }

    /// Launches what was prepared. If one launch fails, those before it have written nothing but what is
    /// the table's.
    ///
    /// # Safety
    /// The context is current, nothing was prepared since on this launcher, and [`Launcher::step`]'s
    /// contract holds for the steps and `stream`, the stream of the preparation.
    pub(super) unsafe fn start(&self, ready: &Ready, stream: u64) -> Result<()> {
        for (function, blocks) in ready.launches.into_iter().flatten() {
            // SAFETY: the kernel takes the address of a table, uploaded before it on this stream.
            unsafe { self.launch(function, blocks, &mut [ready.table], handle(stream)) }?;
        }
        Ok(())
    }

    /// Non-finite gradient elements so far, as far as the device has got.
    #[must_use]
    pub fn nonfinite(&self) -> u64 {
        let counter = self.nonfinite.host::<u64>();
        // SAFETY: 8 bytes, aligned to a page, which live as long as `self`; both sides access them
        // atomically.
        unsafe { AtomicU64::from_ptr(counter) }.load(Ordering::Relaxed)
    }

    /// Looks for gradients that are not finite, with coupled decay added, before anything is
    /// written: the position in `steps` of the first tensor that has some, and how many. Waits for
    /// the stream.
    ///
    /// # Errors
    /// As [`Launcher::step`].
    ///
    /// # Safety
    /// As [`Launcher::step`].
    pub unsafe fn count_nonfinite(
        &mut self,
        steps: &[DeviceStep],
        stream: u64,
    ) -> Result<Option<(usize, usize)>> {
        if steps.is_empty() {
            return Ok(None);
        }
        let [_, launch] = self.plan(steps.iter().enumerate(), Purpose::Count)?;
        let _current = self.context.enter()?;
        let stream_handle = handle(stream);
        // SAFETY: the context is current, the stream valid by contract.
        let table = unsafe {
            if self.context.is_capturing(stream_handle)? {
                let reason = "nonfinite \"raise\" waits for the device".to_owned();
                return Err(Error::Capture { reason });
            }
            self.upload(stream)?
        };
        let counts = self.zero_counts(steps.len())?;
        // SAFETY: `count` takes the addresses of a table and of a u64 for each of its tensors.
        let done = unsafe {
            let arguments = &mut [table, counts.device];
            let launched = launch.map_or(Ok(()), |(count, blocks)| {
                self.launch(count, blocks, arguments, stream_handle)
            });
            launched.and_then(|()| {
                let code = (self.context.driver.api.cuStreamSynchronize)(stream_handle);
                self.context.check(code, || "waiting for the count of non-finite values".to_owned())
            })
        };
        if let Err(error) = done {
            self.retire(Work { device: 0, host: counts.bytes }, counts);
            return Err(error);
        }
        // SAFETY: so many u64, aligned to a page; the kernel that wrote them is done.
        let found = unsafe { std::slice::from_raw_parts(counts.host::<u64>(), steps.len()) };
        let first = found.iter().position(|&count| count > 0);
        let first = first.map(|index| (index, found[index] as usize));
        self.counts = Some(counts);
        Ok(first)
    }

    /// Takes memory for capturing `count` different steps like `steps` without another in between.
    ///
    /// # Errors
    /// As [`Launcher::step`].
    pub fn reserve(&mut self, steps: &[DeviceStep], count: usize) -> Result<()> {
        self.reserve_for(steps.iter().enumerate(), Purpose::Reserve, count)
    }

    /// [`Launcher::reserve`] for steps with the numbers that errors name them by.
    pub(super) fn reserve_for<'a>(
        &mut self,
        steps: impl Iterator<Item = (usize, &'a DeviceStep)>,
        purpose: Purpose<'_>,
        count: usize,
    ) -> Result<()> {
        self.plan(steps, purpose)?;
        let _current = self.context.enter()?;
        self.captures.prepare(enough(self.next.room(), Room::default()), count)
    }

    /// How much memory this launcher holds.
    #[must_use]
    pub fn memory(&self) -> Work {
        let counts = self.counts.as_ref().map_or(0, |counts| counts.bytes);
        let own = Work { device: 0, host: self.nonfinite.bytes + counts };
        let tables = self.tables.iter().map(Tables::work);
        let retired = self.retired.iter().map(|retired| retired.work);
        tables.chain(retired).chain([own, self.captures.work()]).sum()
    }

    /// Keeps memory to the end.
    fn retire(&mut self, work: Work, memory: impl Any + Send + Sync) {
        self.retired.push(Retired { work, _memory: Box::new(memory) });
    }

    /// Checks `steps`, makes the plan for them, and says what to launch.
    pub(super) fn plan<'a>(
        &mut self,
        steps: impl Iterator<Item = (usize, &'a DeviceStep)>,
        purpose: Purpose<'_>,
    ) -> Result<Launches> {
        match &self.uploaded {
            Some(uploaded) => self.next.fill(steps, purpose, uploaded)?,
            None => self.next.fill(steps, purpose, &Plan::default())?,
        }
        // More than the driver takes is refused by it.
        let blocks = |warps: usize| u32::try_from(warps.div_ceil(WARPS)).unwrap_or(u32::MAX);
        let (kernels, chunks) = (self.context.kernels()?, blocks(self.next.chunk_count()));
        let some = |function, blocks| (blocks > 0).then_some((function, blocks));
        Ok(match purpose {
            Purpose::Step | Purpose::Reserve => {
                let measure = some(kernels.measure, chunks).filter(|_| self.next.measures());
                [measure, some(kernels.step, chunks)]
            }
            Purpose::Count => [None, some(kernels.count, chunks)],
            Purpose::Clip(_) => {
                let tensors = blocks(self.next.tensor_count().max(1)); // the first writes the norm
                [some(kernels.squares, chunks), some(kernels.cut, tensors)]
            }
        })
    }

    /// Sees to it that the table on the device is `self.next` for what `stream` does next, and
    /// gives its address.
    ///
    /// # Safety
    /// The context is current, `stream` is one of its streams and is not being captured.
    unsafe fn upload(&mut self, stream: u64) -> Result<u64> {
        self.make_room()?;
        // SAFETY: by contract.
        unsafe { self.order(stream) }?;
        let Some(Tables { device, ring }) = &mut self.tables else {
            let doing = "uploading the table".to_owned();
            return Err(Error::Cuda { name: "no memory".to_owned(), code: 0, doing });
        };
        let changed = match &self.uploaded {
            Some(uploaded) => self.next.changed(uploaded),
            None => 0..self.next.room().image,
        };
        if changed.is_empty() {
            return Ok(device.address);
        }
        let old = self.uploaded.take(); // unknown until the upload is enqueued
        let (next, base, nonfinite) = (&self.next, device.address, self.nonfinite.device);
        // SAFETY: by contract; `make_room` made the table large enough, and `order` put this
        // stream behind its last use.
        unsafe {
            ring.upload(device, changed.clone(), handle(stream), |image| {
                next.write(&changed, base, nonfinite, image);
            })
        }?;
        self.uploaded = Some(std::mem::replace(&mut self.next, old.unwrap_or_default()));
        Ok(base)
    }

    /// Allocates what the next upload needs.
    fn make_room(&mut self) -> Result<()> {
        let room = self.next.room();
        let have = self.tables.as_ref().map_or_else(Room::default, Tables::room);
        if !have.holds(room) {
            let Room { image, device } = enough(room, have);
            let device = DeviceMemory::new(self.context, device, "the tensor table")?;
            let ring = Ring::new(self.context, image)?;
            self.uploaded = None;
            if let Some(old) = self.tables.replace(Tables { device, ring }) {
                self.retire(old.work(), old);
            }
        }
        if let Some(tables) = &mut self.tables {
            let room = tables.room();
            let ring = &mut tables.ring;
            if ring.is_lost() {
                let fresh = Ring::new(self.context, room.image)?;
                let lost = std::mem::replace(ring, fresh);
                let work = Work { device: 0, host: lost.bytes() };
                self.retired.push(Retired { work, _memory: Box::new(lost) });
            }
            self.captures.prepare(room, 1)?;
        }
        Ok(())
    }

    /// Puts what `stream` does next behind what the last stream did with the table.
    ///
    /// # Safety
    /// The context is current, `stream` is one of its streams and is not being captured.
    unsafe fn order(&mut self, stream: u64) -> Result<()> {
        let Some(last) = self.stream.filter(|&last| last != stream) else {
            self.stream = Some(stream);
            return Ok(());
        };
        let api = &self.context.driver.api;
        // SAFETY: the last stream is still valid, by the contract of the step that used it.
        let capturing = unsafe { self.context.is_capturing(handle(last)) };
        if capturing == Ok(true) {
            let reason = "the stream of the previous step is being captured, and this step, on \
                          another stream, cannot wait for it";
            return Err(Error::Capture { reason: reason.to_owned() });
        }
        let recorded = capturing.and_then(|_| {
            // SAFETY: as above; the event is this launcher's.
            let code = unsafe { (api.cuEventRecord)(self.order.handle, handle(last)) };
            self.context.check(code, || "marking the end of the previous step".to_owned())
        });
        match recorded {
            Ok(()) => {
                // SAFETY: both are valid.
                let code = unsafe { (api.cuStreamWaitEvent)(handle(stream), self.order.handle, 0) };
                self.context.check(code, || "waiting for the previous step's stream".to_owned())?;
            }
            // Against the contract, and yet noticed: the stream was destroyed, which does not wait
            // for its work.
            Err(Error::Cuda { code: INVALID_HANDLE, .. }) => self.synchronize()?,
            Err(error) => return Err(error),
        }
        self.stream = Some(stream);
        Ok(())
    }

    fn synchronize(&self) -> Result<()> {
        // SAFETY: the context is current.
        let code = unsafe { (self.context.driver.api.cuCtxSynchronize)() };
        self.context.check(code, || "waiting for the device".to_owned())
    }

    /// Pinned memory for `tensors` counts, all 0.
    fn zero_counts(&mut self, tensors: usize) -> Result<Pinned> {
        let bytes = 8 * tensors;
        if let Some(counts) = self.counts.take().filter(|counts| counts.bytes >= bytes) {
            // SAFETY: its own memory; the kernel that last wrote it is done.
            unsafe { counts.host::<u8>().write_bytes(0, counts.bytes) };
            return Ok(counts);
        }
        Pinned::new(self.context, bytes.next_power_of_two(), "counts of non-finite values")
    }

    /// Launches a kernel over so many blocks.
    ///
    /// # Safety
    /// The context is current, `stream` is one of its streams, and `function` takes `arguments`,
    /// whose memory is as it expects.
    unsafe fn launch(
        &self,
        function: CUfunction,
        blocks: u32,
        arguments: &mut [u64],
        stream: CUstream,
    ) -> Result<()> {
        let mut pointers = [null_mut::<c_void>(); 2];
        for (pointer, argument) in pointers.iter_mut().zip(arguments) {
            *pointer = (&raw mut *argument).cast();
        }
        let no_extra = null_mut();
        // SAFETY: as many pointers to 8-byte arguments as the kernel has; the rest by contract.
        let code = unsafe {
            (self.context.driver.api.cuLaunchKernel)(
                function,
                blocks,
                1,
                1,
                THREADS,
                1,
                1,
                0,
                stream,
                pointers.as_mut_ptr(),
                no_extra,
            )
        };
        self.context.check(code, || format!("launching over {blocks} blocks"))
    }
}

impl Drop for Launcher {
    /// Frees everything, after waiting for the device. Destroy graphs that captured a step first,
    /// and do not drop a launcher during a capture: waiting would end it.
    fn drop(&mut self) {
        if let Ok(_current) = self.context.enter() {
            // Errors are ignored: at the end of the process the driver may be gone.
            let _ = self.synchronize();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_launcher_may_move_between_threads_and_be_shared() {
        const fn shared<T: Send + Sync>() {}
        const { shared::<Launcher>() }
    }

    #[test]
    fn tables_grow_by_doubling() {
        assert_eq!(capacity(100, 0), 16 << 10);
        assert_eq!(capacity(20_000, 16 << 10), 32 << 10);
        assert_eq!(capacity(100_000, 16 << 10), 112 << 10);
    }
}
