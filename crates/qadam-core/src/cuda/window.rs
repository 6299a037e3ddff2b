//! Cutting a step into windows: what is prefetched together, and then updated by one launch.

use std::ops::Range;
use std::sync::Arc;

use super::request::DeviceStep;
use crate::paging::HUGE;
use crate::paging::managed::{self, Arena};

/// Where a device cannot map 2 MiB of managed memory at once, it maps pages of this many bytes.
const PAGE: u64 = 64 << 10;

/// Steps whose state is paged in together.
#[derive(Debug, Default)]
pub(super) struct Window {
    /// Their positions among the steps, in order.
    pub steps: Vec<usize>,
    bytes: u64,
    pages: Vec<Pages>,
}

/// A step, cut.
#[derive(Debug, Default)]
pub(super) struct Cut {
    /// Positions of the steps whose state is not paged.
    pub rest: Vec<usize>,
    /// The others, in order.
    pub windows: Vec<Window>,
}

/// Addresses of state, and of the arena that it lies in.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Pages {
    range: Range<u64>,
    arena: Range<u64>,
}

/// Finds arenas; neighbours mostly lie in the same.
#[derive(Default)]
struct Lookup(Option<Arc<Arena>>);

impl Lookup {
    /// The addresses of the arena that `address` lies in.
    fn find(&mut self, address: u64) -> Option<Range<u64>> {
        let addresses = |arena: &Arc<Arena>| arena.addresses();
        let last = self.0.as_ref().map(addresses).filter(|range| range.contains(&address));
        last.or_else(|| {
            self.0 = managed::find(address);
            self.0.as_ref().map(addresses)
        })
    }
}

impl Cut {
    /// Cuts `steps` into windows of at most `limit` bytes of state, or of a single step with more;
    /// `None` if none is paged.
    pub fn new(steps: &[DeviceStep], limit: u64) -> Option<Self> {
        if managed::is_unused() {
            return None;
        }
        let mut cut = Self::default();
        let mut lookup = Lookup::default();
        for (index, step) in steps.iter().enumerate() {
            let pages = step.buffers().into_iter().filter(|(_, bytes)| *bytes > 0);
            let pages = pages.filter_map(|(address, bytes)| {
                let arena = lookup.find(address)?;
                Some(Pages { range: address..address + bytes, arena })
            });
            cut.add(index, pages.collect(), step.grad != 0, limit);
        }
        if cut.windows.is_empty() { None } else { Some(cut) }
    }

    /// Adds a step that has state on `pages`.
    fn add(&mut self, index: usize, pages: Vec<Pages>, is_used: bool, limit: u64) {
        let bytes: u64 = pages.iter().map(|pages| pages.range.end - pages.range.start).sum();
        if bytes == 0 {
            self.rest.push(index);
            return;
        }
        if self.windows.last().is_none_or(|last| last.bytes + bytes > limit) {
            self.windows.push(Window::default());
        }
        let Some(window) = self.windows.last_mut() else { return };
        window.steps.push(index);
        // State that is not used counts, so that windows, and with them their tables, stay as they
        // are when gradients come and go; but it stays where it is.
        window.bytes += bytes;
        if is_used {
            window.pages.extend(pages);
        }
    }
}

impl Window {
    /// What to prefetch: whole pages within arenas, in few and large pieces, by address.
    pub fn ranges(&self) -> Vec<Range<u64>> {
        let mut pages = self.pages.clone();
        pages.sort_unstable_by_key(|pages| pages.range.start);
        pages.dedup_by(|next, last| {
            // Drivers move up to 2 MiB at a time: a smaller gap is not worth another call.
            let joins = next.arena == last.arena && next.range.start < last.range.end + HUGE as u64;
            if joins {
                last.range.end = last.range.end.max(next.range.end);
            }
            joins
        });
        let whole = |Pages { range, arena }: Pages| {
            let start = (range.start - range.start % PAGE).max(arena.start);
            start..range.end.next_multiple_of(PAGE).min(arena.end)
        };
        pages.into_iter().map(whole).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ARENA: Range<u64> = 1 << 30..(1 << 30) + (100 << 20) + 4096;

    fn at(start: u64, end: u64) -> Pages {
        Pages { range: ARENA.start + start..ARENA.start + end, arena: ARENA }
    }

    #[test]
    fn windows_hold_as_much_as_they_may_and_one_step_at_least() {
        let mut cut = Cut::default();
        for (index, bytes) in [60, 40, 0, 1, 250, 50, 0, 51].into_iter().enumerate() {
            cut.add(index, vec![at(0, bytes)], true, 100);
        }
        assert_eq!(cut.rest, [2, 6]);
        let steps: Vec<_> = cut.windows.iter().map(|window| &window.steps[..]).collect();
        assert_eq!(steps, [&[0, 1][..], &[3], &[4], &[5], &[7]]);
    }

    #[test]
    fn ranges_are_whole_pages_and_few() {
        let mib = 1 << 20;
        let other = ARENA.end..ARENA.end + mib;
        let pages = vec![
            at(50 * mib, 50 * mib + 1),
            at(52 * mib, 53 * mib - 5), // a gap of less than 2 MiB
            at(PAGE + 7, PAGE + 8),
            at(100 * mib, 100 * mib + 1), // the arena's last page is not whole
            Pages { range: other.clone(), arena: other.clone() },
        ];
        let want = [(PAGE, 2 * PAGE), (50 * mib, 53 * mib), (100 * mib, 100 * mib + 4096)];
        let mut want: Vec<_> = want.map(|(start, end)| at(start, end).range).to_vec();
        want.push(other);
        assert_eq!(Window { pages, ..Window::default() }.ranges(), want);
    }

    #[test]
    fn state_that_is_not_used_takes_room_but_is_not_fetched() {
        let mut cut = Cut::default();
        cut.add(0, vec![at(0, 60)], false, 100);
        cut.add(1, vec![at(60, 120)], true, 100);
        assert_eq!(cut.windows.len(), 2);
        assert_eq!(cut.windows[0].ranges(), []);
    }
}
