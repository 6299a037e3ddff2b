//! Events.

use crate::driver::codes::{CAPTURED_EVENT, INVALID_HANDLE, INVALID_VALUE};
use crate::driver::state::{Driver, Event, Res};
use crate::driver::{Out, cuda};

fn elapsed(d: &mut Driver, ms: &Out<f32>, start: u64, end: u64) -> Res {
    d.device()?;
    let (a, b) =
        (d.events.get(&start).ok_or(INVALID_HANDLE)?, d.events.get(&end).ok_or(INVALID_HANDLE)?);
    if a.no_timing || b.no_timing {
        return Err(INVALID_HANDLE);
    }
    let (Some(a), Some(b)) = (a.at, b.at) else { return Err(INVALID_HANDLE) };
    ms.set(b.saturating_duration_since(a).as_secs_f32() * 1e3)
}

cuda! {
    /// `cuEventCreate`. Flags: blocking sync (1), no timing (2).
    fn cuEventCreate(event: Out<u64>, flags: u32) [None, 0] |d| {
        let device = d.device()?;
        event.wanted()?;
        if flags & 4 != 0 {
            return d.unsupported("interprocess events");
        }
        if flags & !3 != 0 {
            return Err(INVALID_VALUE);
        }
        let h = d.handle();
        d.events.insert(h, Event { device, no_timing: flags & 2 != 0, ..Event::default() });
        event.set(h)
    }

    /// `cuEventRecord`.
    fn cuEventRecord(event: u64, stream: u64) [Some(stream), 0] |d| {
        d.note(format!("event {event:#x}"));
        let key = d.stream(stream)?;
        d.record(event, key)
    }

    /// `cuEventQuery`: work is done when it is enqueued, so never "not ready".
    fn cuEventQuery(event: u64) [None, 0] |d| {
        d.device()?;
        let e = d.events.get(&event).ok_or(INVALID_HANDLE)?;
        if e.captured.is_some() {
            return Err(CAPTURED_EVENT);
        }
        let clock = e.clock.clone();
        d.unsafe_call()?;
        if let Some(c) = clock {
            d.host.join(&c);
        }
        Ok(())
    }

    /// `cuEventSynchronize`.
    fn cuEventSynchronize(event: u64) [None, 0] |d| {
        d.device()?;
        let e = d.events.get(&event).ok_or(INVALID_HANDLE)?;
        if e.captured.is_some() {
            return Err(CAPTURED_EVENT);
        }
        let clock = e.clock.clone();
        d.unsafe_call()?;
        d.mark_sync();
        if let Some(c) = clock {
            d.host.join(&c);
        }
        Ok(())
    }

    /// `cuEventElapsedTime`: time of the host between the records.
    fn cuEventElapsedTime(ms: Out<f32>, start: u64, end: u64) [None, 0] |d| { elapsed(d, &ms, start, end) }

    /// `cuEventElapsedTime_v2`.
    fn cuEventElapsedTime_v2(ms: Out<f32>, start: u64, end: u64) [None, 0] |d| { elapsed(d, &ms, start, end) }

    /// `cuEventDestroy_v2`.
    fn cuEventDestroy_v2(event: u64) [None, 0] |d| {
        d.device()?;
        d.events.remove(&event).map(drop).ok_or(INVALID_HANDLE)
    }
}
