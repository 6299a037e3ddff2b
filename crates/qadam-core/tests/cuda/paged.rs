//! State in managed memory: the same bits, what is prefetched when, nothing waits, nothing is left.

use std::collections::HashMap;

use cudarc::driver::result;
use qadam_core::cuda::{Stepper, Work};
use qadam_core::paging::managed::{self, Arena};
use qadam_core::{DType, Error, Result, StateFormat};

use crate::device::{Stream, leaks, soft, use_device};
use crate::model::{Model, OnDevice, Param};
use crate::stand_in::Soft;

const F32: (DType, DType, StateFormat) = (DType::F32, DType::F32, StateFormat::F32);
const DYNAMIC8: (DType, DType, StateFormat) = (DType::F32, DType::F32, StateFormat::DYNAMIC8);

/// Parameters of these kinds and lengths.
fn model(params: &[((DType, DType, StateFormat), usize)]) -> Model {
    let mut seed = 11;
    Model(params.iter().map(|&(kind, len)| Param::flat(kind, len, &mut seed)).collect())
}

/// Three windows of up to 100,000 bytes, with two parameters between them that are not paged; all
/// of it so many times smaller.
fn three_windows(times: usize) -> (Model, fn(usize) -> bool, usize) {
    let params = [
        (F32, 10_000 / times),
        (F32, 40),
        (DYNAMIC8, 9_000 / times),
        (F32, 10_000 / times),
        (DYNAMIC8, 300),
        (F32, 30_000 / times),
    ];
    (model(&params), |i| i != 1 && i != 4, 100_000 / times)
}

fn step(stepper: &mut Stepper, got: &OnDevice<'_>, stream: u64) -> Result<()> {
    // SAFETY: the model's memory is the device's; the stand-in is done when it returns.
    unsafe { stepper.step(&got.model.device_steps(), stream) }
}

/// What a line of the log says under `name`.
fn field<'a>(line: &'a str, name: &str) -> &'a str {
    let rest = line.split_once(&format!("\"{name}\":")).unwrap().1;
    match rest.strip_prefix('"') {
        Some(text) => text.split('"').next().unwrap(),
        None => rest.split([',', '}']).next().unwrap(),
    }
}

/// The calls since the logs were cleared, with addresses as offsets from `base` in pages of 64 KiB,
/// `main` by that name, any other stream as "side", and events as "A", "B", ... as they occur.
fn calls(soft: &Soft, base: u64, main: u64) -> Vec<String> {
    let mut events = HashMap::new();
    let mut say = |line: &str| {
        let (call, stream, note) =
            (field(line, "call"), field(line, "stream"), field(line, "note"));
        let stream = if stream == main.to_string() { "main" } else { "side" };
        let mut event = || {
            let next = (b'A' + events.len() as u8) as char;
            *events.entry(note.to_owned()).or_insert(next)
        };
        match call {
            "cuEventRecord" => format!("record {} on {stream}", event()),
            "cuStreamWaitEvent" => format!("{stream} waits for {}", event()),
            "cuLaunchKernel" => format!("{note} on {stream}"),
            "cuMemPrefetchAsync" => {
                let (address, place) =
                    note.strip_prefix("at 0x").unwrap().split_once(", ").unwrap();
                let offset = u64::from_str_radix(address, 16).unwrap() - base;
                let bytes: u64 = field(line, "bytes").parse().unwrap();
                let (pages, page) = (|bytes: u64| bytes as f64 / 65536.0, offset);
                format!("prefetch {}..{} {place} on {stream}", pages(page), pages(page + bytes))
            }
            other => other.to_owned(),
        }
    };
    soft.text("softgpu_call_log").lines().map(&mut say).collect()
}

