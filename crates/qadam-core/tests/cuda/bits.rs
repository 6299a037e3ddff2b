//! The device gives the CPU's bits.

use cudarc::driver::result;
use qadam_core::cuda::{DeviceStep, Launcher, availability};
use qadam_core::{DType, Hyper, NonFinite, StateFormat};

use crate::device::{Stream, leaks, soft, use_device};
use crate::model::{Buffer, Model, Param};

#[test]
fn a_mixed_model_steps_as_on_the_cpu() {
    let soft = soft();
    let before = leaks(&soft);
    {
        let mut want = Model::mixed();
        let mut got = want.on_device(&soft, 0);
        let mut launcher = Launcher::new(0).unwrap();
        let mut nonfinite = 0;
        for round in 0..4 {
            // SAFETY: the model's memory is the device's; the stand-in is done when it returns.
            unsafe { launcher.step(&got.model.device_steps(), 0).unwrap() };
            nonfinite += want.step();
            got.model.assert_same(&want, &format!("round {round}"));
            assert_eq!(launcher.nonfinite(), nonfinite);
            for model in [&mut want, &mut got.model] {
                model.refill_grads(round + 100);
                if round == 1 {
                    model.set_lr(0.03);
                }
            }
            if round == 2 {
                got.move_grads();
            }
        }
        assert!(nonfinite > 100);
    }
    assert_eq!(leaks(&soft), before);
    assert_eq!(soft.text("softgpu_findings"), "");
    assert_eq!(soft.text("softgpu_stream_races"), "");
}

#[test]
fn measured_models_step_as_on_the_cpu() {
    let soft = soft();
    let before = leaks(&soft);
    for start in [Model::mixed().measured(), Model::small(300).measured()] {
        let mut want = start;
        let got = want.on_device(&soft, 0);
        let mut launcher = Launcher::new(0).unwrap();
        for round in 0..3 {
            // SAFETY: the model's memory is the device's; the stand-in is done when it returns.
            unsafe { launcher.step(&got.model.device_steps(), 0).unwrap() };
            want.step();
            got.model.assert_same(&want, &format!("round {round}"));
        }
    }
    assert_eq!(leaks(&soft), before);
    assert_eq!(soft.text("softgpu_findings"), "");
}

#[test]
fn tables_that_differ_only_in_what_is_measured_are_told_apart() {
    let soft = soft();
    let mut seed = 5;
    let kind = (DType::F32, DType::F32, StateFormat::DYNAMIC8.with_block_wise(false));
    let mut launcher = Launcher::new(0).unwrap();
    // One chunk each, if another made chunks long: as many bytes to upload, more folds.
    let long = Param::flat((DType::F32, DType::F32, StateFormat::F32), 2_000_000, &mut seed);
    for len in [3000, 9000, 12_288, 12_289, 1] {
        let mut want = Model(vec![long.clone(), Param::flat(kind, len, &mut seed)]);
        let got = want.on_device(&soft, 0);
        // SAFETY: as above.
        unsafe { launcher.step(&got.model.device_steps()[1..], 0).unwrap() };
        want.0[0].has_grad = false;
        want.step();
        got.model.assert_same(&want, &format!("{len}"));
    }
}

#[test]
fn a_model_without_elements_counts_its_steps() {
    let soft = soft();
    let mut seed = 1;
    let mut want =
        Model(vec![Param::flat((DType::F32, DType::F32, StateFormat::F32), 0, &mut seed)]);
    let got = want.on_device(&soft, 0);
    let mut launcher = Launcher::new(0).unwrap();
    for steps in 1..4_u8 {
        // SAFETY: as above.
        unsafe { launcher.step(&got.model.device_steps(), 0).unwrap() };
        want.step();
        got.model.assert_same(&want, "no elements");
        assert_eq!(got.model.0[0].step.f32(), steps.into());
    }
}

#[test]
fn nonfinite_values_propagate_if_asked() {
    let soft = soft();
    let mut want = Model::small(6);
    for param in &mut want.0 {
        param.hyper = Hyper { nonfinite: NonFinite::Propagate, ..Hyper::adam() };
    }
    let got = want.on_device(&soft, 0);
    let mut launcher = Launcher::new(0).unwrap();
    for _ in 0..2 {
        // SAFETY: as above.
        unsafe { launcher.step(&got.model.device_steps(), 0).unwrap() };
        want.step();
        got.model.assert_same(&want, "propagated");
    }
}

