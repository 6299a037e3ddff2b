//! The stand-in library through cudarc 0.19.10, as qadam-core uses it.

#[path = "common/stand_in.rs"]
mod stand_in;

use std::ffi::CString;

use cudarc::driver::sys::{
    self, CUdevice_attribute_enum as D, CUfunction_attribute_enum as A, CUresult,
};
use cudarc::driver::{CudaContext, DriverError, LaunchConfig, PushKernelArg, result};
use stand_in::Soft;

const ADAM: &str = include_str!("ptx/adam.sm_80.ptx");

const SMALL: &str = ".version 8.0
.target sm_75
.address_size 64
.visible .entry add_one(.param .u64 x, .param .u32 n)
{
.reg .pred %p; .reg .b32 %r<8>; .reg .b64 %d<4>;
ld.param.u64 %d0, [x];
ld.param.u32 %r0, [n];
mov.u32 %r1, %ctaid.x;
mov.u32 %r2, %ntid.x;
mov.u32 %r3, %tid.x;
mad.lo.u32 %r1, %r1, %r2, %r3;
setp.ge.u32 %p, %r1, %r0;
@%p ret;
mul.wide.u32 %d1, %r1, 4;
add.u64 %d0, %d0, %d1;
ld.global.u32 %r4, [%d0];
add.u32 %r4, %r4, 1;
st.global.u32 [%d0], %r4;
ret;
}
";

/// Context, module and function, by the thin layer.
struct Device {
    ordinal: i32,
    module: sys::CUmodule,
    add: sys::CUfunction,
}

fn code(r: Result<(), DriverError>) -> i32 {
    r.map_or_else(|e| e.0 as i32, |()| 0)
}

fn load(text: &str) -> Result<sys::CUmodule, DriverError> {
    let c = CString::new(text).unwrap();
    // SAFETY: a NUL-terminated image.
    unsafe { result::module::load_data(c.as_ptr().cast()) }
}

impl Device {
    fn new(ordinal: i32) -> Device {
        result::init().unwrap();
        let dev = result::device::get(ordinal).unwrap();
        // SAFETY: a valid device and context; a module from the text above.
        unsafe {
            let ctx = result::primary_ctx::retain(dev).unwrap();
            result::ctx::set_current(ctx).unwrap();
            let module = load(SMALL).unwrap();
            let add =
                result::module::get_function(module, CString::new("add_one").unwrap()).unwrap();
            Device { ordinal: dev, module, add }
        }
    }

    fn launch(
        &self,
        stream: sys::CUstream,
        x: u64,
        n: u32,
        blocks: u32,
        threads: u32,
    ) -> Result<(), DriverError> {
        let (mut x, mut n) = (x, n);
        let mut params = [(&raw mut x).cast(), (&raw mut n).cast()];
        // SAFETY: parameters as the kernel declares them.
        unsafe {
            result::launch_kernel(self.add, (blocks, 1, 1), (threads, 1, 1), 0, stream, &mut params)
        }
    }

    fn close(self) {
        // SAFETY: this test's own module and context.
        unsafe {
            result::module::unload(self.module).unwrap();
            result::primary_ctx::release(self.ordinal).unwrap();
        }
    }
}

fn alloc(n: usize) -> u64 {
    // SAFETY: freed or reset later.
    unsafe { result::malloc_sync(n).unwrap() }
}

fn filled(n: usize) -> u64 {
    let p = alloc(4 * n);
    // SAFETY: `p` has that many bytes.
    unsafe { result::memset_d8_sync(p, 0, 4 * n).unwrap() };
    p
}

fn read(at: u64, n: usize) -> Vec<u32> {
    let mut v = vec![0u32; n];
    // SAFETY: `v` is as long as asked.
    unsafe { result::memcpy_dtoh_sync(&mut v, at).unwrap() };
    v
}

fn stream() -> sys::CUstream {
    result::stream::create(result::stream::StreamKind::NonBlocking).unwrap()
}

fn event() -> sys::CUevent {
    result::event::create(sys::CUevent_flags::CU_EVENT_DISABLE_TIMING).unwrap()
}

const NULL: sys::CUstream = std::ptr::null_mut();

