//! Everything the driver knows: devices, handles, calls, and what went wrong.

use std::cell::RefCell;
use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use std::thread::ThreadId;

use super::clock::{Clock, History};
use super::codes::{
    CAPTURED_EVENT, INVALID_CONTEXT, INVALID_HANDLE, INVALID_VALUE, NOT_INITIALIZED, NOT_SUPPORTED,
    STREAM_CAPTURE_IMPLICIT, STREAM_CAPTURE_INVALIDATED, STREAM_CAPTURE_ISOLATION,
    STREAM_CAPTURE_MERGE, STREAM_CAPTURE_UNSUPPORTED,
};
use super::ops::Work;
use crate::inst::Kernel;
use crate::memory::managed::{Cause, Place};
use crate::memory::{Kind, Memory};
use crate::module::Module;

/// A driver call's result.
pub type Res<T = ()> = Result<T, i32>;

/// A virtual device and its primary context.
#[derive(Default)]
pub struct Device {
    /// Retains less releases.
    pub retained: u32,
    /// Sticky error of the context.
    pub failed: Option<i32>,
    /// Flags of the primary context.
    pub flags: u32,
}

/// A loaded module and its handles.
pub struct Loaded {
    /// Device it was loaded on.
    pub device: u32,
    /// The module.
    pub module: Module,
}

/// A function handle.
pub struct Function {
    /// Module it is from.
    pub module: u64,
    /// Device of that module.
    pub device: u32,
    /// The kernel.
    pub kernel: Arc<Kernel>,
    /// `CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES`.
    pub max_dynamic: usize,
}

/// A stream.
pub struct Stream {
    /// Device it was made on.
    pub device: u32,
    /// Does not wait for the legacy stream.
    pub nonblocking: bool,
    /// As asked for.
    pub priority: i32,
    /// What comes before its next operation.
    pub clock: Clock,
    /// The capture it takes part in.
    pub capture: Option<u64>,
    /// Made by the driver itself (legacy, per thread): no leak.
    pub implicit: bool,
}

/// An event.
#[derive(Default)]
pub struct Event {
    /// Device it was made on.
    pub device: u32,
    /// Never timed.
    pub no_timing: bool,
    /// What was done when it was recorded.
    pub clock: Option<Clock>,
    /// Recorded into a capture: its id, the stream, and how much that stream had recorded.
    pub captured: Option<(u64, u64, usize)>,
    /// When, for elapsed times.
    pub at: Option<std::time::Instant>,
}

/// A capture under way.
pub struct Capture {
    /// Where it began.
    pub origin: u64,
    /// 0 global, 1 thread-local, 2 relaxed.
    pub mode: i32,
    /// Who began it.
    pub thread: ThreadId,
    /// Recorded so far.
    pub work: Vec<Work>,
    /// Streams that joined, how much each recorded, and how much of it flowed back to the origin.
    pub joined: HashMap<u64, (usize, usize)>,
    /// A forbidden call came in between.
    pub broken: bool,
}

/// A graph or an executable graph.
#[derive(Clone)]
pub struct Graph {
    /// What it does.
    pub work: Arc<Vec<Work>>,
    /// Device it was captured on.
    pub device: u32,
}

/// One call, for the log.
pub struct Call {
    /// Exported name.
    pub name: &'static str,
    /// Stream handle, where the call has one.
    pub stream: Option<u64>,
    /// Bytes it moves, sets or allocates.
    pub bytes: u64,
    /// What it returned.
    pub result: i32,
    /// The host waited for the device.
    pub sync: bool,
    /// Kernel name or other detail.
    pub note: String,
}

/// A managed move with its circumstances.
pub struct Migration {
    /// Index of the call that caused it.
    pub call: usize,
    /// Stream it happened on.
    pub stream: u64,
    /// The move.
    pub moved: crate::memory::managed::Move,
}

