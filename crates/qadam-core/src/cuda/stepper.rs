//! Steps of tensors whose state may be paged: windows, each prefetched while the one before it is
//! being updated.

use super::driver::Context;
use super::launch::{Launcher, Launches, Ready, handle};
use super::plan::Purpose;
use super::prefetch::{Ahead, Prefetch};
use super::request::{DeviceClip, DeviceStep};
use super::window::{Cut, Window};
use super::work::Work;
use crate::error::{Error, Result};

/// How many bytes of state a window has. Two windows must fit on the device beside everything else,
/// so they should be small; but moving this much takes 10 ms over PCIe 4.0, beside which a window's
/// driver calls are nothing.
const WINDOW: usize = 256 << 20;

/// Steps the tensors of one optimizer on one device, wherever their state is.
///
/// Tensors whose state lies in no [`Arena`](crate::paging::managed::Arena) are stepped by one
/// launch, as a [`Launcher`] does. The others follow in windows of up to 256 MiB of state, a launch
/// each (two, where something must be known of a whole tensor first). While one is being updated the pages of the next are brought to the device, on a stream
/// beside the caller's; events join the two, and the host waits for neither. A stream that is being
/// captured gets the launches only, and where the device has no concurrent managed access there is
/// one launch for everything.
#[derive(Debug)]
pub struct Stepper {
    context: &'static Context,
    limit: u64,
    /// Steps what is not paged, and counts over everything.
    rest: Launcher,
    /// One a window, as each has a table of its own, which stays as it is from step to step.
    windows: Vec<Launcher>,
    /// Measures gradients, paged or not: made when that is first asked for.
    clip: Option<Launcher>,
    /// Whether pages can be prefetched, when that was asked.
    concurrent: Option<bool>,
    /// Made by the first step that has a use for it. Dropped after the launchers, which wait for
    /// the device.
    prefetch: Option<Prefetch>,
}

impl Stepper {
    /// A stepper for the device of this number, in its primary context.
    ///
    /// # Errors
    /// As [`Launcher::new`].
    pub fn new(ordinal: usize) -> Result<Self> {
        Self::with_window(ordinal, WINDOW)
    }

    /// A stepper whose windows have at most `bytes` of state, or a single tensor with more.
    ///
    /// # Errors
    /// As [`Launcher::new`].
    #[doc(hidden)] // for tests
    pub fn with_window(ordinal: usize, bytes: usize) -> Result<Self> {
        let rest = Launcher::new(ordinal)?;
        Ok(Self {
            context: Context::get(ordinal)?,
            limit: bytes as u64,
            rest,
            windows: Vec::new(),
            clip: None,
            concurrent: None,
            prefetch: None,
        })
    }

    /// Enqueues all of `steps` on `stream` (a `CUstream` as an integer).
    ///
    /// # Errors
    /// As [`Launcher::step`]; after each, no parameter, state or step count has been touched, with
    /// one exception: where some steps are paged and a launch but the first fails
    /// ([`Error::Cuda`]), the launches before it stand. A failed prefetch is no error.
    ///
    /// # Safety
    /// As [`Launcher::step`], and no two of `steps` overlap.
    pub unsafe fn step(&mut self, steps: &[DeviceStep], stream: u64) -> Result<()> {
        let Some(cut) = self.cut(steps)? else {
            // SAFETY: by contract.
            return unsafe { self.rest.step(steps, stream) };
        };
        let _current = self.context.enter()?;
        // SAFETY: the context is current, the stream valid by contract.
        let capturing = unsafe { self.context.is_capturing(handle(stream)) }?;
        self.open(cut.windows.len(), capturing)?;
        // SAFETY: the context is current, the rest by contract; the windows are cut from `steps`.
        unsafe {
            let (rest, ready) = self.prepare(&cut, steps, stream, capturing)?;
            let prefetch = self.prefetch.as_ref().filter(|_| !capturing);
            let mut ahead = Ahead::new(prefetch, handle(stream));
            // Behind the work so far: before it is done the device may have no room to spare.
            ahead.follow();
            ahead.fetch(&cut.windows[0].ranges());
            if let Some(rest) = rest {
                self.rest.start(&rest, stream)?;
            }
            for (k, (launcher, ready)) in self.windows.iter().zip(&ready).enumerate() {
                ahead.join();
                launcher.start(ready, stream)?;
                // Window k + 1, behind window k - 1 and beside window k.
                if let Some(next) = cut.windows.get(k + 1) {
                    ahead.fetch(&next.ranges());
                }
                if k + 2 < cut.windows.len() {
                    ahead.follow();
                }
            }
        }
        Ok(())
    }

