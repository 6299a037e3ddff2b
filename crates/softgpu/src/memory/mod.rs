//! Device memory: real host memory at real addresses, known allocation by allocation.
//!
//! An allocation is a private anonymous mapping without reserved swap, so 2^36 bytes cost
//! nothing until touched. Beside it stand the bytes that were written ([`shadow`]) and, for
//! managed memory, where each page is ([`managed`]).

pub mod managed;
mod mapping;
pub mod shadow;

use managed::{Place, Residency};
use mapping::Mapping;
use shadow::Shadow;

/// Generic addresses of shared memory start here; user-space addresses never reach it.
pub const SHARED_WINDOW: u64 = 1 << 60;
/// Generic addresses of a thread's local memory start here.
pub const LOCAL_WINDOW: u64 = 2 << 60;
/// Size of either window.
pub const WINDOW: u64 = 1 << 32;

/// What a region is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// `cuMemAlloc`.
    Device,
    /// `cuMemAllocManaged`.
    Managed,
    /// `cuMemAllocHost`, `cuMemHostAlloc`.
    Pinned,
    /// A module's `.global` variables.
    ModuleGlobal,
    /// A module's `.const` variables.
    ModuleConst,
    /// A host buffer lent by a test.
    Adopted,
}

/// Bytes one operation touched, as an interval of offsets; empty if `lo >= hi`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Span {
    /// First byte.
    pub lo: u64,
    /// Behind the last byte.
    pub hi: u64,
}

impl Span {
    /// Nothing.
    pub const EMPTY: Span = Span { lo: u64::MAX, hi: 0 };

    fn add(&mut self, off: u64, len: u64) {
        self.lo = self.lo.min(off);
        self.hi = self.hi.max(off + len);
    }

    /// Whether two spans share a byte.
    pub fn meets(self, o: Span) -> bool {
        self.lo < o.hi && o.lo < self.hi
    }

    /// Whether nothing is in it.
    pub fn is_empty(self) -> bool {
        self.lo >= self.hi
    }
}

/// One allocation.
pub struct Region {
    /// First address.
    pub base: u64,
    /// Exact length asked for; the next byte is out of bounds.
    pub len: u64,
    /// What it is.
    pub kind: Kind,
    /// The one device that may touch it; `None` for all.
    pub device: Option<u32>,
    /// The device whose context it dies with.
    pub owner: Option<u32>,
    /// Unique over the life of the library.
    pub id: u64,
    /// Bytes written; `None` where every byte counts as written.
    pub shadow: Option<Shadow>,
    /// Pages of managed memory.
    pub pages: Option<Residency>,
    /// Read by the operation under way.
    pub read: Span,
    /// Written by the operation under way.
    pub written: Span,
    /// Keeps the bytes alive; absent for adopted memory.
    mapping: Option<Mapping>,
}

/// Why an access is refused.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Refusal {
    /// No region covers it; what is near.
    OutOfBounds(String),
    /// Of another device.
    WrongDevice(u32),
    /// First byte that was never written.
    Uninitialised(u64),
}

/// All memory of the machine.
#[derive(Default)]
pub struct Memory {
    regions: Vec<Region>,
    /// Recently freed ranges, for messages.
    freed: Vec<(u64, u64)>,
    next_id: u64,
    /// Track what is uninitialised in managed memory as well. Off, since a host may write it unseen.
    pub track_managed: bool,
}

impl Memory {
    /// All regions by address.
    pub fn regions(&self) -> &[Region] {
        &self.regions
    }

    /// A new mapping of `len` bytes.
    pub fn alloc(&mut self, len: u64, kind: Kind, device: Option<u32>) -> Option<u64> {
        let mapping = Mapping::new(usize::try_from(len).ok()?)?;
        let base = mapping.addr();
        let zeroed = matches!(kind, Kind::Pinned | Kind::ModuleGlobal | Kind::ModuleConst);
        let shadow = match kind {
            Kind::Managed => self.track_managed.then(|| Shadow::new(len)),
            _ if zeroed => None,
            _ => Some(Shadow::new(len)),
        };
        let pages = (kind == Kind::Managed).then(|| Residency::new(len));
        Some(self.insert(Region {
            base,
            len,
            kind,
            device,
            owner: device,
            id: 0,
            shadow,
            pages,
            read: Span::EMPTY,
            written: Span::EMPTY,
            mapping: Some(mapping),
        }))
    }

