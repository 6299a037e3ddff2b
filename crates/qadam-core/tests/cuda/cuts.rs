//! Gradients that are cut by their norms, and tensors that are measured before they are stepped: few
//! driver calls, none that waits, nothing touched where one fails.

use cudarc::driver::result;
use qadam_core::cuda::{DeviceClip, DevicePercentile, DeviceStep, Launcher, Stepper};
use qadam_core::{DType, Error, Hyper, NonFinite, Result, StateFormat};

use crate::calls::calls;
use crate::device::{Stream, leaks, soft, use_device};
use crate::model::{Buffer, Model, OnDevice, Param};
use crate::stand_in::Soft;

/// An f32 of device 0.
struct Number<'a> {
    soft: &'a Soft,
    buffer: Buffer,
}

impl<'a> Number<'a> {
    fn new(soft: &'a Soft, x: f32) -> Self {
        let mut buffer = Buffer::new(4, 0);
        buffer.set_f32(x);
        assert_eq!(soft.adopt(buffer.bytes_mut(), 0), 0);
        Self { soft, buffer }
    }
}

impl Drop for Number<'_> {
    fn drop(&mut self) {
        assert_eq!(self.soft.unadopt(self.buffer.address()), 0);
    }
}

/// Steps whose gradients are cut.
fn with_cuts(steps: Vec<DeviceStep>, cuts: Vec<u64>) -> Vec<DeviceStep> {
    assert_eq!(steps.len(), cuts.len());
    let with = |(step, cut)| DeviceStep { cut: Some(cut), ..step };
    steps.into_iter().zip(cuts).map(with).collect()
}

fn cut_and_step(
    stepper: &mut Stepper,
    got: &OnDevice<'_>,
    clip: &DeviceClip,
    stream: u64,
) -> Result<()> {
    let steps = got.model.device_steps();
    // SAFETY: the model's memory is the device's; the stand-in is done when it returns.
    unsafe {
        let cuts = stepper.clip(&steps, clip, stream)?;
        stepper.step(&with_cuts(steps, cuts), stream)
    }
}

#[test]
fn gradients_are_cut_as_on_the_cpu() {
    let soft = soft();
    let before = leaks(&soft);
    {
        let norm = Number::new(&soft, -1.0);
        let propagating = {
            let mut model = Model::mixed().limited();
            for param in model.0.iter_mut().step_by(2) {
                param.hyper = Hyper { nonfinite: NonFinite::Propagate, ..param.hyper };
            }
            model
        };
        let models = [
            Model::mixed().limited(),
            Model::mixed().measured().limited(),
            Model::small(300).limited(),
            propagating,
        ];
        let max_norms = [Some(0.01), None, Some(1e30), Some(f64::INFINITY), Some(0.0)];
        for (m, mut want) in models.into_iter().enumerate() {
            for param in want.0.iter_mut().step_by(5) {
                param.hyper.maximize = true;
            }
            let mut got = want.on_device(&soft, 0);
            let mut stepper = Stepper::new(0).unwrap();
            for (round, max_norm) in max_norms.into_iter().enumerate() {
                let clip = DeviceClip { max_norm, norm: Some(norm.buffer.address()) };
                cut_and_step(&mut stepper, &got, &clip, 0).unwrap();
                let (_, want_norm) = want.cut_and_step(max_norm);
                got.model.assert_same(&want, &format!("model {m}, round {round}"));
                let (x, y) = (norm.buffer.f32(), want_norm);
                assert!(x == y || x.is_nan() && y.is_nan(), "model {m}: norm {x}, not {y}");
                for model in [&mut want, &mut got.model] {
                    model.refill_grads(round as u64);
                }
                if round == 2 {
                    got.move_grads();
                }
            }
        }
    }
    assert_eq!(leaks(&soft), before);
    assert_eq!(soft.text("softgpu_findings"), "");
    assert_eq!(soft.text("softgpu_stream_races"), "");
}

#[test]
fn a_history_fills_turns_and_limits() {
    let soft = soft();
    let mut want = Model::small(6).limited();
    want.0[1].step.set_f32(95.0); // passes the end of its history
    let mut got = want.on_device(&soft, 0);
    let mut stepper = Stepper::new(0).unwrap();
    for round in 0..12 {
        cut_and_step(&mut stepper, &got, &DeviceClip::default(), 0).unwrap();
        want.cut_and_step(None);
        got.model.assert_same(&want, &format!("round {round}"));
        for model in [&mut want, &mut got.model] {
            model.refill_grads(round);
            model.set_grad_scale(1.0);
        }
    }
}

