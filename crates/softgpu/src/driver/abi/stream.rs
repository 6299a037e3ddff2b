//! Streams and capture.

use std::collections::HashMap;

use crate::driver::codes::{
    INVALID_HANDLE, INVALID_VALUE, STREAM_CAPTURE_INVALIDATED, STREAM_CAPTURE_UNJOINED,
    STREAM_CAPTURE_UNMATCHED, STREAM_CAPTURE_UNSUPPORTED, STREAM_CAPTURE_WRONG_THREAD,
};
use crate::driver::state::{Capture, Driver, Graph, Res, Stream};
use crate::driver::{Out, cuda};

fn create(d: &mut Driver, out: &Out<u64>, flags: u32, priority: i32) -> Res {
    let device = d.device()?;
    out.wanted()?;
    if flags & !1 != 0 {
        return Err(INVALID_VALUE);
    }
    let h = d.handle();
    let clock = d.host.clone();
    d.streams.insert(
        h,
        Stream {
            device,
            nonblocking: flags & 1 == 1,
            priority: priority.clamp(-5, 0),
            clock,
            capture: None,
            implicit: false,
        },
    );
    out.set(h)
}

cuda! {
    /// `cuStreamCreate`.
    fn cuStreamCreate(stream: Out<u64>, flags: u32) [None, 0] |d| { create(d, &stream, flags, 0) }

    /// `cuStreamCreateWithPriority`.
    fn cuStreamCreateWithPriority(stream: Out<u64>, flags: u32, priority: i32) [None, 0] |d| {
        create(d, &stream, flags, priority)
    }

    /// `cuStreamDestroy_v2`.
    fn cuStreamDestroy_v2(stream: u64) [Some(stream), 0] |d| {
        d.device()?;
        match d.streams.get(&stream) {
            Some(s) if !s.implicit => {
                if let Some(c) = s.capture.and_then(|id| d.captures.get_mut(&id)) {
                    c.broken = true;
                }
                d.streams.remove(&stream);
                Ok(())
            }
            _ => Err(INVALID_HANDLE),
        }
    }

    /// `cuStreamSynchronize`.
    fn cuStreamSynchronize(stream: u64) [Some(stream), 0] |d| {
        let key = d.stream(stream)?;
        d.wait_stream(key)
    }

    /// `cuStreamQuery`: work is done when it is enqueued, so never "not ready".
    fn cuStreamQuery(stream: u64) [Some(stream), 0] |d| {
        let key = d.stream(stream)?;
        if d.capture(key)?.is_some() {
            if let Some(c) = d.streams[&key].capture.and_then(|id| d.captures.get_mut(&id)) {
                c.broken = true;
            }
            return Err(STREAM_CAPTURE_UNSUPPORTED);
        }
        let clock = d.streams[&key].clock.clone();
        d.host.join(&clock);
        Ok(())
    }

    /// `cuStreamWaitEvent`.
    fn cuStreamWaitEvent(stream: u64, event: u64, flags: u32) [Some(stream), 0] |d| {
        if flags != 0 {
            return d.unsupported(&format!("flags {flags}"));
        }
        d.note(format!("event {event:#x}"));
        let key = d.stream(stream)?;
        d.wait_event(key, event)
    }

    /// `cuStreamGetPriority`.
    fn cuStreamGetPriority(stream: u64, priority: Out<i32>) [Some(stream), 0] |d| {
        let key = d.stream(stream)?;
        priority.set(d.streams[&key].priority)
    }

    /// `cuStreamGetFlags`.
    fn cuStreamGetFlags(stream: u64, flags: Out<u32>) [Some(stream), 0] |d| {
        let key = d.stream(stream)?;
        flags.set(u32::from(d.streams[&key].nonblocking))
    }

    /// `cuStreamGetCtx`.
    fn cuStreamGetCtx(stream: u64, ctx: Out<u64>) [Some(stream), 0] |d| {
        let key = d.stream(stream)?;
        ctx.set(crate::driver::state::CONTEXT + u64::from(d.streams[&key].device))
    }

    /// `cuStreamIsCapturing`.
    fn cuStreamIsCapturing(stream: u64, status: Out<i32>) [Some(stream), 0] |d| {
        let key = d.stream(stream)?;
        let c = d.streams[&key].capture.and_then(|id| d.captures.get(&id));
        status.set(c.map_or(0, |c| 1 + i32::from(c.broken)))
    }

    /// `cuStreamBeginCapture_v2`.
    fn cuStreamBeginCapture_v2(stream: u64, mode: i32) [Some(stream), 0] |d| {
        let key = d.stream(stream)?;
        if !(0..=2).contains(&mode) {
            return Err(INVALID_VALUE);
        }
        if stream <= 1 {
            return d.refuse(STREAM_CAPTURE_UNSUPPORTED, "the legacy stream cannot capture");
        }
        if d.streams[&key].capture.is_some() {
            return Err(crate::driver::codes::STREAM_CAPTURE_UNSUPPORTED);
        }
        let id = d.handle();
        let thread = std::thread::current().id();
        d.captures.insert(id, Capture { origin: key, mode, thread, work: vec![], joined: HashMap::new(), broken: false });
        if let Some(s) = d.streams.get_mut(&key) {
            s.capture = Some(id);
        }
        Ok(())
    }

    /// `cuStreamEndCapture`.
    fn cuStreamEndCapture(stream: u64, graph: Out<u64>) [Some(stream), 0] |d| {
        let key = d.stream(stream)?;
        graph.wanted()?;
        let Some(id) = d.streams[&key].capture else {
            return d.refuse(crate::driver::codes::INVALID_VALUE, "the stream is not capturing");
        };
        let c = &d.captures[&id];
        if c.origin != key {
            return Err(STREAM_CAPTURE_UNMATCHED);
        }
        if c.mode != 2 && c.thread != std::thread::current().id() {
            return Err(STREAM_CAPTURE_WRONG_THREAD);
        }
        let Some(c) = d.captures.remove(&id) else { return Err(INVALID_HANDLE) };
        for s in d.streams.values_mut().filter(|s| s.capture == Some(id)) {
            s.capture = None;
        }
        graph.set(0)?;
        if c.broken {
            return Err(STREAM_CAPTURE_INVALIDATED);
        }
        if c.joined.values().any(|(did, back)| back < did) {
            return d.refuse(STREAM_CAPTURE_UNJOINED, "a stream that joined the capture did not come back");
        }
        let h = d.handle();
        let device = d.streams[&key].device;
        d.graphs.insert(h, Graph { work: std::sync::Arc::new(c.work), device });
        graph.set(h)
    }
}
