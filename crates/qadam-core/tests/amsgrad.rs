//! AMSGrad through the safe API: `torch.optim`'s equation, and what 8 bits may lose of the maximum.

use proptest::prelude::*;
use qadam_core::codec::Code;
use qadam_core::codec::block::{BLOCK, decode};
use qadam_core::codec::dynamic::{self, Sign};
use qadam_core::cpu::Backend;
use qadam_core::{Adam, Coded, Decay, Hyper, ParamId, State, StateFormat, Update};

const LEN: usize = 300; // a block and a tail
const F32: StateFormat = StateFormat::F32.with_amsgrad(true);
const DYNAMIC8: StateFormat = StateFormat::DYNAMIC8.with_amsgrad(true);

fn adam(hyper: Hyper, format: StateFormat, backend: Backend) -> (Adam, ParamId) {
    let mut adam = Adam::new(hyper, format).unwrap().with_backend(backend).unwrap();
    let id = adam.add(LEN);
    (adam, id)
}

/// The third moment.
fn maxima(adam: &Adam, id: ParamId) -> Coded {
    match adam.state(id).unwrap().0 {
        State::Coded { max_exp_avg_sq: Some(maxima), .. } => maxima.clone(),
        other => panic!("{:?} has no coded maximum", other.format()),
    }
}

/// As values.
fn values(coded: &Coded) -> Vec<f32> {
    let value = |(i, &code): (usize, &u8)| decode(code, coded.scale[i / BLOCK], Sign::Unsigned);
    coded.code.iter().enumerate().map(value).collect()
}

/// Gradients with rare spikes, which the maximum remembers; every element has a size of its own.
fn gradient(t: usize) -> Vec<f32> {
    let element = |i: usize| {
        let random = (i * 2_654_435_761 + t * 40_503).wrapping_mul(2_246_822_519) >> 13;
        let x = (random % 2001) as f32 / 1000.0 - 1.0;
        let spike = if random.is_multiple_of(41) { 20.0 } else { 1.0 };
        x * spike * 2_f32.powi(-(i as i32 % 5))
    };
    (0..LEN).map(element).collect()
}

/// `torch.optim.Adam`, in f64.
struct Reference {
    amsgrad: bool,
    hyper: Hyper,
    p: Vec<f64>,
    moments: Vec<[f64; 3]>,
}

impl Reference {
    fn step(&mut self, t: i32, grad: &[f32]) {
        let Hyper { lr, beta1, beta2, eps, weight_decay, decay, .. } = self.hyper;
        let (c1, c2) = (1.0 - beta1.powi(t), 1.0 - beta2.powi(t));
        for ((p, [m, v, max_v]), &g) in self.p.iter_mut().zip(&mut self.moments).zip(grad) {
            let mut g = f64::from(if self.hyper.maximize { -g } else { g });
            match decay {
                Decay::Coupled => g += weight_decay * *p,
                Decay::Decoupled => *p *= 1.0 - lr * weight_decay,
            }
            *m = beta1 * *m + (1.0 - beta1) * g;
            *v = beta2 * *v + (1.0 - beta2) * g * g;
            *max_v = if self.amsgrad { max_v.max(*v) } else { *v };
            *p -= lr / c1 * *m / (max_v.sqrt() / c2.sqrt() + eps);
        }
    }
}

/// The largest distance from the reference after 300 steps of 1e-3, and from where it began.
fn distances(hyper: Hyper, format: StateFormat, backend: Backend) -> (f64, f64) {
    let (mut adam, id) = adam(hyper, format, backend);
    let mut p = vec![0.5_f32; LEN];
    let (amsgrad, moments) = (format.amsgrad, vec![[0.0; 3]; LEN]);
    let mut reference = Reference { amsgrad, hyper, p: vec![0.5; LEN], moments };
    for t in 1..=300 {
        let grad = gradient(t);
        adam.step(&mut [Update::new(id, &mut p[..], &grad[..])]).unwrap();
        reference.step(t as i32, &grad);
    }
    let largest = |of: &dyn Fn(usize) -> f64| (0..LEN).map(of).fold(0.0, f64::max);
    let error = largest(&|i| (f64::from(p[i]) - reference.p[i]).abs());
    (error, largest(&|i| (reference.p[i] - 0.5).abs()))
}

#[test]
fn both_widths_follow_torch() {
    let coupled = Hyper { weight_decay: 0.1, maximize: true, ..Hyper::adam() };
    for hyper in [Hyper::adam(), Hyper::adamw(), coupled] {
        for backend in Backend::available() {
            let (error, way) = distances(hyper, F32, backend);
            assert!(error < 1e-5 && way > 0.015, "{backend:?}: {error} of {way}");
            // At 8 bits, as near to it as Adam's two moments are to theirs.
            let (plain, _) = distances(hyper, StateFormat::DYNAMIC8, backend);
            let (error, _) = distances(hyper, DYNAMIC8, backend);
            assert!(error < 1.1 * plain, "{backend:?} at 8 bits: {error}, without {plain}");
        }
    }
}

#[test]
fn the_maximum_matters() {
    let run = |format| {
        let (mut adam, id) = adam(Hyper::adam(), format, Backend::Scalar);
        let mut p = vec![0.5_f32; LEN];
        for t in 0..100 {
            adam.step(&mut [Update::new(id, &mut p[..], &gradient(t)[..])]).unwrap();
        }
        p
    };
    assert_ne!(run(F32), run(StateFormat::F32));
    assert_ne!(run(DYNAMIC8), run(StateFormat::DYNAMIC8));
}

