//! One warp. Lanes at the lowest program counter run together until they meet others.

use super::meet::Outcome;
use super::{Context, Launch};
use crate::fault::{Fault, FaultKind};
use crate::inst::{Inst, MaskKind, Op, Special};
use crate::regs::{Regs, WARP};

/// Why a warp stopped running.
pub enum Stop {
    /// Its turn is over.
    Paused,
    /// All threads ended.
    Done,
    /// All threads wait at a block barrier.
    Barrier,
}

/// A warp's state.
pub struct Warp {
    pub(super) regs: Regs,
    pub(super) pc: [u32; WARP],
    /// Threads that exist and have not ended.
    pub(super) live: u32,
    /// Waiting at a warp-level `.sync`.
    pub(super) waiting: u32,
    /// Waiting at a block barrier.
    at_barrier: u32,
    pub(super) index: u32,
    /// Threads that exist.
    exist: u32,
    /// Local memory, lane after lane.
    pub(super) local: Vec<u8>,
    pub(super) local_known: Vec<bool>,
    /// `Regs::known` at the start of a block.
    known: Vec<u32>,
}

fn set_pc(pc: &mut [u32; WARP], mask: u32, to: u32) {
    for (l, p) in pc.iter_mut().enumerate() {
        if (mask >> l) & 1 == 1 {
            *p = to;
        }
    }
}

impl Warp {
    /// Registers, constants and the special registers that stay the same in every block.
    pub fn new(launch: &Launch<'_>, index: u32, threads: u32) -> Warp {
        let k = launch.kernel;
        let [w, q, p] = k.counts;
        let mut regs = Regs {
            w: vec![[0; WARP]; w],
            q: vec![[0; WARP]; q],
            p: vec![0; p],
            known: vec![0; w + q + p],
        };
        for &(slot, v) in &k.consts {
            regs.fill(slot, v);
            let at = regs.flat(slot);
            regs.known[at] = u32::MAX;
        }
        for &(what, slot) in &k.specials {
            let at = regs.flat(slot);
            regs.known[at] = u32::MAX;
            for l in 0..WARP {
                let v = special(launch, what, index, l as u32);
                regs.set_lane(slot, l, u64::from(v));
            }
        }
        let count = (threads - 32 * index).min(32);
        let known = regs.known.clone();
        Warp {
            regs,
            pc: [0; WARP],
            live: 0,
            waiting: 0,
            at_barrier: 0,
            index,
            exist: if count == 32 { u32::MAX } else { (1 << count) - 1 },
            local: vec![0; WARP * k.local_bytes],
            local_known: vec![false; WARP * k.local_bytes],
            known,
        }
    }

    /// At the start of a block.
    pub fn start(&mut self, cx: &Context<'_>) {
        self.regs.known.copy_from_slice(&self.known);
        self.local_known.fill(false);
        self.pc = [0; WARP];
        self.live = self.exist;
        self.waiting = 0;
        self.at_barrier = 0;
        for &(what, slot) in &cx.launch.kernel.specials {
            if let Special::Ctaid(a) = what {
                self.regs.fill(slot, u64::from(cx.block[a as usize]));
            }
        }
    }

    /// Linear number of the first waiting thread.
    pub fn first_thread(&self) -> u32 {
        32 * self.index + self.at_barrier.trailing_zeros()
    }

    /// Where the warp waits.
    pub fn barrier_pc(&self) -> usize {
        self.pc[self.at_barrier.trailing_zeros() as usize & 31] as usize
    }

    /// Which barrier it waits at.
    pub fn barrier_id(&self, cx: &Context<'_>) -> u32 {
        match cx.launch.kernel.code[self.barrier_pc()].op {
            Op::Barrier { id, .. } => id,
            _ => u32::MAX,
        }
    }

    /// Past the barrier.
    pub fn release(&mut self) {
        for l in 0..WARP {
            self.pc[l] += (self.at_barrier >> l) & 1;
        }
        self.at_barrier = 0;
    }

