//! What a stream can be asked to do, so that it can be done now or recorded for a graph.

use std::sync::Arc;

use crate::exec::{Launch, run};
use crate::inst::Kernel;
use crate::memory::managed::{Cause, Place};
use crate::memory::{Memory, Refusal};

/// An operation of a stream.
#[derive(Clone)]
#[allow(missing_docs)]
pub enum Work {
    Kernel {
        kernel: Arc<Kernel>,
        grid: [u32; 3],
        block: [u32; 3],
        dynamic_shared: usize,
        params: Vec<u8>,
    },
    Upload {
        to: u64,
        from: usize,
        len: u64,
    },
    Download {
        to: usize,
        from: u64,
        len: u64,
    },
    Copy {
        to: u64,
        from: u64,
        len: u64,
    },
    Fill {
        to: u64,
        value: u32,
        width: usize,
        count: u64,
    },
    Prefetch {
        at: u64,
        len: u64,
        to: Place,
    },
}

/// Why it failed: a sticky code and the text.
pub struct Failure {
    /// CUDA error.
    pub code: i32,
    /// For the log.
    pub text: String,
    /// Whether the context is lost.
    pub sticky: bool,
}

/// What came of it besides its effect.
#[derive(Default)]
pub struct Outcome {
    /// Lanes that ran.
    pub thread_instructions: u64,
    /// A download read this byte, which nothing ever wrote.
    pub unwritten: Option<u64>,
}

impl Work {
    /// For messages and logs.
    pub fn name(&self) -> String {
        match self {
            Work::Kernel { kernel, .. } => format!("kernel {}", kernel.name),
            Work::Upload { .. } => "copy from host".into(),
            Work::Download { .. } => "copy to host".into(),
            Work::Copy { .. } => "device copy".into(),
            Work::Fill { .. } => "memset".into(),
            Work::Prefetch { .. } => "prefetch".into(),
        }
    }

    /// Does it on `device`.
    ///
    /// # Safety
    /// The host pointers of an upload or download must be valid for their lengths, now: for a
    /// graph, at every replay, as CUDA asks.
    pub unsafe fn run(
        &self,
        mem: &mut Memory,
        device: u32,
        budget: u64,
    ) -> Result<Outcome, Failure> {
        let here = Place::Device(device);
        let refused = |what: &str, r: Refusal| {
            let why = match r {
                Refusal::OutOfBounds(w) => w,
                Refusal::WrongDevice(d) => format!("memory of device {d}"),
                Refusal::Uninitialised(b) => format!("byte {b:#x} was never written"),
            };
            Failure { code: 1, text: format!("{what}: {why}"), sticky: false }
        };
        let mut out = Outcome::default();
        match self {
            Work::Kernel { kernel, grid, block, dynamic_shared, params } => {
                let launch = Launch {
                    kernel,
                    grid: *grid,
                    block: *block,
                    dynamic_shared: *dynamic_shared,
                    params,
                    device,
                    budget,
                };
                let stats = run(&launch, mem).map_err(|f| Failure {
                    code: f.kind.code(),
                    text: f.to_string(),
                    sticky: true,
                })?;
                out.thread_instructions = stats.thread_instructions;
            }
            Work::Upload { to, from, len } => {
                // SAFETY: by this function's contract.
                let r = unsafe { mem.upload(*to, *from as *const u8, *len, here) };
                r.map_err(|r| refused("copy from host", r))?;
            }
            Work::Download { to, from, len } => {
                // SAFETY: by this function's contract.
                let r = unsafe { mem.download(*to as *mut u8, *from, *len) };
                out.unwritten = r.map_err(|r| refused("copy to host", r))?;
            }
            Work::Copy { to, from, len } => {
                mem.copy(*to, *from, *len, here).map_err(|r| refused("device copy", r))?;
            }
            Work::Fill { to, value, width, count } => {
                mem.fill(*to, *value, *width, *count, here).map_err(|r| refused("memset", r))?;
            }
            Work::Prefetch { at, len, to } => {
                let found = mem.find(*at).filter(|&i| {
                    let r = mem.region(i);
                    r.pages.is_some() && r.len - (at - r.base) >= *len
                });
                let Some(i) = found else {
                    return Err(refused(
                        "prefetch",
                        Refusal::OutOfBounds("not managed memory".into()),
                    ));
                };
                let r = mem.region_mut(i);
                let (base, off) = (r.base, at - r.base);
                if let Some(p) = &mut r.pages {
                    p.shift(base, off, *len, *to, Cause::Prefetch);
                }
            }
        }
        Ok(out)
    }
}
