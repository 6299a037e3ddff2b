//! Allocation, copies, fills, managed memory and pointer queries.

use crate::driver::codes::{INVALID_DEVICE, INVALID_VALUE, NOT_SUPPORTED, OUT_OF_MEMORY};
use crate::driver::ops::Work;
use crate::driver::state::{CONTEXT, Driver, Res};
use crate::driver::{In, Out, cuda};
use crate::memory::Kind;
use crate::memory::managed::Place;

/// `CUmemLocation`, by value.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct Location {
    /// 1 device, 2 host.
    pub kind: i32,
    /// Device ordinal.
    pub id: i32,
}

fn alloc(d: &mut Driver, out: &Out<u64>, len: usize, kind: Kind) -> Res {
    let device = d.device()?;
    out.wanted()?;
    if len == 0 {
        return d.refuse(INVALID_VALUE, "allocation of no bytes");
    }
    let bounded = kind == Kind::Device;
    if bounded && (len as u64) > d.config.total.saturating_sub(d.used(device)) {
        return Err(OUT_OF_MEMORY);
    }
    let owner = if bounded { Some(device) } else { None };
    let at = d.mem.alloc(len as u64, kind, owner).ok_or(OUT_OF_MEMORY)?;
    if let Some(i) = d.mem.find(at) {
        // Managed and pinned memory serves all devices, but ends with the context that made it.
        d.mem.region_mut(i).owner = Some(device);
    }
    out.set(at)
}

/// Does a copy or fill at once on the legacy stream, as calls without a stream do.
///
/// # Safety
/// Host pointers in `work` are valid for its length.
unsafe fn now(d: &mut Driver, work: Work, waits: bool) -> Res {
    d.device()?;
    d.unsafe_call()?;
    let key = d.stream(0)?;
    // SAFETY: by this function's contract.
    unsafe { d.enqueue(key, work) }?;
    if waits { d.wait_stream(key) } else { Ok(()) }
}

/// # Safety
/// Host pointers in `work` stay valid until it ran.
unsafe fn later(d: &mut Driver, stream: u64, work: Work, pageable: Option<(usize, u64)>) -> Res {
    let key = d.stream(stream)?;
    // The driver stages pageable memory: it waits for a copy to the host, and for a big one from it.
    let staged = pageable.is_some_and(|(host, limit)| {
        let known = d.mem.find(host as u64).map(|i| d.mem.region(i).kind);
        let len = match &work {
            Work::Upload { len, .. } | Work::Download { len, .. } => *len,
            _ => 0,
        };
        !matches!(known, Some(Kind::Pinned | Kind::Managed)) && len > limit
    });
    // SAFETY: by this function's contract.
    unsafe { d.enqueue(key, work) }?;
    if staged && d.streams[&key].capture.is_none() {
        d.mark_sync();
        let clock = d.streams[&key].clock.clone();
        d.host.join(&clock);
    }
    Ok(())
}

fn prefetch(d: &mut Driver, at: u64, len: usize, to: Place, stream: u64) -> Res {
    d.note(format!("at {at:#x}, to {to:?}"));
    let key = d.stream(stream)?;
    if len == 0 {
        return Err(INVALID_VALUE);
    }
    // The manual asks it of the destination and of the stream's device, so the host is no exception.
    if !(d.config.managed && d.config.concurrent) {
        return d.refuse(INVALID_DEVICE, "no concurrent managed access");
    }
    // SAFETY: a prefetch has no host pointers.
    unsafe { d.enqueue(key, Work::Prefetch { at, len: len as u64, to }) }
}

fn place(d: &Driver, dev: i32) -> Res<Place> {
    match dev {
        -1 => Ok(Place::Host),
        i if i >= 0 && (i as usize) < d.devices.len() => Ok(Place::Device(i as u32)),
        _ => Err(INVALID_DEVICE),
    }
}

fn located(d: &Driver, l: Location) -> Res<Place> {
    match l.kind {
        1 if l.id >= 0 => place(d, l.id),
        2 => Ok(Place::Host),
        _ => d.unsupported(&format!("memory location of type {}", l.kind)),
    }
}

