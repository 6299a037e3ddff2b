//! The system calls behind a mapped file. Linux has them all; elsewhere there is no paging to disk.
//!
//! Those that only move pages between file and memory are hints: where one is refused, the kernel
//! moves the pages itself, later and one by one.

#[cfg(not(target_os = "linux"))]
pub(super) use elsewhere::*;
#[cfg(target_os = "linux")]
pub(super) use linux::*;

#[cfg(target_os = "linux")]
mod linux {
    use std::fs::File;
    use std::io;
    use std::ops::Range;
    use std::os::fd::AsRawFd;
    use std::os::unix::fs::FileExt;

    use memmap2::{Advice, MmapRaw, UncheckedAdvice};

    /// The processor's page size, in bytes.
    fn page() -> usize {
        // SAFETY: no conditions.
        let size = unsafe { libc::sysconf(libc::_SC_PAGESIZE) };
        usize::try_from(size).unwrap_or(4096)
    }

    /// The whole pages that `range` touches, up to `end`.
    fn outward(range: &Range<usize>, end: usize) -> Range<usize> {
        let page = page();
        range.start / page * page..range.end.next_multiple_of(page).min(end)
    }

    /// The whole pages within `range`.
    fn inward(range: &Range<usize>) -> Range<usize> {
        let page = page();
        let start = range.start.next_multiple_of(page);
        start..(range.end / page * page).max(start)
    }

    fn result(code: libc::c_int) -> io::Result<()> {
        if code == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
    }

    /// Gives `file` this length, with disk space for all of it.
    pub fn reserve(file: &File, bytes: usize) -> io::Result<()> {
        keep_in_place(file);
        let free = free(file)?;
        if free.is_some_and(|free| free < bytes as u64) {
            // Known beforehand, so that the disk is not filled for a moment first.
            return Err(io::Error::from_raw_os_error(libc::ENOSPC));
        }
        let code = loop {
            // SAFETY: a valid descriptor.
            let code = unsafe { libc::posix_fallocate(file.as_raw_fd(), 0, bytes as libc::off_t) };
            if code != libc::EINTR {
                break code;
            }
        };
        match code {
            0 => Ok(()),
            libc::EOPNOTSUPP => {
                let zeros = vec![0; 1 << 20];
                (0..bytes).step_by(zeros.len()).try_for_each(|at| {
                    file.write_all_at(&zeros[..zeros.len().min(bytes - at)], at as u64)
                })
            }
            code => Err(io::Error::from_raw_os_error(code)),
        }
    }

    /// Asks btrfs to overwrite reserved space in place: it would else need new space for each page
    /// written, which a full disk does not have. Other file systems do not know the flag.
    fn keep_in_place(file: &File) {
        const NOCOW: libc::c_long = 0x0080_0000;
        let mut flags: libc::c_long = 0;
        let fd = file.as_raw_fd();
        // SAFETY: a valid descriptor; the calls read and write a long.
        unsafe {
            if libc::ioctl(fd, libc::FS_IOC_GETFLAGS, &raw mut flags) == 0 {
                flags |= NOCOW;
                libc::ioctl(fd, libc::FS_IOC_SETFLAGS, &raw const flags);
            }
        }
    }

    /// Bytes that are free on the file's disk, if it says.
    fn free(file: &File) -> io::Result<Option<u64>> {
        let mut stat = std::mem::MaybeUninit::<libc::statvfs>::zeroed();
        // SAFETY: a valid descriptor; writes the structure.
        let stat = unsafe {
            result(libc::fstatvfs(file.as_raw_fd(), stat.as_mut_ptr()))?;
            stat.assume_init()
        };
        Ok((stat.f_blocks > 0).then(|| stat.f_bavail.saturating_mul(stat.f_frsize)))
    }

    /// Writes `content` at byte `at`.
    pub fn write(file: &File, content: &[u8], at: usize) -> io::Result<()> {
        file.write_all_at(content, at as u64)
    }

    pub fn is_resident(map: &MmapRaw, range: &Range<usize>) -> bool {
        let range = outward(range, map.len());
        let mut pages = vec![0_u8; range.len().div_ceil(page())];
        // SAFETY: a range of the map that begins at a page; a byte for each page.
        let code = unsafe {
            let start = map.as_mut_ptr().add(range.start);
            libc::mincore(start.cast(), range.len(), pages.as_mut_ptr())
        };
        code == 0 && pages.iter().all(|page| page & 1 == 1)
    }