#[test]
fn nothing_is_remembered_of_steps_that_are_not_taken() {
    let soft = soft();
    let mut want = Model::small(9).limited().measured();
    let got = want.on_device(&soft, 0);
    let mut stepper = Stepper::new(0).unwrap();
    let (scale, norm) = (Number::new(&soft, 3.0), Number::new(&soft, 0.0));
    let mut found = Number::new(&soft, 1.0);
    let mut steps = got.model.device_steps();
    for (i, step) in steps.iter_mut().enumerate() {
        step.grad_scale = Some(scale.buffer.address());
        step.found_inf = (i % 2 == 0).then_some(found.buffer.address());
    }
    steps[3].grad = 0;
    let clip = DeviceClip { max_norm: Some(0.1), norm: Some(norm.buffer.address()) };
    want.set_grad_scale(3.0);
    for inf in [1.0, 0.0, f32::NAN] {
        found.buffer.set_f32(inf);
        // SAFETY: as above.
        unsafe {
            let cuts = stepper.clip(&steps, &clip, 0).unwrap();
            stepper.step(&with_cuts(steps.clone(), cuts), 0).unwrap();
        }
        for (i, param) in want.0.iter_mut().enumerate() {
            param.has_grad = i != 3 && (inf == 0.0 || i % 2 == 1);
        }
        let (_, want_norm) = want.cut_and_step(Some(0.1));
        got.model.assert_same(&want, &format!("found {inf}"));
        assert_eq!(norm.buffer.f32(), want_norm);
    }
    // Not one gradient, and not one step.
    want.0.iter_mut().for_each(|param| param.has_grad = false);
    for step in &mut steps {
        step.grad = 0;
    }
    // SAFETY: as above.
    unsafe {
        let cuts = stepper.clip(&steps, &clip, 0).unwrap();
        stepper.step(&with_cuts(steps, cuts), 0).unwrap();
        got.model.assert_same(&want, "no gradients");
        assert_eq!(norm.buffer.f32(), 0.0);
        norm.soft.clear();
        assert_eq!(stepper.clip(&[], &DeviceClip::default(), 0), Ok(vec![]));
        assert!(calls(&soft).is_empty());
    }
    let mut norm = norm;
    norm.buffer.set_f32(7.0);
    // SAFETY: as above.
    assert_eq!(unsafe { stepper.clip(&[], &clip, 0) }, Ok(vec![]));
    assert_eq!(norm.buffer.f32(), 0.0, "the norm of nothing");
}

/// The kernels that were launched since the logs were cleared.
fn kernels(soft: &Soft) -> Vec<String> {
    let log = soft.text("softgpu_call_log");
    let kernel = |line: &str| Some(line.split("qadam_").nth(1)?.split('"').next()?.to_owned());
    log.lines().filter_map(kernel).collect()
}

#[test]
fn cutting_takes_two_launches_and_measuring_one_and_none_waits() {
    let soft = soft();
    use_device(0);
    let stream = Stream::new();
    {
        let mut got = Model::small(300).limited().measured().on_device(&soft, 0);
        let plain = Model::small(300).on_device(&soft, 0);
        let mut stepper = Stepper::new(0).unwrap();
        let clip = DeviceClip { max_norm: Some(1.0), norm: None };
        for _ in 0..2 {
            cut_and_step(&mut stepper, &got, &clip, stream.handle()).unwrap();
        }
        soft.clear();
        cut_and_step(&mut stepper, &got, &clip, stream.handle()).unwrap();
        assert_eq!(kernels(&soft), ["squares", "cut", "measure", "step"]);
        let around = ["cuCtxPushCurrent_v2", "cuStreamIsCapturing"];
        let launches = ["cuLaunchKernel", "cuLaunchKernel", "cuCtxPopCurrent_v2"];
        let each = [&around[..], &launches].concat();
        assert_eq!(calls(&soft), [&each[..], &each].concat());
        assert_eq!(soft.syncs(), 0);

        // New gradients, a new limit: one upload for either table, and nothing else.
        got.move_grads();
        soft.clear();
        let clip = DeviceClip { max_norm: Some(2.0), norm: None };
        cut_and_step(&mut stepper, &got, &clip, stream.handle()).unwrap();
        assert_eq!(soft.count("cuMemcpyHtoDAsync"), 2);
        assert_eq!(soft.count("cuLaunchKernel"), 4);
        assert_eq!((soft.count("cuMemAlloc"), soft.syncs()), (0, 0));

        soft.clear();
        cut_and_step(&mut stepper, &plain, &clip, stream.handle()).unwrap();
        assert_eq!(kernels(&soft), ["squares", "cut", "step"]);
        soft.clear();
        // SAFETY: as above.
        unsafe { stepper.step(&plain.model.device_steps(), stream.handle()).unwrap() };
        assert_eq!(kernels(&soft), ["step"]);
        assert_eq!(soft.syncs(), 0);
    }
    stream.destroy();
}