    /// Makes a host buffer device-accessible at its own address. Fails if it overlaps a region.
    ///
    /// # Safety
    /// `[base, base+len)` must stay valid for reads and writes until it is unadopted.
    pub unsafe fn adopt(&mut self, base: u64, len: u64, device: Option<u32>) -> Option<u64> {
        let i = self.regions.partition_point(|r| r.base < base.saturating_add(len));
        if len == 0 || base == 0 || base.checked_add(len).is_none() {
            return None;
        }
        if i > 0 && self.regions[i - 1].base + self.regions[i - 1].len > base {
            return None;
        }
        Some(self.insert(Region {
            base,
            len,
            kind: Kind::Adopted,
            device,
            owner: None,
            id: 0,
            shadow: None,
            pages: None,
            read: Span::EMPTY,
            written: Span::EMPTY,
            mapping: None,
        }))
    }

    fn insert(&mut self, mut r: Region) -> u64 {
        self.next_id += 1;
        r.id = self.next_id;
        let base = r.base;
        self.freed.retain(|f| f.0 + f.1 <= base || f.0 >= base + r.len);
        let i = self.regions.partition_point(|o| o.base < base);
        self.regions.insert(i, r);
        base
    }

    /// Removes the region that starts at `base`, if it is of one of `kinds`.
    pub fn free(&mut self, base: u64, kinds: &[Kind]) -> Option<Region> {
        let i = self.regions.iter().position(|r| r.base == base && kinds.contains(&r.kind))?;
        let r = self.regions.remove(i);
        self.freed.push((r.base, r.len));
        if self.freed.len() > 256 {
            self.freed.remove(0);
        }
        Some(r)
    }

    /// Drops everything.
    pub fn clear(&mut self) {
        self.regions.clear();
        self.freed.clear();
    }

    /// Index of the region that covers `addr`.
    pub fn find(&self, addr: u64) -> Option<usize> {
        let i = self.regions.partition_point(|r| r.base <= addr);
        let i = i.checked_sub(1)?;
        (addr - self.regions[i].base < self.regions[i].len).then_some(i)
    }

    /// The region by index.
    pub fn region(&self, i: usize) -> &Region {
        &self.regions[i]
    }

    /// The region by index, for changes.
    pub fn region_mut(&mut self, i: usize) -> &mut Region {
        &mut self.regions[i]
    }

    /// What lies around an address nobody owns.
    fn around(&self, addr: u64, len: u64) -> String {
        if let Some(f) = self.freed.iter().rev().find(|f| addr >= f.0 && addr < f.0 + f.1) {
            return format!(
                "{len} bytes, {} into a freed allocation of {} bytes at {:#x}",
                addr - f.0,
                f.1,
                f.0
            );
        }
        let i = self.regions.partition_point(|r| r.base <= addr);
        let before = i.checked_sub(1).map(|i| &self.regions[i]);
        let after = self.regions.get(i);
        let mut best: Option<(u64, String)> = None;
        if let Some(r) = before {
            let d = addr.saturating_sub(r.base + r.len);
            best = Some((
                d,
                format!(
                    "{len} bytes, {d} bytes behind the {} bytes at {:#x} ({:?})",
                    r.len, r.base, r.kind
                ),
            ));
        }
        if let Some(r) = after {
            let d = r.base - addr;
            if best.as_ref().is_none_or(|b| d < b.0) {
                best = Some((
                    d,
                    format!(
                        "{len} bytes, {d} bytes before the {} bytes at {:#x} ({:?})",
                        r.len, r.base, r.kind
                    ),
                ));
            }
        }
        best.map_or_else(|| format!("{len} bytes, and nothing is allocated"), |b| b.1)
    }