#[test]
fn paged_state_has_the_bits_of_state_that_is_not() {
    let soft = soft();
    let before = leaks(&soft);
    let lengths = [10_000, 1, 0, 257, 30_000, 4096, 20_000];
    let of = |kinds: [_; 2]| {
        let kind = |i: usize| kinds[i % 2];
        model(&lengths.iter().enumerate().map(|(i, &len)| (kind(i), len)).collect::<Vec<_>>())
    };
    let models = [of([F32; 2]), of([DYNAMIC8; 2]), of([F32, DYNAMIC8]), Model::mixed()];
    for (m, start) in models.iter().enumerate() {
        for window in [1, 50_000, 300_000, 256 << 20] {
            for part in [1, 3] {
                let mut want = start.clone();
                let mut got = want.on_device(&soft, 0);
                got.page(|i| i % part == 0);
                let mut stepper = Stepper::with_window(0, window).unwrap();
                let mut nonfinite = 0;
                for round in 0..3 {
                    step(&mut stepper, &got, 0).unwrap();
                    nonfinite += want.step();
                    got.model.assert_same(&want, &format!("model {m}, {window}, round {round}"));
                    assert_eq!(stepper.nonfinite(), nonfinite);
                    for model in [&mut want, &mut got.model] {
                        model.refill_grads(round);
                        model.set_lr(0.02);
                    }
                    if round == 1 {
                        got.move_grads();
                    }
                }
            }
        }
    }
    assert_eq!(leaks(&soft), before);
    assert_eq!(soft.text("softgpu_findings"), "");
    assert_eq!(soft.text("softgpu_stream_races"), "");
}

#[test]
fn each_window_is_prefetched_beside_the_one_before_it_and_no_host_waits() {
    let soft = soft();
    use_device(0);
    let stream = Stream::new();
    let (mut want, paged, window) = three_windows(1);
    {
        let mut got = want.on_device(&soft, 0);
        let arena = got.page(paged);
        let mut stepper = Stepper::with_window(0, window).unwrap();
        for round in 0..4 {
            soft.clear();
            step(&mut stepper, &got, stream.handle()).unwrap();
            want.step();
            got.model.assert_same(&want, "in windows");
            assert_eq!(soft.syncs(), 0, "round {round}");
        }
        let steady = [
            "cuCtxPushCurrent_v2",
            "cuStreamIsCapturing",
            "record A on main",
            "side waits for A",
            "prefetch 0..2 to Device(0) on side",
            "record B on side",
            "qadam_step on main",
            "main waits for B",
            "qadam_step on main",
            "prefetch 1..3 to Device(0) on side",
            "record B on side",
            "record A on main",
            "side waits for A",
            "main waits for B",
            "qadam_step on main",
            "prefetch 2..6.5 to Device(0) on side",
            "record B on side",
            "main waits for B",
            "qadam_step on main",
            "cuCtxPopCurrent_v2",
        ];
        assert_eq!(calls(&soft, arena.address(), stream.handle()), steady);

        // New gradients: all tables are uploaded before the first launch.
        got.move_grads();
        soft.clear();
        step(&mut stepper, &got, stream.handle()).unwrap();
        let work = calls(&soft, arena.address(), stream.handle());
        let uploads = work.iter().rposition(|call| call == "cuMemcpyHtoDAsync_v2").unwrap();
        let launch = work.iter().position(|call| call == "qadam_step on main").unwrap();
        assert!(uploads < launch, "{work:?}");
        assert_eq!(soft.count("cuMemcpyHtoDAsync"), 4);
        assert_eq!(soft.count("cuMemPrefetchAsync"), 3);
        assert_eq!(soft.syncs(), 0);

        // Another stream.
        soft.clear();
        step(&mut stepper, &got, 0).unwrap();
        assert_eq!(soft.syncs(), 0);
    }
    stream.destroy();
    assert_eq!(soft.text("softgpu_stream_races"), "");
}

#[test]
fn kernels_find_the_pages_that_the_host_took() {
    let soft = soft();
    use_device(0);
    let (want, paged, window) = three_windows(1);
    for ordinal in [0, 1] {
        let mut got = want.on_device(&soft, ordinal);
        let arena = got.page(paged);
        let mut stepper = Stepper::with_window(ordinal as usize, window).unwrap();
        step(&mut stepper, &got, 0).unwrap();
        for _ in 0..2 {
            let bytes = arena.extents().bytes() as u64;
            assert_eq!(soft.host_touch(arena.address(), bytes), 0);
            soft.clear();
            step(&mut stepper, &got, 0).unwrap();
            let log = soft.text("softgpu_migrations");
            let to = format!("device {ordinal}");
            for line in log.lines() {
                assert_eq!((field(line, "cause"), field(line, "to")), ("Prefetch", &to[..]));
            }
            let moved = log.lines().map(|line| field(line, "bytes").parse::<u64>().unwrap());
            let moved: u64 = moved.sum();
            assert!((bytes..bytes + (2 << 16)).contains(&moved), "{moved} of {bytes}");
            // The same again moves nothing.
            soft.clear();
            step(&mut stepper, &got, 0).unwrap();
            assert_eq!(soft.text("softgpu_migrations"), "");
        }
    }
}

