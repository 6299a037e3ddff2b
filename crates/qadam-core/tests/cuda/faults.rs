//! Every driver call that a step makes, failing at every turn.

use cudarc::driver::result;
use qadam_core::cuda::{DeviceStep, Launcher};
use qadam_core::{Error, Result};

use crate::device::{Stream, leaks, soft, use_device};
use crate::model::{Model, OnDevice};

/// What calls of a launcher's life can fail. Not those that free, nor `cuCtxPopCurrent`, which
/// only gives back the caller's context.
const CALLS: [&str; 14] = [
    "cuCtxPushCurrent",
    "cuCtxSynchronize",
    "cuMemAlloc",
    "cuMemHostAlloc",
    "cuMemHostGetDevicePointer",
    "cuMemcpyHtoDAsync",
    "cuEventCreate",
    "cuEventRecord",
    "cuEventQuery",
    "cuEventSynchronize",
    "cuStreamWaitEvent",
    "cuStreamSynchronize",
    "cuStreamIsCapturing",
    "cuLaunchKernel",
];

/// One thing that a trainer does.
type Act = fn(&mut Launcher, &mut OnDevice<'_>, [Stream; 2]) -> Result<()>;

fn steps(model: &OnDevice<'_>) -> Vec<DeviceStep> {
    model.model.device_steps()
}

fn step(launcher: &mut Launcher, steps: &[DeviceStep], stream: Stream) -> Result<()> {
    // SAFETY: the model's memory is the device's; the stand-in is done when it returns.
    unsafe { launcher.step(steps, stream.handle()) }
}

/// Each but the last steps all tensors once.
const ACTS: [Act; 9] = [
    |launcher, model, [a, _]| step(launcher, &steps(model), a),
    |launcher, model, [a, _]| step(launcher, &steps(model), a),
    |launcher, model, [a, _]| {
        model.move_grads();
        step(launcher, &steps(model), a)
    },
    |launcher, model, [_, b]| step(launcher, &steps(model), b),
    |launcher, model, [_, b]| {
        model.move_grads();
        step(launcher, &steps(model), b)
    },
    |launcher, model, [_, b]| {
        model.move_grads();
        step(launcher, &steps(model), b)
    },
    |launcher, model, [_, b]| {
        model.move_grads();
        step(launcher, &steps(model), b)
    },
    |launcher, model, [_, b]| {
        model.move_grads();
        step(launcher, &steps(model), b)
    },
    |launcher, model, [a, _]| {
        // SAFETY: as above.
        unsafe { launcher.count_nonfinite(&steps(model), a.handle()) }.map(drop)
    },
];

#[test]
fn any_call_may_fail_at_any_time_and_nothing_is_touched() {
    let soft = soft();
    use_device(0);
    let streams = [Stream::new(), Stream::new()];
    // The caller works on another device meanwhile.
    let theirs = use_device(1);
    // Context and kernels are there; their faults are `availability`'s subject.
    drop(Launcher::new(0).unwrap());
    let before = leaks(&soft);
    let mut failures = 0;
    for call in CALLS {
        for k in 1.. {
            let mut want = Model::small(6);
            let mut got = want.on_device(&soft, 0);
            assert_eq!(soft.fail(call, k, 2), 0);
            let made = Launcher::new(0);
            let mut failed = made.is_err();
            let mut launcher = made.or_else(|_| Launcher::new(0)).unwrap();
            for (i, act) in ACTS.iter().enumerate() {
                let result = act(&mut launcher, &mut got, streams);
                assert_eq!(result::ctx::get_current().unwrap(), Some(theirs), "{call} {k}");
                if let Err(error) = &result {
                    let Error::Cuda { name, code: 2, doing } = error else {
                        panic!("{call} {k}: {error}");
                    };
                    assert_eq!(name, "CUDA_ERROR_OUT_OF_MEMORY", "{call}");
                    assert!(doing.ends_with(" on device 0"), "{doing}");
                    got.model.assert_same(&want, &format!("{call} {k} in act {i}"));
                    assert!(!failed, "{call} fails once");
                    failed = true;
                    act(&mut launcher, &mut got, streams).unwrap();
                }
                if i + 1 < ACTS.len() {
                    want.step();
                }
                got.model.assert_same(&want, &format!("{call} {k} after act {i}"));
            }
            soft.disarm();
            drop(launcher);
            drop(got);
            assert_eq!(leaks(&soft), before, "{call} {k}");
            assert_eq!(soft.text("softgpu_stream_races"), "", "{call} {k}");
            if !failed {
                break;
            }
            failures += 1;
        }
    }
    assert!(failures > 60, "{failures}");
    streams.into_iter().for_each(Stream::destroy);
    assert_eq!(soft.text("softgpu_findings"), "");
}

#[test]
fn uploads_that_failed_over_and_over_get_new_staging_memory() {
    let soft = soft();
    use_device(0);
    let before = leaks(&soft);
    {
        let mut want = Model::small(4);
        let mut got = want.on_device(&soft, 0);
        let mut launcher = Launcher::new(0).unwrap();
        let stream = Stream::new();
        step(&mut launcher, &steps(&got), stream).unwrap();
        want.step();
        for round in 0..10 {
            got.move_grads();
            let call = if round % 2 == 0 { "cuEventRecord" } else { "cuMemcpyHtoDAsync" };
            assert_eq!(soft.fail(call, 1, 999), 0);
            let text = step(&mut launcher, &steps(&got), stream).unwrap_err().to_string();
            assert!(text.starts_with("CUDA_ERROR_UNKNOWN (999) while "), "{text}");
            got.model.assert_same(&want, "failed");
        }
        step(&mut launcher, &steps(&got), stream).unwrap();
        want.step();
        got.model.assert_same(&want, "recovered");
        drop(launcher);
        stream.destroy();
    }
    assert_eq!(leaks(&soft), before);
}

#[test]
fn after_a_failed_upload_the_table_is_not_taken_for_the_old_one() {
    let soft = soft();
    use_device(0);
    let mut want = Model::small(1);
    want.0.push(want.0[0].clone());
    want.refill_grads(5); // different ones
    let got = want.on_device(&soft, 0);
    let mut launcher = Launcher::new(0).unwrap();
    let stream = Stream::new();
    let steps = steps(&got);
    let mut exchanged = steps.clone();
    (exchanged[0].grad, exchanged[1].grad) = (steps[1].grad, steps[0].grad);
    step(&mut launcher, &steps, stream).unwrap();
    // The copy is under way when the driver fails, and then the old gradients are back.
    assert_eq!(soft.fail("cuEventRecord", 1, 999), 0);
    step(&mut launcher, &exchanged, stream).unwrap_err();
    step(&mut launcher, &steps, stream).unwrap();
    want.step();
    want.step();
    got.model.assert_same(&want, "the old gradients");
    drop(launcher);
    stream.destroy();
}

#[test]
fn what_is_refused_before_any_call_touches_nothing() {
    let soft = soft();
    let want = Model::small(3);
    let got = want.on_device(&soft, 0);
    let mut launcher = Launcher::new(0).unwrap();
    let mut steps = steps(&got);
    steps[2].param += 1;
    soft.clear();
    // SAFETY: refused.
    let text = unsafe { launcher.step(&steps, 0) }.unwrap_err().to_string();
    assert!(text.starts_with("the parameter of tensor 2 is at device address"), "{text}");
    assert_eq!(soft.text("softgpu_call_log"), "");
    got.model.assert_same(&want, "refused");
}