/// What tests can set.
#[derive(Clone)]
pub struct Config {
    /// Virtual devices.
    pub devices: u32,
    /// Memory of each.
    pub total: u64,
    /// Compute capability, 75 for 7.5.
    pub sm: u32,
    /// What `cuDriverGetVersion` says.
    pub version: i32,
    /// Warp instructions a block may run.
    pub budget: u64,
    /// Whether devices have managed memory.
    pub managed: bool,
    /// Whether host and devices may use managed memory at the same time, which prefetching needs.
    pub concurrent: bool,
}

impl Default for Config {
    fn default() -> Config {
        Config {
            devices: 1,
            total: 80 << 30,
            sm: 80,
            version: 12000,
            budget: 1 << 32,
            managed: true,
            concurrent: true,
        }
    }
}

/// The driver.
#[derive(Default)]
pub struct Driver {
    /// Settings.
    pub config: Config,
    /// `cuInit` was called.
    pub initialised: bool,
    /// Incremented by each reset, so that other threads' current contexts end with it.
    pub generation: u64,
    /// Devices by ordinal.
    pub devices: Vec<Device>,
    /// All memory.
    pub mem: Memory,
    next: u64,
    /// Modules by handle.
    pub modules: BTreeMap<u64, Loaded>,
    /// Functions by handle.
    pub functions: BTreeMap<u64, Function>,
    /// Streams by handle.
    pub streams: BTreeMap<u64, Stream>,
    /// Events by handle.
    pub events: BTreeMap<u64, Event>,
    /// Graphs by handle.
    pub graphs: BTreeMap<u64, Graph>,
    /// Executable graphs by handle.
    pub execs: BTreeMap<u64, Graph>,
    /// Captures by id.
    pub captures: BTreeMap<u64, Capture>,
    /// What the host waited for.
    pub host: Clock,
    /// Accesses that may still race.
    pub history: History,
    /// Calls since the log was cleared.
    pub calls: Vec<Call>,
    /// Armed faults: name, calls left, code.
    pub armed: Vec<(String, u64, i32)>,
    /// Managed moves.
    pub migrations: Vec<Migration>,
    /// Text of the last kernel fault.
    pub last_fault: Option<String>,
    /// Cross-stream races found.
    pub races: Vec<String>,
    /// Other findings: copies of bytes never written, resources alive when a context died.
    pub findings: Vec<String>,
    /// Lanes times instructions executed.
    pub thread_instructions: u64,
}

thread_local! {
    /// Generation, and the stack of current contexts (device ordinals, or none).
    static CURRENT: RefCell<(u64, Vec<Option<u32>>)> = const { RefCell::new((0, Vec::new())) };
}

/// Handle of a device's primary context.
pub const CONTEXT: u64 = 0x00c0_de00;
/// `CU_STREAM_LEGACY`.
pub const LEGACY: u64 = 1;
/// `CU_STREAM_PER_THREAD`.
pub const PER_THREAD: u64 = 2;

impl Driver {
    /// With the default settings.
    pub fn new() -> Driver {
        Driver { next: 0x0050_0000, ..Driver::default() }
    }

    /// A fresh handle.
    pub fn handle(&mut self) -> u64 {
        self.next += 0x10;
        self.next
    }

    /// Says on stderr why a call is refused.
    pub fn refuse<T>(&self, code: i32, why: &str) -> Res<T> {
        eprintln!("softgpu: {}: {why}", self.calls.last().map_or("", |c| c.name));
        Err(code)
    }

    /// An unsupported flag or form.
    pub fn unsupported<T>(&self, why: &str) -> Res<T> {
        self.refuse(NOT_SUPPORTED, why)
    }

    /// Refuses calls before `cuInit`.
    pub fn ready(&self) -> Res {
        if self.initialised { Ok(()) } else { Err(NOT_INITIALIZED) }
    }

    fn with_current<T>(&self, f: impl FnOnce(&mut Vec<Option<u32>>) -> T) -> T {
        CURRENT.with(|c| {
            let mut c = c.borrow_mut();
            if c.0 != self.generation {
                *c = (self.generation, Vec::new());
            }
            f(&mut c.1)
        })
    }