/// While the second moments fall, what is stored of their maximum stays, to the bit.
#[test]
fn maxima_that_are_not_exceeded_keep_their_codes() {
    for backend in Backend::available() {
        let (mut adam, id) = adam(Hyper { beta2: 0.9, ..Hyper::adam() }, DYNAMIC8, backend);
        let mut p = vec![0.5_f32; LEN];
        adam.step(&mut [Update::new(id, &mut p[..], &gradient(1)[..])]).unwrap();
        let first = maxima(&adam, id);
        for _ in 0..100 {
            adam.step(&mut [Update::new(id, &mut p[..], &[0.0_f32; LEN][..])]).unwrap();
            assert_eq!(maxima(&adam, id), first, "{backend:?}");
        }
    }
}

/// So does every code at every scale that is not tiny: decoding and encoding is the identity.
#[test]
fn codes_are_idempotent_at_scales_of_all_sizes() {
    let (mut adam, id) = adam(Hyper { beta2: 0.0, ..Hyper::adam() }, DYNAMIC8, Backend::Scalar);
    let zeros = Coded { code: vec![0; LEN], scale: vec![0.0; 2] };
    let first = Coded { code: vec![127; LEN], scale: vec![0.0; 2] };
    for exponent in -120..128 {
        let scale = 2_f32.powi(exponent) * 1.37;
        let scale = if scale.is_finite() { scale } else { f32::MAX };
        let code = (0..LEN).map(|i| 255 - (i % 256) as u8).collect();
        let all = Coded { code, scale: vec![scale; 2] };
        let (exp_avg, exp_avg_sq) = (first.clone(), zeros.clone());
        let max_exp_avg_sq = Some(all.clone());
        let state = State::Coded {
            code: Code::Dynamic,
            exp_avg,
            exp_avg_sq,
            max_exp_avg_sq,
            block_wise: true,
        };
        adam.load_state(id, state, 1).unwrap();
        adam.step(&mut [Update::new(id, &mut [0.0_f32; LEN][..], &[0.0_f32; LEN][..])]).unwrap();
        assert_eq!(maxima(&adam, id), all, "{scale:e}");
    }
}

#[test]
fn blocks_without_a_finite_gradient_keep_everything() {
    for backend in Backend::available() {
        let (mut adam, id) = adam(Hyper::adam(), DYNAMIC8, backend);
        let mut p = vec![0.5_f32; LEN];
        adam.step(&mut [Update::new(id, &mut p[..], &gradient(1)[..])]).unwrap();
        let (state, before) = (adam.state(id).unwrap().0.clone(), p.clone());
        let report = adam.step(&mut [Update::new(id, &mut p[..], &[f32::NAN; LEN][..])]).unwrap();
        assert_eq!(report.nonfinite, LEN);
        assert_eq!((adam.state(id).unwrap(), &p), ((&state, 2), &before));
    }
}

/// A gradient whose size is `2^exponent`, or none.
fn element() -> impl Strategy<Value = f32> {
    let size = -30.0_f32..0.0;
    prop_oneof![
        8 => (size, any::<bool>()).prop_map(|(e, up)| if up { e.exp2() } else { -e.exp2() }),
        1 => Just(0.0_f32),
        1 => Just(f32::NAN),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 100, ..ProptestConfig::default() })]

    /// What is stored falls by half the distance to the next code at most, whatever the scales do,
    /// and where they stay it does not fall; a scale never does; nothing positive becomes 0.
    #[test]
    fn a_stored_maximum_falls_by_a_rounding_at_most(
        steps in prop::collection::vec((prop::collection::vec(element(), LEN), -30_i32..30), 1..12),
        grows in any::<bool>(),
        beta2 in prop::sample::select(vec![0.0, 0.5, 0.999]),
        backend in prop::sample::select(Backend::available().collect::<Vec<_>>()),
    ) {
        let (mut adam, id) = adam(Hyper { beta2, ..Hyper::adam() }, DYNAMIC8, backend);
        let mut p = vec![0.5_f32; LEN];
        let mut before = maxima(&adam, id);
        for (k, (grad, exponent)) in steps.iter().enumerate() {
            let size = 2_f32.powi(if grows { k as i32 } else { *exponent });
            let grad: Vec<f32> = grad.iter().map(|g| g * size).collect();
            adam.step(&mut [Update::new(id, &mut p[..], &grad[..])]).unwrap();
            let after = maxima(&adam, id);
            for (i, (old, new)) in values(&before).into_iter().zip(values(&after)).enumerate() {
                let (code, scale) = (after.code[i], after.scale[i / BLOCK]);
                prop_assert!(scale >= before.scale[i / BLOCK]);
                if scale == before.scale[i / BLOCK] {
                    prop_assert!(code >= before.code[i]);
                }
                prop_assert!(old == 0.0 || new > 0.0);
                let value = |code| f64::from(dynamic::decode(code, Sign::Unsigned));
                let half_step = (value(code.saturating_add(1)) - value(code)) / 2.0;
                let fall = f64::from(old) - f64::from(new);
                let most = (half_step + 1e-6 * value(code)) * f64::from(scale);
                prop_assert!(fall <= most, "element {i} from {old:e} to {new:e}");
            }
            before = after;
        }
    }
}