#[test]
fn state_without_a_gradient_stays_where_it_is() {
    let soft = soft();
    use_device(0);
    let mut want = model(&[(F32, 1000), (F32, 3_000_000), (DYNAMIC8, 1000)]);
    want.0[1].has_grad = false;
    let mut got = want.on_device(&soft, 0);
    let arena = got.page(|_| true);
    let mut stepper = Stepper::new(0).unwrap();
    soft.clear();
    step(&mut stepper, &got, 0).unwrap();
    want.step();
    got.model.assert_same(&want, "two of three");
    let log = calls(&soft, arena.address(), 0);
    let prefetched: Vec<_> = log.iter().filter(|call| call.starts_with("prefetch")).collect();
    assert_eq!(prefetched.len(), 2, "{log:?}");
    let buffers = arena.extents().buffers();
    let end = arena.extents().bytes() as f64 / 65536.0;
    let last = format!("prefetch {}..{end} ", buffers[2][0].start / 65536);
    assert!(prefetched[0].starts_with("prefetch 0..1 "), "{prefetched:?}");
    assert!(prefetched[1].starts_with(&last), "{prefetched:?}, {last}");

    // None has one: nothing to fetch, and no error.
    want.0.iter_mut().chain(&mut got.model.0).for_each(|param| param.has_grad = false);
    soft.clear();
    step(&mut stepper, &got, 0).unwrap();
    got.model.assert_same(&want, "none");
    assert_eq!(soft.count("cuMemPrefetchAsync"), 0);
}

#[test]
fn what_is_not_paged_takes_the_calls_of_a_launcher() {
    let soft = soft();
    use_device(0);
    let other = Arena::new(0, &[(StateFormat::F32, 1000)]).unwrap();
    let mut want = Model::small(20);
    let got = want.on_device(&soft, 0);
    let mut stepper = Stepper::new(0).unwrap();
    for _ in 0..3 {
        soft.clear();
        step(&mut stepper, &got, 0).unwrap();
        want.step();
    }
    got.model.assert_same(&want, "not paged");
    let steady =
        ["cuCtxPushCurrent_v2", "cuStreamIsCapturing", "qadam_step on main", "cuCtxPopCurrent_v2"];
    assert_eq!(calls(&soft, 0, 0), steady);
    soft.clear();
    // SAFETY: nothing is used.
    unsafe { stepper.step(&[], 0).unwrap() };
    assert_eq!(soft.text("softgpu_call_log"), "");
    drop(other);
}