    /// The calling thread's current context, whatever its state.
    pub fn current(&self) -> Option<u32> {
        self.with_current(|s| s.last().copied().flatten())
    }

    /// Replaces the top of the stack.
    pub fn set_current(&self, ctx: Option<u32>) {
        self.with_current(|s| {
            s.pop();
            s.push(ctx);
        });
    }

    /// Pushes onto the stack.
    pub fn push_current(&self, ctx: u32) {
        self.with_current(|s| s.push(Some(ctx)));
    }

    /// Pops the stack.
    pub fn pop_current(&self) -> Option<u32> {
        self.with_current(|s| s.pop().flatten())
    }

    /// The device of a context handle.
    pub fn context(&self, handle: u64) -> Res<u32> {
        let i = handle.wrapping_sub(CONTEXT);
        if i < self.devices.len() as u64 && self.devices[i as usize].retained > 0 {
            Ok(i as u32)
        } else {
            Err(INVALID_CONTEXT)
        }
    }

    /// The current context's device, if the context is alive and not failed.
    pub fn device(&self) -> Res<u32> {
        self.ready()?;
        let d = self.current().ok_or(INVALID_CONTEXT)?;
        let dev = self.devices.get(d as usize).filter(|x| x.retained > 0).ok_or(INVALID_CONTEXT)?;
        match dev.failed {
            Some(code) => Err(code),
            None => Ok(d),
        }
    }

    /// A stream handle to the one it stands for; the default streams come to be on first use.
    pub fn stream(&mut self, handle: u64) -> Res<u64> {
        let device = self.device()?;
        let (key, nonblocking) = match handle {
            0 | LEGACY => (0x10 + u64::from(device), false),
            PER_THREAD => {
                // A stable small number for the thread.
                let text = format!("{:?}", std::thread::current().id());
                let n: u64 = text
                    .chars()
                    .filter(char::is_ascii_digit)
                    .collect::<String>()
                    .parse()
                    .unwrap_or(0);
                (0x1000 + 0x100 * n + u64::from(device), false)
            }
            h => {
                let s = self.streams.get(&h).filter(|s| !s.implicit).ok_or(INVALID_HANDLE)?;
                if s.device != device {
                    return self.refuse(INVALID_HANDLE, "stream of another context");
                }
                return Ok(h);
            }
        };
        self.streams.entry(key).or_insert_with(|| Stream {
            device,
            nonblocking,
            priority: 0,
            clock: Clock::default(),
            capture: None,
            implicit: true,
        });
        Ok(key)
    }

    fn is_legacy(key: u64) -> bool {
        (0x10..0x1000).contains(&key)
    }

    /// A capture that forbids unsafe calls is broken by one.
    pub fn unsafe_call(&mut self) -> Res {
        let me = std::thread::current().id();
        let mut hit = false;
        for c in self.captures.values_mut().filter(|c| !c.broken) {
            if c.mode == 0 || (c.mode == 1 && c.thread == me) {
                c.broken = true;
                hit = true;
            }
        }
        if hit { self.refuse(STREAM_CAPTURE_UNSUPPORTED, "a stream is capturing") } else { Ok(()) }
    }

    /// The capture a stream takes part in; an error if it is broken.
    pub fn capture(&mut self, key: u64) -> Res<Option<u64>> {
        let Some(id) = self.streams.get(&key).and_then(|s| s.capture) else { return Ok(None) };
        match self.captures.get(&id) {
            Some(c) if c.broken => Err(STREAM_CAPTURE_INVALIDATED),
            Some(_) => Ok(Some(id)),
            None => Ok(None),
        }
    }