    /// The region that covers `[addr, addr+len)` and `device` may touch. `hint` remembers it.
    pub fn locate(
        &self,
        addr: u64,
        len: u64,
        device: u32,
        hint: &mut u32,
    ) -> Result<usize, Refusal> {
        if let Some(r) = self.regions.get(*hint as usize) {
            let off = addr.wrapping_sub(r.base);
            if off < r.len && r.len - off >= len && r.device.is_none_or(|d| d == device) {
                return Ok(*hint as usize);
            }
        }
        let Some(i) = self.find(addr) else {
            return Err(Refusal::OutOfBounds(self.around(addr, len)));
        };
        let r = &self.regions[i];
        if r.len - (addr - r.base) < len {
            let over = len - (r.len - (addr - r.base));
            return Err(Refusal::OutOfBounds(format!(
                "{len} bytes, the last {over} beyond the {} bytes at {:#x} ({:?})",
                r.len, r.base, r.kind
            )));
        }
        if let Some(d) = r.device.filter(|d| *d != device) {
            return Err(Refusal::WrongDevice(d));
        }
        *hint = i as u32;
        Ok(i)
    }

    /// Reads up to 16 bytes for a kernel. The caller located `[addr, addr+len)` in region `i`.
    pub fn read(
        &mut self,
        i: usize,
        addr: u64,
        len: usize,
        place: Place,
    ) -> Result<[u8; 16], Refusal> {
        let r = &mut self.regions[i];
        let off = r.inside(addr, len as u64)?;
        if let Some(s) = &r.shadow
            && let Some(bad) = s.first_unwritten(off, len as u64)
        {
            return Err(Refusal::Uninitialised(r.base + bad));
        }
        if let Some(p) = &mut r.pages {
            p.touch(r.base, off, len as u64, place);
        }
        r.read.add(off, len as u64);
        let mut out = [0; 16];
        // SAFETY: `inside` checked that the region covers these bytes; a mapped region is readable
        // while it exists, an adopted one by `adopt`'s contract.
        unsafe { std::ptr::copy_nonoverlapping(addr as *const u8, out.as_mut_ptr(), len.min(16)) };
        Ok(out)
    }

    /// Writes up to 16 bytes for a kernel. The caller located `[addr, addr+len)` in region `i`.
    pub fn write(
        &mut self,
        i: usize,
        addr: u64,
        bytes: &[u8],
        place: Place,
    ) -> Result<(), Refusal> {
        let r = &mut self.regions[i];
        let off = r.inside(addr, bytes.len() as u64)?;
        if let Some(s) = &mut r.shadow {
            s.mark(off, bytes.len() as u64);
        }
        if let Some(p) = &mut r.pages {
            p.touch(r.base, off, bytes.len() as u64, place);
        }
        r.written.add(off, bytes.len() as u64);
        // SAFETY: `inside` checked that the region covers these bytes, writable as in `read`; `bytes`
        // is a Rust slice and so lies in no region but possibly an adopted one, hence `copy`.
        unsafe { std::ptr::copy(bytes.as_ptr(), addr as *mut u8, bytes.len()) };
        Ok(())
    }

    /// `memset` of `count` elements of `width` bytes.
    pub fn fill(
        &mut self,
        addr: u64,
        value: u32,
        width: usize,
        count: u64,
        place: Place,
    ) -> Result<(), Refusal> {
        let len = count * width as u64;
        if len == 0 {
            return Ok(());
        }
        let i = self.any(addr, len)?;
        let r = &mut self.regions[i];
        let off = r.inside(addr, len)?;
        if let Some(s) = &mut r.shadow {
            s.mark(off, len);
        }
        if let Some(p) = &mut r.pages {
            p.touch(r.base, off, len, place);
        }
        r.written.add(off, len);
        let bytes = value.to_le_bytes();
        if bytes[..width].iter().all(|&b| b == 0)
            && let Some(m) = &r.mapping
        {
            m.zero(off as usize, len as usize);
            return Ok(());
        }
        if bytes[..width].iter().all(|&b| b == bytes[0]) {
            // SAFETY: `inside` checked that the region covers `len` bytes from `addr`.
            unsafe { std::ptr::write_bytes(addr as *mut u8, bytes[0], len as usize) };
        } else {
            for k in 0..count {
                // SAFETY: `k * width + width <= len`, all of it inside the region.
                unsafe {
                    std::ptr::copy_nonoverlapping(
                        bytes.as_ptr(),
                        (addr + k * width as u64) as *mut u8,
                        width,
                    );
                }
            }
        }
        Ok(())
    }

