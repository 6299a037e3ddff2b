//! Streams, events and graphs as a trainer has them, and the stand-in with two devices.

use cudarc::driver::{result, sys};

use crate::stand_in::Soft;

/// The stand-in, never reset: the core keeps its contexts for the life of the process.
pub fn soft() -> Soft {
    static SETTINGS: std::sync::Once = std::sync::Once::new();
    let soft = Soft::loaded();
    SETTINGS.call_once(|| soft.set_devices(2));
    soft.disarm();
    soft.clear();
    soft
}

/// What a launcher may leave behind: nothing.
pub fn leaks(soft: &Soft) -> Vec<u64> {
    ["device", "managed", "pinned", "streams", "events", "graphs", "graph_execs", "captures"]
        .map(|what| soft.leak(what))
        .to_vec()
}

/// Makes the primary context of a device current, as torch does.
pub fn use_device(ordinal: i32) -> sys::CUcontext {
    result::init().unwrap();
    let device = result::device::get(ordinal).unwrap();
    // SAFETY: the context is retained and never released.
    unsafe {
        let context = result::primary_ctx::retain(device).unwrap();
        result::ctx::set_current(context).unwrap();
        context
    }
}

/// A stream of the current context.
#[derive(Clone, Copy, PartialEq)]
pub struct Stream(pub sys::CUstream);

impl Stream {
    pub fn new() -> Self {
        Self(result::stream::create(result::stream::StreamKind::NonBlocking).unwrap())
    }

    pub fn handle(self) -> u64 {
        self.0 as u64
    }

    pub fn synchronize(self) {
        // SAFETY: a stream that was not destroyed.
        unsafe { result::stream::synchronize(self.0).unwrap() };
    }

    pub fn destroy(self) {
        // SAFETY: not used again but to see it refused.
        unsafe { result::stream::destroy(self.0).unwrap() };
    }

    /// Captures what `work` does on this stream.
    pub fn capture(self, work: impl FnOnce()) -> Result<Graph, result::DriverError> {
        let mode = sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_GLOBAL;
        // SAFETY: a stream that was not destroyed.
        unsafe { result::stream::begin_capture(self.0, mode).unwrap() };
        work();
        // SAFETY: as above; the graph is destroyed with what is made of it.
        unsafe {
            let graph = result::stream::end_capture(self.0)?;
            let mut exec = std::ptr::null_mut();
            sys::cuGraphInstantiateWithFlags(&raw mut exec, graph, 0).result().unwrap();
            Ok(Graph { graph, exec })
        }
    }
}

/// A captured graph, ready to be replayed.
pub struct Graph {
    graph: sys::CUgraph,
    exec: sys::CUgraphExec,
}

impl Graph {
    pub fn replay(&self, stream: Stream) {
        // SAFETY: both exist.
        unsafe { result::graph::launch(self.exec, stream.0).unwrap() };
    }
}

impl Drop for Graph {
    fn drop(&mut self) {
        // SAFETY: both exist, and nothing replays.
        unsafe {
            result::graph::exec_destroy(self.exec).unwrap();
            result::graph::destroy(self.graph).unwrap();
        }
    }
}