    /// Enqueues two launches on `stream` that find how the gradients of `steps` are to be cut: all
    /// together to the norm that `clip` says, and each by its own [history](DeviceStep::percentile), as
    /// [`clip::gradients`](crate::clip::gradients) does. Returns for each step what to put into
    /// [`DeviceStep::cut`] before it is stepped.
    ///
    /// Gradients of address 0, and those of steps whose `found_inf` is not 0, count as 0; what is found
    /// for them changes nothing. (They keep their place in the order of the sum, so a list without them
    /// can have a norm of other last bits.) Whatever `cut` the steps have is not looked at.
    ///
    /// What is returned holds until the next call, on any stream. The steps belong behind this on the
    /// same stream (in the same graph, if it is captured), all of them or some, in one step or several;
    /// between them and this nothing may change the gradients, step counts and histories.
    ///
    /// # Errors
    /// As [`Launcher::step`]; and [`Error::Hyperparameter`] for a `max_norm` that is negative or NaN.
    /// After each, nothing but the norm may have been written.
    ///
    /// # Safety
    /// As [`Launcher::step`]; parameters and their states are not used. `clip.norm` is the address of
    /// device memory for an f32, which nothing else uses until the launches have run.
    pub unsafe fn clip(
        &mut self,
        steps: &[DeviceStep],
        clip: &DeviceClip,
        stream: u64,
    ) -> Result<Vec<u64>> {
        if steps.is_empty() && clip.norm.is_none() {
            return Ok(Vec::new());
        }
        let _current = self.context.enter()?;
        // SAFETY: the context is current, the stream valid by contract.
        let capturing = unsafe { self.context.is_capturing(handle(stream)) }?;
        let launcher = match &mut self.clip {
            Some(launcher) => launcher,
            None if capturing => return Err(not_ready()),
            none => none.insert(Launcher::new(self.context.ordinal)?),
        };
        let planned = launcher.plan(steps.iter().enumerate(), Purpose::Clip(clip))?;
        // SAFETY: the context is current, the rest by contract.
        unsafe {
            let ready = launcher.prepare(planned, stream, capturing)?;
            launcher.start(&ready, stream)?;
            Ok(ready.found())
        }
    }

    /// Non-finite gradient elements so far, as far as the device has got.
    #[must_use]
    pub fn nonfinite(&self) -> u64 {
        self.launchers().map(Launcher::nonfinite).sum()
    }