    fn any(&self, addr: u64, len: u64) -> Result<usize, Refusal> {
        let Some(i) = self.find(addr) else {
            return Err(Refusal::OutOfBounds(self.around(addr, len)));
        };
        let r = &self.regions[i];
        if r.len - (addr - r.base) < len {
            return Err(Refusal::OutOfBounds(self.around(r.base + r.len, len)));
        }
        Ok(i)
    }

    /// Host to device copy.
    ///
    /// # Safety
    /// `from` must be readable for `len` bytes.
    pub unsafe fn upload(
        &mut self,
        to: u64,
        from: *const u8,
        len: u64,
        place: Place,
    ) -> Result<(), Refusal> {
        if len == 0 {
            return Ok(());
        }
        let i = self.any(to, len)?;
        // The host side may be pinned memory, which is a region too.
        if let Some(h) = self.find(from as u64) {
            let off = from as u64 - self.regions[h].base;
            self.regions[h].read.add(off, len);
        }
        let r = &mut self.regions[i];
        let off = r.inside(to, len)?;
        if let Some(s) = &mut r.shadow {
            s.mark(off, len);
        }
        if let Some(p) = &mut r.pages {
            p.touch(r.base, off, len, place);
        }
        r.written.add(off, len);
        // SAFETY: the region covers the target (`inside`); the source by this function's contract;
        // `copy` allows them to overlap, as an adopted buffer may.
        unsafe { std::ptr::copy(from, to as *mut u8, len as usize) };
        Ok(())
    }

    /// Device to host copy. Returns whether any byte was never written.
    ///
    /// # Safety
    /// `to` must be writable for `len` bytes.
    pub unsafe fn download(
        &mut self,
        to: *mut u8,
        from: u64,
        len: u64,
    ) -> Result<Option<u64>, Refusal> {
        if len == 0 {
            return Ok(None);
        }
        let i = self.any(from, len)?;
        if let Some(h) = self.find(to as u64) {
            let off = to as u64 - self.regions[h].base;
            self.regions[h].written.add(off, len);
        }
        let r = &mut self.regions[i];
        let off = r.inside(from, len)?;
        let bad = r.shadow.as_ref().and_then(|s| s.first_unwritten(off, len)).map(|b| r.base + b);
        r.read.add(off, len);
        // SAFETY: the region covers the source (`inside`), the target by this function's contract.
        unsafe { std::ptr::copy(from as *const u8, to, len as usize) };
        Ok(bad)
    }

    /// Device to device copy; what was unwritten stays so.
    pub fn copy(&mut self, to: u64, from: u64, len: u64, place: Place) -> Result<(), Refusal> {
        if len == 0 {
            return Ok(());
        }
        let (a, b) = (self.any(from, len)?, self.any(to, len)?);
        let from_off = self.regions[a].inside(from, len)?;
        let to_off = self.regions[b].inside(to, len)?;
        self.regions[a].read.add(from_off, len);
        self.regions[b].written.add(to_off, len);
        for (i, off) in [(a, from_off), (b, to_off)] {
            let r = &mut self.regions[i];
            if let Some(p) = &mut r.pages {
                p.touch(r.base, off, len, place);
            }
        }
        let source = self.regions[a].shadow.as_ref().map(|s| s.slice(from_off, len));
        if let Some(s) = &mut self.regions[b].shadow {
            match source {
                None => s.mark(to_off, len),
                Some(bits) => s.paste(to_off, &bits),
            }
        }
        // SAFETY: both ranges were found inside regions; `copy` allows overlap.
        unsafe { std::ptr::copy(from as *const u8, to as *mut u8, len as usize) };
        Ok(())
    }

    /// Forgets which bytes the last operation touched and returns them: (region id, read, written).
    pub fn take_spans(&mut self) -> Vec<(u64, Span, Span)> {
        let mut out = Vec::new();
        for r in &mut self.regions {
            if !r.read.is_empty() || !r.written.is_empty() {
                out.push((r.id, r.read, r.written));
                r.read = Span::EMPTY;
                r.written = Span::EMPTY;
            }
        }
        out
    }
}