#[test]
fn cudarc_loads_the_stand_in_and_its_safe_layer_works() {
    let soft = Soft::fresh();
    // SAFETY: only asks whether a library can be opened.
    assert!(unsafe { sys::is_culib_present() });
    {
        let ctx = CudaContext::new(0).unwrap();
        assert!(ctx.name().unwrap().starts_with("softgpu"));
        assert_eq!(ctx.compute_capability().unwrap(), (8, 0));
        let s = ctx.new_stream().unwrap();
        let module = ctx.load_module(cudarc::nvrtc::Ptx::from_src(SMALL)).unwrap();
        let f = module.load_function("add_one").unwrap();
        let mut x = s.clone_htod(&[1u32, 2, 3]).unwrap();
        // SAFETY: the kernel's parameters.
        unsafe {
            s.launch_builder(&f)
                .arg(&mut x)
                .arg(&3u32)
                .launch(LaunchConfig::for_num_elems(3))
                .unwrap();
        }
        assert_eq!(s.clone_dtoh(&x).unwrap(), [2, 3, 4]);
    }
    for what in ["device", "streams", "events", "modules", "contexts"] {
        assert_eq!(soft.leak(what), 0, "{}", soft.text("softgpu_leaks"));
    }
    assert_eq!(soft.text("softgpu_findings"), "");
    assert_eq!(soft.text("softgpu_stream_races"), "");
}

#[test]
fn launches_over_blocks_and_counts_calls() {
    let soft = Soft::fresh();
    let d = Device::new(0);
    let x = filled(1000);
    soft.clear();
    d.launch(NULL, x, 1000, 8, 128).unwrap();
    assert_eq!((soft.count("cuLaunchKernel"), soft.syncs()), (1, 0));
    assert!(soft.text("softgpu_call_log").contains("\"note\":\"add_one\""));
    assert_eq!(read(x, 1000), vec![1; 1000]);
    assert_eq!((soft.count("cuMemcpyDtoH"), soft.syncs()), (1, 1));
    // SAFETY: allocated above.
    unsafe { result::free_sync(x).unwrap() };
    assert_eq!(soft.leak("device_bytes"), 0);
    d.close();
    assert_eq!((soft.leak("modules"), soft.leak("contexts")), (0, 0));
}

#[test]
fn a_device_fault_is_sticky_and_names_its_place() {
    let soft = Soft::fresh();
    let d = Device::new(0);
    let x = filled(100);
    // The launch succeeds, as on a GPU; everything after it fails.
    d.launch(NULL, x, 101, 1, 128).unwrap();
    let e = result::ctx::synchronize();
    assert_eq!(code(e), CUresult::CUDA_ERROR_ILLEGAL_ADDRESS as i32);
    assert_eq!(code(d.launch(NULL, x, 1, 1, 32)), 700);
    // SAFETY: fails before it does anything.
    assert_eq!(code(unsafe { result::free_sync(x) }), 700);
    let t = soft.text("softgpu_last_fault");
    for part in [
        "out-of-bounds",
        "add_one",
        "PTX line 17",
        "ld.global.u32",
        "thread (100,0,0)",
        &format!("{:#x}", x + 400),
    ] {
        assert!(t.contains(part), "{part} in {t}");
    }
    d.closed_after_fault();
    let d = Device::new(0);
    assert_eq!(code(result::ctx::synchronize()), 0, "a new context is sound");
    assert!(soft.text("softgpu_findings").contains("ended with 400 bytes Device"));
    d.close();
}

impl Device {
    fn closed_after_fault(self) {
        // SAFETY: this test's own context.
        unsafe { result::primary_ctx::release(self.ordinal).unwrap() };
    }
}

#[test]
fn misaligned_and_uninitialised_accesses_fail_the_context() {
    for (skew, want) in [(2, 716), (0, 719)] {
        let _soft = Soft::fresh();
        let d = Device::new(0);
        let x = alloc(64);
        d.launch(NULL, x + skew, 4, 1, 32).unwrap();
        assert_eq!(code(result::ctx::synchronize()), want);
        d.closed_after_fault();
    }
}

#[test]
fn a_hung_kernel_runs_out_of_budget() {
    let soft = Soft::fresh();
    soft.set_budget(1000);
    result::init().unwrap();
    let d = Device::new(0);
    let m = load(
        ".version 8.0\n.target sm_75\n.address_size 64\n.visible .entry spin()\n{\nL:\nbra L;\n}\n",
    )
    .unwrap();
    // SAFETY: a kernel without parameters.
    unsafe {
        let f = result::module::get_function(m, CString::new("spin").unwrap()).unwrap();
        result::launch_kernel(f, (1, 1, 1), (32, 1, 1), 0, NULL, &mut []).unwrap();
    }
    assert_eq!(code(result::ctx::synchronize()), 702);
    assert!(soft.text("softgpu_last_fault").contains("budget"));
    d.closed_after_fault();
}