fn advise(d: &mut Driver, at: u64, len: usize, advice: i32, to: Place) -> Res {
    d.device()?;
    if !(1..=6).contains(&advice) {
        return Err(INVALID_VALUE);
    }
    let i = d.mem.find(at).ok_or(INVALID_VALUE)?;
    let r = d.mem.region(i);
    if r.kind != Kind::Managed || r.len - (at - r.base) < len as u64 {
        return d.refuse(INVALID_VALUE, "not managed memory");
    }
    // Advice moves nothing by itself; the log shows that it was given.
    d.note(format!("advice {advice}, {to:?}"));
    // A preferred location or an accessor that is a device; other advice ignores the device.
    let names_device = matches!(advice, 3 | 5) && matches!(to, Place::Device(_));
    if names_device && !d.config.concurrent {
        return d.refuse(INVALID_DEVICE, "no concurrent managed access");
    }
    Ok(())
}

/// `CU_POINTER_ATTRIBUTE_*` as (value, bytes).
fn pointer(d: &Driver, which: i32, at: u64) -> Res<Option<(u64, usize)>> {
    let Some(i) = d.mem.find(at) else { return Ok(None) };
    let r = d.mem.region(i);
    let host = r.kind == Kind::Pinned;
    let device = u64::from(r.device.unwrap_or(0));
    Ok(Some(match which {
        1 => (CONTEXT + device, 8),
        2 => (if host { 1 } else { 2 }, 4),
        3 => (at, 8),
        4 if matches!(r.kind, Kind::Pinned | Kind::Managed) => (at, 8),
        4 => return Err(INVALID_VALUE),
        7 => (r.id, 8),
        8 => (u64::from(r.kind == Kind::Managed), 1),
        9 => (device, 4),
        11 => (r.base, 8),
        12 => (r.len, 8),
        13 => (1, 1),
        _ => return d.unsupported(&format!("pointer attribute {which}")),
    }))
}

fn store(out: usize, (value, bytes): (u64, usize)) -> Res {
    let out = Out(out as *mut u8);
    for (k, b) in value.to_le_bytes().into_iter().take(bytes).enumerate() {
        out.set_at(k, b)?;
    }
    Ok(())
}