#[test]
fn captured_steps_do_not_prefetch() {
    let soft = soft();
    use_device(0);
    let before = leaks(&soft);
    let stream = Stream::new();
    {
        let (mut want, paged, window) = three_windows(1);
        let mut got = want.on_device(&soft, 0);
        let arena = got.page(paged);
        let mut stepper = Stepper::with_window(0, window).unwrap();
        let mut text = String::new();
        let graph = stream.capture(|| {
            text = step(&mut stepper, &got, stream.handle()).unwrap_err().to_string();
        });
        assert!(graph.is_ok(), "the capture itself is sound");
        assert!(text.contains("no memory is ready for its table"), "{text}");
        got.model.assert_same(&want, "refused");

        step(&mut stepper, &got, stream.handle()).unwrap();
        want.step();
        soft.clear();
        let graph = stream.capture(|| step(&mut stepper, &got, stream.handle()).unwrap()).unwrap();
        let log = calls(&soft, arena.address(), stream.handle());
        for call in ["prefetch", "record", "side", "cuStreamCreate", "cuMem", "cuEvent"] {
            let is = |line: &&String| line.starts_with(call) && *line != "cuMemcpyHtoDAsync_v2";
            assert_eq!(log.iter().find(is), None, "{log:?}");
        }
        assert_eq!(soft.count("cuLaunchKernel"), 4);
        assert_eq!(soft.syncs(), 0);
        got.model.assert_same(&want, "a capture runs nothing");
        for round in 0..3 {
            graph.replay(stream);
            want.step();
            got.model.assert_same(&want, &format!("replay {round}"));
            step(&mut stepper, &got, stream.handle()).unwrap();
            want.step();
            got.model.assert_same(&want, &format!("beside replay {round}"));
        }
        drop(graph);

        // Memory taken ahead serves for as many captures.
        stepper.reserve(&got.model.device_steps(), 2).unwrap();
        let mut other = got.model.device_steps();
        other[0].grad = 0;
        other[5].grad = 0;
        let graph = stream.capture(|| {
            step(&mut stepper, &got, stream.handle()).unwrap();
            // SAFETY: the memory outlives the graph.
            unsafe { stepper.step(&other, stream.handle()).unwrap() };
        });
        graph.unwrap().replay(stream);
        want.step();
        for i in [0, 5] {
            want.0[i].has_grad = false;
        }
        want.step();
        got.model.assert_same(&want, "two in a graph");
    }
    stream.destroy();
    assert_eq!(leaks(&soft), before);
    assert_eq!(soft.text("softgpu_stream_races"), "");
    assert_eq!(soft.text("softgpu_findings"), "");
}

#[test]
fn memory_reserved_before_any_step_serves_a_capture() {
    let soft = soft();
    use_device(0);
    let stream = Stream::new();
    {
        let (mut want, paged, window) = three_windows(1);
        let mut got = want.on_device(&soft, 0);
        got.page(paged);
        let mut stepper = Stepper::with_window(0, window).unwrap();
        stepper.reserve(&got.model.device_steps(), 1).unwrap();
        let graph = stream.capture(|| step(&mut stepper, &got, stream.handle()).unwrap());
        graph.unwrap().replay(stream);
        want.step();
        got.model.assert_same(&want, "captured first");
    }
    stream.destroy();
}

#[test]
fn without_concurrent_access_nothing_is_prefetched() {
    let soft = soft();
    use_device(0);
    let before = leaks(&soft);
    soft.set_concurrent(false);
    let (mut want, paged, window) = three_windows(1);
    {
        let mut got = want.on_device(&soft, 0);
        let arena = got.page(paged);
        let mut stepper = Stepper::with_window(0, window).unwrap();
        for round in 0..3 {
            step(&mut stepper, &got, 0).unwrap();
            want.step();
            got.model.assert_same(&want, &format!("round {round}"));
        }
        let log = calls(&soft, arena.address(), 0);
        let launches = log.iter().filter(|call| call.starts_with("qadam_step")).count();
        assert_eq!(launches, 3, "one a step");
        for call in ["cuMemPrefetchAsync", "cuMemAdvise", "cuStreamCreate", "cuStreamWaitEvent"] {
            assert_eq!(soft.count(call), 0, "{call}");
        }
    }
    soft.set_concurrent(true);
    assert_eq!(leaks(&soft), before);
}

#[test]
fn without_managed_memory_there_is_an_error() {
    let soft = soft();
    let before = leaks(&soft);
    assert_eq!(managed::check(0), Ok(()));
    soft.set_managed(false);
    let errors = [
        managed::check(1).unwrap_err(),
        Arena::new(1, &[(StateFormat::F32, 1000)]).unwrap_err(),
        Arena::new(1, &[]).unwrap_err(),
    ];
    soft.set_managed(true);
    for error in errors {
        assert_eq!(error, Error::NoManagedMemory { ordinal: 1 });
        assert_eq!(
            error.to_string(),
            "device 1 has no managed memory, which paged state needs; use a class that is not paged"
        );
    }
    let text = managed::check(7).unwrap_err().to_string();
    assert_eq!(text, "CUDA is not available: there is no device 7, only 2");
    assert_eq!(soft.count("cuMemAllocManaged"), 0);
    assert_eq!(leaks(&soft), before);
}