#[test]
fn adopted_host_memory_serves_as_device_memory() {
    let soft = Soft::fresh();
    let d = Device::new(0);
    let mut host = vec![41u32; 300];
    let at = host.as_mut_ptr() as u64;
    assert_eq!(soft.adopt(&mut host, -1), 0);
    assert_eq!(soft.adopt(&mut host, -1), 1, "overlap");
    d.launch(NULL, at, 300, 3, 128).unwrap();
    result::ctx::synchronize().unwrap();
    assert_eq!(host, vec![42; 300]);
    let mut kind = 0i32;
    // SAFETY: an i32 for the memory type.
    let r = unsafe {
        sys::cuPointerGetAttribute(
            (&raw mut kind).cast(),
            sys::CUpointer_attribute::CU_POINTER_ATTRIBUTE_MEMORY_TYPE,
            at,
        )
    };
    assert_eq!((r as i32, kind), (0, 2));
    assert_eq!((soft.unadopt(at), soft.unadopt(at)), (0, 1));
    d.launch(NULL, at, 1, 1, 32).unwrap();
    assert_eq!(code(result::ctx::synchronize()), 700);
    d.closed_after_fault();
}

#[test]
fn any_call_can_be_made_to_fail_the_kth_time() {
    let soft = Soft::fresh();
    let d = Device::new(0);
    let x = filled(8);
    assert_eq!(soft.fail("cuNoSuchCall", 1, 2), 1);
    assert_eq!(soft.fail("cuMemAlloc", 0, 2), 1);
    assert_eq!(soft.fail("cuMemAlloc", 2, 2), 0);
    assert_eq!(soft.fail("cuLaunchKernel", 1, 701), 0);
    let y = alloc(8);
    // SAFETY: fails.
    assert_eq!(code(unsafe { result::malloc_sync(8) }.map(drop)), 2);
    let z = alloc(8);
    assert_eq!(code(d.launch(NULL, x, 8, 1, 32)), 701);
    assert_eq!(read(x, 8), [0; 8], "an injected failure does nothing");
    d.launch(NULL, x, 8, 1, 32).unwrap();
    assert_eq!(read(x, 8), [1; 8]);
    for p in [x, y, z] {
        // SAFETY: allocated above.
        unsafe { result::free_sync(p).unwrap() };
    }
    d.close();
}

#[test]
fn every_exported_call_takes_an_injected_fault() {
    let soft = Soft::fresh();
    for name in softgpu::driver::abi::proc::exported() {
        assert_eq!(soft.fail(name, 1, 999), 0, "{name}");
        // SAFETY: an injected call returns before it looks at its arguments, which are all of integer class.
        let f = unsafe {
            soft.symbol::<unsafe extern "C" fn(u64, u64, u64, u64, u64, u64, u64, u64, u64, u64, u64) -> i32>(name)
        };
        // SAFETY: as above.
        assert_eq!(unsafe { f(0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0) }, 999, "{name}");
        assert_eq!(soft.count(name), 1 + usize::from(paired_before(name)), "{name}");
    }
}

/// Whether a function of the same plain name was already called in the table's order.
fn paired_before(name: &str) -> bool {
    let plain = softgpu::driver::plain(name);
    softgpu::driver::abi::proc::exported()
        .take_while(|n| *n != name)
        .any(|n| softgpu::driver::plain(n) == plain)
}

#[test]
fn memory_runs_out_at_the_total_and_null_and_bad_arguments_are_refused() {
    let soft = Soft::fresh();
    soft.set_total(1 << 20);
    let d = Device::new(0);
    let x = alloc(1 << 19);
    // SAFETY: these fail.
    unsafe {
        assert_eq!(code(result::malloc_sync((1 << 19) + 1).map(drop)), 2);
        assert_eq!(code(result::malloc_sync(0).map(drop)), 1);
        assert_eq!(code(result::free_sync(x + 8)), 1);
        assert_eq!(code(result::memset_d8_sync(x, 0, (1 << 19) + 1)), 1);
        assert_eq!(sys::cuMemAlloc_v2(std::ptr::null_mut(), 8) as i32, 1);
        assert_eq!(sys::cuStreamSynchronize(77 as sys::CUstream) as i32, 400);
        assert_eq!(
            code(result::module::get_function(d.module, CString::new("nope").unwrap()).map(drop)),
            500
        );
    }
    let (free, total) = result::mem_get_info().unwrap();
    assert_eq!((free, total), (1 << 19, 1 << 20));
    // SAFETY: allocated above.
    unsafe { result::free_sync(x).unwrap() };
    d.close();
}

