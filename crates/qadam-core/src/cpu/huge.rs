//! Huge pages for what a step goes through, where it is neither paged nor on a device.
//!
//! A step reads memory once, front to back: with pages of 4 KiB the processor translates an address
//! every few hundred cycles of that, and its prefetchers stop as often. Linux gives memory of its
//! usual setting (`madvise`) huge pages only where it is asked to.

use std::ops::Range;

/// What Linux calls a huge page on x86-64 and, with pages of 4 KiB, on AArch64.
const HUGE: usize = 2 << 20;

/// The huge pages that lie wholly within `memory`, so that none of them is larger than what it holds.
const fn within(memory: &Range<usize>) -> Range<usize> {
    let start = match memory.start.checked_next_multiple_of(HUGE) {
        Some(start) => start,
        None => memory.end,
    };
    let end = memory.end / HUGE * HUGE;
    start..if end < start { start } else { end }
}

/// Asks for huge pages under a range of addresses, best before it is first written. The memory's
/// contents, and what it takes up, stay as they are; what cannot be had is not an error.
#[cfg_attr(not(target_os = "linux"), expect(clippy::missing_const_for_fn, reason = "is for Linux"))]
pub fn advise_huge_pages(memory: &Range<usize>) {
    let huge = within(memory);
    #[cfg(target_os = "linux")]
    if !huge.is_empty() {
        let address = std::ptr::without_provenance_mut(huge.start);
        // SAFETY: this advice changes no mapping and no contents, whosever they are.
        unsafe { libc::madvise(address, huge.len(), libc::MADV_HUGEPAGE) };
    }
    #[cfg(not(target_os = "linux"))]
    let _ = huge;
}

/// Moves memory that is in use into huge pages, as [`advise_huge_pages`] cannot. What cannot be moved stays
/// where it is: for want of memory, or as it is not of the usual kind, or as somebody asked for no huge
/// pages there. So does all of it where the system is not to have huge pages, is older than Linux 6.1, or
/// has several memory nodes, as pages may then be where they are for a reason.
///
/// That copies the memory, which takes as long as some steps, once. Contents and addresses stay.
#[cfg_attr(not(target_os = "linux"), expect(clippy::missing_const_for_fn, reason = "is for Linux"))]
pub fn move_into_huge_pages(memory: &Range<usize>) {
    #[cfg(target_os = "linux")]
    if are_wanted() {
        collapse(memory);
    }
    #[cfg(not(target_os = "linux"))]
    let _ = memory;
}

/// Whether all of the memory that can be in huge pages is, after what was not has been moved.
#[cfg(target_os = "linux")]
fn collapse(memory: &Range<usize>) -> bool {
    /// `MADV_COLLAPSE`, which libc's bindings have for some C libraries only.
    const COLLAPSE: libc::c_int = 25;
    /// Pages that the system may refuse before it is believed to have none: looking for one takes time.
    const REFUSALS: usize = 8;
    let ask = |start: usize, len: usize| {
        // SAFETY: pages are moved by the system, so that no thread sees but the same contents at the same
        // addresses, whosever they are.
        unsafe { libc::madvise(std::ptr::without_provenance_mut(start), len, COLLAPSE) == 0 }
    };
    let huge = within(memory);
    if huge.is_empty() || ask(huge.start, huge.len()) {
        return !huge.is_empty();
    }
    // one page that cannot be moved may have ended the call, with others behind it that can
    huge.step_by(HUGE).filter(|&page| !ask(page, HUGE)).take(REFUSALS).count() == 0
}

/// Whether the system may have huge pages, which moving does not ask, and has one node of memory.
#[cfg(target_os = "linux")]
fn are_wanted() -> bool {
    static WANTED: std::sync::OnceLock<bool> = std::sync::OnceLock::new();
    let says = |path: &str| std::fs::read_to_string(path).unwrap_or_default();
    *WANTED.get_or_init(|| {
        let setting = says("/sys/kernel/mm/transparent_hugepage/enabled");
        let nodes = says("/sys/devices/system/node/online"); // as in "0-1,3"; of old, none for one
        !setting.is_empty() && !setting.contains("[never]") && !nodes.contains(['-', ','])
    })
}

