//! State of CPU parameters in a file that is mapped into memory.
//!
//! The file is made in `QADAM_PAGE_DIR` (`/var/tmp` by default: `/tmp` is often memory) and has no
//! name, so nothing of it outlives the process, however that ends. All of its space is reserved
//! before it is mapped, so that a full disk is an error here and never a SIGBUS in a step.

use std::ffi::OsString;
use std::fs::File;
use std::io;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::process;
use std::sync::{Arc, OnceLock};

use memmap2::MmapRaw;

use super::extents::{Extents, HUGE};
use super::registry::Registry;
use super::{budget, file};
use crate::error::{Error, Result};
use crate::state::StateFormat;

static ARENAS: Registry<Arena> = Registry::new();

/// How much [`Arena::fill`] writes at a time.
const PIECE: usize = 1 << 20;
/// After how many bytes [`Arena::fill`] sees to it that they reach the disk, if need be.
const BATCH: usize = 32 << 20;

/// Pages move in aligned pieces of this size: smaller ones were measured to halve the disk's rate, as
/// each page costs the kernel the same.
const GRANULE: usize = HUGE;

/// The state of some parameters in a mapped file; unmapped and freed when it is dropped.
#[derive(Debug)]
pub struct Arena {
    map: MmapRaw,
    file: File,
    directory: PathBuf,
    extents: Extents,
    /// The process that may write it.
    owner: u32,
    /// What the user lets all arenas keep in memory, in bytes.
    limit: Option<u64>,
    /// Why pages could not be written out: what they held may be lost.
    failure: OnceLock<Error>,
}

/// Where an arena's file would be made: `QADAM_PAGE_DIR`, or `/var/tmp`.
#[must_use]
pub fn directory() -> PathBuf {
    let set = std::env::var_os("QADAM_PAGE_DIR").filter(|value| !value.is_empty());
    set.unwrap_or_else(|| OsString::from("/var/tmp")).into()
}

/// Returns an error where no arena could be made, whatever its size.
///
/// # Errors
/// [`Error::PageFile`] if the directory is missing or cannot be written, [`Error::PageMemory`].
pub fn check() -> Result<()> {
    budget::limit()?;
    create(&directory()).map(|_| ())
}

/// The arena that `address` lies in.
#[must_use]
pub fn find(address: usize) -> Option<Arc<Arena>> {
    ARENAS.find(address)
}

/// Whether there is no arena, as is usual: then no address needs looking up.
pub(crate) fn is_unused() -> bool {
    ARENAS.is_empty()
}

impl Arena {
    /// Room for the state of parameters of these formats and lengths in elements: all zeros, taking
    /// disk space but no memory yet.
    ///
    /// # Errors
    /// [`Error::PageFile`] where the file cannot be made or the disk has no room for it,
    /// [`Error::PageMemory`].
    pub fn new(params: &[(StateFormat, usize)]) -> Result<Arc<Self>> {
        Self::new_in(&directory(), budget::limit()?, params)
    }

    fn new_in(
        directory: &Path,
        limit: Option<u64>,
        params: &[(StateFormat, usize)],
    ) -> Result<Arc<Self>> {
        let extents = Extents::new(params);
        let bytes = extents.bytes().max(1); // an empty file cannot be mapped
        let error = |doing: String| move |error| page_file(directory, doing, &error);
        let file = create(directory)?;
        file::reserve(&file, bytes)
            .map_err(error(format!("reserving {bytes} bytes of disk for paged state")))?;
        let map = file::map(&file).map_err(error(format!("mapping {bytes} bytes")))?;
        let directory = directory.to_owned();
        let owner = process::id();
        let failure = OnceLock::new();
        let arena = Arc::new(Self { map, file, directory, extents, owner, limit, failure });
        ARENAS.insert(&(arena.address()..arena.address() + bytes), &arena);
        Ok(arena)
    }

    /// Where each parameter's buffers lie.
    #[must_use]
    pub const fn extents(&self) -> &Extents {
        &self.extents
    }

    /// The address of the first byte, a multiple of the page size.
    #[must_use]
    pub fn address(&self) -> usize {
        self.map.as_mut_ptr().addr()
    }

    /// The first byte.
    #[must_use]
    pub fn pointer(&self) -> *mut u8 {
        self.map.as_mut_ptr()
    }