#[test]
fn launch_configurations_beyond_the_limits_are_refused() {
    let _soft = Soft::fresh();
    let d = Device::new(0);
    let x = filled(8);
    assert_eq!(code(d.launch(NULL, x, 8, 0, 32)), 1);
    assert_eq!(code(d.launch(NULL, x, 8, 1, 1025)), 1);
    assert_eq!(code(d.launch(NULL, x, 8, 1, 0)), 1);
    let (mut a, mut n) = (x, 8u32);
    let mut params = [(&raw mut a).cast(), (&raw mut n).cast()];
    // SAFETY: refused before anything runs.
    unsafe {
        assert_eq!(
            code(result::launch_kernel(d.add, (1, 65536, 1), (1, 1, 1), 0, NULL, &mut params)),
            1
        );
        assert_eq!(
            code(result::launch_kernel(d.add, (1, 1, 1), (1, 1, 65), 0, NULL, &mut params)),
            1
        );
        assert_eq!(
            code(result::launch_kernel(d.add, (1, 1, 1), (1, 1, 1), 50_000, NULL, &mut params)),
            1
        );
    }
    // NVRTC wrote __launch_bounds__(256) into this one.
    let m = load(ADAM).unwrap();
    // SAFETY: refused before the (missing) parameters matter.
    unsafe {
        let f = result::module::get_function(m, CString::new("adam_f32").unwrap()).unwrap();
        assert_eq!(code(result::launch_kernel(f, (1, 1, 1), (257, 1, 1), 0, NULL, &mut [])), 1);
        result::module::unload(m).unwrap();
    }
    // SAFETY: allocated above.
    unsafe { result::free_sync(x).unwrap() };
    d.close();
}

#[test]
fn modules_are_refused_with_the_drivers_codes() {
    let soft = Soft::fresh();
    let d = Device::new(0);
    let c = |t: &str| code(load(t).map(drop));
    assert_eq!(c(".version 9.0\n.target sm_75\n.address_size 64\n"), 222);
    assert_eq!(c(".version 8.0\n.target sm_90\n.address_size 64\n"), 218);
    assert_eq!(c(".version 8.0\n.target sm_75\n.address_size 64\n.entry k() { frobnicate; }"), 218);
    assert_eq!(c("ELF"), 200);
    d.close();
    soft.set_sm(90);
    let d = Device::new(0);
    assert_eq!(c(".version 8.0\n.target sm_90\n.address_size 64\n"), 0);
    // The module above was dropped without an unload: the context says so.
    d.close();
    assert!(soft.text("softgpu_findings").contains("1 modules"));
}

#[test]
fn no_device_is_an_error_of_init() {
    let soft = Soft::fresh();
    soft.set_devices(0);
    assert_eq!(code(result::init()), 100);
}

#[test]
fn two_devices_do_not_share_memory() {
    let soft = Soft::fresh();
    soft.set_devices(2);
    let a = Device::new(0);
    let x = filled(8);
    let b = Device::new(1);
    assert_eq!(result::device::get_count().unwrap(), 2);
    assert_eq!(code(a.launch(NULL, x, 8, 1, 32)), 400, "a function of the other context");
    let y = filled(8);
    // SAFETY: both allocated.
    unsafe { result::memcpy_dtod_sync(y, x, 32).unwrap() };
    b.launch(NULL, x, 8, 1, 32).unwrap();
    assert_eq!(code(result::ctx::synchronize()), 700);
    assert!(soft.text("softgpu_last_fault").contains("of device 0, from device 1"));
    b.closed_after_fault();
    // SAFETY: device 0's context is untouched by device 1's failure.
    unsafe {
        let ctx = result::primary_ctx::retain(0).unwrap();
        result::ctx::set_current(ctx).unwrap();
        result::primary_ctx::release(0).unwrap();
        result::free_sync(x).unwrap();
    }
    a.close();
}

#[test]
fn managed_memory_logs_prefetches_and_faults() {
    let soft = Soft::fresh();
    let d = Device::new(0);
    let n = 1 << 20;
    // SAFETY: sizes as allocated; freed below.
    unsafe {
        let x = result::malloc_managed(n, sys::CUmemAttach_flags::CU_MEM_ATTACH_GLOBAL).unwrap();
        let s = stream();
        assert_eq!(sys::cuMemPrefetchAsync(x, n, -1, s) as i32, 0);
        assert_eq!((soft.resident(x, -1), soft.resident(x, 0)), (n as u64, 0));
        assert_eq!(sys::cuMemPrefetchAsync(x, n / 2, 0, s) as i32, 0);
        d.launch(s, x, (n / 4) as u32, (n / 1024) as u32, 256).unwrap();
        let log = soft.text("softgpu_migrations");
        let lines: Vec<_> = log.lines().collect();
        assert_eq!(lines.len(), 3, "{log}");
        assert!(lines[0].contains("Prefetch") && lines[0].contains("\"to\":\"host\""), "{log}");
        assert!(lines[1].contains("Prefetch") && lines[1].contains("\"to\":\"device 0\""), "{log}");
        assert!(
            lines[2].contains("Fault") && lines[2].contains(&format!("\"bytes\":{}", n / 2)),
            "{log}"
        );
        assert_eq!(sys::cuMemPrefetchAsync(filled(8), 32, 0, s) as i32, 1, "not managed");
        assert_eq!(soft.leak("managed_bytes"), n as u64);
        result::stream::synchronize(s).unwrap();
        result::stream::destroy(s).unwrap();
        result::free_sync(x).unwrap();
    }
    assert_eq!(soft.leak("managed_bytes"), 0);
    d.closed_after_fault();
}

