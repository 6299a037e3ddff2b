//! Takes a step through its paged state, window by window.
//!
//! While a window is worked on, one thread brings the next ones into memory and, where not all of
//! the state may stay there, another writes the last ones out and gives their memory back. Neither
//! keeps the arithmetic waiting as long as the disk is fast enough.

use std::collections::HashSet;
use std::ops::Range;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::thread;

use super::budget;
use super::mapped::Arena;
use crate::error::Result;

/// Buffers of a parameter's state, at most.
const BUFFERS: usize = 6;

/// Bytes of an arena.
#[derive(Debug, Clone)]
struct Pages {
    arena: Arc<Arena>,
    /// Counted from the arena's beginning.
    range: Range<usize>,
}

/// Work that is done at a time, and the pages that it needs.
#[derive(Debug, Default)]
struct Window {
    /// Which of the step's chunks.
    chunks: Range<usize>,
    pages: Vec<Pages>,
    bytes: usize,
    /// The granules among `pages` that no later window needs, where any are to be let go.
    last_used: Vec<Pages>,
}

/// Adds bytes of `arena` to `pages`, to those before them where there are some.
fn add(pages: &mut Vec<Pages>, arena: &Arc<Arena>, range: Range<usize>) {
    // The buffers of a state are gone through side by side: the neighbour is among the last.
    let mut last = pages.iter_mut().rev().take(BUFFERS);
    let before =
        last.find(|pages| pages.range.end == range.start && Arc::ptr_eq(&pages.arena, arena));
    match before {
        Some(pages) => pages.range.end = range.end,
        None => pages.push(Pages { arena: Arc::clone(arena), range }),
    }
}

impl Window {
    /// Finds the granules that are last used here; `later` has the addresses of those that later
    /// windows use, and gets these.
    fn find_last_used(&mut self, later: &mut HashSet<usize>) {
        for Pages { arena, range } in &self.pages {
            for granule in arena.granules(range) {
                if later.insert(arena.address() + granule.start) {
                    add(&mut self.last_used, arena, granule);
                }
            }
        }
    }

    fn is_resident(&self) -> bool {
        self.pages.iter().all(|Pages { arena, range }| arena.is_resident(range))
    }

    fn fetch(&self) {
        for Pages { arena, range } in &self.pages {
            arena.fetch(range);
        }
    }

    /// Starts writing the pages that no later window needs.
    fn write_out(&self) {
        self.each_last_used(Arena::write_out);
    }

    /// Gives the memory of those pages back, once they are on the disk.
    fn let_go(&self) {
        self.each_last_used(Arena::let_go);
    }

    fn each_last_used(&self, to_do: impl Fn(&Arena, &Range<usize>) -> Result<()>) {
        for Pages { arena, range } in &self.last_used {
            // Where the disk fails, memory is all there is: nothing more is let go.
            if arena.check().is_ok()
                && let Err(error) = to_do(arena, range)
            {
                arena.fail(error);
            }
        }
    }
}

/// A step cut into windows.
#[derive(Debug)]
pub(crate) struct Windows {
    windows: Vec<Window>,
    plan: budget::Plan,
}

impl Windows {
    /// Cuts `count` chunks into windows; `arena` says in which arena the state of a chunk lies, if
    /// in any, and `ranges` lists the addresses that it takes there.
    pub fn new(
        count: usize,
        arenas: &[&Arena],
        arena: impl Fn(usize) -> Option<Arc<Arena>>,
        ranges: impl Fn(usize) -> Vec<Range<usize>>,
    ) -> Self {
        let plan = budget::plan(arenas);
        let mut windows = vec![Window::default()];
        for chunk in 0..count {
            let taken = arena(chunk).map(|arena| (arena, ranges(chunk)));
            let bytes: usize = taken.iter().flat_map(|(_, ranges)| ranges).map(Range::len).sum();
            let last = windows.last_mut().expect("one from the beginning");
            let window = if last.bytes > 0 && last.bytes + bytes > plan.window {
                let chunks = last.chunks.end..last.chunks.end;
                windows.push(Window { chunks, ..Window::default() });
                windows.last_mut().expect("just pushed")
            } else {
                last
            };
            window.chunks.end = chunk + 1;
            window.bytes += bytes;
            if let Some((arena, ranges)) = taken {
                for range in ranges {
                    let range = range.start - arena.address()..range.end - arena.address();
                    add(&mut window.pages, &arena, range);
                }
            }
        }
        if !plan.keeps_all {
            let mut later = HashSet::new();
            windows.iter_mut().rev().for_each(|window| window.find_last_used(&mut later));
        }
        Self { windows, plan }
    }

    /// Does `work` for ranges of chunks that together are all of them, in order, and adds up what
    /// it returns.
    ///
    /// # Errors
    /// What `work` returns. Where the disk fails, [`Arena::check`] says so from then on.
    pub fn run(&self, work: impl Fn(Range<usize>) -> Result<usize>) -> Result<usize> {
        if self.plan.keeps_all && self.windows.iter().all(Window::is_resident) {
            let last = self.windows.last().map_or(0, |window| window.chunks.end);
            return work(0..last);
        }
        thread::scope(|scope| {
            // As many windows are ready, at most, as the channel holds and the thread itself has.
            let (ready, fetched) = sync_channel(1);
            let reader = thread::Builder::new().name("qadam-read".to_owned());
            let reader = reader.spawn_scoped(scope, move || self.fetch(&ready));
            let (done, finished) = sync_channel(1);
            let writer = (!self.plan.keeps_all).then(|| {
                let writer = thread::Builder::new().name("qadam-write".to_owned());
                writer.spawn_scoped(scope, move || self.write_behind(&finished))
            });
            let mut sum = 0;
            for (index, window) in self.windows.iter().enumerate() {
                // Where a thread could not be started, the kernel moves the pages.
                let _ = fetched.recv();
                sum += work(window.chunks.clone())?;
                let _ = done.send(index);
            }
            drop((done, reader));
            if let Some(Ok(writer)) = writer {
                writer.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
            }
            Ok(sum)
        })
    }

    /// Brings windows into memory, in order, and says when each is there.
    fn fetch(&self, ready: &SyncSender<()>) {
        for window in &self.windows {
            window.fetch();
            if ready.send(()).is_err() {
                return;
            }
        }
    }

    /// Writes finished windows out and lets go of their memory, but for the first ones, which may
    /// stay, and the last one, for which the step would have to wait.
    fn write_behind(&self, finished: &Receiver<usize>) {
        let mut kept = 0;
        let mut last: Option<&Window> = None;
        for index in finished {
            let window = &self.windows[index];
            if kept + window.bytes <= self.plan.keep {
                kept += window.bytes;
                continue;
            }
            window.write_out();
            if let Some(last) = last.replace(window) {
                last.let_go();
            }
        }
    }
}