    /// How many bytes it takes of the disk.
    #[must_use]
    pub fn bytes(&self) -> usize {
        self.map.len()
    }

    /// The process that made it, which alone may write it: a forked child shares the pages.
    #[must_use]
    pub const fn owner(&self) -> u32 {
        self.owner
    }

    /// What the user lets all arenas keep in memory, in bytes.
    pub(super) const fn limit(&self) -> Option<u64> {
        self.limit
    }

    /// Returns the error with which a step could not write pages out, if there was one. That step had
    /// been done; the next one must not go on from state that may be lost.
    ///
    /// # Errors
    /// [`Error::PageFile`].
    pub fn check(&self) -> Result<()> {
        self.failure.get().cloned().map_or(Ok(()), Err)
    }

    /// Notes why pages could not be written out.
    pub(super) fn fail(&self, mut error: Error) {
        if let Error::PageFile { reason, .. } = &mut error {
            reason.push_str("; what was to be written may be lost: load a state dict");
        }
        let _ = self.failure.set(error); // the first one counts
    }

    /// Sets the bytes of `range`, counted from the arena's beginning, to `value`; nothing may read
    /// them meanwhile. What does not fit into memory goes to the disk at once.
    ///
    /// # Errors
    /// [`Error::PageFile`] where the disk fails.
    ///
    /// # Panics
    /// If the range is not within the arena.
    pub fn fill(&self, range: Range<usize>, value: u8) -> Result<()> {
        assert!(range.end <= self.bytes(), "{range:?} of an arena of {} bytes", self.bytes());
        let keeps = budget::plan(&[]).keeps_all;
        let piece = vec![value; PIECE.min(range.len())];
        for start in range.clone().step_by(BATCH) {
            let batch = start..range.end.min(start + BATCH);
            for at in batch.clone().step_by(PIECE) {
                let piece = &piece[..PIECE.min(batch.end - at)];
                file::write(&self.file, piece, at)
                    .map_err(|error| self.error("writing", &error))?;
            }
            if !keeps {
                let finished = finished(&batch);
                self.write_out(&finished)?;
                self.let_go(&finished)?;
            }
        }
        Ok(())
    }

    /// Writes `range` to the disk and gives its memory back, if not all of the state may stay in
    /// memory.
    ///
    /// # Errors
    /// [`Error::PageFile`] where the disk fails.
    pub fn settle(&self, range: &Range<usize>) -> Result<()> {
        if budget::plan(&[]).keeps_all {
            return Ok(());
        }
        let finished = finished(range);
        self.write_out(&finished)?;
        self.let_go(&finished)
    }

    /// Whether all of `range` is in memory.
    pub(super) fn is_resident(&self, range: &Range<usize>) -> bool {
        file::is_resident(&self.map, range)
    }

    /// Waits until `range` is in memory, ready to be written to.
    pub(super) fn fetch(&self, range: &Range<usize>) {
        let end = range.end.next_multiple_of(GRANULE).min(self.bytes());
        let range = range.start / GRANULE * GRANULE..end;
        if !self.is_resident(&range) {
            file::populate(&self.map, &range);
        }
    }

    /// The granules that `range` touches.
    pub(super) fn granules(&self, range: &Range<usize>) -> impl Iterator<Item = Range<usize>> {
        let starts = (range.start / GRANULE * GRANULE..range.end).step_by(GRANULE);
        starts.map(|start| start..(start + GRANULE).min(self.bytes()))
    }

    /// Starts writing what changed in `range` to the disk.
    pub(super) fn write_out(&self, range: &Range<usize>) -> Result<()> {
        file::start_writing(&self.file, range).map_err(|error| self.error("writing", &error))
    }

    /// Waits until `range` is on the disk, then gives its memory back; its contents stay.
    pub(super) fn let_go(&self, range: &Range<usize>) -> Result<()> {
        file::finish_writing(&self.file, range).map_err(|error| self.error("writing", &error))?;
        file::release(&self.map, &self.file, range);
        Ok(())
    }

    fn error(&self, doing: &str, error: &io::Error) -> Error {
        page_file(&self.directory, format!("{doing} paged state"), error)
    }
}

impl Drop for Arena {
    fn drop(&mut self) {
        ARENAS.remove(self.address());
    }
}