/// `len` times `value`, in huge pages.
pub(crate) fn filled<T: Clone>(value: T, len: usize) -> Vec<T> {
    let mut values = Vec::with_capacity(len);
    let start = values.as_ptr() as usize;
    advise_huge_pages(&(start..start + len * size_of::<T>()));
    values.resize(len, value);
    values
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_whole_huge_pages_are_asked_for() {
        assert_eq!(within(&(HUGE..3 * HUGE)), HUGE..3 * HUGE);
        assert_eq!(within(&(HUGE + 1..3 * HUGE + 5)), 2 * HUGE..3 * HUGE);
        for none in
            [0..0, 1..HUGE, HUGE + 1..2 * HUGE, HUGE - 1..HUGE + 1, usize::MAX - 1..usize::MAX]
        {
            assert!(within(&none).is_empty(), "{none:?}");
        }
    }

    #[test]
    fn nobodys_memory_is_no_matter() {
        advise_huge_pages(&(0..4 * HUGE));
    }

    #[test]
    fn filled_is_filled() {
        assert_eq!(filled(7_u8, 3), [7; 3]);
        assert_eq!(filled(0.5_f32, HUGE), vec![0.5; HUGE]);
    }

    #[test]
    fn values_are_moved_as_they_are() {
        let values: Vec<u32> = (0..3 * HUGE as u32).collect();
        let start = values.as_ptr().addr();
        let memory = start..start + size_of_val(&values[..]);
        move_into_huge_pages(&memory);
        #[cfg(target_os = "linux")]
        if collapse(&memory) {
            let line = smaps(start + 2 * HUGE, "AnonHugePages:");
            assert!(!line.ends_with(" 0 kB"), "{line}");
        }
        assert!(values.iter().copied().eq(0..3 * HUGE as u32));
        move_into_huge_pages(&(0..4 * HUGE)); // nobody's
    }

    #[cfg(target_os = "linux")]
    #[test]
    fn a_page_that_stays_keeps_none_behind_it_from_moving() {
        let values = vec![1_u8; 8 * HUGE];
        let huge = within(&(values.as_ptr().addr()..values.as_ptr().addr() + values.len()));
        let stays = std::ptr::without_provenance_mut(huge.start + 2 * HUGE);
        // SAFETY: this advice changes no mapping and no contents.
        assert_eq!(unsafe { libc::madvise(stays, HUGE, libc::MADV_NOHUGEPAGE) }, 0);
        let other = vec![1_u8; 4 * HUGE];
        let can_move = collapse(&(other.as_ptr().addr()..other.as_ptr().addr() + other.len()));
        assert!(!collapse(&huge));
        let line = smaps(huge.start + 4 * HUGE, "AnonHugePages:");
        assert!(!can_move || !line.ends_with(" 0 kB"), "{line}");
    }

    #[cfg(target_os = "linux")]
    #[test]
    fn linux_takes_the_advice() {
        let values = filled(1_u8, 5 * HUGE);
        let line = smaps(values.as_ptr().addr() + 2 * HUGE, "VmFlags:");
        assert!(line.split(' ').any(|flag| flag == "hg"), "{line}");
    }

    /// What Linux says of the mapping at an address.
    #[cfg(target_os = "linux")]
    fn smaps(address: usize, what: &str) -> String {
        let maps = std::fs::read_to_string("/proc/self/smaps").unwrap();
        let mut within = false;
        for line in maps.lines() {
            let range = line.split(' ').next().unwrap().split_once('-');
            if let Some((start, end)) = range
                && let Ok(start) = usize::from_str_radix(start, 16)
                && let Ok(end) = usize::from_str_radix(end, 16)
            {
                within = (start..end).contains(&address);
            }
            if within && line.starts_with(what) {
                return line.to_owned();
            }
        }
        panic!("no {what} of the mapping at {address:#x}");
    }
}
