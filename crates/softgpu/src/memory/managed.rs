//! Where the pages of managed memory are, and how they got there.

/// Granularity of residency.
pub const PAGE: u64 = 1 << 16;

/// Where a page can be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    /// Never touched.
    Nowhere,
    /// Host memory.
    Host,
    /// A device.
    Device(u32),
}

/// Why pages moved.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cause {
    /// `cuMemPrefetchAsync`.
    Prefetch,
    /// A kernel or copy touched pages that were elsewhere: a page fault on the critical path.
    Fault,
    /// First touch; nothing was copied.
    Populate,
}

/// Pages that moved together.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Move {
    /// First address.
    pub addr: u64,
    /// Bytes, in whole pages (cut at the allocation's end).
    pub len: u64,
    /// From where.
    pub from: Place,
    /// To where.
    pub to: Place,
    /// Why.
    pub cause: Cause,
}

/// The pages of one managed allocation.
pub struct Residency {
    at: Vec<Place>,
    len: u64,
    /// Moves since the last [`Residency::take`].
    log: Vec<Move>,
    /// The page the last touch found in place: most touches repeat it.
    last: Option<(usize, Place)>,
}

impl Residency {
    /// Nothing populated.
    pub fn new(len: u64) -> Residency {
        Residency {
            at: vec![Place::Nowhere; len.div_ceil(PAGE) as usize],
            len,
            log: vec![],
            last: None,
        }
    }

    /// An access from `place`.
    pub fn touch(&mut self, base: u64, off: u64, len: u64, place: Place) {
        let page = (off / PAGE) as usize;
        if self.last == Some((page, place)) && (off + len - 1) / PAGE == page as u64 {
            return;
        }
        self.shift(base, off, len, place, Cause::Fault);
        self.last = Some((page, place));
    }

    /// Brings pages to `to`.
    pub fn shift(&mut self, base: u64, off: u64, len: u64, to: Place, cause: Cause) {
        if len == 0 {
            return;
        }
        self.last = None;
        for p in off / PAGE..(off + len).div_ceil(PAGE) {
            let from = self.at[p as usize];
            if from == to {
                continue;
            }
            self.at[p as usize] = to;
            // A prefetch of untouched pages still is one: it populates them where it says.
            let cause = if from == Place::Nowhere && cause == Cause::Fault {
                Cause::Populate
            } else {
                cause
            };
            let addr = base + p * PAGE;
            let bytes = PAGE.min(self.len - p * PAGE);
            match self.log.last_mut() {
                Some(m)
                    if m.addr + m.len == addr && (m.from, m.to, m.cause) == (from, to, cause) =>
                {
                    m.len += bytes;
                }
                _ => self.log.push(Move { addr, len: bytes, from, to, cause }),
            }
        }
    }

    /// Bytes that are at `place`.
    pub fn bytes_at(&self, place: Place) -> u64 {
        let here =
            |(i, p): (usize, &Place)| (*p == place).then(|| PAGE.min(self.len - i as u64 * PAGE));
        self.at.iter().enumerate().filter_map(here).sum()
    }

    /// Where a byte is.
    pub fn place(&self, off: u64) -> Place {
        self.at[(off / PAGE) as usize]
    }

    /// Moves since the last call.
    pub fn take(&mut self) -> Vec<Move> {
        std::mem::take(&mut self.log)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn moves_merge_and_name_their_cause() {
        let mut r = Residency::new(3 * PAGE + 5);
        r.touch(0, 0, 4, Place::Device(0));
        r.touch(0, 4, 4, Place::Device(0));
        r.shift(0, 0, 3 * PAGE + 5, Place::Host, Cause::Prefetch);
        r.touch(0, PAGE - 4, 8, Place::Device(0));
        let log = r.take();
        assert_eq!(log.len(), 4, "{log:?}");
        assert_eq!((log[0].cause, log[0].len), (Cause::Populate, PAGE));
        assert_eq!((log[1].cause, log[1].from), (Cause::Prefetch, Place::Device(0)));
        assert_eq!((log[2].cause, log[2].len), (Cause::Prefetch, 2 * PAGE + 5));
        assert_eq!((log[3].cause, log[3].len), (Cause::Fault, 2 * PAGE));
        assert_eq!(r.bytes_at(Place::Host), PAGE + 5);
        assert_eq!(r.place(3 * PAGE), Place::Host);
        assert!(r.take().is_empty());
    }
}
