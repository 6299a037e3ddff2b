//! The ratio code through the safe API: how close it stays to the moments it stands for, and what it
//! leaves alone.

use qadam_core::cpu::Backend;
use qadam_core::{Adam, Hyper, ParamId, State, StateFormat, Update};

const LEN: usize = 1100; // blocks and a tail
const FORMATS: [StateFormat; 4] = [
    StateFormat::RATIO8,
    StateFormat::RATIO8.with_amsgrad(true),
    StateFormat::RATIO8.with_block_wise(false),
    StateFormat::RATIO8.with_block_wise(false).with_amsgrad(true),
];

fn adam(hyper: Hyper, format: StateFormat, backend: Backend) -> (Adam, ParamId) {
    let mut adam = Adam::new(hyper, format).unwrap().with_backend(backend).unwrap();
    let id = adam.add(LEN);
    (adam, id)
}

/// Noise whose size differs by five decades from element to element.
fn gradient(t: u32) -> Vec<f32> {
    let element = |i: u32| {
        let random = (i * 1009 + t).wrapping_mul(2_654_435_761) >> 8;
        let random = random.wrapping_mul(0x9E37_79B9 ^ t) >> 12;
        let size = 10_f32.powi(-((i % 6) as i32));
        ((random % 2001) as f32 / 1000.0 - 1.0) * size
    };
    (0..LEN as u32).map(element).collect()
}

/// The distance of parameters from those of 32-bit Adam after `steps`, in learning rates.
fn distance(format: StateFormat, steps: u32) -> f64 {
    let (hyper, backend) = (Hyper::adam(), Backend::current().unwrap());
    let (mut coded, a) = adam(hyper, format, backend);
    let (mut exact, b) = adam(hyper, StateFormat::F32.with_amsgrad(format.amsgrad), backend);
    let (mut p, mut q) = (vec![0.0_f32; LEN], vec![0.0_f32; LEN]);
    for t in 1..=steps {
        let g = gradient(t);
        coded.step(&mut [Update::new(a, &mut p[..], &g[..])]).unwrap();
        exact.step(&mut [Update::new(b, &mut q[..], &g[..])]).unwrap();
    }
    let sum: f64 = p.iter().zip(&q).map(|(p, q)| f64::from((p - q).abs())).sum();
    sum / LEN as f64 / hyper.lr
}

#[test]
fn it_stays_closer_to_32_bits_than_the_dynamic_code() {
    for amsgrad in [false, true] {
        let of = |format: StateFormat| distance(format.with_amsgrad(amsgrad), 300);
        let (ratio, dynamic) = (of(StateFormat::RATIO8), of(StateFormat::DYNAMIC8));
        assert!(ratio < 0.4 * dynamic, "amsgrad {amsgrad}: {ratio} {dynamic}");
    }
}

/// What rounding takes from first moments is made up for: it does not add up.
#[test]
fn errors_of_first_moments_do_not_add_up() {
    let hyper = Hyper { beta2: 0.9, ..Hyper::adam() };
    let backend = Backend::current().unwrap();
    let mut after = [0.0; 2];
    for (steps, sum) in [100, 3000].into_iter().zip(&mut after) {
        let (mut coded, a) = adam(hyper, StateFormat::RATIO8, backend);
        let (mut exact, b) = adam(hyper, StateFormat::F32, backend);
        let (mut p, mut q) = (vec![0.0_f32; LEN], vec![0.0_f32; LEN]);
        for t in 1..=steps {
            // of one magnitude, so that second moments are the same everywhere and exact
            let g: Vec<f32> = gradient(t).iter().map(|g| 0.01_f32.copysign(*g)).collect();
            coded.step(&mut [Update::new(a, &mut p[..], &g[..])]).unwrap();
            exact.step(&mut [Update::new(b, &mut q[..], &g[..])]).unwrap();
        }
        *sum = p.iter().zip(&q).map(|(p, q)| f64::from((p - q).abs())).sum::<f64>();
    }
    // a random walk's would be 5.5 times as large
    assert!(after[1] < 2.0 * after[0], "{after:?}");
    assert!(after[1] / LEN as f64 / hyper.lr < 0.1, "{after:?}");
}

