//! Loads, stores and atomics of a warp, lane by lane, every access checked.

use super::Context;
use super::warp::Warp;
use crate::fault::{Fault, FaultKind};
use crate::inst::{Addr, Atom, AtomOp, Inst, Mem};
use crate::memory::managed::Place;
use crate::memory::{self, Kind, LOCAL_WINDOW, SHARED_WINDOW, WINDOW};
use crate::ptx::ast::{Space, Ty};
use crate::regs::WARP;
use crate::shared::{self, Who};

/// Loaded bytes to a register's bits.
fn extend(b: &[u8], ty: Ty, keep: u64) -> u64 {
    let mut v = [0; 8];
    v[..b.len()].copy_from_slice(b);
    let v = u64::from_le_bytes(v);
    let v = if ty.is_signed() {
        let up = 64 - 8 * ty.bytes() as u32;
        (((v << up) as i64) >> up) as u64
    } else {
        v
    };
    v & keep
}

impl Warp {
    fn address(&self, a: Addr, l: usize) -> u64 {
        a.base.map_or(0, |s| self.regs.lane(s, l)).wrapping_add(a.offset as u64)
    }

    /// State space and address in it.
    fn resolve(space: Space, addr: u64) -> (Space, u64) {
        match space {
            Space::Generic if addr.wrapping_sub(SHARED_WINDOW) < WINDOW => {
                (Space::Shared, addr - SHARED_WINDOW)
            }
            Space::Generic if addr.wrapping_sub(LOCAL_WINDOW) < WINDOW => {
                (Space::Local, addr - LOCAL_WINDOW)
            }
            Space::Generic => (Space::Global, addr),
            s => (s, addr),
        }
    }

    fn thread(&self, l: usize) -> u32 {
        32 * self.index + l as u32
    }

    fn shared_fault(
        &self,
        cx: &Context<'_>,
        inst: &Inst,
        l: usize,
        at: u64,
        n: usize,
        r: &shared::Refusal,
    ) -> Box<Fault> {
        let t = self.thread(l);
        match *r {
            shared::Refusal::OutOfBounds => {
                let detail = format!("{n} bytes in {} bytes of shared memory", cx.shared.len());
                cx.fault(inst, t, FaultKind::OutOfBounds, Some(at), detail)
            }
            shared::Refusal::Uninitialised(b) => cx.fault(
                inst,
                t,
                FaultKind::Uninitialised,
                Some(b),
                "shared byte never written in this block".into(),
            ),
            shared::Refusal::Race(b, did, other) => {
                let other = other.map_or("several threads".to_string(), |o| format!("thread {o}"));
                let detail = format!(
                    "shared byte {b}: {other} of the block {did} it since the last barrier"
                );
                cx.fault(inst, t, FaultKind::SharedRace, Some(at), detail)
            }
        }
    }

    fn global_fault(
        &self,
        cx: &Context<'_>,
        inst: &Inst,
        l: usize,
        at: u64,
        n: usize,
        r: memory::Refusal,
    ) -> Box<Fault> {
        let t = self.thread(l);
        match r {
            memory::Refusal::OutOfBounds(why) => {
                cx.fault(inst, t, FaultKind::OutOfBounds, Some(at), why)
            }
            memory::Refusal::WrongDevice(d) => {
                let detail = format!("{n} bytes of device {d}, from device {}", cx.launch.device);
                cx.fault(inst, t, FaultKind::OutOfBounds, Some(at), detail)
            }
            memory::Refusal::Uninitialised(b) => {
                let detail = format!("global byte {b:#x} was never written ({n} bytes read)");
                cx.fault(inst, t, FaultKind::Uninitialised, Some(at), detail)
            }
        }
    }

    fn aligned(
        &self,
        cx: &Context<'_>,
        inst: &Inst,
        l: usize,
        at: u64,
        n: usize,
    ) -> Result<(), Box<Fault>> {
        if at.is_multiple_of(n as u64) {
            return Ok(());
        }
        let detail = format!("{n} bytes need a multiple of {n}");
        Err(cx.fault(inst, self.thread(l), FaultKind::Misaligned, Some(at), detail))
    }

    fn local_range(
        &self,
        cx: &Context<'_>,
        inst: &Inst,
        l: usize,
        at: u64,
        n: usize,
    ) -> Result<usize, Box<Fault>> {
        let size = cx.launch.kernel.local_bytes;
        if at.checked_add(n as u64).is_some_and(|e| e <= size as u64) {
            return Ok(l * size + at as usize);
        }
        let detail = format!("{n} bytes in {size} bytes of local memory");
        Err(cx.fault(inst, self.thread(l), FaultKind::OutOfBounds, Some(at), detail))
    }