    /// Does `work` on a stream, or records it.
    ///
    /// # Safety
    /// As for [`Work::run`].
    pub unsafe fn enqueue(&mut self, key: u64, work: Work) -> Res {
        if let Some(id) = self.capture(key)? {
            if matches!(work, Work::Prefetch { .. }) {
                self.captures.get_mut(&id).into_iter().for_each(|c| c.broken = true);
                return self.refuse(STREAM_CAPTURE_UNSUPPORTED, "a prefetch cannot be captured");
            }
            if let Some(c) = self.captures.get_mut(&id) {
                c.work.push(work);
                if let Some(j) = c.joined.get_mut(&key) {
                    j.0 += 1;
                }
            }
            return Ok(());
        }
        self.legacy_order(key)?;
        // SAFETY: handed on from this function's contract.
        unsafe { self.perform(key, &work) }
    }

    /// Work on the legacy stream waits for all blocking streams of its device, and they for it.
    fn legacy_order(&mut self, key: u64) -> Res {
        let device = self.streams[&key].device;
        if Self::is_legacy(key) {
            let blocking = |s: &&mut Stream| s.device == device && !s.nonblocking;
            if let Some(id) = self.streams.values_mut().filter(blocking).find_map(|s| s.capture) {
                self.captures.get_mut(&id).into_iter().for_each(|c| c.broken = true);
                return self.refuse(
                    STREAM_CAPTURE_IMPLICIT,
                    "the legacy stream waits for a capturing stream",
                );
            }
            let mut all = Clock::default();
            for s in self.streams.values().filter(|s| s.device == device && !s.nonblocking) {
                all.join(&s.clock);
            }
            if let Some(s) = self.streams.get_mut(&key) {
                s.clock.join(&all);
            }
        } else if !self.streams[&key].nonblocking {
            let legacy = self.streams.get(&(0x10 + u64::from(device))).map(|s| s.clock.clone());
            if let (Some(l), Some(s)) = (legacy, self.streams.get_mut(&key)) {
                s.clock.join(&l);
            }
        }
        Ok(())
    }

    /// # Safety
    /// As for [`Work::run`].
    pub(super) unsafe fn perform(&mut self, key: u64, work: &Work) -> Res {
        let host = self.host.clone();
        let Some(s) = self.streams.get_mut(&key) else { return Err(INVALID_HANDLE) };
        let device = s.device;
        s.clock.join(&host);
        let tick = s.clock.tick(key);
        let clock = s.clock.clone();
        // SAFETY: handed on from this function's contract.
        let r = unsafe { work.run(&mut self.mem, device, self.config.budget) };
        let name = work.name();
        for (region, read, written) in self.mem.take_spans() {
            for (span, write) in [(read, false), (written, true)] {
                if span.is_empty() {
                    continue;
                }
                if let Some(other) =
                    self.history.add(region, (key, tick), &clock, &host, span, write, &name)
                {
                    let base =
                        self.mem.regions().iter().find(|r| r.id == region).map_or(0, |r| r.base);
                    let verb = if write { "writes" } else { "reads" };
                    let text = format!(
                        "{name} on stream {key:#x} {verb} bytes {}..{} of the allocation at {base:#x}, unordered with {other}",
                        span.lo, span.hi
                    );
                    eprintln!("softgpu: cross-stream race: {text}");
                    self.races.push(text);
                }
            }
        }
        self.collect_moves(key);
        match r {
            Ok(o) => {
                self.thread_instructions += o.thread_instructions;
                if let Some(b) = o.unwritten {
                    let text = format!("{name}: byte {b:#x} was never written");
                    eprintln!("softgpu: {text}");
                    self.findings.push(text);
                }
                Ok(())
            }
            Err(f) if f.sticky => {
                // As on a GPU, the launch itself succeeded; everything after it fails.
                eprintln!("softgpu: {}", f.text);
                self.last_fault = Some(f.text);
                self.devices[device as usize].failed.get_or_insert(f.code);
                Ok(())
            }
            Err(f) => self.refuse(if f.code == 0 { INVALID_VALUE } else { f.code }, &f.text),
        }
    }

