//! `softgpu_*`: what tests set, break and ask. C ABI, exported beside the driver's symbols.
//!
//! Functions that give text take a buffer and its size, write as much as fits with a closing NUL,
//! and return the full length without it. Lists are JSON, one object a line.

use std::fmt::Write;

use super::state::{Config, Driver};
use super::{Out, Text, global, plain};
use crate::memory::Kind;
use crate::memory::managed::Place;

fn put(text: &str, buffer: &Out<u8>, size: usize) -> usize {
    if buffer.addr() != 0 && size > 0 {
        for (k, b) in text.bytes().take(size - 1).chain([0]).enumerate() {
            // The pointer is not null, so this cannot fail.
            let _ = buffer.set_at(k, b);
        }
    }
    text.len()
}

/// One text a line.
fn lines(list: &[String]) -> String {
    let mut out = list.join("\n");
    if !out.is_empty() {
        out.push('\n');
    }
    out
}

/// A JSON string.
fn quote(s: &str) -> String {
    let mut out = String::from("\"");
    for c in s.chars() {
        match c {
            '"' => out.push_str("\\\""),
            '\\' => out.push_str("\\\\"),
            c if (c as u32) < 0x20 => {
                let _ = write!(out, "\\u{:04x}", c as u32);
            }
            c => out.push(c),
        }
    }
    out.push('"');
    out
}

fn where_is(p: Place) -> String {
    match p {
        Place::Nowhere => "\"nowhere\"".into(),
        Place::Host => "\"host\"".into(),
        Place::Device(d) => format!("\"device {d}\""),
    }
}

fn set(f: impl FnOnce(&mut Driver)) {
    f(&mut global());
}

/// Forgets everything: handles, memory (also adopted), logs, armed faults and settings.
#[unsafe(no_mangle)]
pub extern "C" fn softgpu_reset() {
    set(|d| {
        let generation = d.generation + 1;
        *d = Driver::new();
        d.generation = generation;
        d.config = Config::default();
    });
}

/// Number of virtual devices, from the next `cuInit` after a reset on. 0: `cuInit` fails with NO_DEVICE.
#[unsafe(no_mangle)]
pub extern "C" fn softgpu_set_device_count(n: u32) {
    set(|d| d.config.devices = n.min(64));
}

/// Memory of each device.
#[unsafe(no_mangle)]
pub extern "C" fn softgpu_set_total_memory(bytes: u64) {
    set(|d| d.config.total = bytes);
}

/// Compute capability, 75 for 7.5.
#[unsafe(no_mangle)]
pub extern "C" fn softgpu_set_compute_capability(sm: u32) {
    set(|d| d.config.sm = sm);
}

/// What `cuDriverGetVersion` says.
#[unsafe(no_mangle)]
pub extern "C" fn softgpu_set_driver_version(version: i32) {
    set(|d| d.config.version = version);
}

/// Warp instructions a block may run before it counts as hung.
#[unsafe(no_mangle)]
pub extern "C" fn softgpu_set_instruction_budget(n: u64) {
    set(|d| d.config.budget = n);
}

/// Whether devices have managed memory (attribute 83; default yes). Without it, allocating some is
/// `NOT_SUPPORTED`.
#[unsafe(no_mangle)]
pub extern "C" fn softgpu_set_managed_memory(on: i32) {
    set(|d| d.config.managed = on != 0);
}

/// Whether host and devices may use managed memory at the same time (attribute 89; default yes).
/// Without it, prefetching and advice that names a device are `INVALID_DEVICE`.
#[unsafe(no_mangle)]
pub extern "C" fn softgpu_set_concurrent_managed_access(on: i32) {
    set(|d| d.config.concurrent = on != 0);
}

/// Whether reads of managed memory that no device operation wrote are faults (default no: a host may write it unseen).
#[unsafe(no_mangle)]
pub extern "C" fn softgpu_track_managed(on: i32) {
    set(|d| d.mem.track_managed = on != 0);
}