#[test]
fn an_arena_is_aligned_advised_found_by_address_and_freed_with_its_last_user() {
    let soft = soft();
    use_device(0);
    let before = leaks(&soft);
    let formats = [(StateFormat::F32, 100_000), (StateFormat::DYNAMIC8, 3_000_000)];
    soft.clear();
    let arena = Arena::new(1, &formats).unwrap();
    assert!(soft.text("softgpu_call_log").contains("advice 5, Device(1)"));
    assert!(arena.address().is_multiple_of(2 << 20));
    assert_eq!(arena.ordinal(), 1);
    assert_eq!(soft.leak("managed_bytes"), arena.bytes() as u64);
    let (start, bytes) = (arena.address(), arena.extents().bytes() as u64);
    assert!(arena.bytes() as u64 >= bytes);
    let found = |address| managed::find(address).map(|arena| arena.address());
    let at = [start - 1, start, start + bytes - 1, start + bytes].map(found);
    assert_eq!(at, [None, Some(start), Some(start), None]);

    let mut want = model(&[(F32, 1000)]);
    let mut got = want.on_device(&soft, 0);
    let kept = got.page(|_| true);
    let mut stepper = Stepper::new(0).unwrap();
    step(&mut stepper, &got, 0).unwrap();
    want.step();
    drop(stepper);
    got.model.assert_same(&want, "the stepper is gone");
    let address = kept.address();
    drop(got);
    assert_eq!(found(address), Some(address), "kept by one clone");
    drop((kept, arena));
    assert_eq!([address, start].map(found), [None; 2]);

    soft.clear();
    for formats in [&[][..], &[(StateFormat::F32, 0), (StateFormat::DYNAMIC8, 0)]] {
        let empty = Arena::new(0, formats).unwrap();
        assert_eq!((empty.bytes(), empty.extents().bytes(), empty.address()), (0, 0, 0));
        assert_eq!(empty.extents().buffers().len(), formats.len());
    }
    assert_eq!(soft.count("cuMemAllocManaged"), 0);
    assert_eq!(leaks(&soft), before);
}

#[test]
fn positions_are_those_in_the_slice() {
    let soft = soft();
    use_device(0);
    let (mut want, paged, window) = three_windows(1);
    want.0.iter_mut().for_each(|param| param.g.bytes_mut().fill(0));
    for (param, element) in [(5, 7), (4, 8), (4, 9)] {
        want.0[param].g.bytes_mut()[4 * element..4 * element + 4]
            .copy_from_slice(&f32::NAN.to_le_bytes());
    }
    let mut got = want.on_device(&soft, 0);
    got.page(paged);
    let mut stepper = Stepper::with_window(0, window).unwrap();
    step(&mut stepper, &got, 0).unwrap();
    want.step();
    let mut steps = got.model.device_steps();
    // SAFETY: as in `step`.
    let found = unsafe { stepper.count_nonfinite(&steps, 0).unwrap() };
    assert_eq!(found, Some((4, 2)));
    for wrong in [5, 3, 1] {
        steps[wrong].param += 1;
        // SAFETY: refused.
        let text = unsafe { stepper.step(&steps, 0) }.unwrap_err().to_string();
        assert!(text.starts_with("the parameter of tensor "), "{text}");
        let found: usize = text["the parameter of tensor ".len()..][..1].parse().unwrap();
        assert!(steps[found].param % 4 == 1, "{text}");
    }
    got.model.assert_same(&want, "refused");
    step(&mut stepper, &got, 0).unwrap();
    want.step();
    got.model.assert_same(&want, "once more");
}

/// What calls can fail. Not those that free, nor `cuCtxPopCurrent`.
const CALLS: [&str; 19] = [
    "cuCtxPushCurrent",
    "cuCtxSynchronize",
    "cuDeviceGetAttribute",
    "cuMemAlloc",
    "cuMemAllocManaged",
    "cuMemAdvise",
    "cuMemPrefetchAsync",
    "cuMemHostAlloc",
    "cuMemHostGetDevicePointer",
    "cuMemcpyHtoDAsync",
    "cuEventCreate",
    "cuEventRecord",
    "cuEventQuery",
    "cuEventSynchronize",
    "cuStreamCreate",
    "cuStreamWaitEvent",
    "cuStreamSynchronize",
    "cuStreamIsCapturing",
    "cuLaunchKernel",
];