    fn collect_moves(&mut self, key: u64) {
        let call = self.calls.len().saturating_sub(1);
        for i in 0..self.mem.regions().len() {
            if let Some(p) = &mut self.mem.region_mut(i).pages {
                for moved in p.take() {
                    self.migrations.push(Migration { call, stream: key, moved });
                }
            }
        }
    }

    /// Bytes the host moved out of a managed allocation's way; for tests that model host access.
    pub fn host_touch(&mut self, at: u64, len: u64) -> Res {
        let i = self.mem.find(at).ok_or(INVALID_VALUE)?;
        let r = self.mem.region_mut(i);
        let (base, off) = (r.base, at - r.base);
        if r.len - off < len {
            return Err(INVALID_VALUE);
        }
        r.pages.as_mut().ok_or(INVALID_VALUE)?.shift(base, off, len, Place::Host, Cause::Fault);
        self.collect_moves(0);
        Ok(())
    }

    /// The host waits for a stream.
    pub fn wait_stream(&mut self, key: u64) -> Res {
        if let Some(id) = self.streams.get(&key).and_then(|s| s.capture) {
            self.captures.get_mut(&id).into_iter().for_each(|c| c.broken = true);
            return self.refuse(STREAM_CAPTURE_UNSUPPORTED, "waits for a capturing stream");
        }
        self.legacy_order(key)?;
        self.mark_sync();
        let clock = self.streams[&key].clock.clone();
        self.host.join(&clock);
        self.device().map(drop)
    }

    /// The host waits for all streams of the device.
    pub fn wait_device(&mut self, device: u32) -> Res {
        let capturing =
            self.streams.values().filter(|s| s.device == device).find_map(|s| s.capture);
        if let Some(id) = capturing {
            self.captures.get_mut(&id).into_iter().for_each(|c| c.broken = true);
            return self.refuse(STREAM_CAPTURE_UNSUPPORTED, "waits for a capturing stream");
        }
        self.mark_sync();
        let mut all = Clock::default();
        self.streams.values().filter(|s| s.device == device).for_each(|s| all.join(&s.clock));
        self.host.join(&all);
        self.device().map(drop)
    }

    /// The call under way made the host wait.
    pub fn mark_sync(&mut self) {
        if let Some(c) = self.calls.last_mut() {
            c.sync = true;
        }
    }

    /// Adds a word to the call's log entry.
    pub fn note(&mut self, text: String) {
        if let Some(c) = self.calls.last_mut() {
            c.note = text;
        }
    }

    /// `cuEventRecord`.
    pub fn record(&mut self, event: u64, key: u64) -> Res {
        if !self.events.contains_key(&event) {
            return Err(INVALID_HANDLE);
        }
        if self.events[&event].device != self.streams[&key].device {
            return self.refuse(INVALID_HANDLE, "event and stream of different contexts");
        }
        if let Some(id) = self.capture(key)? {
            let done =
                self.captures[&id].joined.get(&key).map_or(self.captures[&id].work.len(), |j| j.0);
            if let Some(e) = self.events.get_mut(&event) {
                e.captured = Some((id, key, done));
                e.clock = None;
            }
            return Ok(());
        }
        self.legacy_order(key)?;
        let host = self.host.clone();
        let Some(s) = self.streams.get_mut(&key) else { return Err(INVALID_HANDLE) };
        s.clock.join(&host);
        s.clock.tick(key);
        let clock = s.clock.clone();
        if let Some(e) = self.events.get_mut(&event) {
            e.clock = Some(clock);
            e.captured = None;
            e.at = Some(std::time::Instant::now());
        }
        Ok(())
    }