impl Region {
    /// Offset of a range that must lie inside.
    fn inside(&self, addr: u64, len: u64) -> Result<u64, Refusal> {
        let off = addr.wrapping_sub(self.base);
        if off <= self.len && self.len - off >= len {
            Ok(off)
        } else {
            Err(Refusal::OutOfBounds(format!(
                "{len} bytes outside the {} bytes at {:#x}",
                self.len, self.base
            )))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const D0: Place = Place::Device(0);

    #[test]
    fn a_huge_allocation_is_sparse_and_its_ends_work() {
        let mut m = Memory::default();
        let len = 1u64 << 36;
        let a = m.alloc(len, Kind::Device, Some(0)).unwrap();
        let mut hint = 0;
        for at in [a, a + len - 4] {
            let i = m.locate(at, 4, 0, &mut hint).unwrap();
            assert!(matches!(m.read(i, at, 4, D0), Err(Refusal::Uninitialised(b)) if b == at));
            m.write(i, at, &[1, 2, 3, 4], D0).unwrap();
            assert_eq!(m.read(i, at, 4, D0).unwrap()[..4], [1, 2, 3, 4]);
        }
        assert!(matches!(m.locate(a + len - 3, 4, 0, &mut hint), Err(Refusal::OutOfBounds(_))));
        assert!(matches!(m.locate(a, 4, 1, &mut hint), Err(Refusal::WrongDevice(0))));
        // Clearing all of it must not touch 64 GiB.
        m.fill(a, 0, 1, len, D0).unwrap();
        let i = m.locate(a + len - 4, 4, 0, &mut hint).unwrap();
        assert_eq!(m.read(i, a + len - 4, 4, D0).unwrap()[..4], [0; 4]);
        m.free(a, &[Kind::Device]).unwrap();
        let Err(Refusal::OutOfBounds(why)) = m.locate(a + 8, 4, 0, &mut hint) else { panic!() };
        assert!(why.contains("freed"), "{why}");
    }

    #[test]
    fn copies_carry_what_is_unwritten() {
        let mut m = Memory::default();
        let a = m.alloc(64, Kind::Device, Some(0)).unwrap();
        let b = m.alloc(64, Kind::Device, Some(0)).unwrap();
        let src = [7u8; 8];
        // SAFETY: `src` and `dst` are local arrays of the lengths given.
        unsafe { m.upload(a + 8, src.as_ptr(), 8, D0).unwrap() };
        m.copy(b, a, 32, D0).unwrap();
        let i = m.find(b).unwrap();
        assert!(m.read(i, b + 8, 8, D0).is_ok());
        assert_eq!(m.read(i, b + 16, 4, D0), Err(Refusal::Uninitialised(b + 16)));
        let mut dst = [0u8; 32];
        // SAFETY: as above.
        assert_eq!(unsafe { m.download(dst.as_mut_ptr(), b, 32) }.unwrap(), Some(b));
        // SAFETY: as above.
        assert_eq!(unsafe { m.download(dst.as_mut_ptr(), b + 8, 8) }.unwrap(), None);
        assert_eq!(dst[0], 7);
    }

    #[test]
    fn adopted_memory_is_whole_and_does_not_overlap() {
        let mut m = Memory::default();
        let mut host = vec![1u32; 8];
        let base = host.as_mut_ptr() as u64;
        // SAFETY: `host` outlives `m`'s use of it.
        unsafe {
            assert_eq!(m.adopt(base, 32, None), Some(base));
            assert_eq!(m.adopt(base + 16, 32, None), None);
            assert_eq!(m.adopt(0, 32, None), None);
        }
        let i = m.locate(base + 28, 4, 3, &mut 0).unwrap();
        m.write(i, base + 28, &[9, 0, 0, 0], D0).unwrap();
        assert!(m.free(base, &[Kind::Adopted]).is_some());
        assert_eq!(host[7], 9);
    }

    #[test]
    fn fill_writes_words() {
        let mut m = Memory::default();
        let a = m.alloc(40, Kind::Device, Some(0)).unwrap();
        m.fill(a, 0x0102_0304, 4, 10, D0).unwrap();
        let i = m.find(a).unwrap();
        assert_eq!(m.read(i, a + 36, 4, D0).unwrap()[..4], [4, 3, 2, 1]);
        assert!(m.fill(a + 4, 1, 4, 10, D0).is_err());
    }
}
