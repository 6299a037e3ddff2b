//! What a step asks of the driver, and what it leaves behind.

use qadam_core::cuda::Launcher;

use crate::device::{Stream, leaks, soft, use_device};
use crate::model::Model;
use crate::stand_in::Soft;

/// The names of the calls since the logs were cleared.
pub fn calls(soft: &Soft) -> Vec<String> {
    let log = soft.text("softgpu_call_log");
    let name = |line: &str| line.split("\"cu").nth(1)?.split('"').next().map(|n| format!("cu{n}"));
    log.lines().filter_map(name).collect()
}

/// Those that launch, copy or record.
fn work(soft: &Soft) -> Vec<String> {
    let is_work = |name: &String| {
        ["cuLaunch", "cuMemcpy", "cuMemset", "cuEventRecord"].iter().any(|w| name.starts_with(w))
    };
    calls(soft).into_iter().filter(is_work).collect()
}

#[test]
fn a_steady_step_only_launches_and_any_other_takes_four_calls_at_most() {
    let soft = soft();
    use_device(0);
    let mut got = Model::small(500).on_device(&soft, 0);
    let mut launcher = Launcher::new(0).unwrap();
    let streams = [Stream::new(), Stream::new()];
    let mut step = |model: &Model, stream: Stream| {
        soft.clear();
        // SAFETY: the model's memory is the device's; the stand-in is done when it returns.
        unsafe { launcher.step(&model.device_steps(), stream.handle()).unwrap() };
        (work(&soft), calls(&soft))
    };
    step(&got.model, streams[0]);
    let (_, steady) = step(&got.model, streams[0]);
    let want =
        ["cuCtxPushCurrent_v2", "cuStreamIsCapturing", "cuLaunchKernel", "cuCtxPopCurrent_v2"];
    assert_eq!(steady, want);

    let upload = ["cuMemcpyHtoDAsync_v2", "cuEventRecord", "cuLaunchKernel"];
    for _ in 0..10 {
        got.move_grads();
        assert_eq!(step(&got.model, streams[0]).0, upload, "gradients");
        assert_eq!(soft.syncs(), 0);
    }
    got.model.set_lr(0.1);
    assert_eq!(step(&got.model, streams[0]).0, upload, "learning rate");
    assert!(soft.text("softgpu_call_log").contains("\"bytes\":88"), "one set of hyperparameters");
    let mut half = got.model.device_steps();
    half.truncate(250);
    soft.clear();
    // SAFETY: as above.
    unsafe { launcher.step(&half, streams[0].handle()).unwrap() };
    assert_eq!(work(&soft), upload, "other tensors");
    let mut step = |model: &Model, stream: Stream| {
        soft.clear();
        // SAFETY: as above.
        unsafe { launcher.step(&model.device_steps(), stream.handle()).unwrap() };
        (work(&soft), soft.syncs())
    };
    step(&got.model, streams[0]);
    got.move_grads();
    let (work, syncs) = step(&got.model, streams[1]);
    assert_eq!(
        (&work[0][..], &work[1..], syncs),
        ("cuEventRecord", &upload.map(String::from)[..], 0)
    );
    drop(launcher);
    streams.into_iter().for_each(Stream::destroy);
}

/// `CUDA_ERROR_NOT_READY`.
const NOT_READY: i32 = 600;

#[test]
fn the_host_waits_only_if_it_is_four_uploads_ahead() {
    let soft = soft();
    use_device(0);
    let mut want = Model::small(3);
    let mut got = want.on_device(&soft, 0);
    let mut launcher = Launcher::new(0).unwrap();
    for (round, late) in [0, 0, 0, 0, 1, 3, 4, 0, 4].into_iter().enumerate() {
        got.move_grads();
        soft.clear();
        for k in 1..=late {
            assert_eq!(soft.fail("cuEventQuery", k, NOT_READY), 0);
        }
        // SAFETY: as above.
        unsafe { launcher.step(&got.model.device_steps(), 0).unwrap() };
        want.step();
        got.model.assert_same(&want, "uploaded");
        let queries = if round < 4 { 0 } else { 4.min(late as usize + 1) };
        assert_eq!(soft.count("cuEventQuery"), queries, "{round}");
        assert_eq!(soft.syncs(), usize::from(late == 4), "{round}");
    }
}

#[test]
fn no_tensors_no_calls() {
    let soft = soft();
    let mut launcher = Launcher::new(0).unwrap();
    soft.clear();
    // SAFETY: nothing is used.
    unsafe {
        launcher.step(&[], 0).unwrap();
        assert_eq!(launcher.count_nonfinite(&[], 0), Ok(None));
    }
    assert!(calls(&soft).is_empty());
}

#[test]
fn tables_grow_and_shrink_with_the_tensors() {
    let soft = soft();
    let before = leaks(&soft);
    {
        let mut want = Model::small(700);
        let got = want.on_device(&soft, 0);
        let mut launcher = Launcher::new(0).unwrap();
        for count in [3, 700, 10, 350, 700] {
            let steps = got.model.device_steps();
            // SAFETY: as above.
            unsafe { launcher.step(&steps[..count], 0).unwrap() };
            let rest = want.0.split_off(count);
            want.step();
            want.0.extend(rest);
            got.model.assert_same(&want, &format!("{count} tensors"));
        }
    }
    assert_eq!(leaks(&soft), before);
    assert_eq!(soft.text("softgpu_findings"), "");
}

#[test]
fn a_thousand_launchers_leave_nothing() {
    let soft = soft();
    let before = leaks(&soft);
    {
        let got = Model::small(2).on_device(&soft, 0);
        for i in 0..1000 {
            let mut launcher = Launcher::new(i % 2).unwrap();
            if i % 2 == 0 {
                // SAFETY: as above.
                unsafe { launcher.step(&got.model.device_steps(), 0).unwrap() };
            }
        }
    }
    assert_eq!(leaks(&soft), before);
}
