//! Warp-level `.sync` instructions: who must come, who has come, and what they do together.

use super::Context;
use super::warp::Warp;
use crate::fault::{Fault, FaultKind};
use crate::inst::{AtomOp, Inst, Meet, Op, Shuffle, Vote};
use crate::regs::{Slot, WARP};

/// Whether the lanes that arrived go on together.
pub enum Outcome {
    /// They do; the usual case.
    Together,
    /// Some wait, or others were woken.
    Regroup,
}

fn lanes(mask: u32) -> impl Iterator<Item = usize> {
    (0..WARP).filter(move |l| (mask >> l) & 1 == 1)
}

impl Warp {
    /// The membermask lane `l` gives at `inst`.
    pub(super) fn members(&self, inst: &Inst, l: usize) -> u32 {
        match inst.op {
            Op::Meet(_, mask) => self.regs.lane(mask, l) as u32,
            _ => 0,
        }
    }

    /// Lanes `exec` (of the group `mask`) arrive at `inst`.
    #[expect(clippy::too_many_arguments, reason = "the state of one instruction")]
    pub(super) fn meet(
        &mut self,
        cx: &mut Context<'_>,
        inst: &Inst,
        pc: u32,
        what: &Meet,
        members: Slot,
        mask: u32,
        exec: u32,
    ) -> Result<Outcome, Box<Fault>> {
        let mut same = true;
        for l in lanes(exec) {
            let m = self.regs.lane(members, l) as u32;
            same &= m == exec;
            let thread = 32 * self.index + l as u32;
            if (m >> l) & 1 == 0 {
                let detail = format!("membermask {m:#010x} does not name the calling lane {l}");
                return Err(cx.fault(inst, thread, FaultKind::Divergent, None, detail));
            }
            if m & !self.live != 0 {
                let at = (m & !self.live).trailing_zeros();
                let detail = format!(
                    "membermask {m:#010x} names lane {at}, which has ended or never existed"
                );
                return Err(cx.fault(inst, thread, FaultKind::Divergent, None, detail));
            }
        }
        if same {
            self.together(cx, inst, what, exec);
            return Ok(Outcome::Together);
        }
        self.waiting |= exec;
        for l in lanes(mask) {
            self.pc[l] = pc + u32::from((exec >> l) & 1 == 0);
        }
        loop {
            let here =
                lanes(self.waiting).filter(|&l| self.pc[l] == pc).fold(0u32, |m, l| m | (1 << l));
            let complete = lanes(here).find(|&l| self.members(inst, l) & !here == 0);
            let Some(l) = complete else { break };
            let set = self.members(inst, l);
            if let Some(o) = lanes(set).find(|&o| self.members(inst, o) != set) {
                let detail = format!(
                    "membermask {set:#010x} here, but {:#010x} in lane {o}, which it names",
                    self.members(inst, o)
                );
                return Err(cx.fault(
                    inst,
                    32 * self.index + l as u32,
                    FaultKind::Divergent,
                    None,
                    detail,
                ));
            }
            self.together(cx, inst, what, set);
            self.waiting &= !set;
            for l in lanes(set) {
                self.pc[l] = pc + 1;
            }
        }
        Ok(Outcome::Regroup)
    }

    /// All lanes of `set` do it.
    fn together(&mut self, cx: &mut Context<'_>, inst: &Inst, what: &Meet, set: u32) {
        for &w in &inst.writes {
            self.regs.known[w as usize] |= set;
        }
        match *what {
            Meet::Barrier => {
                if set == self.live {
                    cx.shared.warp_barrier(self.index as usize);
                }
            }
            Meet::Vote { mode, dest, src, negate } => {
                let mut yes = 0;
                for l in lanes(set) {
                    yes |= u32::from((self.regs.lane(src, l) == 1) != negate) << l;
                }
                let v = match mode {
                    Vote::All => u32::from(yes == set),
                    Vote::Any => u32::from(yes != 0),
                    Vote::Uni => u32::from(yes == set || yes == 0),
                    Vote::Ballot => yes,
                };
                lanes(set).for_each(|l| self.regs.set_lane(dest, l, v.into()));
            }
            Meet::Redux { op, signed, dest, src } => {
                let mut all = lanes(set).map(|l| self.regs.lane(src, l) as u32);
                let first = all.next().unwrap_or_default();
                let v = all.fold(first, |a, b| match (op, signed) {
                    (AtomOp::Add, _) => a.wrapping_add(b),
                    (AtomOp::Min, false) => a.min(b),
                    (AtomOp::Max, false) => a.max(b),
                    (AtomOp::Min, true) => (a as i32).min(b as i32) as u32,
                    (AtomOp::Max, true) => (a as i32).max(b as i32) as u32,
                    (AtomOp::And, _) => a & b,
                    (AtomOp::Or, _) => a | b,
                    _ => a ^ b,
                });
                lanes(set).for_each(|l| self.regs.set_lane(dest, l, v.into()));
            }
            Meet::MatchAny { dest, src } => {
                let v: [u64; WARP] = std::array::from_fn(|l| self.regs.lane(src, l));
                for l in lanes(set) {
                    let m = lanes(set).filter(|&o| v[o] == v[l]).fold(0u64, |m, o| m | (1 << o));
                    self.regs.set_lane(dest, l, m);
                }
            }
            Meet::Shfl { mode, dest, pred, a, b, c } => {
                let v: [u64; WARP] = std::array::from_fn(|l| self.regs.lane(a, l));
                for l in lanes(set) {
                    let bv = self.regs.lane(b, l) as i32 & 0x1f;
                    let cv = self.regs.lane(c, l) as i32;
                    let (clamp, seg) = (cv & 0x1f, (cv >> 8) & 0x1f);
                    let lane = l as i32;
                    let max = (lane & seg) | (clamp & !seg);
                    let min = lane & seg;
                    let (j, ok) = match mode {
                        Shuffle::Up => (lane - bv, lane - bv >= max),
                        Shuffle::Down => (lane + bv, lane + bv <= max),
                        Shuffle::Bfly => (lane ^ bv, (lane ^ bv) <= max),
                        Shuffle::Idx => {
                            let j = min | (bv & !seg & 0x1f);
                            (j, j <= max)
                        }
                    };
                    let j = if ok { j as usize & 31 } else { l };
                    if let Some(d) = dest {
                        self.regs.set_lane(d, l, v[j]);
                        if (set >> j) & 1 == 0 {
                            // The manual leaves this value open; who uses it is told then.
                            let at = self.regs.flat(d);
                            self.regs.known[at] &= !(1 << l);
                        }
                    }
                    if let Some(p) = pred {
                        self.regs.set_lane(p, l, u64::from(ok));
                    }
                }
            }
        }
    }
}