/// The granules that a pass through memory is done with when it is done with `range`: the one in
/// which the range ends is in use still.
const fn finished(range: &Range<usize>) -> Range<usize> {
    range.start / GRANULE * GRANULE..range.end / GRANULE * GRANULE
}

/// All arenas of this process.
pub(super) fn all() -> Vec<Arc<Arena>> {
    let process = process::id();
    ARENAS.all().into_iter().filter(|arena| arena.owner == process).collect()
}

/// A file without a name.
fn create(directory: &Path) -> Result<File> {
    tempfile::tempfile_in(directory).map_err(|error| {
        let doing = "making a file for paged state".to_owned();
        page_file(directory, doing, &error)
    })
}

fn page_file(directory: &Path, doing: String, error: &io::Error) -> Error {
    let accepted = match error.raw_os_error() {
        Some(libc::ENOSPC) => "; a directory with more free space is accepted",
        Some(libc::ENOENT | libc::ENOTDIR | libc::EACCES | libc::EPERM | libc::EROFS) => {
            "; a directory that exists and can be written is accepted"
        }
        _ => "",
    };
    Error::PageFile {
        directory: directory.display().to_string(),
        doing,
        errno: error.raw_os_error().unwrap_or(0),
        reason: format!("{error}{accepted}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn arena(params: &[(StateFormat, usize)]) -> Arc<Arena> {
        Arena::new_in(Path::new("/var/tmp"), None, params).unwrap()
    }

    #[test]
    fn an_arena_is_zero_writable_and_found_by_address() {
        let arena = arena(&[(StateFormat::F32, 100_000), (StateFormat::DYNAMIC8, 100_000)]);
        let bytes = arena.extents().bytes();
        assert_eq!(arena.bytes(), bytes);
        // SAFETY: the arena's own bytes, which nothing else uses.
        let content = unsafe { std::slice::from_raw_parts_mut(arena.pointer(), bytes) };
        assert!(content.iter().all(|&byte| byte == 0));
        content[7] = 1;
        let codes = arena.extents().buffers()[1][0].clone();
        arena.fill(codes.clone(), 127).unwrap();
        assert!(content[codes.clone()].iter().all(|&byte| byte == 127));
        assert_eq!((content[codes.start - 1], content[codes.end]), (0, 0));
        arena.settle(&(0..bytes)).unwrap();
        file::finish_writing(&arena.file, &(0..bytes)).unwrap();
        file::release(&arena.map, &arena.file, &(0..bytes));
        assert!(!arena.is_resident(&(0..4096)));
        assert_eq!((content[7], content[codes.start]), (1, 127));
        let address = arena.address();
        assert!(find(address + bytes - 1).is_some() && find(address - 1).is_none());
        drop(arena);
        assert!(find(address).is_none());
    }

    #[test]
    fn a_disk_that_failed_is_remembered() {
        let arena = arena(&[(StateFormat::F32, 1000)]);
        assert_eq!(arena.check(), Ok(()));
        let error = arena.error("writing", &io::Error::from_raw_os_error(libc::EIO));
        arena.fail(error);
        let text = arena.check().unwrap_err().to_string();
        assert!(text.starts_with("writing paged state in QADAM_PAGE_DIR=\"/var/tmp\": "), "{text}");
        assert!(text.contains("load a state dict"), "{text}");
    }

    #[test]
    fn nothing_to_hold_is_an_arena_too() {
        assert_eq!(arena(&[]).extents().bytes(), 0);
    }

    #[test]
    fn a_directory_that_will_not_do_is_named() {
        let make = |directory: &str, len| {
            let arena = Arena::new_in(Path::new(directory), None, &[(StateFormat::F32, len)]);
            arena.unwrap_err().to_string()
        };
        let text = make("/nowhere/at/all", 100_000);
        assert!(text.contains("QADAM_PAGE_DIR=\"/nowhere/at/all\": No such file"), "{text}");
        let text = make("/proc", 100_000);
        assert!(text.starts_with("making a file for paged state in QADAM_PAGE_DIR=\"/proc\""));
        let text = make("/var/tmp", 1 << 50);
        assert!(text.starts_with("reserving 9007199254740992 bytes of disk"), "{text}");
        assert!(text.contains("a directory with more free space is accepted"), "{text}");
    }
}
