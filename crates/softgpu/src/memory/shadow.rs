//! Which bytes of an allocation were written: a state a page, bits only for mixed pages.

const PAGE: u64 = 1 << 16;
const WORDS: usize = PAGE as usize / 64;

enum Page {
    None,
    All,
    Mixed(Box<[u64; WORDS]>),
}

/// The written bytes of one allocation.
pub struct Shadow {
    pages: Vec<Page>,
    len: u64,
}

/// Bits of word `w` that the range `[from, to)` of a page covers.
fn mask(w: usize, from: u64, to: u64) -> u64 {
    let lo = from.saturating_sub(64 * w as u64).min(64);
    let hi = to.saturating_sub(64 * w as u64).min(64);
    if lo >= hi {
        return 0;
    }
    let top = if hi == 64 { u64::MAX } else { (1 << hi) - 1 };
    top & !((1u64 << lo) - 1)
}

impl Shadow {
    /// Nothing written.
    pub fn new(len: u64) -> Shadow {
        let n = len.div_ceil(PAGE) as usize;
        Shadow { pages: std::iter::repeat_with(|| Page::None).take(n).collect(), len }
    }

    /// Page by page: index, and the range inside it.
    fn pieces(off: u64, len: u64) -> impl Iterator<Item = (usize, u64, u64)> {
        let end = off + len;
        (off / PAGE..end.div_ceil(PAGE)).map(move |p| {
            let base = p * PAGE;
            (p as usize, off.max(base) - base, end.min(base + PAGE) - base)
        })
    }

    /// The first byte of the range that was never written.
    pub fn first_unwritten(&self, off: u64, len: u64) -> Option<u64> {
        for (p, from, to) in Self::pieces(off, len) {
            match &self.pages[p] {
                Page::All => {}
                Page::None => return Some(p as u64 * PAGE + from),
                Page::Mixed(bits) => {
                    for w in (from / 64) as usize..to.div_ceil(64) as usize {
                        let missing = mask(w, from, to) & !bits[w];
                        if missing != 0 {
                            return Some(
                                p as u64 * PAGE
                                    + 64 * w as u64
                                    + u64::from(missing.trailing_zeros()),
                            );
                        }
                    }
                }
            }
        }
        None
    }

    /// The range is written now.
    pub fn mark(&mut self, off: u64, len: u64) {
        for (p, from, to) in Self::pieces(off, len) {
            let whole = PAGE.min(self.len - p as u64 * PAGE);
            let page = &mut self.pages[p];
            if matches!(page, Page::All) {
                continue;
            }
            if from == 0 && to == whole {
                *page = Page::All;
                continue;
            }
            if matches!(page, Page::None) {
                *page = Page::Mixed(Box::new([0; WORDS]));
            }
            if let Page::Mixed(bits) = page {
                for w in (from / 64) as usize..to.div_ceil(64) as usize {
                    bits[w] |= mask(w, from, to);
                }
                // Kernels write upwards, so the last byte of a page is when to look whether it is full.
                if to == whole
                    && (0..whole.div_ceil(64) as usize)
                        .all(|w| bits[w] | !mask(w, 0, whole) == u64::MAX)
                {
                    *page = Page::All;
                }
            }
        }
    }

    /// Runs of (written, length) that make up the range.
    pub fn slice(&self, off: u64, len: u64) -> Vec<(bool, u64)> {
        let mut out: Vec<(bool, u64)> = Vec::new();
        let mut push = |b: bool, n: u64| match out.last_mut() {
            Some(l) if l.0 == b => l.1 += n,
            _ => out.push((b, n)),
        };
        for (p, from, to) in Self::pieces(off, len) {
            match &self.pages[p] {
                Page::All => push(true, to - from),
                Page::None => push(false, to - from),
                Page::Mixed(bits) => {
                    for i in from..to {
                        push((bits[(i / 64) as usize] >> (i % 64)) & 1 == 1, 1);
                    }
                }
            }
        }
        out
    }

    /// Overwrites the range with runs from [`Shadow::slice`]. Unwritten runs unmark.
    pub fn paste(&mut self, mut off: u64, runs: &[(bool, u64)]) {
        for &(written, n) in runs {
            if written {
                self.mark(off, n);
            } else {
                self.unmark(off, n);
            }
            off += n;
        }
    }

    fn unmark(&mut self, off: u64, len: u64) {
        for (p, from, to) in Self::pieces(off, len) {
            let whole = PAGE.min(self.len - p as u64 * PAGE);
            let page = &mut self.pages[p];
            if from == 0 && to == whole {
                *page = Page::None;
            }
            match page {
                Page::None => continue,
                Page::All => *page = Page::Mixed(Box::new([u64::MAX; WORDS])),
                Page::Mixed(_) => {}
            }
            if let Page::Mixed(bits) = page {
                for w in (from / 64) as usize..to.div_ceil(64) as usize {
                    bits[w] &= !mask(w, from, to);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn marks_across_words_and_pages() {
        let mut s = Shadow::new(3 * PAGE + 10);
        assert_eq!(s.first_unwritten(0, 1), Some(0));
        s.mark(60, 8);
        assert_eq!(s.first_unwritten(60, 8), None);
        assert_eq!(s.first_unwritten(60, 9), Some(68));
        s.mark(PAGE - 4, PAGE + 8);
        assert_eq!(s.first_unwritten(PAGE - 4, PAGE + 8), None);
        assert_eq!(s.first_unwritten(PAGE, 2 * PAGE), Some(2 * PAGE + 4));
        assert!(matches!(s.pages[1], Page::All));
        s.mark(3 * PAGE, 10);
        assert!(matches!(s.pages[3], Page::All));
    }

    #[test]
    fn a_page_filled_word_by_word_becomes_whole() {
        let mut s = Shadow::new(2 * PAGE);
        for i in 0..PAGE / 4 {
            s.mark(4 * i, 4);
        }
        assert!(matches!(s.pages[0], Page::All));
    }

    #[test]
    fn slices_paste() {
        let mut a = Shadow::new(200);
        a.mark(10, 20);
        a.mark(40, 100);
        let mut b = Shadow::new(300);
        b.mark(0, 300);
        b.paste(100, &a.slice(0, 200));
        assert_eq!(b.first_unwritten(0, 300), Some(100));
        assert_eq!(b.first_unwritten(110, 20), None);
        assert_eq!(b.first_unwritten(110, 21), Some(130));
        assert_eq!(b.first_unwritten(140, 100), None);
    }
}