    /// `cuStreamWaitEvent`.
    pub fn wait_event(&mut self, key: u64, event: u64) -> Res {
        let mine = self.capture(key)?;
        let e = self.events.get(&event).ok_or(INVALID_HANDLE)?;
        if let Some((id, from, done)) = e.captured {
            let Some(origin) = self.captures.get(&id).map(|c| c.origin) else {
                return self.refuse(CAPTURED_EVENT, "the event belongs to a finished capture");
            };
            if mine.is_some_and(|m| m != id) {
                return self.refuse(STREAM_CAPTURE_MERGE, "event of another capture");
            }
            if mine.is_none() {
                if let Some(s) = self.streams.get_mut(&key) {
                    s.capture = Some(id);
                }
                // Joining is itself something that has to flow back.
                if let Some(c) = self.captures.get_mut(&id) {
                    c.joined.insert(key, (1, 0));
                }
            }
            if let Some(c) = self.captures.get_mut(&id) {
                if key == origin {
                    if let Some(j) = c.joined.get_mut(&from) {
                        j.1 = j.1.max(done);
                    }
                } else if from != origin && from != key {
                    // What flows into a third stream returns with it.
                    if let Some(j) = c.joined.get_mut(&from) {
                        j.1 = j.1.max(done);
                    }
                    if let Some(j) = c.joined.get_mut(&key) {
                        j.0 += 1;
                    }
                }
            }
            return Ok(());
        }
        if mine.is_some() && e.clock.is_some() {
            if let Some(c) = mine.and_then(|id| self.captures.get_mut(&id)) {
                c.broken = true;
            }
            return self.refuse(
                STREAM_CAPTURE_ISOLATION,
                "waits for an event recorded outside the capture",
            );
        }
        let clock = e.clock.clone();
        if let (Some(c), Some(s)) = (clock, self.streams.get_mut(&key)) {
            s.clock.join(&c);
        }
        Ok(())
    }

    /// Frees a region and forgets its accesses.
    pub fn release(&mut self, at: u64, kinds: &[Kind]) -> Res {
        match self.mem.free(at, kinds) {
            Some(r) => {
                self.history.forget(r.id);
                Ok(())
            }
            None => self
                .refuse(INVALID_VALUE, &format!("{at:#x} is not the start of such an allocation")),
        }
    }

    /// Device memory in use; managed memory counts where it is.
    pub fn used(&self, device: u32) -> u64 {
        let r =
            self.mem.regions().iter().filter(|r| r.device == Some(device) || r.device.is_none());
        r.map(|r| match (r.kind, &r.pages) {
            (Kind::Managed, Some(p)) => p.bytes_at(Place::Device(device)),
            (Kind::Pinned | Kind::Adopted, _) => 0,
            _ => r.len,
        })
        .sum()
    }

    /// The primary context is gone: so is all that lived in it. What was alive is a finding.
    pub fn destroy(&mut self, device: u32) {
        let mut lost = Vec::new();
        let regions = |this: &Driver| -> Vec<(u64, Kind, u64)> {
            this.mem
                .regions()
                .iter()
                .filter(|r| r.owner == Some(device))
                .map(|r| (r.base, r.kind, r.len))
                .collect()
        };
        for (base, kind, len) in regions(self) {
            if !matches!(kind, Kind::ModuleGlobal | Kind::ModuleConst) {
                lost.push(format!("{len} bytes {kind:?} at {base:#x}"));
            }
            if let Some(r) = self.mem.free(base, &[kind]) {
                self.history.forget(r.id);
            }
        }
        let streams = self.streams.values().filter(|s| s.device == device && !s.implicit).count();
        let events = self.events.values().filter(|e| e.device == device).count();
        let modules = self.modules.values().filter(|m| m.device == device).count();
        for (n, what) in [(streams, "streams"), (events, "events"), (modules, "modules")] {
            if n > 0 {
                lost.push(format!("{n} {what}"));
            }
        }
        self.streams.retain(|_, s| s.device != device);
        self.events.retain(|_, e| e.device != device);
        self.modules.retain(|_, m| m.device != device);
        self.functions.retain(|_, f| f.device != device);
        if !lost.is_empty() {
            self.findings
                .push(format!("context of device {device} ended with {} alive", lost.join(", ")));
        }
        let d = &mut self.devices[device as usize];
        d.failed = None;
    }
}