    /// Reads `n` bytes for lane `l`.
    #[expect(clippy::too_many_arguments, reason = "one access and where it comes from")]
    fn fetch(
        &mut self,
        cx: &mut Context<'_>,
        inst: &Inst,
        pc: u32,
        space: Space,
        raw: u64,
        n: usize,
        l: usize,
        tick: u64,
        atomic: bool,
    ) -> Result<[u8; 16], Box<Fault>> {
        let (at_space, at) = Self::resolve(space, raw);
        self.aligned(cx, inst, l, at, n)?;
        match at_space {
            Space::Shared => {
                let who = Who { thread: self.thread(l), tick, atomic };
                cx.shared.read(at, n, who).map_err(|r| self.shared_fault(cx, inst, l, at, n, &r))
            }
            Space::Local => {
                let i = self.local_range(cx, inst, l, at, n)?;
                if let Some(b) = (0..n).find(|b| !self.local_known[i + b]) {
                    let detail = format!("local byte {} was never written", at + b as u64);
                    return Err(cx.fault(
                        inst,
                        self.thread(l),
                        FaultKind::Uninitialised,
                        Some(at),
                        detail,
                    ));
                }
                let mut out = [0; 16];
                out[..n].copy_from_slice(&self.local[i..i + n]);
                Ok(out)
            }
            Space::Param => {
                let p = cx.launch.params;
                let end = at.checked_add(n as u64).filter(|e| *e <= p.len() as u64);
                let Some(end) = end else {
                    let detail = format!("{n} bytes in {} bytes of parameters", p.len());
                    return Err(cx.fault(
                        inst,
                        self.thread(l),
                        FaultKind::OutOfBounds,
                        Some(at),
                        detail,
                    ));
                };
                let mut out = [0; 16];
                out[..n].copy_from_slice(&p[at as usize..end as usize]);
                Ok(out)
            }
            _ => {
                let hint = &mut cx.hints[pc as usize];
                let device = cx.launch.device;
                let r = cx.mem.locate(at, n as u64, device, hint).and_then(|i| {
                    let constant = cx.mem.region(i).kind == Kind::ModuleConst;
                    if (space == Space::Const && !constant) || (space == Space::Global && constant)
                    {
                        return Err(memory::Refusal::OutOfBounds(format!(
                            "{n} bytes of another state space"
                        )));
                    }
                    cx.mem.read(i, at, n, Place::Device(device))
                });
                r.map_err(|r| self.global_fault(cx, inst, l, at, n, r))
            }
        }
    }

    /// Writes `data` for lane `l`.
    #[expect(clippy::too_many_arguments, reason = "one access and where it comes from")]
    fn put(
        &mut self,
        cx: &mut Context<'_>,
        inst: &Inst,
        pc: u32,
        space: Space,
        raw: u64,
        data: &[u8],
        l: usize,
        tick: u64,
        atomic: bool,
    ) -> Result<(), Box<Fault>> {
        let (at_space, at) = Self::resolve(space, raw);
        let n = data.len();
        self.aligned(cx, inst, l, at, n)?;
        match at_space {
            Space::Shared => {
                let who = Who { thread: self.thread(l), tick, atomic };
                cx.shared
                    .write(at, data, who)
                    .map_err(|r| self.shared_fault(cx, inst, l, at, n, &r))
            }
            Space::Local => {
                let i = self.local_range(cx, inst, l, at, n)?;
                self.local[i..i + n].copy_from_slice(data);
                self.local_known[i..i + n].fill(true);
                Ok(())
            }
            _ => {
                let hint = &mut cx.hints[pc as usize];
                let device = cx.launch.device;
                let i = match cx.mem.locate(at, n as u64, device, hint) {
                    Ok(i) => i,
                    Err(r) => return Err(self.global_fault(cx, inst, l, at, n, r)),
                };
                if cx.mem.region(i).kind == Kind::ModuleConst {
                    return Err(cx.fault(
                        inst,
                        self.thread(l),
                        FaultKind::ReadOnly,
                        Some(at),
                        format!("{n} bytes"),
                    ));
                }
                let r = cx.mem.write(i, at, data, Place::Device(device));
                r.map_err(|r| self.global_fault(cx, inst, l, at, n, r))
            }
        }
    }

    pub(super) fn load(
        &mut self,
        cx: &mut Context<'_>,
        inst: &Inst,
        pc: u32,
        m: &Mem,
        exec: u32,
    ) -> Result<(), Box<Fault>> {
        let size = m.ty.bytes();
        let tick = cx.stats.warp_instructions;
        if m.space == Space::Param && m.addr.base.is_none() {
            // The same for all lanes; parameters are not tracked, so one read serves.
            let l = exec.trailing_zeros() as usize;
            let b = self.fetch(
                cx,
                inst,
                pc,
                m.space,
                m.addr.offset as u64,
                size * m.regs.len(),
                l,
                tick,
                false,
            )?;
            for (r, c) in m.regs.iter().zip(b.chunks_exact(size)) {
                if let Some(r) = r {
                    let v = extend(c, m.ty, m.keep);
                    (0..WARP)
                        .filter(|l| (exec >> l) & 1 == 1)
                        .for_each(|l| self.regs.set_lane(*r, l, v));
                }
            }
            return Ok(());
        }
        for l in 0..WARP {
            if (exec >> l) & 1 == 0 {
                continue;
            }
            let at = self.address(m.addr, l);
            let b = self.fetch(cx, inst, pc, m.space, at, size * m.regs.len(), l, tick, false)?;
            for (r, c) in m.regs.iter().zip(b.chunks_exact(size)) {
                if let Some(r) = r {
                    self.regs.set_lane(*r, l, extend(c, m.ty, m.keep));
                }
            }
        }
        Ok(())
    }