#[test]
fn devices_may_be_without_managed_memory_or_concurrent_access() {
    let soft = Soft::fresh();
    let d = Device::new(0);
    let attribute = |which| {
        result::device::get(0).and_then(|device| {
            // SAFETY: a device that exists.
            unsafe { result::device::get_attribute(device, which) }
        })
    };
    let both = || {
        [D::CU_DEVICE_ATTRIBUTE_MANAGED_MEMORY, D::CU_DEVICE_ATTRIBUTE_CONCURRENT_MANAGED_ACCESS]
            .map(|which| attribute(which).unwrap())
    };
    assert_eq!(both(), [1, 1]);
    // SAFETY: sizes as allocated; freed below.
    unsafe {
        let allocate =
            || result::malloc_managed(4096, sys::CUmemAttach_flags::CU_MEM_ATTACH_GLOBAL);
        let x = allocate().unwrap();
        let advise = |advice, device| sys::cuMemAdvise(x, 4096, advice, device) as i32;
        let preferred = sys::CUmem_advise::CU_MEM_ADVISE_SET_PREFERRED_LOCATION;
        let accessed = sys::CUmem_advise::CU_MEM_ADVISE_SET_ACCESSED_BY;
        soft.set_concurrent(false);
        assert_eq!(both(), [1, 0]);
        assert_eq!(sys::cuMemPrefetchAsync(x, 4096, 0, std::ptr::null_mut()) as i32, 101);
        assert_eq!(
            [advise(preferred, 0), advise(accessed, 0), advise(preferred, -1)],
            [101, 101, 0]
        );
        soft.set_concurrent(true);
        assert_eq!(sys::cuMemPrefetchAsync(x, 4096, 0, std::ptr::null_mut()) as i32, 0);
        let log = soft.text("softgpu_call_log");
        assert!(log.contains(&format!("\"note\":\"at {x:#x}, to Device(0)\"")), "{log}");
        result::free_sync(x).unwrap();
        soft.set_managed(false);
        assert_eq!(both(), [0, 0]);
        assert_eq!(code(allocate().map(drop)), 801);
    }
    d.close();
}

#[test]
fn a_captured_graph_replays_with_new_data() {
    let soft = Soft::fresh();
    let d = Device::new(0);
    let x = filled(64);
    let s = stream();
    // SAFETY: this test's own stream and graph.
    unsafe {
        result::stream::begin_capture(s, sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_GLOBAL)
            .unwrap();
        d.launch(s, x, 64, 1, 64).unwrap();
        d.launch(s, x, 32, 1, 64).unwrap();
        let g = result::stream::end_capture(s).unwrap();
        assert_eq!(read(x, 64), [0; 64], "capturing runs nothing");
        let mut exec = std::ptr::null_mut();
        assert_eq!(sys::cuGraphInstantiateWithFlags(&raw mut exec, g, 0) as i32, 0);
        for _ in 0..3 {
            result::graph::launch(exec, s).unwrap();
        }
        result::stream::synchronize(s).unwrap();
        let got = read(x, 64);
        assert_eq!((got[31], got[32]), (6, 3));
        result::graph::exec_destroy(exec).unwrap();
        result::graph::destroy(g).unwrap();
        result::stream::destroy(s).unwrap();
        result::free_sync(x).unwrap();
    }
    assert_eq!(soft.leak("graphs") + soft.leak("graph_execs") + soft.leak("captures"), 0);
    d.close();
}

/// What is done during a capture, and the code it must give.
type Act<'a> = (&'a str, i32, Box<dyn Fn() -> i32 + 'a>);

