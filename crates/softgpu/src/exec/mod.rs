//! Runs a kernel: blocks one after another, warps of a block in turns, lanes of a warp together.

mod access;
mod meet;
mod warp;

use crate::fault::{Fault, FaultKind};
use crate::inst::{Inst, Kernel};
use crate::memory::Memory;
use crate::shared::Shared;
use warp::{Stop, Warp};

/// Shape and inputs of a launch.
pub struct Launch<'a> {
    /// What to run.
    pub kernel: &'a Kernel,
    /// Blocks.
    pub grid: [u32; 3],
    /// Threads a block.
    pub block: [u32; 3],
    /// Dynamic shared memory.
    pub dynamic_shared: usize,
    /// The parameter block, `kernel.param_bytes` long.
    pub params: &'a [u8],
    /// Which device runs it.
    pub device: u32,
    /// Warp instructions a block may execute.
    pub budget: u64,
}

/// What a finished launch did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Stats {
    /// Warp instructions issued.
    pub warp_instructions: u64,
    /// Lanes that took part in them.
    pub thread_instructions: u64,
}

/// What all warps of a block share while it runs.
pub(crate) struct Context<'a> {
    pub launch: &'a Launch<'a>,
    pub mem: &'a mut Memory,
    pub shared: Shared,
    pub block: [u32; 3],
    /// Region last used, by instruction.
    pub hints: Vec<u32>,
    pub stats: Stats,
    pub spent: u64,
}

impl Context<'_> {
    /// A fault of `thread` (linear) at `inst`.
    pub fn fault(
        &self,
        inst: &Inst,
        thread: u32,
        kind: FaultKind,
        addr: Option<u64>,
        detail: String,
    ) -> Box<Fault> {
        let [x, y, _] = self.launch.block;
        Box::new(Fault {
            kind,
            kernel: self.launch.kernel.name.clone(),
            line: inst.line,
            text: inst.text.to_string(),
            block: self.block,
            thread: [thread % x, thread / x % y, thread / (x * y)],
            addr,
            detail,
        })
    }
}

/// How many instructions a warp runs before the next one gets its turn.
const QUANTUM: u64 = 1 << 14;

/// Runs all blocks in order.
pub fn run(launch: &Launch<'_>, mem: &mut Memory) -> Result<Stats, Box<Fault>> {
    let threads = launch.block.iter().product::<u32>();
    let warps = threads.div_ceil(32);
    let k = launch.kernel;
    let mut cx = Context {
        launch,
        mem,
        shared: Shared::new(k.shared_bytes + launch.dynamic_shared, warps as usize),
        block: [0; 3],
        hints: vec![u32::MAX; k.code.len()],
        stats: Stats::default(),
        spent: 0,
    };
    let mut all: Vec<Warp> = (0..warps).map(|w| Warp::new(launch, w, threads)).collect();
    for z in 0..launch.grid[2] {
        for y in 0..launch.grid[1] {
            for x in 0..launch.grid[0] {
                cx.block = [x, y, z];
                cx.spent = 0;
                cx.shared.reset();
                for w in &mut all {
                    w.start(&cx);
                }
                block(&mut cx, &mut all)?;
            }
        }
    }
    Ok(cx.stats)
}

fn block(cx: &mut Context<'_>, all: &mut [Warp]) -> Result<(), Box<Fault>> {
    loop {
        let mut paused = false;
        let mut done = None;
        let mut waits: Option<usize> = None;
        for (i, w) in all.iter_mut().enumerate() {
            match w.run(cx, QUANTUM)? {
                Stop::Paused => paused = true,
                Stop::Done => done = Some(i),
                Stop::Barrier => waits = Some(i),
            }
        }
        if paused {
            continue;
        }
        let Some(first) = waits else { return Ok(()) };
        if let Some(d) = done {
            // The CUDA manual wants the barrier reached by all threads or none; a warp that left
            // early happens to work on some devices only.
            let w = &all[first];
            let inst = &cx.launch.kernel.code[w.barrier_pc()];
            let detail =
                format!("thread {} of the block ended without reaching this barrier", 32 * d);
            return Err(cx.fault(inst, w.first_thread(), FaultKind::Divergent, None, detail));
        }
        let id = all[first].barrier_id(cx);
        for w in all.iter() {
            let other = w.barrier_id(cx);
            if other != id {
                let inst = &cx.launch.kernel.code[w.barrier_pc()];
                let detail =
                    format!("waits at barrier {other} while thread {} waits at {id}", 32 * first);
                return Err(cx.fault(inst, w.first_thread(), FaultKind::Divergent, None, detail));
            }
        }
        cx.shared.block_barrier();
        for w in all.iter_mut() {
            w.release();
        }
    }
}