/// The steps, with a scale and a `found_inf` that the device reads.
fn with_amp(steps: Vec<DeviceStep>, scale: &Buffer, found: &Buffer) -> Vec<DeviceStep> {
    let (grad_scale, found_inf) = (Some(scale.address()), Some(found.address()));
    steps.into_iter().map(|step| DeviceStep { grad_scale, found_inf, ..step }).collect()
}

#[test]
fn the_device_reads_the_scale_and_takes_no_step_where_infinities_were_found() {
    let soft = soft();
    let mut want = Model::mixed();
    for param in want.0.iter_mut().step_by(3) {
        param.hyper.maximize = true;
    }
    let mut got = want.on_device(&soft, 0);
    let mut launcher = Launcher::new(0).unwrap();
    let (mut scale, mut found) = (Buffer::new(4, 0), Buffer::new(4, 0));
    for buffer in [&mut scale, &mut found] {
        assert_eq!(soft.adopt(buffer.bytes_mut(), 0), 0);
    }
    let mut nonfinite = 0;
    for (round, (s, inf)) in
        [(1024.0, 0.0), (512.0, 1.0), (512.0, -0.0), (3.0, f32::NAN), (0.0, 0.0), (0.1, 0.0)]
            .into_iter()
            .enumerate()
    {
        scale.set_f32(s);
        found.set_f32(inf);
        let steps = with_amp(got.model.device_steps(), &scale, &found);
        soft.clear();
        // SAFETY: the model's memory is the device's; the stand-in is done when it returns.
        let first = unsafe {
            launcher.step(&steps, 0).unwrap();
            assert_eq!(soft.syncs(), 0);
            launcher.count_nonfinite(&steps, 0).unwrap()
        };
        want.set_grad_scale(s);
        if inf == 0.0 {
            nonfinite += want.step();
            assert_eq!(first, want.count_nonfinite(), "round {round}");
        } else {
            assert_eq!(first, None, "round {round}");
        }
        got.model.assert_same(&want, &format!("round {round}"));
        assert_eq!(launcher.nonfinite(), nonfinite);
        for model in [&mut want, &mut got.model] {
            model.refill_grads(round as u64);
        }
    }
    drop(launcher);
    soft.unadopt(scale.address());
    soft.unadopt(found.address());
    assert_eq!(soft.text("softgpu_findings"), "");
}

#[test]
fn some_tensors_can_be_left_out_by_the_device_and_others_not() {
    let soft = soft();
    let mut want = Model::small(9);
    let got = want.on_device(&soft, 0);
    let mut launcher = Launcher::new(0).unwrap();
    let mut found = Buffer::new(4, 0);
    found.set_f32(1.0);
    assert_eq!(soft.adopt(found.bytes_mut(), 0), 0);
    let mut steps = got.model.device_steps();
    for step in steps.iter_mut().skip(1).step_by(2) {
        step.found_inf = Some(found.address());
    }
    // SAFETY: as above.
    unsafe { launcher.step(&steps, 0).unwrap() };
    for param in want.0.iter_mut().skip(1).step_by(2) {
        param.has_grad = false;
    }
    let nonfinite = want.step();
    got.model.assert_same(&want, "every other tensor");
    assert_eq!(launcher.nonfinite(), nonfinite);
    drop(launcher);
    soft.unadopt(found.address());
}

#[test]
fn the_first_tensor_with_nonfinite_gradients_is_found_and_nothing_written() {
    let soft = soft();
    let mut seed = 3;
    let kind = (DType::BF16, DType::F32, StateFormat::DYNAMIC8);
    let mut model =
        Model((0..5).map(|i| Param::flat(kind, 5000 * i, &mut seed)).collect::<Vec<_>>());
    for param in &mut model.0 {
        param.g.bytes_mut().fill(0);
    }
    let mut launcher = Launcher::new(0).unwrap();
    let mut count = |model: &Model| {
        let got = model.on_device(&soft, 0);
        // SAFETY: as above.
        let found = unsafe { launcher.count_nonfinite(&got.model.device_steps(), 0).unwrap() };
        got.model.assert_same(model, "counted");
        found
    };
    assert_eq!(count(&model), None);
    let nan = f32::NAN.to_le_bytes();
    for (param, elements) in [(4, vec![1, 19_999]), (2, vec![0, 4999, 5000, 9999])] {
        for at in elements {
            model.0[param].g.bytes_mut()[4 * at..4 * at + 4].copy_from_slice(&nan);
        }
    }
    assert_eq!(count(&model), Some((2, 4)));
    assert_eq!(count(&Model(model.0.split_off(3))), Some((1, 2)));

    // An infinite parameter makes the gradient infinite through coupled decay only.
    model.0[1].p.bytes_mut()[..2].copy_from_slice(&qadam_core::bf16::INFINITY.to_le_bytes());
    model.0.truncate(2);
    assert_eq!(count(&model), None);
    model.0[1].hyper = Hyper { weight_decay: 0.1, ..Hyper::adam() };
    assert_eq!(count(&model), Some((1, 1)));
}

