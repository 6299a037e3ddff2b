//! A block's shared memory, byte by byte: what was written, and who raced whom.
//!
//! Two accesses of one byte by different threads, at least one a plain write, must have a block
//! barrier between them, or, inside a warp, a `bar.warp.sync` of all its live lanes. (`shfl.sync`
//! and `vote.sync` order nothing, by the PTX manual.) Lanes of one instruction may store the same
//! value to the same byte.

/// Who accesses: thread number in the block, and the count of the instruction it does it in.
#[derive(Clone, Copy, Debug)]
pub struct Who {
    /// Linear thread number.
    pub thread: u32,
    /// Unique number of the warp instruction.
    pub tick: u64,
    /// `atom` or `red`.
    pub atomic: bool,
}

#[derive(Clone, Copy, Default)]
struct Cell {
    /// Thread + 1, 0 for none.
    writer: u32,
    atomic: bool,
    wrote_at: Stamp,
    wrote_tick: u64,
    /// Thread + 1; `MANY` for several warps; a warp as `WARP_FLAG | warp`.
    reader: u32,
    read_at: Stamp,
}

/// Block barriers passed, and full warp barriers of the accessing warp.
#[derive(Clone, Copy, Default, PartialEq, Eq)]
struct Stamp {
    block: u64,
    warp: u64,
}

const MANY: u32 = u32::MAX;
const WARP_FLAG: u32 = 1 << 30;

/// Why an access is refused; the other thread where there is one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Refusal {
    /// Outside the block's shared memory.
    OutOfBounds,
    /// This byte was never written in this block.
    Uninitialised(u64),
    /// The byte, what the other did, and its thread if one alone.
    Race(u64, &'static str, Option<u32>),
}

/// The shared memory of the block that runs.
pub struct Shared {
    bytes: Vec<u8>,
    known: Vec<bool>,
    cells: Vec<Cell>,
    epoch: u64,
    warps: Vec<u64>,
}

impl Shared {
    /// `len` bytes for blocks of up to `warps` warps.
    pub fn new(len: usize, warps: usize) -> Shared {
        Shared {
            bytes: vec![0; len],
            known: vec![false; len],
            cells: vec![Cell::default(); len],
            epoch: 1,
            warps: vec![0; warps],
        }
    }

    /// A new block starts: nothing is written. (Epochs keep counting, so cells need no clearing.)
    pub fn reset(&mut self) {
        self.known.fill(false);
        self.epoch += 1;
    }

    /// Size in bytes.
    pub fn len(&self) -> usize {
        self.bytes.len()
    }

    /// Whether the kernel has none.
    pub fn is_empty(&self) -> bool {
        self.bytes.is_empty()
    }

    /// All threads passed a barrier.
    pub fn block_barrier(&mut self) {
        self.epoch += 1;
    }

    /// All live lanes of a warp passed `bar.warp.sync`.
    pub fn warp_barrier(&mut self, warp: usize) {
        self.warps[warp] += 1;
    }

    fn stamp(&self, thread: u32) -> Stamp {
        Stamp { block: self.epoch, warp: self.warps[thread as usize / 32] }
    }

    /// Whether what `thread` did at `then` is ordered before what `by` does now.
    fn ordered(&self, then: Stamp, thread: u32, by: u32) -> bool {
        then.block < self.epoch
            || thread == by
            || (thread / 32 == by / 32 && then.warp < self.warps[by as usize / 32])
    }

    fn range(&self, off: u64, len: usize) -> Result<std::ops::Range<usize>, Refusal> {
        let end = off.checked_add(len as u64).filter(|e| *e <= self.bytes.len() as u64);
        end.map(|e| off as usize..e as usize).ok_or(Refusal::OutOfBounds)
    }

    /// Reads up to 16 bytes.
    pub fn read(&mut self, off: u64, len: usize, who: Who) -> Result<[u8; 16], Refusal> {
        let range = self.range(off, len)?;
        let mut out = [0; 16];
        for (o, i) in out.iter_mut().zip(range) {
            if !self.known[i] {
                return Err(Refusal::Uninitialised(i as u64));
            }
            let c = self.cells[i];
            if c.writer != 0
                && !(c.atomic && who.atomic)
                && !self.ordered(c.wrote_at, c.writer - 1, who.thread)
            {
                return Err(Refusal::Race(i as u64, "wrote", Some(c.writer - 1)));
            }
            if !who.atomic {
                let now = self.stamp(who.thread);
                let (me, my_warp) = (who.thread + 1, WARP_FLAG | (who.thread / 32));
                let c = &mut self.cells[i];
                let in_warp = c.reader == my_warp
                    || (c.reader != 0
                        && c.reader < WARP_FLAG
                        && (c.reader - 1) / 32 == who.thread / 32);
                // What this warp read before its own barrier is ordered already.
                let past = c.read_at.block < now.block || (in_warp && c.read_at.warp < now.warp);
                if past || c.reader == 0 || c.reader == me {
                    c.reader = me;
                } else if in_warp {
                    c.reader = my_warp;
                } else {
                    c.reader = MANY;
                }
                c.read_at = now;
            }
            *o = self.bytes[i];
        }
        Ok(out)
    }