/// One scale of ratios for all may grow by a rounding: it is found by what all elements decode to.
#[test]
fn elements_that_are_kept_keep_parameter_and_codes() {
    for (format, backend) in
        FORMATS.into_iter().flat_map(|f| Backend::available().map(move |b| (f, b)))
    {
        let (mut adam, id) = adam(Hyper::adam(), format, backend);
        let mut p = vec![0.5_f32; LEN];
        for t in 1..20 {
            adam.step(&mut [Update::new(id, &mut p[..], &gradient(t)[..])]).unwrap();
        }
        let (before, old) = (adam.state(id).unwrap().0.clone(), p.clone());
        adam.step(&mut [Update::new(id, &mut p[..], &[f32::NAN; LEN][..])]).unwrap();
        if format.block_wise {
            assert_eq!(adam.state(id).unwrap().0, &before, "{format} {backend:?}");
        }
        assert_eq!(p, old, "{format} {backend:?}");
        // an element of a block moves, whose moments are neither the largest nor the smallest
        let moves = |i: usize| i % 256 == 100;
        let one: Vec<f32> = (0..LEN).map(|i| if moves(i) { 0.0 } else { f32::NAN }).collect();
        adam.step(&mut [Update::new(id, &mut p[..], &one[..])]).unwrap();
        let after = adam.state(id).unwrap().0;
        let codes = |state: &State| match state {
            State::Coded { exp_avg, exp_avg_sq, .. } => {
                exp_avg.code.iter().zip(&exp_avg_sq.code).map(|(a, b)| (*a, *b)).collect::<Vec<_>>()
            }
            State::F32 { .. } => unreachable!("the format is 8-bit"),
        };
        for (i, (was, is)) in codes(&before).into_iter().zip(codes(after)).enumerate() {
            let kept = (was, old[i]) == (is, p[i]);
            assert!(kept || moves(i), "{format} {backend:?} {i}");
        }
        assert_ne!(p, old, "{format} {backend:?}");
    }
}

/// Second moments decay as they do at 32 bits, however slowly.
#[test]
fn second_moments_of_zero_gradients_decay() {
    let (mut coded, id) = adam(Hyper::adam(), StateFormat::RATIO8, Backend::current().unwrap());
    let (mut exact, b) = adam(Hyper::adam(), StateFormat::F32, Backend::current().unwrap());
    let (mut p, mut q) = (vec![0.0_f32; LEN], vec![0.0_f32; LEN]);
    for t in 1..=2000 {
        let g: Vec<f32> =
            gradient(t.min(50)).iter().map(|g| if t <= 50 { *g } else { 0.0 }).collect();
        coded.step(&mut [Update::new(id, &mut p[..], &g[..])]).unwrap();
        exact.step(&mut [Update::new(b, &mut q[..], &g[..])]).unwrap();
    }
    let State::Coded { exp_avg, exp_avg_sq, .. } = coded.state(id).unwrap().0 else {
        unreachable!("the format is 8-bit")
    };
    let State::F32 { exp_avg_sq: want, .. } = exact.state(b).unwrap().0 else {
        unreachable!("the format is 32-bit")
    };
    let mut logs = 0.0;
    for block in 0..LEN.div_ceil(256) {
        let (start, end) = (block * 256, LEN.min(block * 256 + 256));
        let scales = [
            qadam_core::codec::Scale::read(&exp_avg.scale[block..=block]),
            qadam_core::codec::Scale::read(&exp_avg_sq.scale[2 * block..2 * block + 2]),
            qadam_core::codec::Scale::default(),
        ];
        let bytes = [&exp_avg.code[start..end], &exp_avg_sq.code[start..end], &[]];
        let decoded = qadam_core::codec::ratio::decode_block(bytes, &scales);
        for (i, [_, v, _]) in decoded.into_iter().enumerate() {
            let log = f64::from(v / want[start + i]).ln();
            assert!(log.abs() < 0.6, "{}: {v} {}", start + i, want[start + i]);
            logs += log;
        }
    }
    assert!((logs / LEN as f64).abs() < 0.02, "{}", logs / LEN as f64);
}