#[test]
fn every_kind_of_tensor_is_counted_as_on_the_cpu() {
    let soft = soft();
    let mut launcher = Launcher::new(0).unwrap();
    let mut found = 0;
    for (i, mut param) in Model::mixed().0.into_iter().filter(|param| param.has_grad).enumerate() {
        param.hyper.skip_zeros = i % 2 == 0;
        param.hyper.weight_decay = if i % 3 == 0 { 1e300 } else { 0.0 }; // coupled, it makes NaNs
        let size = param.grad_dtype.size();
        param.g.bytes_mut().chunks_exact_mut(size).step_by(3).for_each(|zero| zero.fill(0));
        let model = Model(vec![param]);
        let got = model.on_device(&soft, 0);
        // SAFETY: as above.
        let count = unsafe { launcher.count_nonfinite(&got.model.device_steps(), 0).unwrap() };
        assert_eq!(count, model.count_nonfinite());
        found += usize::from(count.is_some());
    }
    assert!(found > 10);
}

#[test]
fn two_devices_step_their_own_tensors_and_the_current_context_stays() {
    let soft = soft();
    assert_eq!(availability(), Ok(2));
    let mut want = Model::small(9);
    let zero = want.on_device(&soft, 0);
    let one = want.on_device(&soft, 1);
    let theirs = use_device(1);
    let mut launchers = [Launcher::new(0).unwrap(), Launcher::new(1).unwrap()];
    for _ in 0..2 {
        for (launcher, model) in launchers.iter_mut().zip([&zero, &one]) {
            // SAFETY: as above.
            unsafe { launcher.step(&model.model.device_steps(), 0).unwrap() };
            assert_eq!(result::ctx::get_current().unwrap(), Some(theirs));
        }
        want.step();
        zero.model.assert_same(&want, "device 0");
        one.model.assert_same(&want, "device 1");
    }
    drop(launchers);
    assert_eq!(result::ctx::get_current().unwrap(), Some(theirs));
    let text = Launcher::new(2).unwrap_err().to_string();
    assert_eq!(text, "CUDA is not available: there is no device 2, only 2");
}

#[test]
fn changing_streams_are_ordered_one_behind_the_other() {
    let soft = soft();
    use_device(0);
    let streams = [Stream::new(), Stream::new()];
    let mut want = Model::small(5);
    let mut got = want.on_device(&soft, 0);
    let mut launcher = Launcher::new(0).unwrap();
    for round in 0..6 {
        let stream = streams[round % 2];
        if round % 3 == 0 {
            got.move_grads();
        }
        // SAFETY: as above.
        unsafe { launcher.step(&got.model.device_steps(), stream.handle()).unwrap() };
        // SAFETY: as above. A second step that uploads nothing must be waited for, too.
        unsafe { launcher.step(&got.model.device_steps(), stream.handle()).unwrap() };
        want.step();
        want.step();
    }
    got.model.assert_same(&want, "two streams");
    assert_eq!(soft.text("softgpu_stream_races"), "");

    // A stream that is gone, against the contract, leaves work behind that must be waited for.
    streams[1].destroy();
    soft.clear();
    // SAFETY: as above.
    unsafe { launcher.step(&got.model.device_steps(), streams[0].handle()).unwrap() };
    want.step();
    got.model.assert_same(&want, "after a stream was destroyed");
    assert_eq!(soft.syncs(), 1);
    drop(launcher);
    streams[0].synchronize();
    streams[0].destroy();
}