#[test]
fn what_a_capture_forbids_breaks_it() {
    let mode = sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_GLOBAL;
    let _soft = Soft::fresh();
    let d = Device::new(0);
    let x = filled(64);
    let s = stream();
    let blocking = result::stream::create(result::stream::StreamKind::Default).unwrap();
    // SAFETY: this test's own handles; each call is refused.
    let acts: Vec<Act> = vec![
        ("sync", 900, Box::new(|| code(unsafe { result::stream::synchronize(s) }))),
        ("device sync", 900, Box::new(|| code(result::ctx::synchronize()))),
        // SAFETY: as above.
        ("alloc", 900, Box::new(|| code(unsafe { result::malloc_sync(8) }.map(drop)))),
        // SAFETY: as above.
        ("sync copy", 900, Box::new(|| code(unsafe { result::memcpy_dtod_sync(x, x + 8, 8) }))),
        ("foreign event", 905, {
            let e = event();
            // SAFETY: as above.
            unsafe { result::event::record(e, blocking).unwrap() };
            let wait = sys::CUevent_wait_flags::CU_EVENT_WAIT_DEFAULT;
            // SAFETY: as above.
            Box::new(move || code(unsafe { result::stream::wait_event(s, e, wait) }))
        }),
    ];
    for (what, want, act) in acts {
        // SAFETY: this test's own stream.
        unsafe {
            result::stream::begin_capture(s, mode).unwrap();
            d.launch(s, x, 64, 1, 64).unwrap();
            assert_eq!(act(), want, "{what}");
            assert_eq!(code(d.launch(s, x, 64, 1, 64)), 901, "{what}");
            assert_eq!(code(result::stream::end_capture(s).map(drop)), 901, "{what}");
        }
    }
    // SAFETY: as above.
    unsafe {
        result::stream::begin_capture(blocking, mode).unwrap();
        assert_eq!(code(d.launch(NULL, x, 64, 1, 64)), 906);
        assert_eq!(code(result::stream::end_capture(blocking).map(drop)), 901);
        assert_eq!(code(result::stream::begin_capture(NULL, mode)), 900);
    }
    d.closed_after_fault();
}

#[test]
fn a_fork_into_another_stream_must_come_back() {
    let _soft = Soft::fresh();
    let d = Device::new(0);
    let x = filled(64);
    let (s, t) = (stream(), stream());
    let wait = sys::CUevent_wait_flags::CU_EVENT_WAIT_DEFAULT;
    for join in [true, false] {
        let (fork, back) = (event(), event());
        // SAFETY: this test's own handles.
        unsafe {
            result::stream::begin_capture(
                s,
                sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_RELAXED,
            )
            .unwrap();
            result::event::record(fork, s).unwrap();
            result::stream::wait_event(t, fork, wait).unwrap();
            d.launch(t, x, 64, 1, 64).unwrap();
            if join {
                result::event::record(back, t).unwrap();
                result::stream::wait_event(s, back, wait).unwrap();
            }
            let g = result::stream::end_capture(s);
            assert_eq!(code(g.map(drop)), if join { 0 } else { 904 });
        }
    }
    d.closed_after_fault();
}

#[test]
fn unordered_streams_race_and_events_order_them() {
    let soft = Soft::fresh();
    let d = Device::new(0);
    let x = filled(64);
    result::ctx::synchronize().unwrap();
    let (s, t) = (stream(), stream());
    d.launch(s, x, 64, 1, 64).unwrap();
    let e = event();
    // SAFETY: this test's own handles.
    unsafe {
        result::event::record(e, s).unwrap();
        result::stream::wait_event(t, e, sys::CUevent_wait_flags::CU_EVENT_WAIT_DEFAULT).unwrap();
    }
    d.launch(t, x, 64, 1, 64).unwrap();
    assert_eq!(soft.text("softgpu_stream_races"), "");
    d.launch(s, x, 64, 1, 64).unwrap();
    let races = soft.text("softgpu_stream_races");
    assert!(races.contains("kernel add_one") && races.contains("unordered with"), "{races}");
    soft.clear();
    result::ctx::synchronize().unwrap();
    d.launch(t, x, 64, 1, 64).unwrap();
    assert_eq!(soft.text("softgpu_stream_races"), "", "the host waited in between");
    // SAFETY: ordered by nothing: freeing on one stream what the other still uses.
    unsafe { result::free_async(x, s).unwrap() };
    assert!(soft.text("softgpu_stream_races").contains("unordered with kernel add_one"));
    d.closed_after_fault();
}

#[test]
fn a_tensor_of_2_to_the_33_elements_works_at_its_last_block() {
    let soft = Soft::fresh();
    soft.set_total(1 << 40);
    let d = Device::new(0);
    let bytes = 1usize << 35;
    let x = alloc(bytes);
    // SAFETY: `x` has that many bytes.
    unsafe { result::memset_d8_sync(x, 0, bytes).unwrap() };
    let last = x + bytes as u64 - 4 * 256;
    d.launch(NULL, last, 256, 1, 256).unwrap();
    assert_eq!(read(last - 4, 257), [vec![0], vec![1; 256]].concat());
    d.launch(NULL, last + 4, 256, 1, 256).unwrap();
    assert_eq!(code(result::ctx::synchronize()), 700);
    d.closed_after_fault();
}