cuda! {
    /// `cuMemGetInfo_v2`.
    fn cuMemGetInfo_v2(free: Out<usize>, total: Out<usize>) [None, 0] |d| {
        let i = d.device()?;
        free.set(d.config.total.saturating_sub(d.used(i)) as usize)?;
        total.set(d.config.total as usize)
    }

    /// `cuMemAlloc_v2`.
    fn cuMemAlloc_v2(ptr: Out<u64>, len: usize) [None, len] |d| {
        d.device()?;
        d.unsafe_call()?;
        alloc(d, &ptr, len, Kind::Device)
    }

    /// `cuMemAllocAsync`.
    fn cuMemAllocAsync(ptr: Out<u64>, len: usize, stream: u64) [Some(stream), len] |d| {
        let key = d.stream(stream)?;
        if d.capture(key)?.is_some() {
            return d.refuse(NOT_SUPPORTED, "allocation inside a capture");
        }
        alloc(d, &ptr, len, Kind::Device)
    }

    /// `cuMemFree_v2`: waits for the device, as the real one does.
    fn cuMemFree_v2(ptr: u64) [None, 0] |d| {
        let i = d.device()?;
        d.unsafe_call()?;
        if ptr == 0 {
            return Ok(());
        }
        d.wait_device(i)?;
        d.release(ptr, &[Kind::Device, Kind::Managed])
    }

    /// `cuMemFreeAsync`: ordered like a write of the whole allocation.
    fn cuMemFreeAsync(ptr: u64, stream: u64) [Some(stream), 0] |d| {
        let key = d.stream(stream)?;
        if d.capture(key)?.is_some() {
            return d.refuse(NOT_SUPPORTED, "free inside a capture");
        }
        let i = d.mem.find(ptr).ok_or(INVALID_VALUE)?;
        let r = d.mem.region_mut(i);
        if r.base != ptr || r.kind != Kind::Device {
            return d.refuse(INVALID_VALUE, "not the start of a device allocation");
        }
        r.written = crate::memory::Span { lo: 0, hi: r.len };
        // SAFETY: an empty copy touches nothing; it puts the free into the stream's order.
        unsafe { d.enqueue(key, Work::Copy { to: ptr, from: ptr, len: 0 }) }?;
        d.release(ptr, &[Kind::Device])
    }

    /// `cuMemAllocManaged`. Flags: 1 global, 2 host (attach).
    fn cuMemAllocManaged(ptr: Out<u64>, len: usize, flags: u32) [None, len] |d| {
        d.device()?;
        d.unsafe_call()?;
        if flags != 1 && flags != 2 {
            return Err(INVALID_VALUE);
        }
        if !d.config.managed {
            return d.unsupported("no managed memory");
        }
        alloc(d, &ptr, len, Kind::Managed)
    }

    /// `cuMemAllocHost_v2`.
    fn cuMemAllocHost_v2(ptr: Out<u64>, len: usize) [None, len] |d| {
        d.device()?;
        d.unsafe_call()?;
        alloc(d, &ptr, len, Kind::Pinned)
    }

    /// `cuMemHostAlloc`. All pinned memory is portable and mapped.
    fn cuMemHostAlloc(ptr: Out<u64>, len: usize, flags: u32) [None, len] |d| {
        d.device()?;
        d.unsafe_call()?;
        if flags & !7 != 0 {
            return Err(INVALID_VALUE);
        }
        alloc(d, &ptr, len, Kind::Pinned)
    }

    /// `cuMemHostGetDevicePointer_v2`.
    fn cuMemHostGetDevicePointer_v2(ptr: Out<u64>, host: u64, flags: u32) [None, 0] |d| {
        d.device()?;
        let i = d.mem.find(host).ok_or(INVALID_VALUE)?;
        if flags != 0 || d.mem.region(i).kind != Kind::Pinned {
            return Err(INVALID_VALUE);
        }
        ptr.set(host)
    }

    /// `cuMemFreeHost`.
    fn cuMemFreeHost(ptr: u64) [None, 0] |d| {
        let i = d.device()?;
        d.unsafe_call()?;
        d.wait_device(i)?;
        d.release(ptr, &[Kind::Pinned])
    }

    /// `cuMemcpyHtoD_v2`.
    fn cuMemcpyHtoD_v2(to: u64, from: In<u8>, len: usize) [None, len] |d| {
        // SAFETY: `from` is readable for `len` bytes by the caller's contract.
        unsafe { now(d, Work::Upload { to, from: from.addr(), len: len as u64 }, true) }
    }

    /// `cuMemcpyDtoH_v2`.
    fn cuMemcpyDtoH_v2(to: Out<u8>, from: u64, len: usize) [None, len] |d| {
        // SAFETY: `to` is writable for `len` bytes by the caller's contract.
        unsafe { now(d, Work::Download { to: to.addr(), from, len: len as u64 }, true) }
    }

    /// `cuMemcpyDtoD_v2`.
    fn cuMemcpyDtoD_v2(to: u64, from: u64, len: usize) [None, len] |d| {
        // SAFETY: no host pointers.
        unsafe { now(d, Work::Copy { to, from, len: len as u64 }, false) }
    }

    /// `cuMemcpyHtoDAsync_v2`.
    fn cuMemcpyHtoDAsync_v2(to: u64, from: In<u8>, len: usize, stream: u64) [Some(stream), len] |d| {
        let host = from.addr();
        // SAFETY: `from` is readable for `len` bytes by the caller's contract.
        unsafe { later(d, stream, Work::Upload { to, from: host, len: len as u64 }, Some((host, 64 << 10))) }
    }

    /// `cuMemcpyDtoHAsync_v2`.
    fn cuMemcpyDtoHAsync_v2(to: Out<u8>, from: u64, len: usize, stream: u64) [Some(stream), len] |d| {
        let host = to.addr();
        // SAFETY: `to` is writable for `len` bytes by the caller's contract.
        unsafe { later(d, stream, Work::Download { to: host, from, len: len as u64 }, Some((host, 0))) }
    }

    /// `cuMemcpyDtoDAsync_v2`.
    fn cuMemcpyDtoDAsync_v2(to: u64, from: u64, len: usize, stream: u64) [Some(stream), len] |d| {
        // SAFETY: no host pointers.
        unsafe { later(d, stream, Work::Copy { to, from, len: len as u64 }, None) }
    }

    /// `cuMemsetD8_v2`.
    fn cuMemsetD8_v2(to: u64, value: u8, count: usize) [None, count] |d| {
        // SAFETY: no host pointers.
        unsafe { now(d, Work::Fill { to, value: value.into(), width: 1, count: count as u64 }, false) }
    }

    /// `cuMemsetD32_v2`.
    fn cuMemsetD32_v2(to: u64, value: u32, count: usize) [None, 4 * count] |d| {
        if !to.is_multiple_of(4) {
            return Err(INVALID_VALUE);
        }
        // SAFETY: no host pointers.
        unsafe { now(d, Work::Fill { to, value, width: 4, count: count as u64 }, false) }
    }

    /// `cuMemsetD8Async`.
    fn cuMemsetD8Async(to: u64, value: u8, count: usize, stream: u64) [Some(stream), count] |d| {
        // SAFETY: no host pointers.
        unsafe { later(d, stream, Work::Fill { to, value: value.into(), width: 1, count: count as u64 }, None) }
    }

    /// `cuMemsetD32Async`.
    fn cuMemsetD32Async(to: u64, value: u32, count: usize, stream: u64) [Some(stream), 4 * count] |d| {
        if !to.is_multiple_of(4) {
            return Err(INVALID_VALUE);
        }
        // SAFETY: no host pointers.
        unsafe { later(d, stream, Work::Fill { to, value, width: 4, count: count as u64 }, None) }
    }

    /// `cuMemPrefetchAsync`, version 1: the destination is a device ordinal, -1 for the host.
    fn cuMemPrefetchAsync(at: u64, len: usize, dev: i32, stream: u64) [Some(stream), len] |d| {
        d.device()?;
        let to = place(d, dev)?;
        prefetch(d, at, len, to, stream)
    }

    /// `cuMemPrefetchAsync_v2`.
    fn cuMemPrefetchAsync_v2(at: u64, len: usize, to: Location, flags: u32, stream: u64) [Some(stream), len] |d| {
        d.device()?;
        if flags != 0 {
            return Err(INVALID_VALUE);
        }
        let to = located(d, to)?;
        prefetch(d, at, len, to, stream)
    }

    /// `cuMemAdvise`, version 1.
    fn cuMemAdvise(at: u64, len: usize, advice: i32, dev: i32) [None, len] |d| {
        let to = place(d, dev)?;
        advise(d, at, len, advice, to)
    }

    /// `cuMemAdvise_v2`.
    fn cuMemAdvise_v2(at: u64, len: usize, advice: i32, to: Location) [None, len] |d| {
        let to = located(d, to)?;
        advise(d, at, len, advice, to)
    }

    /// `cuPointerGetAttribute`.
    fn cuPointerGetAttribute(data: Out<u8>, which: i32, at: u64) [None, 0] |d| {
        d.device()?;
        let v = pointer(d, which, at)?.ok_or(INVALID_VALUE)?;
        store(data.addr(), v)
    }

    /// `cuPointerGetAttributes`: memory this driver does not know answers with zeros.
    fn cuPointerGetAttributes(n: u32, which: In<i32>, data: In<usize>, at: u64) [None, 0] |d| {
        d.device()?;
        for i in 0..n as usize {
            let w = which.get(i)?;
            let unknown = match w {
                9 => (u64::from(u32::MAX - 1), 4),
                2 => (0, 4),
                8 | 13 => (0, 1),
                _ => (0, 8),
            };
            store(data.get(i)?, pointer(d, w, at)?.unwrap_or(unknown))?;
        }
        Ok(())
    }

    /// `cuMemGetAddressRange_v2`.
    fn cuMemGetAddressRange_v2(base: Out<u64>, len: Out<usize>, at: u64) [None, 0] |d| {
        d.device()?;
        let i = d.mem.find(at).ok_or(INVALID_VALUE)?;
        base.maybe(d.mem.region(i).base);
        len.maybe(d.mem.region(i).len as usize);
        Ok(())
    }
}