    pub(super) fn store(
        &mut self,
        cx: &mut Context<'_>,
        inst: &Inst,
        pc: u32,
        m: &Mem,
        exec: u32,
    ) -> Result<(), Box<Fault>> {
        let size = m.ty.bytes();
        let tick = cx.stats.warp_instructions;
        for l in 0..WARP {
            if (exec >> l) & 1 == 0 {
                continue;
            }
            let mut data = [0; 16];
            for (r, c) in m.regs.iter().zip(data.chunks_exact_mut(size)) {
                if let Some(r) = r {
                    c.copy_from_slice(&self.regs.lane(*r, l).to_le_bytes()[..size]);
                }
            }
            let at = self.address(m.addr, l);
            self.put(cx, inst, pc, m.space, at, &data[..size * m.regs.len()], l, tick, false)?;
        }
        Ok(())
    }

    /// Lanes take their turns in ascending order.
    pub(super) fn atom(
        &mut self,
        cx: &mut Context<'_>,
        inst: &Inst,
        pc: u32,
        a: &Atom,
        exec: u32,
    ) -> Result<(), Box<Fault>> {
        let size = a.ty.bytes();
        let tick = cx.stats.warp_instructions;
        for l in 0..WARP {
            if (exec >> l) & 1 == 0 {
                continue;
            }
            let at = self.address(a.addr, l);
            let in_shared = Self::resolve(a.space, at).0 == Space::Shared;
            let old = self.fetch(cx, inst, pc, a.space, at, size, l, tick, true)?;
            let old = extend(&old[..size], if size == 8 { Ty::B64 } else { Ty::B32 }, u64::MAX);
            let b = self.regs.lane(a.b, l);
            let c = a.c.map_or(0, |c| self.regs.lane(c, l));
            let new = combine(a.op, a.ty, old, b, c, !in_shared);
            self.put(cx, inst, pc, a.space, at, &new.to_le_bytes()[..size], l, tick, true)?;
            if let Some(d) = a.dest {
                self.regs.set_lane(d, l, old);
            }
        }
        Ok(())
    }
}

/// Subnormals to zero with their sign.
fn flush(x: u32) -> u32 {
    if f32::from_bits(x).is_subnormal() { x & 0x8000_0000 } else { x }
}

/// What an atomic stores.
fn combine(op: AtomOp, ty: Ty, old: u64, b: u64, c: u64, global: bool) -> u64 {
    let (o32, b32) = (old as u32, b as u32);
    match (op, ty) {
        // Documented: f32 addition flushes subnormals in global memory and keeps them in shared.
        (AtomOp::Add, Ty::F32) if global => {
            flush(crate::alu::float::add(flush(o32), flush(b32))).into()
        }
        (AtomOp::Add, Ty::F32) => crate::alu::float::add(o32, b32).into(),
        (AtomOp::Add, Ty::F64) => crate::alu::float::add64(old, b),
        (AtomOp::Add, Ty::U64) => old.wrapping_add(b),
        (AtomOp::Add, _) => o32.wrapping_add(b32).into(),
        (AtomOp::Min, Ty::S32) => ((o32 as i32).min(b32 as i32) as u32).into(),
        (AtomOp::Max, Ty::S32) => ((o32 as i32).max(b32 as i32) as u32).into(),
        (AtomOp::Min, Ty::S64) => (old as i64).min(b as i64) as u64,
        (AtomOp::Max, Ty::S64) => (old as i64).max(b as i64) as u64,
        (AtomOp::Min, _) => old.min(b),
        (AtomOp::Max, _) => old.max(b),
        (AtomOp::And, _) => old & b,
        (AtomOp::Or, _) => old | b,
        (AtomOp::Xor, _) => old ^ b,
        (AtomOp::Exch, _) => b,
        (AtomOp::Cas, _) => {
            if old == b {
                c
            } else {
                old
            }
        }
        (AtomOp::Inc, _) => (if o32 >= b32 { 0 } else { o32 + 1 }).into(),
        (AtomOp::Dec, _) => (if o32 == 0 || o32 > b32 { b32 } else { o32 - 1 }).into(),
    }
}