#[test]
fn symbols_come_by_name_and_unknown_ones_do_not() {
    let soft = Soft::fresh();
    result::init().unwrap();
    let find = |name: &str, version: i32| {
        let (name, mut p) = (CString::new(name).unwrap(), std::ptr::null_mut());
        let mut status = sys::CUdriverProcAddressQueryResult::CU_GET_PROC_ADDRESS_SUCCESS;
        // SAFETY: all pointers are valid.
        let r = unsafe {
            sys::cuGetProcAddress_v2(name.as_ptr(), &raw mut p, version, 0, &raw mut status)
        };
        (r as i32, p as usize)
    };
    // SAFETY: only the address is used.
    let at = |n: &str| unsafe { soft.symbol::<*const ()>(n) } as usize;
    assert_eq!(find("cuMemAlloc", 12000), (0, at("cuMemAlloc_v2")));
    assert_eq!(find("cuMemPrefetchAsync", 12000), (0, at("cuMemPrefetchAsync")));
    assert_eq!(find("cuMemPrefetchAsync", 12020), (0, at("cuMemPrefetchAsync_v2")));
    assert_eq!(find("cuTexObjectCreate", 12000), (500, 0));
    for name in softgpu::driver::abi::proc::exported() {
        assert_eq!(find(name, 13000).0, 0, "{name}");
    }
}

#[test]
fn pageable_copies_to_the_host_count_as_synchronising() {
    let soft = Soft::fresh();
    let d = Device::new(0);
    let x = filled(16);
    let s = stream();
    result::ctx::synchronize().unwrap();
    soft.clear();
    // SAFETY: buffers as long as the copies; freed below.
    unsafe {
        let pinned = result::malloc_host(64, 0).unwrap();
        let target = std::slice::from_raw_parts_mut(pinned.cast::<u32>(), 16);
        result::memcpy_dtoh_async(target, x, s).unwrap();
        assert_eq!((soft.syncs(), target[3]), (0, 0));
        let mut pageable = [1u32; 16];
        result::memcpy_dtoh_async(&mut pageable, x, s).unwrap();
        assert_eq!((soft.syncs(), pageable[3]), (1, 0));
        result::memcpy_htod_async(x, &pageable, s).unwrap();
        assert_eq!(soft.syncs(), 1);
        result::free_host(pinned).unwrap();
    }
    d.closed_after_fault();
}

#[test]
fn a_copy_of_bytes_nobody_wrote_is_a_finding() {
    let soft = Soft::fresh();
    let d = Device::new(0);
    let x = alloc(64);
    read(x, 16);
    assert!(soft.text("softgpu_findings").contains("was never written"));
    d.closed_after_fault();
}

#[test]
fn calls_without_a_context_or_before_init_are_refused() {
    let _soft = Soft::fresh();
    // SAFETY: refused.
    unsafe {
        assert_eq!(code(result::malloc_sync(8).map(drop)), 3);
        result::init().unwrap();
        assert_eq!(code(result::malloc_sync(8).map(drop)), 201);
        assert_eq!(code(result::device::get(1).map(drop)), 101);
    }
}

/// Runs only as the child of the test below.
#[test]
fn child_finds_the_library_by_search_path() {
    if std::env::var_os("SOFTGPU_CHILD").is_none() {
        return;
    }
    result::init().unwrap();
    assert!(result::device::get_name(0).unwrap().starts_with("softgpu"));
}

#[test]
fn cudarc_finds_it_through_ld_library_path_as_libcuda_so_1() {
    let dir = std::env::temp_dir().join(format!("softgpu-{}", std::process::id()));
    std::fs::create_dir_all(&dir).unwrap();
    let link = dir.join("libcuda.so.1");
    let _ = std::fs::remove_file(&link);
    std::os::unix::fs::symlink(stand_in::library(), &link).unwrap();
    let out = std::process::Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "child_finds_the_library_by_search_path"])
        .env("SOFTGPU_CHILD", "1")
        .env("LD_LIBRARY_PATH", &dir)
        .output()
        .unwrap();
    std::fs::remove_dir_all(&dir).unwrap();
    let text = String::from_utf8_lossy(&out.stdout);
    assert!(
        out.status.success() && text.contains("1 passed"),
        "{text}{}",
        String::from_utf8_lossy(&out.stderr)
    );
}