/// Those whose failure a step does not mention.
const HINTS: [&str; 2] = ["cuMemPrefetchAsync", "cuStreamCreate"];

/// How far a failed step got: of the launches in order, which went before the failed one.
fn launched(got: &Model, want: &Model) -> Vec<bool> {
    let mut stepped = want.clone();
    stepped.step();
    let launches: [&[usize]; 4] = [&[1, 4], &[0, 2], &[3], &[5]];
    let pick =
        |model: &Model, which: &[usize]| Model(which.iter().map(|&i| model.0[i].clone()).collect());
    let mut all = Vec::new();
    for which in launches {
        let (got, old, new) = (pick(got, which), pick(want, which), pick(&stepped, which));
        let done = got.0[0].step.f32() == new.0[0].step.f32();
        got.assert_same(if done { &new } else { &old }, "a launch");
        all.push(done);
    }
    all
}

#[test]
fn any_call_may_fail_and_only_a_later_launch_leaves_a_part_done() {
    let soft = soft();
    use_device(0);
    let streams = [Stream::new(), Stream::new()];
    let theirs = use_device(1);
    let before = leaks(&soft);
    let (mut failures, mut parts) = (0, 0);
    for call in CALLS {
        for k in 1.. {
            let (mut want, paged, window) = three_windows(20);
            let mut got = want.on_device(&soft, 0);
            let arena = got.page(paged);
            assert_eq!(soft.fail(call, k, 2), 0);
            let mut failed = None;
            let mut note = |error: &Error| {
                assert!(matches!(error, Error::Cuda { code: 2, .. }), "{call} {k}: {error}");
                assert!(failed.replace(error.clone()).is_none(), "{call} fails once");
            };
            // Kept until no call fails any more: freeing cannot report a failure.
            let first = Arena::new(0, &[(StateFormat::F32, 100_000)]).inspect_err(&mut note);
            let made = Stepper::with_window(0, window).inspect_err(&mut note);
            let mut stepper = made.unwrap_or_else(|_| Stepper::with_window(0, window).unwrap());
            for (round, stream) in [0, 0, 0, 1, 1].into_iter().enumerate() {
                if round == 2 {
                    got.move_grads();
                }
                let result = step(&mut stepper, &got, streams[stream].handle());
                assert_eq!(result::ctx::get_current().unwrap(), Some(theirs), "{call} {k}");
                if let Err(error) = result {
                    note(&error);
                    let done = launched(&got.model, &want);
                    let ran = done.iter().filter(|done| **done).count();
                    assert!(done.is_sorted_by(|a, b| a >= b), "{call} {k}: in order, {done:?}");
                    assert!(ran == 0 || call == "cuLaunchKernel", "{call} {k}: {done:?}");
                    if ran > 0 {
                        parts += 1;
                        // What is left can be done by a step of its own.
                        let left: Vec<_> = got
                            .model
                            .device_steps()
                            .into_iter()
                            .zip(&got.model.0)
                            .zip(&want.0)
                            .filter(|((_, got), want)| got.step.f32() == want.step.f32())
                            .map(|((step, _), _)| step)
                            .collect();
                        // SAFETY: as in `step`.
                        unsafe { stepper.step(&left, streams[stream].handle()).unwrap() };
                    } else {
                        step(&mut stepper, &got, streams[stream].handle()).unwrap();
                    }
                }
                want.step();
                got.model.assert_same(&want, &format!("{call} {k}, round {round}"));
            }
            // SAFETY: as in `step`.
            let mut count = || unsafe {
                stepper.count_nonfinite(&got.model.device_steps(), streams[1].handle())
            };
            if let Err(error) = count() {
                note(&error);
                assert!(count().is_ok());
            }
            got.model.assert_same(&want, &format!("{call} {k}, counted"));
            if HINTS.contains(&call) {
                assert_eq!(failed, None);
            }
            let happened = soft.disarm() == 0;
            drop((stepper, got, arena, first));
            assert_eq!(leaks(&soft), before, "{call} {k}");
            assert_eq!(soft.text("softgpu_stream_races"), "", "{call} {k}");
            if !happened {
                break;
            }
            failures += 1;
        }
    }
    assert!(failures > 150, "{failures}");
    assert!(parts > 10, "{parts}");
    streams.into_iter().for_each(Stream::destroy);
    assert_eq!(soft.text("softgpu_findings"), "");
}

