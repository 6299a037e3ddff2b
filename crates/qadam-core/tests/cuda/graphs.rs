//! Captured steps, replayed.

use qadam_core::cuda::{DeviceStep, Launcher};

use crate::device::{Stream, leaks, soft, use_device};
use crate::model::{Buffer, Model};

fn with_lr_at(steps: Vec<DeviceStep>, lr: &Buffer) -> Vec<DeviceStep> {
    let lr_address = Some(lr.address());
    steps.into_iter().map(|step| DeviceStep { lr_address, ..step }).collect()
}

#[test]
fn replays_follow_the_learning_rate_and_survive_other_steps() {
    let soft = soft();
    use_device(0);
    let before = leaks(&soft);
    let stream = Stream::new();
    {
        let mut lr = Buffer::new(4, 0);
        lr.set_f32(1e-3);
        assert_eq!(soft.adopt(lr.bytes_mut(), 0), 0);
        let mut want = Model::mixed();
        let mut got = want.on_device(&soft, 0);
        let mut launcher = Launcher::new(0).unwrap();
        // The reference reads the same f32.
        let cpu_step = |want: &mut Model, lr: &Buffer| {
            want.set_lr(lr.f32().into());
            want.step();
        };
        let steps = with_lr_at(got.model.device_steps(), &lr);
        // SAFETY: the model's memory is the device's; the stand-in is done when it returns.
        unsafe { launcher.step(&steps, stream.handle()).unwrap() };
        cpu_step(&mut want, &lr);

        // Other gradients than in the step before, as when torch captures.
        let mut captured = got.model.device_steps();
        captured[3].grad = 0;
        captured.swap(1, 2);
        let captured = with_lr_at(captured, &lr);
        soft.clear();
        let graph = stream.capture(|| {
            // SAFETY: as above; the memory outlives the graph.
            unsafe { launcher.step(&captured, stream.handle()).unwrap() };
        });
        let graph = graph.unwrap();
        for call in ["cuMemAlloc", "cuMemHostAlloc", "cuEventQuery", "cuEventRecord"] {
            assert_eq!(soft.count(call), 0, "{call}");
        }
        assert_eq!(soft.syncs(), 0);
        got.model.assert_same(&want, "a capture runs nothing");

        for round in 0..4_u8 {
            lr.set_f32(1e-3 / f32::from(round + 1));
            graph.replay(stream);
            want.0[3].has_grad = false;
            cpu_step(&mut want, &lr);
            want.0[3].has_grad = true;
            got.model.assert_same(&want, &format!("replay {round}"));
            // Steps beside the graph have tables of their own: here with fewer tensors.
            let steps = with_lr_at(got.model.device_steps(), &lr);
            // SAFETY: as above.
            unsafe { launcher.step(&steps[..5], stream.handle()).unwrap() };
            let rest = want.0.split_off(5);
            cpu_step(&mut want, &lr);
            want.0.extend(rest);
            got.model.assert_same(&want, &format!("step beside replay {round}"));
            for model in [&mut want, &mut got.model] {
                model.refill_grads(round.into());
            }
        }
        drop(graph);
        drop(launcher);
        soft.unadopt(lr.address());
    }
    stream.destroy();
    assert_eq!(leaks(&soft), before);
    assert_eq!(soft.text("softgpu_stream_races"), "");
    assert_eq!(soft.text("softgpu_findings"), "");
}

#[test]
fn replays_follow_the_scale_of_the_loss_and_leave_out_steps() {
    let soft = soft();
    use_device(0);
    let stream = Stream::new();
    {
        let (mut scale, mut found) = (Buffer::new(4, 0), Buffer::new(4, 0));
        scale.set_f32(1.0);
        for buffer in [&mut scale, &mut found] {
            assert_eq!(soft.adopt(buffer.bytes_mut(), 0), 0);
        }
        let mut want = Model::small(8);
        let got = want.on_device(&soft, 0);
        let mut launcher = Launcher::new(0).unwrap();
        let (grad_scale, found_inf) = (Some(scale.address()), Some(found.address()));
        let steps = got.model.device_steps().into_iter();
        let steps: Vec<_> =
            steps.map(|step| DeviceStep { grad_scale, found_inf, ..step }).collect();
        launcher.reserve(&steps, 1).unwrap();
        let graph = stream.capture(|| {
            // SAFETY: as above.
            unsafe { launcher.step(&steps, stream.handle()).unwrap() };
        });
        let graph = graph.unwrap();
        for (s, inf) in [(64.0, 0.0), (128.0, 1.0), (32.0, 0.0)] {
            scale.set_f32(s);
            found.set_f32(inf);
            graph.replay(stream);
            if inf == 0.0 {
                want.set_grad_scale(s);
                want.step();
            }
            got.model.assert_same(&want, &format!("scale {s}, found {inf}"));
        }
        drop(graph);
        drop(launcher);
        soft.unadopt(scale.address());
        soft.unadopt(found.address());
    }
    stream.destroy();
    assert_eq!(soft.text("softgpu_findings"), "");
}

#[test]
fn memory_for_captures_is_taken_before() {
    let soft = soft();
    use_device(0);
    let stream = Stream::new();
    {
        let mut want = Model::small(8);
        let got = want.on_device(&soft, 0);
        let steps = got.model.device_steps();
        let mut launcher = Launcher::new(0).unwrap();
        let mut text = String::new();
        let graph = stream.capture(|| {
            // SAFETY: refused.
            text = unsafe { launcher.step(&steps, stream.handle()) }.unwrap_err().to_string();
        });
        assert!(graph.is_ok(), "the capture itself is sound");
        assert!(text.contains("no memory is ready for its table"), "{text}");

        launcher.reserve(&steps, 2).unwrap();
        let graph = stream.capture(|| {
            // SAFETY: as above.
            unsafe {
                launcher.step(&steps, stream.handle()).unwrap();
                launcher.step(&steps[..4], stream.handle()).unwrap();
                launcher.step(&steps, stream.handle()).unwrap(); // shares the first one's table
                assert!(launcher.step(&steps[..3], stream.handle()).is_err());
                let count = launcher.count_nonfinite(&steps, stream.handle());
                let text = count.unwrap_err().to_string();
                assert!(text.contains("nonfinite \"raise\" waits"), "{text}");
            }
        });
        let graph = graph.unwrap();
        graph.replay(stream);
        let rest = {
            want.step();
            want.0.split_off(4)
        };
        want.step();
        want.0.extend(rest);
        want.step();
        got.model.assert_same(&want, "three steps in a graph");
    }
    stream.destroy();
}

#[test]
fn a_step_cannot_wait_for_a_stream_that_is_being_captured() {
    let soft = soft();
    use_device(0);
    let (a, b) = (Stream::new(), Stream::new());
    {
        let mut want = Model::small(3);
        let got = want.on_device(&soft, 0);
        let steps = got.model.device_steps();
        let mut launcher = Launcher::new(0).unwrap();
        // SAFETY: as above.
        unsafe { launcher.step(&steps, a.handle()).unwrap() };
        want.step();
        let graph = a.capture(|| {
            // SAFETY: refused.
            let text = unsafe { launcher.step(&steps, b.handle()) }.unwrap_err().to_string();
            assert!(text.contains("the previous step is being captured"), "{text}");
        });
        assert!(graph.is_ok());
        // SAFETY: as above.
        unsafe { launcher.step(&steps, b.handle()).unwrap() };
        want.step();
        got.model.assert_same(&want, "after the capture");
    }
    a.destroy();
    b.destroy();
    assert_eq!(soft.text("softgpu_stream_races"), "");
}