#[test]
fn the_jit_log_says_what_was_refused() {
    let _soft = Soft::fresh();
    let d = Device::new(0);
    let text =
        CString::new(".version 8.0\n.target sm_75\n.address_size 64\n.entry k() { frobnicate; }")
            .unwrap();
    let mut log = [0u8; 200];
    let mut options = [
        sys::CUjit_option::CU_JIT_ERROR_LOG_BUFFER,
        sys::CUjit_option::CU_JIT_ERROR_LOG_BUFFER_SIZE_BYTES,
    ];
    let mut values = [log.as_mut_ptr().cast(), log.len() as *mut std::ffi::c_void];
    let mut m = std::ptr::null_mut();
    let (o, v) = (options.as_mut_ptr(), values.as_mut_ptr());
    // SAFETY: arrays of two, and a log buffer as long as said.
    let r = unsafe { sys::cuModuleLoadDataEx(&raw mut m, text.as_ptr().cast(), 2, o, v) };
    assert_eq!(r as i32, 218);
    let log = String::from_utf8_lossy(&log);
    assert!(log.contains("PTX line 4") && log.contains("frobnicate"), "{log}");
    options[0] = sys::CUjit_option::CU_JIT_FAST_COMPILE;
    // SAFETY: as above.
    let r = unsafe {
        sys::cuModuleLoadDataEx(&raw mut m, text.as_ptr().cast(), 1, options.as_mut_ptr(), v)
    };
    assert_eq!(r as i32, 801);
    d.close();
}

#[test]
fn functions_streams_and_advice_answer_questions() {
    let soft = Soft::fresh();
    let d = Device::new(0);
    // SAFETY: this test's own handles; every output is a local variable.
    unsafe {
        let ask = |what| result::function::get_function_attribute(d.add, what).unwrap();
        assert_eq!(ask(A::CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK), 1024);
        assert_eq!(ask(A::CU_FUNC_ATTRIBUTE_PTX_VERSION), 80);
        assert_eq!(ask(A::CU_FUNC_ATTRIBUTE_BINARY_VERSION), 75);
        let dynamic = A::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
        assert_eq!(ask(dynamic), 48 << 10);
        result::function::set_function_attribute(d.add, dynamic, 100_000).unwrap();
        assert_eq!(ask(dynamic), 100_000);
        assert_eq!(code(result::function::set_function_attribute(d.add, dynamic, 1 << 20)), 1);

        let s = result::stream::create(result::stream::StreamKind::Default).unwrap();
        let (mut status, mut flags) =
            (sys::CUstreamCaptureStatus::CU_STREAM_CAPTURE_STATUS_ACTIVE, 9);
        assert_eq!(sys::cuStreamIsCapturing(s, &raw mut status) as i32, 0);
        assert_eq!(status as i32, 0);
        assert_eq!((sys::cuStreamGetFlags(s, &raw mut flags) as i32, flags), (0, 0));
        assert_eq!(sys::cuStreamQuery(s) as i32, 0);

        let (a, b) = (
            result::event::create(sys::CUevent_flags::CU_EVENT_DEFAULT).unwrap(),
            result::event::create(sys::CUevent_flags::CU_EVENT_DEFAULT).unwrap(),
        );
        assert_eq!(code(result::event::elapsed(a, b).map(drop)), 400, "not recorded yet");
        result::event::record(a, s).unwrap();
        result::event::record(b, s).unwrap();
        assert!(result::event::elapsed(a, b).unwrap() >= 0.0);
        result::event::synchronize(b).unwrap();
        assert_eq!(soft.syncs(), 1);

        let x =
            result::malloc_managed(1 << 17, sys::CUmemAttach_flags::CU_MEM_ATTACH_GLOBAL).unwrap();
        let advice = sys::CUmem_advise::CU_MEM_ADVISE_SET_PREFERRED_LOCATION;
        assert_eq!(sys::cuMemAdvise(x, 1 << 17, advice, 0) as i32, 0);
        assert_eq!(sys::cuMemAdvise(x, (1 << 17) + 1, advice, 0) as i32, 1);
        assert!(soft.text("softgpu_call_log").contains("advice 3, Device(0)"));
        let mut is_managed = 0u8;
        let which = sys::CUpointer_attribute::CU_POINTER_ATTRIBUTE_IS_MANAGED;
        assert_eq!(sys::cuPointerGetAttribute((&raw mut is_managed).cast(), which, x) as i32, 0);
        assert_eq!(is_managed, 1);
        let plain = 5u8;
        let r = sys::cuPointerGetAttribute(
            (&raw mut is_managed).cast(),
            which,
            &raw const plain as u64,
        );
        assert_eq!(r as i32, 1, "memory no device knows");
        result::free_sync(x).unwrap();
        result::event::destroy(a).unwrap();
        result::event::destroy(b).unwrap();
        result::stream::destroy(s).unwrap();
    }
    d.close();
    assert_eq!(soft.text("softgpu_findings"), "");
}