    /// As [`Launcher::count_nonfinite`]; it reads no state, so paging makes no difference.
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
        // SAFETY: by contract.
        unsafe { self.rest.count_nonfinite(steps, stream) }
    }

    /// Takes memory for capturing `count` different steps like `steps` without another in between.
    ///
    /// # Errors
    /// As [`Launcher::step`].
    pub fn reserve(&mut self, steps: &[DeviceStep], count: usize) -> Result<()> {
        let Some(cut) = self.cut(steps)? else { return self.rest.reserve(steps, count) };
        self.open(cut.windows.len(), false)?;
        if !cut.rest.is_empty() {
            self.rest.reserve_for(pick(&cut.rest, steps), Purpose::Reserve, count)?;
        }
        for (launcher, window) in self.windows.iter_mut().zip(&cut.windows) {
            launcher.reserve_for(pick(&window.steps, steps), Purpose::Reserve, count)?;
        }
        Ok(())
    }

    /// The same for capturing [`Stepper::clip`].
    ///
    /// # Errors
    /// As [`Stepper::clip`].
    pub fn reserve_clip(
        &mut self,
        steps: &[DeviceStep],
        clip: &DeviceClip,
        count: usize,
    ) -> Result<()> {
        let launcher = match &mut self.clip {
            Some(launcher) => launcher,
            none => none.insert(Launcher::new(self.context.ordinal)?),
        };
        launcher.reserve_for(steps.iter().enumerate(), Purpose::Clip(clip), count)
    }

    /// How much memory this stepper holds; state is not counted.
    #[must_use]
    pub fn memory(&self) -> Work {
        self.launchers().map(Launcher::memory).sum()
    }

    fn launchers(&self) -> impl Iterator<Item = &Launcher> {
        std::iter::once(&self.rest).chain(&self.windows).chain(&self.clip)
    }

    /// The windows of `steps`, if they are to be stepped in windows.
    fn cut(&mut self, steps: &[DeviceStep]) -> Result<Option<Cut>> {
        let Some(cut) = Cut::new(steps, self.limit) else { return Ok(None) };
        let concurrent = match self.concurrent {
            Some(concurrent) => concurrent,
            None => *self.concurrent.insert(self.context.has_concurrent_access()?),
        };
        Ok(concurrent.then_some(cut))
    }

    /// Sees to so many launchers, and to what prefetches.
    fn open(&mut self, windows: usize, capturing: bool) -> Result<()> {
        if capturing {
            // Nothing may be allocated now.
            if self.windows.len() < windows {
                return Err(not_ready());
            }
            return Ok(());
        }
        while self.windows.len() < windows {
            self.windows.push(Launcher::new(self.context.ordinal)?);
        }
        if self.prefetch.is_none() {
            let _current = self.context.enter()?;
            // A hint: where there is no room for it, the next step tries again.
            self.prefetch = Prefetch::new(self.context).ok();
        }
        Ok(())
    }

    /// Plans, and uploads tables for, what is not paged and each window.
    ///
    /// # Safety
    /// As [`Launcher::prepare`]; there is a launcher for each window.
    unsafe fn prepare(
        &mut self,
        cut: &Cut,
        steps: &[DeviceStep],
        stream: u64,
        capturing: bool,
    ) -> Result<(Option<Ready>, Vec<Ready>)> {
        let Cut { rest, windows } = cut;
        // All are planned, and thereby checked, before the stream is asked for anything.
        let launches = if rest.is_empty() {
            None
        } else {
            Some(self.rest.plan(pick(rest, steps), Purpose::Step)?)
        };
        let plan = |(launcher, window): (&mut Launcher, &Window)| {
            launcher.plan(pick(&window.steps, steps), Purpose::Step)
        };
        let each = self.windows.iter_mut().zip(windows).map(plan);
        let each: Vec<Launches> = each.collect::<Result<_>>()?;
        // SAFETY: by contract.
        unsafe {
            let rest = match launches {
                None => None,
                Some(launches) => Some(self.rest.prepare(launches, stream, capturing)?),
            };
            let ready = self.windows.iter_mut().zip(each);
            let ready =
                ready.map(|(launcher, launches)| launcher.prepare(launches, stream, capturing));
            Ok((rest, ready.collect::<Result<_>>()?))
        }
    }
}

/// The error of a capture for which there is no launcher yet.
fn not_ready() -> Error {
    let reason = "no memory is ready for its tables; run a step with the same tensors before each \
                  captured step, or reserve memory for several";
    Error::Capture { reason: reason.to_owned() }
}

/// The steps at these positions, with them.
fn pick<'a>(
    positions: &'a [usize],
    steps: &'a [DeviceStep],
) -> impl Iterator<Item = (usize, &'a DeviceStep)> {
    positions.iter().map(|&position| (position, &steps[position]))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stepper_may_move_between_threads_and_be_shared() {
        const fn shared<T: Send + Sync>() {}
        const { shared::<Stepper>() }
    }
}