#[test]
fn streams_may_change() {
    let soft = soft();
    use_device(0);
    let streams = [Stream::new(), Stream::new()];
    let mut want = Model::small(12).limited().measured();
    {
        let mut got = want.on_device(&soft, 0);
        let mut stepper = Stepper::new(0).unwrap();
        let clip = DeviceClip { max_norm: Some(0.2), norm: None };
        for round in 0..6 {
            if round % 3 == 0 {
                got.move_grads();
            }
            for _ in 0..2 {
                let stream = streams[round % 2].handle();
                cut_and_step(&mut stepper, &got, &clip, stream).unwrap();
                want.cut_and_step(Some(0.2));
            }
            got.model.assert_same(&want, &format!("round {round}"));
        }
    }
    streams.into_iter().for_each(Stream::destroy);
    assert_eq!(soft.text("softgpu_stream_races"), "");
}

#[test]
fn replays_cut_and_measure() {
    let soft = soft();
    use_device(0);
    let before = leaks(&soft);
    let stream = Stream::new();
    {
        let norm = Number::new(&soft, 0.0);
        let mut want = Model::mixed().limited().measured();
        let mut got = want.on_device(&soft, 0);
        let mut stepper = Stepper::new(0).unwrap();
        let clip = DeviceClip { max_norm: Some(0.1), norm: Some(norm.buffer.address()) };
        let refused = stream.capture(|| {
            let text = cut_and_step(&mut stepper, &got, &clip, stream.handle()).unwrap_err();
            assert!(text.to_string().contains("no memory is ready for its tables"), "{text}");
        });
        assert!(refused.is_ok());
        // Memory is taken by a step, or reserved.
        stepper.reserve(&got.model.device_steps(), 1).unwrap();
        stepper.reserve_clip(&got.model.device_steps(), &clip, 1).unwrap();
        soft.clear();
        let graph = stream.capture(|| {
            cut_and_step(&mut stepper, &got, &clip, stream.handle()).unwrap();
        });
        let graph = graph.unwrap();
        assert_eq!((soft.count("cuMemAlloc"), soft.syncs()), (0, 0));
        got.model.assert_same(&want, "a capture runs nothing");
        for round in 0..4 {
            graph.replay(stream);
            let (_, want_norm) = want.cut_and_step(Some(0.1));
            got.model.assert_same(&want, &format!("replay {round}"));
            assert_eq!(norm.buffer.f32(), want_norm);
            // Others in between have tables of their own.
            let other = DeviceClip { max_norm: Some(0.5), norm: None };
            cut_and_step(&mut stepper, &got, &other, stream.handle()).unwrap();
            want.cut_and_step(Some(0.5));
            got.model.assert_same(&want, &format!("beside replay {round}"));
            for model in [&mut want, &mut got.model] {
                model.refill_grads(round);
            }
        }
        // And the steps took memory for one more capture each.
        let graph = stream.capture(|| {
            let clip = DeviceClip { max_norm: Some(3.0), norm: None };
            cut_and_step(&mut stepper, &got, &clip, stream.handle()).unwrap();
        });
        graph.unwrap().replay(stream);
        want.cut_and_step(Some(3.0));
        got.model.assert_same(&want, "captured behind steps");
    }
    stream.destroy();
    assert_eq!(leaks(&soft), before);
    assert_eq!(soft.text("softgpu_stream_races"), "");
    assert_eq!(soft.text("softgpu_findings"), "");
}