    /// All lanes stopped: may the block barrier complete?
    fn stopped(&self, cx: &Context<'_>) -> Result<Stop, Box<Fault>> {
        let code = &cx.launch.kernel.code;
        let thread = |l: u32| 32 * self.index + l;
        if self.waiting != 0 {
            let l = self.waiting.trailing_zeros();
            let inst = &code[self.pc[l as usize] as usize];
            let members = self.members(inst, l as usize);
            let here = (0..32)
                .filter(|&o| (self.waiting >> o) & 1 == 1 && self.pc[o] == self.pc[l as usize]);
            let here = here.fold(0u32, |m, o| m | (1 << o));
            let missing = members & !here;
            let at = missing.trailing_zeros() & 31;
            let detail = format!(
                "membermask {members:#010x} names lane {at}, which waits at PTX line {} instead; here: {here:#010x}",
                code[self.pc[at as usize] as usize].line
            );
            return Err(cx.fault(inst, thread(l), FaultKind::Divergent, None, detail));
        }
        let l = self.at_barrier.trailing_zeros();
        let pc = self.pc[l as usize];
        let inst = &code[pc as usize];
        let gone = self.exist & !self.live;
        if gone != 0 {
            let detail = format!(
                "thread {} ended without reaching this barrier",
                thread(gone.trailing_zeros())
            );
            return Err(cx.fault(inst, thread(l), FaultKind::Divergent, None, detail));
        }
        for o in 0..32 {
            let other = self.pc[o as usize];
            if (self.at_barrier >> o) & 1 == 0 || other == pc {
                continue;
            }
            let aligned =
                |pc: u32| matches!(code[pc as usize].op, Op::Barrier { aligned: true, .. });
            let id = |pc: u32| {
                if let Op::Barrier { id, .. } = code[pc as usize].op { id } else { u32::MAX }
            };
            if aligned(pc) || aligned(other) || id(pc) != id(other) {
                let detail = format!(
                    "thread {} of the same warp waits at another barrier, PTX line {}",
                    thread(o),
                    code[other as usize].line
                );
                return Err(cx.fault(inst, thread(l), FaultKind::Divergent, None, detail));
            }
        }
        Ok(Stop::Barrier)
    }

    /// Runs until the turn is over or no lane can go on.
    pub fn run(&mut self, cx: &mut Context<'_>, quantum: u64) -> Result<Stop, Box<Fault>> {
        let code: &[Inst] = &cx.launch.kernel.code;
        let stop_at = cx.spent + quantum;
        loop {
            let ready = self.live & !self.waiting & !self.at_barrier;
            if ready == 0 {
                return if self.live == 0 { Ok(Stop::Done) } else { self.stopped(cx) };
            }
            if cx.spent >= stop_at {
                return Ok(Stop::Paused);
            }
            let (mut pc, mut mask, others) = self.pick(ready);
            // Lanes at `pc` run on until they reach the next lanes above them.
            loop {
                let inst = &code[pc as usize];
                cx.spent += 1;
                if cx.spent > cx.launch.budget {
                    let t = 32 * self.index + mask.trailing_zeros();
                    let detail =
                        format!("more than {} warp instructions in one block", cx.launch.budget);
                    return Err(cx.fault(inst, t, FaultKind::Timeout, None, detail));
                }
                let mut exec = mask;
                let mut sources: &[u32] = &inst.reads;
                if let Some((p, negate)) = inst.guard {
                    self.check(cx, inst, &sources[..1], mask)?;
                    sources = &sources[1..];
                    let v = self.regs.p[p as usize];
                    exec &= if negate { !v } else { v };
                }
                cx.stats.warp_instructions += 1;
                if exec != 0 {
                    cx.stats.thread_instructions += u64::from(exec.count_ones());
                    self.check(cx, inst, sources, exec)?;
                    match &inst.op {
                        Op::Alu(f) => f(&mut self.regs, exec),
                        Op::Load(m) => self.load(cx, inst, pc, m, exec)?,
                        Op::Store(m) => self.store(cx, inst, pc, m, exec)?,
                        Op::Branch(to) => {
                            if exec == mask {
                                pc = *to;
                                if pc >= others || cx.spent >= stop_at {
                                    set_pc(&mut self.pc, mask, pc);
                                    break;
                                }
                                continue;
                            }
                            set_pc(&mut self.pc, exec, *to);
                            set_pc(&mut self.pc, mask & !exec, pc + 1);
                            break;
                        }
                        Op::Divide(f, by) => {
                            for l in 0..WARP {
                                if (exec >> l) & 1 == 1 && self.regs.lane(*by, l) == 0 {
                                    let t = 32 * self.index + l as u32;
                                    return Err(cx.fault(
                                        inst,
                                        t,
                                        FaultKind::DivideByZero,
                                        None,
                                        String::new(),
                                    ));
                                }
                            }
                            f(&mut self.regs, exec);
                        }
                        Op::Atom(a) => self.atom(cx, inst, pc, a, exec)?,
                        Op::Meet(what, members) => {
                            match self.meet(cx, inst, pc, what, *members, mask, exec)? {
                                Outcome::Together => {}
                                Outcome::Regroup => break,
                            }
                        }
                        Op::ActiveMask(d) => {
                            for l in 0..WARP {
                                if (exec >> l) & 1 == 1 {
                                    self.regs.set_lane(*d, l, u64::from(exec));
                                }
                            }
                        }
                        Op::Barrier { .. } => {
                            self.at_barrier |= exec;
                            set_pc(&mut self.pc, exec, pc);
                            set_pc(&mut self.pc, mask & !exec, pc + 1);
                            break;
                        }
                        Op::Exit => {
                            self.live &= !exec;
                            mask &= !exec;
                            if mask == 0 {
                                break;
                            }
                        }
                        Op::Trap => {
                            let t = 32 * self.index + exec.trailing_zeros();
                            return Err(cx.fault(inst, t, FaultKind::Trap, None, String::new()));
                        }
                        Op::Fence => {}
                    }
                    if !matches!(inst.op, Op::Meet(..)) {
                        for &w in &inst.writes {
                            self.regs.known[w as usize] |= exec;
                        }
                    }
                }
                pc += 1;
                if pc >= others {
                    set_pc(&mut self.pc, mask, pc);
                    break;
                }
            }
        }
    }