/// Makes the host buffer `[ptr, ptr+len)` device memory at the same address, for `device` or (-1) all.
/// Its bytes count as written. Returns 0, or 1 if it is empty or overlaps known memory.
///
/// # Safety
/// The buffer must stay valid until [`softgpu_unadopt`] or [`softgpu_reset`].
#[unsafe(no_mangle)]
pub unsafe extern "C" fn softgpu_adopt(ptr: u64, len: u64, device: i32) -> i32 {
    let device = u32::try_from(device).ok();
    // SAFETY: by this function's contract.
    i32::from(unsafe { global().mem.adopt(ptr, len, device) }.is_none())
}

/// Ends an adoption. Returns 0, or 1 if nothing was adopted at `ptr`.
#[unsafe(no_mangle)]
pub extern "C" fn softgpu_unadopt(ptr: u64) -> i32 {
    let mut d = global();
    match d.mem.free(ptr, &[Kind::Adopted]) {
        Some(r) => {
            d.history.forget(r.id);
            0
        }
        None => 1,
    }
}

/// The `k`-th call of `name` from now on (1: the next) returns `code` and does nothing else.
/// Version suffixes are ignored. Returns 0, or 1 for a name this driver does not export or `k` = 0.
///
/// # Safety
/// `name` is NUL-terminated.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn softgpu_fail(name: Text, k: u64, code: i32) -> i32 {
    let Ok(name) = name.get() else { return 1 };
    let known = |n: &str| plain(n) == plain(&name);
    if k == 0 || !(super::abi::proc::exported().any(known) || known("cuGetProcAddress")) {
        return 1;
    }
    global().armed.push((name, k, code));
    0
}

/// Disarms all faults. Returns how many had not happened.
#[unsafe(no_mangle)]
pub extern "C" fn softgpu_disarm() -> usize {
    let mut d = global();
    std::mem::take(&mut d.armed).len()
}

/// Calls of `name` (version suffix ignored; null: of everything) since the log was cleared.
///
/// # Safety
/// `name` is null or NUL-terminated.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn softgpu_call_count(name: Text) -> usize {
    let d = global();
    match name.get() {
        Err(_) => d.calls.len(),
        Ok(n) => d.calls.iter().filter(|c| plain(c.name) == plain(&n)).count(),
    }
}

/// Calls since the log was cleared that made the host wait for the device.
#[unsafe(no_mangle)]
pub extern "C" fn softgpu_sync_count() -> usize {
    global().calls.iter().filter(|c| c.sync).count()
}

/// The calls: `{"call","stream","bytes","result","sync","note"}`. The note has what else tells one
/// call from another: the kernel, the event, a prefetch's address and destination.
///
/// # Safety
/// `buffer` is null or writable for `size` bytes.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn softgpu_call_log(buffer: Out<u8>, size: usize) -> usize {
    let mut out = String::new();
    for c in &global().calls {
        let stream = c.stream.map_or("null".to_string(), |s| s.to_string());
        let _ = writeln!(
            out,
            "{{\"call\":\"{}\",\"stream\":{stream},\"bytes\":{},\"result\":{},\"sync\":{},\"note\":{}}}",
            c.name,
            c.bytes,
            c.result,
            c.sync,
            quote(&c.note)
        );
    }
    put(&out, &buffer, size)
}

/// Empties the call log, the migration log, races and findings; keeps everything else.
#[unsafe(no_mangle)]
pub extern "C" fn softgpu_clear_logs() {
    set(|d| {
        d.calls.clear();
        d.migrations.clear();
        d.races.clear();
        d.findings.clear();
        d.thread_instructions = 0;
    });
}