    /// Maps the file, for pages of 2 MiB where the kernel has them: it then reads so much at a time,
    /// whatever its read-ahead is set to, and spends far less on each byte.
    pub fn map(file: &File) -> io::Result<MmapRaw> {
        let map = MmapRaw::map_raw(file)?;
        let _ = map.advise(Advice::HugePage);
        Ok(map)
    }

    pub fn populate(map: &MmapRaw, range: &Range<usize>) {
        let range = outward(range, map.len());
        // since Linux 5.14; before that, what is about to be read can only be announced
        if map.advise_range(Advice::PopulateWrite, range.start, range.len()).is_err() {
            let _ = map.advise_range(Advice::WillNeed, range.start, range.len());
        }
    }

    /// Whether an error says that a call, or this use of it, does not exist.
    const fn is_unknown(errno: i32) -> bool {
        matches!(errno, libc::ENOSYS | libc::EINVAL | libc::ESPIPE | libc::EOPNOTSUPP)
    }

    fn sync_range(file: &File, range: &Range<usize>, flags: libc::c_uint) -> io::Result<()> {
        let (at, len) = (range.start as libc::off64_t, range.len() as libc::off64_t);
        // SAFETY: a valid descriptor.
        let code = unsafe { libc::sync_file_range(file.as_raw_fd(), at, len, flags) };
        match result(code) {
            // where the call is unknown there is nothing to be told
            Err(error) if error.raw_os_error().is_some_and(is_unknown) => Ok(()),
            result => result,
        }
    }

    pub fn start_writing(file: &File, range: &Range<usize>) -> io::Result<()> {
        if range.is_empty() {
            return Ok(()); // a length of 0 would mean the rest of the file
        }
        sync_range(file, range, libc::SYNC_FILE_RANGE_WRITE)
    }

    pub fn finish_writing(file: &File, range: &Range<usize>) -> io::Result<()> {
        if range.is_empty() {
            return Ok(());
        }
        let flags = libc::SYNC_FILE_RANGE_WAIT_BEFORE
            | libc::SYNC_FILE_RANGE_WRITE
            | libc::SYNC_FILE_RANGE_WAIT_AFTER;
        sync_range(file, range, flags)
    }

    pub fn release(map: &MmapRaw, file: &File, range: &Range<usize>) {
        let range = inward(range);
        if range.is_empty() {
            return;
        }
        // SAFETY: pages of a shared map of a file, which keeps what they hold; nothing borrows from
        // a raw map.
        let _ = unsafe {
            map.unchecked_advise_range(UncheckedAdvice::DontNeed, range.start, range.len())
        };
        let (at, len) = (range.start as libc::off_t, range.len() as libc::off_t);
        // SAFETY: a valid descriptor.
        unsafe { libc::posix_fadvise(file.as_raw_fd(), at, len, libc::POSIX_FADV_DONTNEED) };
    }
}

#[cfg(not(target_os = "linux"))]
mod elsewhere {
    use std::fs::File;
    use std::io;
    use std::ops::Range;

    use memmap2::MmapRaw;

    pub fn reserve(_: &File, _: usize) -> io::Result<()> {
        let text = "paged state of CPU parameters needs Linux";
        Err(io::Error::new(io::ErrorKind::Unsupported, text))
    }

    pub fn write(_: &File, _: &[u8], _: usize) -> io::Result<()> {
        Ok(())
    }

    pub fn is_resident(_: &MmapRaw, _: &Range<usize>) -> bool {
        true
    }

    pub fn map(file: &File) -> io::Result<MmapRaw> {
        MmapRaw::map_raw(file)
    }

    pub fn populate(_: &MmapRaw, _: &Range<usize>) {}

    pub fn start_writing(_: &File, _: &Range<usize>) -> io::Result<()> {
        Ok(())
    }

    pub fn finish_writing(_: &File, _: &Range<usize>) -> io::Result<()> {
        Ok(())
    }

    pub fn release(_: &MmapRaw, _: &File, _: &Range<usize>) {}
}