#[test]
fn paged_state_is_cut_and_measured_as_state_that_is_not() {
    let soft = soft();
    use_device(0);
    let before = leaks(&soft);
    {
        let norm = Number::new(&soft, 0.0);
        let clip = DeviceClip { max_norm: Some(0.3), norm: Some(norm.buffer.address()) };
        for window in [1, 20_000, 256 << 20] {
            for part in [1, 3] {
                let mut want = Model::mixed().limited().measured();
                let mut got = want.on_device(&soft, 0);
                got.page(|i| i % part == 0);
                let mut stepper = Stepper::with_window(0, window).unwrap();
                for round in 0..2 {
                    soft.clear();
                    cut_and_step(&mut stepper, &got, &clip, 0).unwrap();
                    let (_, want_norm) = want.cut_and_step(Some(0.3));
                    got.model.assert_same(&want, &format!("{window}, {part}, round {round}"));
                    assert_eq!(norm.buffer.f32(), want_norm);
                    let kernels = kernels(&soft);
                    assert_eq!(kernels[..2], ["squares", "cut"], "over all windows");
                    assert!(
                        kernels[2..].iter().all(|kernel| kernel == "measure" || kernel == "step")
                    );
                }
            }
        }
    }
    assert_eq!(leaks(&soft), before);
    assert_eq!(soft.text("softgpu_stream_races"), "");
    assert_eq!(soft.text("softgpu_findings"), "");
}

#[test]
fn what_cannot_be_cut_is_refused_before_anything_is_done() {
    let soft = soft();
    let want = Model::small(3).limited();
    let got = want.on_device(&soft, 0);
    let mut stepper = Stepper::new(0).unwrap();
    let clip = |steps: &[DeviceStep], clip: &DeviceClip, stepper: &mut Stepper| {
        // SAFETY: refused.
        unsafe { stepper.clip(steps, clip, 0) }.unwrap_err().to_string()
    };
    let steps = got.model.device_steps();
    for max_norm in [-1.0, f64::NAN] {
        let asked = DeviceClip { max_norm: Some(max_norm), norm: None };
        let text = clip(&steps, &asked, &mut stepper);
        assert!(text.starts_with("max_grad_norm must be at least 0, got"), "{text}");
    }
    let asked = DeviceClip { max_norm: None, norm: Some(6) };
    let text = clip(&steps, &asked, &mut stepper);
    assert!(text.starts_with("the place of the norm"), "{text}");
    let asked = DeviceClip::default();
    for (history, percentile, say) in [
        (0, 5, "the history of norms of tensor 1 is at device address 0x0"),
        (0x102, 5, "the history of norms of tensor 1 is at device address 0x102"),
        (0x100, 100, "percentile_clipping must be a whole number less than 100, got 100"),
    ] {
        let mut steps = steps.clone();
        steps[1].percentile = Some(DevicePercentile { history, percentile });
        let text = clip(&steps, &asked, &mut stepper);
        assert!(text.starts_with(say), "{text}");
    }
    soft.clear();
    // SAFETY: refused.
    let text = unsafe { stepper.step(&steps, 0) }.unwrap_err().to_string();
    let say = "what clipping found of tensor 1 is at device address 0x0; a multiple of 16 other";
    assert!(text.starts_with(say), "{text}");
    assert!(calls(&soft).is_empty());
    // SAFETY: as above; counting does not cut.
    let counted = unsafe { stepper.count_nonfinite(&steps, 0) };
    assert_eq!(counted, Ok(want.count_nonfinite()));
    got.model.assert_same(&want, "refused");
}

/// What calls can fail.
const CALLS: [&str; 11] = [
    "cuCtxPushCurrent",
    "cuMemAlloc",
    "cuMemHostAlloc",
    "cuMemHostGetDevicePointer",
    "cuMemcpyHtoDAsync",
    "cuEventCreate",
    "cuEventRecord",
    "cuEventQuery",
    "cuStreamWaitEvent",
    "cuStreamIsCapturing",
    "cuLaunchKernel",
];

