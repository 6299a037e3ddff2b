//! Vector clocks of streams, and the accesses they order.

use std::collections::HashMap;

use crate::memory::Span;

/// How far each stream had come.
#[derive(Clone, Debug, Default)]
pub struct Clock(HashMap<u64, u64>);

impl Clock {
    /// Everything either knows.
    pub fn join(&mut self, o: &Clock) {
        for (&s, &t) in &o.0 {
            let mine = self.0.entry(s).or_default();
            *mine = (*mine).max(t);
        }
    }

    /// One more operation of stream `s`; its number.
    pub fn tick(&mut self, s: u64) -> u64 {
        let t = self.0.entry(s).or_default();
        *t += 1;
        *t
    }

    /// Whether operation `t` of stream `s` came before.
    pub fn knows(&self, s: u64, t: u64) -> bool {
        self.0.get(&s).is_some_and(|&x| x >= t)
    }
}

/// What an earlier operation touched.
struct Access {
    stream: u64,
    tick: u64,
    span: Span,
    write: bool,
    what: String,
}

/// The accesses that may still race, by region id.
#[derive(Default)]
pub struct History {
    regions: HashMap<u64, Vec<Access>>,
}

impl History {
    /// Adds an operation's access. Returns what it races with.
    #[expect(clippy::too_many_arguments, reason = "one access, and who made it when")]
    pub fn add(
        &mut self,
        region: u64,
        (stream, tick): (u64, u64),
        clock: &Clock,
        host: &Clock,
        span: Span,
        write: bool,
        what: &str,
    ) -> Option<String> {
        let list = self.regions.entry(region).or_default();
        // What the host waited for is before everything that can still be enqueued.
        list.retain(|a| !host.knows(a.stream, a.tick));
        let hit = list.iter().find(|a| {
            (a.write || write)
                && a.stream != stream
                && !clock.knows(a.stream, a.tick)
                && a.span.meets(span)
        });
        let found = hit.map(|a| format!("{} on stream {:#x}", a.what, a.stream));
        match list.iter_mut().find(|a| a.stream == stream && a.write == write && a.span == span) {
            Some(a) => {
                a.tick = tick;
                what.clone_into(&mut a.what);
            }
            None => list.push(Access { stream, tick, span, write, what: what.to_string() }),
        }
        found
    }

    /// The region is gone.
    pub fn forget(&mut self, region: u64) {
        self.regions.remove(&region);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn unordered_overlap_is_found_and_order_is_respected() {
        let (mut a, mut b, mut host) = (Clock::default(), Clock::default(), Clock::default());
        let mut h = History::default();
        let span = Span { lo: 0, hi: 8 };
        let t = a.tick(1);
        assert_eq!(h.add(7, (1, t), &a, &host, span, true, "first"), None);
        let t = b.tick(2);
        assert!(
            h.add(7, (2, t), &b, &host, Span { lo: 4, hi: 5 }, false, "second")
                .unwrap()
                .contains("first")
        );
        assert_eq!(h.add(7, (2, t), &b, &host, Span { lo: 8, hi: 9 }, true, "beside"), None);
        b.join(&a);
        let t = b.tick(2);
        assert_eq!(h.add(7, (2, t), &b, &host, span, true, "after an event"), None);
        host.join(&b);
        let c = Clock::default();
        assert_eq!(h.add(7, (3, 1), &c, &host, span, true, "after a host sync"), None);
    }
}