    /// The lanes at the lowest program counter, and the next higher one.
    fn pick(&self, ready: u32) -> (u32, u32, u32) {
        let (mut low, mut next, mut mask) = (u32::MAX, u32::MAX, 0);
        for l in 0..WARP {
            if (ready >> l) & 1 == 0 {
                continue;
            }
            let pc = self.pc[l];
            match pc.cmp(&low) {
                std::cmp::Ordering::Less => {
                    next = low;
                    low = pc;
                    mask = 1 << l;
                }
                std::cmp::Ordering::Equal => mask |= 1 << l,
                std::cmp::Ordering::Greater => next = next.min(pc),
            }
        }
        (low, mask, next)
    }

    fn check(
        &self,
        cx: &Context<'_>,
        inst: &Inst,
        reads: &[u32],
        exec: u32,
    ) -> Result<(), Box<Fault>> {
        for &r in reads {
            let bad = exec & !self.regs.known[r as usize];
            if bad != 0 {
                let name = &cx.launch.kernel.names[r as usize];
                let detail = format!(
                    "register {name} holds no value (never written, or shuffled from a lane that was not there)"
                );
                let t = 32 * self.index + bad.trailing_zeros();
                return Err(cx.fault(inst, t, FaultKind::Uninitialised, None, detail));
            }
        }
        Ok(())
    }
}

fn special(launch: &Launch<'_>, what: Special, warp: u32, lane: u32) -> u32 {
    let t = 32 * warp + lane;
    let [x, y, z] = launch.block;
    let bit = 1u32 << lane;
    match what {
        Special::Tid(0) => t % x,
        Special::Tid(1) => t / x % y,
        Special::Tid(_) => t / (x * y),
        Special::Ntid(a) => launch.block[a as usize],
        Special::Nctaid(a) => launch.grid[a as usize],
        Special::Ctaid(_) => 0,
        Special::LaneId => lane,
        Special::WarpId => warp,
        Special::NWarpId => (x * y * z).div_ceil(32),
        Special::LaneMask(k) => match k {
            MaskKind::Eq => bit,
            MaskKind::Lt => bit - 1,
            MaskKind::Le => bit | (bit - 1),
            MaskKind::Gt => !(bit | (bit - 1)),
            MaskKind::Ge => !(bit - 1),
        },
        Special::DynamicShared => launch.dynamic_shared as u32,
        Special::TotalShared => (launch.kernel.shared_bytes + launch.dynamic_shared) as u32,
    }
}
