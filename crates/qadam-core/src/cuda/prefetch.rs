//! Bringing paged state to the device, on a stream beside the caller's.
//!
//! All of it is a hint: no result depends on it, and the host waits for none of it.

use std::ops::Range;

use cudarc::driver::sys::CUstream;

use super::driver::Context;
use super::memory::{Event, Stream};
use crate::error::Result;

/// A side stream and what joins it to the caller's.
///
/// A wait is for what an event had recorded when the wait was asked for. Each record here is waited
/// for before the next one of its event, so two events serve for any number of windows.
#[derive(Debug)]
pub(super) struct Prefetch {
    context: &'static Context,
    stream: Stream,
    /// What the caller's stream had been asked to do.
    turn: Event,
    /// The last prefetch.
    fetched: Event,
}

impl Prefetch {
    /// Makes the stream and the events. The context is current, and no stream is being captured.
    pub fn new(context: &'static Context) -> Result<Self> {
        let (turn, fetched) = (Event::new(context)?, Event::new(context)?);
        Ok(Self { context, stream: Stream::new(context)?, turn, fetched })
    }

    /// Puts what is prefetched next behind all that `main` has been asked to do.
    ///
    /// # Safety
    /// The context is current and `main` is one of its streams, which is not being captured.
    unsafe fn follow(&self, main: CUstream) -> Result<()> {
        let api = &self.context.driver.api;
        // SAFETY: a stream by contract, and an event of its own.
        let code = unsafe { (api.cuEventRecord)(self.turn.handle, main) };
        self.context.check(code, || "marking where a prefetch begins".to_owned())?;
        // SAFETY: its own stream and event.
        let code = unsafe { (api.cuStreamWaitEvent)(self.stream.handle, self.turn.handle, 0) };
        self.context.check(code, || "putting a prefetch behind the caller's stream".to_owned())
    }

    /// Prefetches.
    ///
    /// # Safety
    /// The context is current, and `ranges` are of managed memory.
    unsafe fn fetch(&self, ranges: &[Range<u64>]) -> Result<()> {
        let (api, device, stream) =
            (&self.context.driver.api, self.context.device, self.stream.handle);
        for range in ranges {
            let bytes = (range.end - range.start) as usize;
            // SAFETY: managed memory by contract, and a stream of its own.
            let code = unsafe { (api.cuMemPrefetchAsync)(range.start, bytes, device, stream) };
            self.context.check(code, || format!("prefetching {bytes} bytes"))?;
        }
        // SAFETY: its own event and stream.
        let code = unsafe { (api.cuEventRecord)(self.fetched.handle, stream) };
        self.context.check(code, || "marking the end of a prefetch".to_owned())
    }

    /// Puts what `main` does next behind the last prefetch.
    ///
    /// # Safety
    /// As [`Prefetch::follow`].
    unsafe fn join(&self, main: CUstream) -> Result<()> {
        // SAFETY: a stream by contract, and an event of its own.
        let code =
            unsafe { (self.context.driver.api.cuStreamWaitEvent)(main, self.fetched.handle, 0) };
        self.context.check(code, || "waiting for a prefetch".to_owned())
    }
}

/// The prefetches of one step.
///
/// The first call that fails is the last of them: an error would leave a step half done for want of
/// a hint. Where the device itself is lost, the next launch says so.
#[derive(Debug)]
pub(super) struct Ahead<'a> {
    prefetch: Option<&'a Prefetch>,
    main: CUstream,
}

impl<'a> Ahead<'a> {
    /// None at all without a `prefetch`.
    ///
    /// # Safety
    /// While this lives, the context is current, and `main` is one of its streams that is not being
    /// captured, unless there is no `prefetch`.
    pub const unsafe fn new(prefetch: Option<&'a Prefetch>, main: CUstream) -> Self {
        Self { prefetch, main }
    }

    /// What is fetched next comes behind all that the main stream has been asked to do.
    pub fn follow(&mut self) {
        let main = self.main;
        // SAFETY: by `new`'s contract.
        self.try_to(|prefetch| unsafe { prefetch.follow(main) });
    }

    /// Prefetches.
    ///
    /// # Safety
    /// The addresses are of managed memory.
    pub unsafe fn fetch(&mut self, ranges: &[Range<u64>]) {
        // SAFETY: by contract, and by `new`'s.
        self.try_to(|prefetch| unsafe { prefetch.fetch(ranges) });
    }

    /// What the main stream does next comes behind what was fetched.
    pub fn join(&mut self) {
        let main = self.main;
        // SAFETY: by `new`'s contract.
        self.try_to(|prefetch| unsafe { prefetch.join(main) });
    }

    fn try_to(&mut self, hint: impl FnOnce(&Prefetch) -> Result<()>) {
        self.prefetch = self.prefetch.filter(|prefetch| hint(prefetch).is_ok());
    }
}