    /// Writes.
    pub fn write(&mut self, off: u64, data: &[u8], who: Who) -> Result<(), Refusal> {
        let range = self.range(off, data.len())?;
        for (&b, i) in data.iter().zip(range) {
            let c = self.cells[i];
            let at = i as u64;
            // One store instruction may give a byte the same value from several lanes.
            let agreed = c.wrote_tick == who.tick && self.bytes[i] == b;
            let harmless = agreed || (c.atomic && who.atomic);
            if c.writer != 0 && !harmless && !self.ordered(c.wrote_at, c.writer - 1, who.thread) {
                return Err(Refusal::Race(at, "wrote", Some(c.writer - 1)));
            }
            if c.reader != 0 && c.read_at.block == self.epoch {
                let other = match c.reader {
                    MANY => Some(None),
                    r if r & WARP_FLAG != 0 => {
                        let first = (r & !WARP_FLAG) * 32;
                        let same = first / 32 == who.thread / 32;
                        (!(same && c.read_at.warp < self.warps[first as usize / 32]))
                            .then_some(None)
                    }
                    r => (!self.ordered(c.read_at, r - 1, who.thread)).then_some(Some(r - 1)),
                };
                if let Some(t) = other {
                    return Err(Refusal::Race(at, "read", t));
                }
            }
            let now = self.stamp(who.thread);
            let c = &mut self.cells[i];
            c.writer = who.thread + 1;
            c.atomic = who.atomic;
            c.wrote_at = now;
            c.wrote_tick = who.tick;
            self.known[i] = true;
            self.bytes[i] = b;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn who(thread: u32, tick: u64) -> Who {
        Who { thread, tick, atomic: false }
    }

    #[test]
    fn a_barrier_orders_and_its_lack_is_a_race() {
        let mut s = Shared::new(16, 2);
        s.write(0, &[1, 2, 3, 4], who(0, 1)).unwrap();
        assert_eq!(s.read(2, 1, who(1, 2)), Err(Refusal::Race(2, "wrote", Some(0))));
        assert!(s.read(0, 4, who(0, 3)).is_ok());
        s.block_barrier();
        assert!(s.read(0, 4, who(1, 4)).is_ok());
        assert!(s.read(0, 4, who(40, 5)).is_ok());
        assert_eq!(s.write(3, &[0], who(1, 6)), Err(Refusal::Race(3, "read", None)));
        s.block_barrier();
        assert!(s.write(3, &[0], who(1, 7)).is_ok());
        assert_eq!(s.read(8, 1, who(1, 8)), Err(Refusal::Uninitialised(8)));
        assert_eq!(s.read(14, 4, who(1, 8)), Err(Refusal::OutOfBounds));
        s.reset();
        assert_eq!(s.read(0, 1, who(1, 9)), Err(Refusal::Uninitialised(0)));
    }

    #[test]
    fn a_warp_barrier_orders_its_warp_only() {
        let mut s = Shared::new(8, 2);
        s.write(0, &[1], who(0, 1)).unwrap();
        s.warp_barrier(0);
        assert!(s.read(0, 1, who(5, 2)).is_ok());
        assert!(s.read(0, 1, who(6, 2)).is_ok());
        assert_eq!(s.write(0, &[2], who(5, 3)), Err(Refusal::Race(0, "read", None)));
        s.warp_barrier(0);
        assert!(s.write(0, &[2], who(5, 3)).is_ok());
        assert_eq!(s.read(0, 1, who(33, 4)), Err(Refusal::Race(0, "wrote", Some(5))));
    }

    #[test]
    fn a_scan_step_with_two_warp_barriers_is_sound() {
        // Each lane reads its neighbour, all meet, each updates its own: the usual scan.
        let mut s = Shared::new(32, 1);
        for l in 0..32 {
            s.write(l, &[1], who(l as u32, 1)).unwrap();
        }
        s.warp_barrier(0);
        for l in 1..32 {
            s.read(l - 1, 1, who(l as u32, 2)).unwrap();
        }
        s.warp_barrier(0);
        for l in 0..32 {
            s.read(l, 1, who(l as u32, 3)).unwrap();
            s.write(l, &[2], who(l as u32, 4)).unwrap();
        }
    }

    #[test]
    fn equal_stores_of_one_instruction_and_atomics_do_not_race() {
        let mut s = Shared::new(8, 1);
        s.write(0, &[7], who(0, 1)).unwrap();
        assert!(s.write(0, &[7], who(1, 1)).is_ok());
        assert!(s.write(0, &[8], who(2, 1)).is_err());
        let a = |t| Who { thread: t, tick: 2, atomic: true };
        s.block_barrier();
        s.write(4, &[1], a(0)).unwrap();
        assert!(s.read(4, 1, a(1)).is_ok());
        assert!(s.write(4, &[2], a(1)).is_ok());
        assert!(s.read(4, 1, who(3, 3)).is_err());
    }
}