#[test]
fn any_call_may_fail_and_nothing_is_touched() {
    let soft = soft();
    use_device(0);
    let streams = [Stream::new(), Stream::new()];
    let theirs = use_device(1);
    drop(Launcher::new(0).unwrap());
    let before = leaks(&soft);
    let clip = DeviceClip { max_norm: Some(0.2), norm: None };
    let mut failures = 0;
    for call in CALLS {
        for k in 1.. {
            let mut want = Model::small(8).limited().measured();
            let mut got = want.on_device(&soft, 0);
            assert_eq!(soft.fail(call, k, 2), 0);
            let made = Stepper::new(0);
            let mut failed = made.is_err();
            let mut stepper = made.or_else(|_| Stepper::new(0)).unwrap();
            for (round, stream) in [0, 0, 1, 1, 1].into_iter().enumerate() {
                if round != 1 {
                    got.move_grads();
                }
                let stream = streams[stream].handle();
                let result = cut_and_step(&mut stepper, &got, &clip, stream);
                assert_eq!(result::ctx::get_current().unwrap(), Some(theirs), "{call} {k}");
                if let Err(error) = result {
                    assert!(matches!(error, Error::Cuda { code: 2, .. }), "{call} {k}: {error}");
                    got.model.assert_same(&want, &format!("{call} {k} in round {round}"));
                    assert!(!failed, "{call} fails once");
                    failed = true;
                    cut_and_step(&mut stepper, &got, &clip, stream).unwrap();
                }
                want.cut_and_step(Some(0.2));
                got.model.assert_same(&want, &format!("{call} {k} after round {round}"));
            }
            soft.disarm();
            drop((stepper, got));
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

/// Cuts and steps on the device and on the CPU, and compares everything.
fn compare(mut model: Model, soft: &Soft, max_norm: Option<f64>, what: &str) {
    let got = model.on_device(soft, 0);
    let mut stepper = Stepper::new(0).unwrap();
    let norm = Number::new(soft, -1.0);
    let clip = DeviceClip { max_norm, norm: Some(norm.buffer.address()) };
    cut_and_step(&mut stepper, &got, &clip, 0).unwrap();
    let (_, want) = model.cut_and_step(max_norm);
    assert_eq!(norm.buffer.f32().to_bits(), want.to_bits(), "{what}: the norm");
    got.model.assert_same(&model, what);
}

fn param(format: StateFormat, len: usize) -> Param {
    Param::flat((DType::F32, DType::F32, format), len, &mut 3)
}

#[test]
fn every_level_of_the_sums_is_the_cpus() {
    let soft = soft();
    // more tensors, and more folds of one, than a fold takes
    let many = (0..4200).map(|_| param(StateFormat::F32, 1)).collect();
    compare(Model(many).limited(), &soft, Some(0.1), "many tensors");
    let mut long = param(StateFormat::F32, 4096 * 4096 + 3 * 4096 + 77);
    long.hyper.max_unorm = 1e-4;
    let model = Model(vec![long, param(StateFormat::F32, 5000)]);
    compare(model, &soft, Some(0.1), "a long tensor");
}

#[test]
fn a_history_of_nan_limits_nothing() {
    let soft = soft();
    for nan in [0x7FC0_0000_u32, 0xFFC0_0000] {
        let mut model = Model::small(3).limited();
        for param in &mut model.0 {
            for place in param.history.bytes_mut().chunks_exact_mut(4) {
                place.copy_from_slice(&nan.to_le_bytes());
            }
        }
        compare(model, &soft, None, "a history of NaN");
    }
}

#[test]
fn a_scale_of_minus_zero_is_one_of_zero() {
    let soft = soft();
    for block_wise in [false, true] {
        for tiny in [0.0, 1e-42_f32] {
            let mut param = param(StateFormat::DYNAMIC8.with_block_wise(block_wise), 600);
            param.hyper.skip_zeros = true;
            param.g.bytes_mut().fill(0);
            param.g.bytes_mut()[1200..1204].copy_from_slice(&tiny.to_le_bytes());
            for scales in [1, 3] {
                for scale in param.state[scales].bytes_mut().chunks_exact_mut(4) {
                    scale.copy_from_slice(&(-0.0_f32).to_le_bytes());
                }
            }
            compare(Model(vec![param]), &soft, None, "a scale of -0");
        }
    }
}
