//! Captured graphs.

use crate::driver::codes::{INVALID_HANDLE, INVALID_VALUE, NOT_SUPPORTED};
use crate::driver::state::{Driver, Res};
use crate::driver::{Out, cuda};

fn instantiate(d: &mut Driver, out: &Out<u64>, graph: u64) -> Res {
    d.device()?;
    out.wanted()?;
    let g = d.graphs.get(&graph).ok_or(INVALID_HANDLE)?.clone();
    let h = d.handle();
    d.execs.insert(h, g);
    out.set(h)
}

cuda! {
    /// `cuGraphInstantiateWithFlags`. Auto-free (1), upload (2) and node priority (8) change nothing here.
    fn cuGraphInstantiateWithFlags(exec: Out<u64>, graph: u64, flags: u64) [None, 0] |d| {
        if flags & !0xb != 0 {
            return d.unsupported(&format!("flags {flags}"));
        }
        instantiate(d, &exec, graph)
    }

    /// `cuGraphUpload`.
    fn cuGraphUpload(exec: u64, stream: u64) [Some(stream), 0] |d| {
        d.stream(stream)?;
        if d.execs.contains_key(&exec) { Ok(()) } else { Err(INVALID_HANDLE) }
    }

    /// `cuGraphLaunch`: the recorded operations, in order, on `stream`.
    fn cuGraphLaunch(exec: u64, stream: u64) [Some(stream), 0] |d| {
        let key = d.stream(stream)?;
        let g = d.execs.get(&exec).ok_or(INVALID_HANDLE)?.clone();
        if g.device != d.streams[&key].device {
            return Err(INVALID_VALUE);
        }
        if d.capture(key)?.is_some() {
            return d.refuse(NOT_SUPPORTED, "a graph inside a capture");
        }
        d.note(format!("{} operations", g.work.len()));
        for w in g.work.iter() {
            // SAFETY: host pointers of recorded copies stay valid while the graph is used: CUDA's contract.
            unsafe { d.enqueue(key, w.clone()) }?;
        }
        Ok(())
    }

    /// `cuGraphGetNodes`, for its count only.
    fn cuGraphGetNodes(graph: u64, nodes: Out<u64>, count: Out<usize>) [None, 0] |d| {
        let g = d.graphs.get(&graph).ok_or(INVALID_HANDLE)?;
        if nodes.addr() != 0 {
            return d.unsupported("node handles");
        }
        count.set(g.work.len())
    }

    /// `cuGraphDestroy`.
    fn cuGraphDestroy(graph: u64) [None, 0] |d| {
        d.graphs.remove(&graph).map(drop).ok_or(INVALID_HANDLE)
    }

    /// `cuGraphExecDestroy`.
    fn cuGraphExecDestroy(exec: u64) [None, 0] |d| {
        d.execs.remove(&exec).map(drop).ok_or(INVALID_HANDLE)
    }
}