/// What is alive, as one JSON object; all numbers are 0 when nothing leaked.
///
/// # Safety
/// `buffer` is null or writable for `size` bytes.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn softgpu_leaks(buffer: Out<u8>, size: usize) -> usize {
    let d = global();
    let sum = |kind: Kind| {
        let r = d.mem.regions().iter().filter(|r| r.kind == kind);
        r.fold((0u64, 0u64), |(n, b), r| (n + 1, b + r.len))
    };
    let ((dn, db), (mn, mb), (pn, pb), (an, ab)) =
        (sum(Kind::Device), sum(Kind::Managed), sum(Kind::Pinned), sum(Kind::Adopted));
    let text = format!(
        "{{\"device\":{dn},\"device_bytes\":{db},\"managed\":{mn},\"managed_bytes\":{mb},\"pinned\":{pn},\
         \"pinned_bytes\":{pb},\"adopted\":{an},\"adopted_bytes\":{ab},\"streams\":{},\"events\":{},\
         \"modules\":{},\"graphs\":{},\"graph_execs\":{},\"captures\":{},\"contexts\":{}}}",
        d.streams.values().filter(|s| !s.implicit).count(),
        d.events.len(),
        d.modules.len(),
        d.graphs.len(),
        d.execs.len(),
        d.captures.len(),
        d.devices.iter().filter(|x| x.retained > 0).count(),
    );
    put(&text, &buffer, size)
}

/// Moves of managed pages: `{"call","stream","cause","addr","bytes","from","to"}`; `call` indexes the call log.
///
/// # Safety
/// `buffer` is null or writable for `size` bytes.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn softgpu_migrations(buffer: Out<u8>, size: usize) -> usize {
    let mut out = String::new();
    for m in &global().migrations {
        let _ = writeln!(
            out,
            "{{\"call\":{},\"stream\":{},\"cause\":\"{:?}\",\"addr\":{},\"bytes\":{},\"from\":{},\"to\":{}}}",
            m.call,
            m.stream,
            m.moved.cause,
            m.moved.addr,
            m.moved.len,
            where_is(m.moved.from),
            where_is(m.moved.to)
        );
    }
    put(&out, &buffer, size)
}

/// Bytes of the managed allocation around `ptr` that are on `device` (-1: the host); `u64::MAX` if it is not managed.
#[unsafe(no_mangle)]
pub extern "C" fn softgpu_resident(ptr: u64, device: i32) -> u64 {
    let d = global();
    let place = u32::try_from(device).map_or(Place::Host, Place::Device);
    let pages = d.mem.find(ptr).and_then(|i| d.mem.region(i).pages.as_ref());
    pages.map_or(u64::MAX, |p| p.bytes_at(place))
}

/// Says that the host touched managed memory, which nothing can observe by itself. Returns 0, or 1 if it is not managed.
#[unsafe(no_mangle)]
pub extern "C" fn softgpu_host_touch(ptr: u64, len: u64) -> i32 {
    i32::from(global().host_touch(ptr, len).is_err())
}

/// Text of the last kernel fault; length 0 if there was none.
///
/// # Safety
/// `buffer` is null or writable for `size` bytes.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn softgpu_last_fault(buffer: Out<u8>, size: usize) -> usize {
    put(global().last_fault.as_deref().unwrap_or(""), &buffer, size)
}

/// Work on different streams that nothing orders and that touched the same bytes, one text a line.
///
/// # Safety
/// `buffer` is null or writable for `size` bytes.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn softgpu_stream_races(buffer: Out<u8>, size: usize) -> usize {
    let text = lines(&global().races);
    put(&text, &buffer, size)
}

/// Other findings, one text a line: bytes copied to the host that nothing wrote, contexts ended with resources alive.
///
/// # Safety
/// `buffer` is null or writable for `size` bytes.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn softgpu_findings(buffer: Out<u8>, size: usize) -> usize {
    let text = lines(&global().findings);
    put(&text, &buffer, size)
}

/// Thread instructions executed since the logs were cleared.
#[unsafe(no_mangle)]
pub extern "C" fn softgpu_thread_instructions() -> u64 {
    global().thread_instructions
}

/// 1: this library is softgpu, not a driver. Tests check it before they adopt anything.
#[unsafe(no_mangle)]
pub extern "C" fn softgpu_version() -> u32 {
    1
}