#[test]
fn a_thousand_arenas_and_steppers_leave_nothing() {
    let soft = soft();
    let before = leaks(&soft);
    let (want, paged, window) = three_windows(1);
    let small = model(&[(F32, 300), (DYNAMIC8, 300), (F32, 20)]);
    for i in 0..1000 {
        let (start, window) = if i % 100 == 0 { (&want, window) } else { (&small, 1000) };
        let mut got = start.on_device(&soft, i % 2);
        got.page(|k| if i % 100 == 0 { paged(k) } else { k < 2 });
        let mut stepper = Stepper::with_window(i as usize % 2, window).unwrap();
        step(&mut stepper, &got, 0).unwrap();
    }
    assert_eq!(leaks(&soft), before);
    assert_eq!(soft.leak("managed_bytes"), 0);
    assert_eq!(soft.text("softgpu_findings"), "");
}

#[test]
fn steps_over_and_over_take_no_more_memory() {
    let soft = soft();
    use_device(0);
    let (want, paged, window) = three_windows(1);
    let mut got = want.on_device(&soft, 0);
    got.page(paged);
    let held =
        |soft: &Soft| ["device_bytes", "pinned_bytes", "events", "streams"].map(|w| soft.leak(w));
    let before = held(&soft);
    let mut stepper = Stepper::with_window(0, window).unwrap();
    assert_eq!(stepper.memory(), Work { device: 0, host: 8 });
    let mut after = Vec::new();
    for _ in 0..20 {
        got.move_grads();
        step(&mut stepper, &got, 0).unwrap();
        after.push(held(&soft));
    }
    assert!(after.iter().all(|now| *now == after[0]), "{after:?}");
    let Work { device, host } = stepper.memory();
    assert_eq!(after[0][0] - before[0], device as u64);
    assert_eq!(after[0][1] - before[1], host as u64);
    // One for each slot of four rings, one for each launcher, two that join the streams.
    assert_eq!((after[0][2] - before[2], after[0][3] - before[3]), (4 * 5 + 2, 1));
}

#[test]
fn windows_come_and_go() {
    let soft = soft();
    use_device(0);
    let (mut want, paged, window) = three_windows(1);
    let mut got = want.on_device(&soft, 0);
    got.page(paged);
    let mut stepper = Stepper::with_window(0, window).unwrap();
    let mut nonfinite = 0;
    for count in [3, 6, 1, 2, 6, 4] {
        // SAFETY: as in `step`.
        unsafe { stepper.step(&got.model.device_steps()[..count], 0).unwrap() };
        let rest = want.0.split_off(count);
        nonfinite += want.step();
        want.0.extend(rest);
        got.model.assert_same(&want, &format!("{count} tensors"));
        assert_eq!(stepper.nonfinite(), nonfinite);
    }
}

#[test]
fn two_steppers_do_not_disturb_each_other() {
    let soft = soft();
    use_device(0);
    let streams = [Stream::new(), Stream::new()];
    let (mut want, paged, window) = three_windows(1);
    {
        let mut models = [want.on_device(&soft, 0), want.on_device(&soft, 0)];
        for got in &mut models {
            got.page(paged);
        }
        let mut steppers = [(); 2].map(|()| Stepper::with_window(0, window).unwrap());
        for round in 0..4 {
            for ((stepper, got), stream) in steppers.iter_mut().zip(&models).zip(streams) {
                step(stepper, got, stream.handle()).unwrap();
            }
            want.step();
            for got in &models {
                got.model.assert_same(&want, &format!("round {round}"));
            }
        }
    }
    streams.into_iter().for_each(Stream::destroy);
    assert_eq!(soft.text("softgpu_stream_races"), "");
}
