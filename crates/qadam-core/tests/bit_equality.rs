//! Scalar, AVX2 and AVX-512 code and 1 to 8 threads give the same bits, over adversarial floats:
//! NaN, infinities, subnormals, signed zeros, huge ranges within a block, tails, no element at all.

use proptest::prelude::*;
use qadam_core::cpu::Backend;
use qadam_core::{
    Adam, Buffer, Decay, GradRef, Hyper, NonFinite, ParamMut, State, StateFormat, StepOptions,
    Update, bf16, f16,
};

/// Element types as bits, so that NaNs compare.
trait Bits: Copy + PartialEq + std::fmt::Debug + 'static {
    fn from_f32(x: f32) -> Self;
    fn bits(self) -> u32;
}
impl Bits for f32 {
    fn from_f32(x: f32) -> Self {
        x
    }
    fn bits(self) -> u32 {
        self.to_bits()
    }
}
impl Bits for bf16 {
    fn from_f32(x: f32) -> Self {
        // NaNs that no arithmetic makes, signaling ones among them
        if x.is_nan() { Self::from_bits((x.to_bits() >> 16) as u16 | 1) } else { Self::from_f32(x) }
    }
    fn bits(self) -> u32 {
        self.to_bits().into()
    }
}
impl Bits for f16 {
    fn from_f32(x: f32) -> Self {
        Self::from_f32(x)
    }
    fn bits(self) -> u32 {
        self.to_bits().into()
    }
}

/// Ordinary numbers mostly, with every kind of trouble among them.
fn adversarial() -> impl Strategy<Value = f32> {
    prop_oneof![
        6 => -1.0_f32..1.0,
        2 => (-40.0_f32..40.0, any::<bool>()).prop_map(|(e, s)| if s { e.exp2() } else { -e.exp2() }),
        2 => any::<u32>().prop_map(f32::from_bits),
        1 => prop::sample::select(vec![
            0.0, -0.0, f32::NAN, f32::INFINITY, f32::NEG_INFINITY, f32::MIN_POSITIVE,
            f32::from_bits(1), -f32::from_bits(1), f32::from_bits(0x007F_FFFF), f32::MAX, f32::MIN,
            f32::from_bits(0x7F80_0001), f32::from_bits(0xFFC1_2345), 1.8446744e19, 65504.0, 65520.0,
        ]),
    ]
}

/// Gradients that need no second look, as those of nearly every block in training: with no zeros, with
/// some, or nothing else, and of sizes that differ by up to 2^60.
fn usual_gradients(len: usize) -> impl Strategy<Value = Vec<f32>> {
    let zeros = prop::sample::select(vec![0.0, 0.0, 0.02, 1.0]);
    let octaves = prop::sample::select(vec![1.0_f32, 20.0, 60.0]);
    (zeros, octaves, -20.0_f32..4.0).prop_flat_map(move |(zeros, octaves, log_scale)| {
        let size = (0.0..octaves).prop_map(move |octave| (log_scale - octave).exp2());
        let gradient = (size, any::<bool>(), prop::bool::weighted(zeros)).prop_map(
            |(size, negative, zero)| match (zero, negative) {
                (true, _) => 0.0,
                (false, true) => -size,
                (false, false) => size,
            },
        );
        prop::collection::vec(gradient, len)
    })
}

fn hypers() -> impl Strategy<Value = Hyper> {
    let nonfinite = prop::sample::select(vec![NonFinite::Skip, NonFinite::Propagate]);
    let beta = prop::sample::select(vec![0.0, 0.5, 0.9, 0.95, 0.999]);
    let decay = prop::sample::select(vec![
        (Decay::Coupled, 0.0),
        (Decay::Coupled, 0.1),
        (Decay::Coupled, 1e300), // infinite in f32: no gradient is finite, nor any padding
        (Decay::Decoupled, 0.0),
        (Decay::Decoupled, 0.01),
    ]);
    let eps = prop::sample::select(vec![0.0, 1e-8, 1e-8, 1e-3, 10.0]);
    let betas = (beta.clone(), beta);
    let max_unorm = prop::sample::select(vec![0.0, 0.0, 1e-3, 1.0]);
    let skip_zeros = any::<bool>();
    (nonfinite, betas, decay, eps, any::<bool>(), max_unorm, skip_zeros).prop_map(
        |(
            nonfinite,
            (beta1, beta2),
            (decay, weight_decay),
            eps,
            maximize,
            max_unorm,
            skip_zeros,
        )| Hyper {
            lr: 1e-2,
            beta1,
            beta2,
            eps,
            weight_decay,
            decay,
            nonfinite,
            maximize,
            skip_zeros,
            max_unorm,
        },
    )
}

/// Of the loss, down to where its inverse is just finite and up to where that is subnormal.
fn scales() -> impl Strategy<Value = f32> {
    prop::sample::select(vec![1.0, 1.0, 65_536.0, 3.0, 1e-3, f32::MAX, 3e-39])
}

/// State as bits.
fn state_bits(state: &State) -> Vec<u32> {
    let bits = |buffer| match buffer {
        Buffer::F32(values) => values.iter().map(|x| x.to_bits()).collect::<Vec<_>>(),
        Buffer::U8(codes) => codes.iter().map(|&code| code.into()).collect(),
    };
    state.buffers().into_iter().flat_map(bits).collect()
}

const ONE_SCALE: StateFormat = StateFormat::DYNAMIC8.with_block_wise(false);
const FORMATS: [StateFormat; 10] = [
    StateFormat::F32,
    StateFormat::DYNAMIC8,
    StateFormat::F32.with_amsgrad(true),
    StateFormat::DYNAMIC8.with_amsgrad(true),
    ONE_SCALE,
    ONE_SCALE.with_amsgrad(true),
    StateFormat::RATIO8,
    StateFormat::RATIO8.with_amsgrad(true),
    StateFormat::RATIO8.with_block_wise(false),
    StateFormat::RATIO8.with_block_wise(false).with_amsgrad(true),
];

/// How gradients are cut: by the percentile of their history, and all together.
type Cut = (usize, Option<f64>);

fn cuts() -> impl Strategy<Value = Cut> {
    let percentile = prop::sample::select(vec![100, 100, 1, 50]);
    let max_norm = prop::sample::select(vec![None, None, Some(0.0), Some(1.0), Some(1e30)]);
    (percentile, max_norm)
}

/// What a run is to do: hyperparameters, the format of the state, the scale of the loss.
#[derive(Debug, Clone, Copy)]
struct Rule {
    hyper: Hyper,
    format: StateFormat,
    grad_scale: f32,
    cut: Cut,
    /// Whether the state comes from elsewhere, and is any that could be loaded.
    foreign: bool,
}

/// State that no steps of this optimizer have made: a block's largest code may be any.
fn foreign(format: StateFormat, len: usize) -> State {
    let hash = |i: usize| i.wrapping_mul(2_654_435_761).wrapping_add(len) >> 7;
    let values = [0.0, 1e-45, 1e-37, 1e-36, 1e-30, 0.3, 1.0, 7e7, 1e30, f32::MAX];
    let value = |i: usize| values[hash(i) % values.len()];
    let mut state = State::zeros(format, len);
    match &mut state {
        State::F32 { exp_avg, exp_avg_sq, max_exp_avg_sq } => {
            for (k, moment) in [exp_avg, exp_avg_sq].into_iter().chain(max_exp_avg_sq).enumerate() {
                moment.iter_mut().enumerate().for_each(|(i, x)| *x = value(3 * i + k));
            }
        }
        State::Coded { exp_avg, exp_avg_sq, max_exp_avg_sq, .. } => {
            for (k, moment) in [exp_avg, exp_avg_sq].into_iter().chain(max_exp_avg_sq).enumerate() {
                let codes = moment.code.iter_mut().enumerate();
                codes.for_each(|(i, code)| *code = (hash(3 * i + k) % 200) as u8);
                moment.scale.iter_mut().enumerate().for_each(|(i, x)| *x = value(3 * i + k));
            }
        }
    }
    state
}

/// Everything a run leaves behind: parameter bits, state bits, the history of norms, and for each
/// step how many gradients were not finite and the bits of their norm.
type Outcome = (Vec<u32>, Vec<u32>, Vec<u32>, Vec<(usize, Option<u64>)>);

fn train<P: Bits, G: Bits>(
    (backend, threads): (Backend, usize),
    Rule { hyper, format, grad_scale, cut: (percentile, max_grad_norm), foreign: is_foreign }: Rule,
    params: &[f32],
    grads: &[Vec<f32>],
) -> Outcome
where
    for<'a> &'a mut [P]: Into<ParamMut<'a>>,
    for<'a> &'a [G]: Into<GradRef<'a>>,
{
    let adam = Adam::new(hyper, format).unwrap().with_threads(threads);
    let adam = adam.with_percentile_clipping(percentile).unwrap();
    let mut adam = adam.with_backend(backend).unwrap();
    let id = adam.add(params.len());
    if is_foreign {
        adam.load_state(id, foreign(format, params.len()), 5).unwrap();
    }
    let mut p: Vec<P> = params.iter().map(|&x| P::from_f32(x)).collect();
    let mut counts = Vec::new();
    for grad in grads {
        let g: Vec<G> = grad.iter().map(|&x| G::from_f32(x)).collect();
        let update = Update::new(id, &mut p[..], &g[..]);
        let options = StepOptions { grad_scale, max_grad_norm };
        let report = adam.step_with(&mut [update], &options).unwrap();
        // a NaN's bits are the processor's
        let norm = report.grad_norm.map(|norm| if norm.is_nan() { 0 } else { norm.to_bits() });
        counts.push((report.nonfinite, norm));
    }
    let norms = adam.norms(id).unwrap().iter().map(|norm| norm.to_bits()).collect();
    (p.into_iter().map(P::bits).collect(), state_bits(adam.state(id).unwrap().0), norms, counts)
}

/// One function a pairing of element types.
type Train = fn((Backend, usize), Rule, &[f32], &[Vec<f32>]) -> Outcome;
const PAIRINGS: [Train; 9] = [
    train::<f32, f32>,
    train::<f32, bf16>,
    train::<f32, f16>,
    train::<bf16, f32>,
    train::<bf16, bf16>,
    train::<bf16, f16>,
    train::<f16, f32>,
    train::<f16, bf16>,
    train::<f16, f16>,
];

/// Around the places where code paths change.
fn lengths() -> impl Strategy<Value = usize> {
    prop_oneof![
        prop::sample::select(vec![0, 1, 7, 8, 9, 15, 16, 17, 255, 256, 257, 511, 513]),
        0_usize..1100,
    ]
}

/// Parameters and three gradients.
fn tensors() -> impl Strategy<Value = (Vec<f32>, Vec<Vec<f32>>)> {
    lengths().prop_flat_map(|len| {
        let vector = move || prop::collection::vec(adversarial(), len);
        (vector(), prop::collection::vec(vector(), 3))
    })
}

/// Parameters, and five gradients of the usual kind.
fn usual_tensors() -> impl Strategy<Value = (Vec<f32>, Vec<Vec<f32>>)> {
    lengths().prop_flat_map(|len| {
        let params = prop_oneof![
            3 => prop::collection::vec(-1.0_f32..1.0, len),
            1 => prop::collection::vec(adversarial(), len),
        ];
        (params, prop::collection::vec(usual_gradients(len), 5))
    })
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, ..ProptestConfig::default() })]

    #[test]
    fn back_ends_agree(
        (params, grads) in tensors(),
        hyper in hypers(),
        format in prop::sample::select(FORMATS.to_vec()),
        grad_scale in scales(),
        cut in cuts(),
        foreign in any::<bool>(),
        pairing in prop::sample::select(PAIRINGS.to_vec()),
    ) {
        let rule = Rule { hyper, format, grad_scale, cut, foreign };
        let want = pairing((Backend::Scalar, 1), rule, &params, &grads);
        for backend in Backend::available() {
            let got = pairing((backend, 1), rule, &params, &grads);
            prop_assert_eq!(&got, &want, "{:?}", backend);
        }
    }

    #[test]
    fn back_ends_agree_on_usual_gradients(
        (params, grads) in usual_tensors(),
        hyper in hypers(),
        format in prop::sample::select(FORMATS.to_vec()),
        foreign in prop::bool::weighted(0.2),
        pairing in prop::sample::select(PAIRINGS.to_vec()),
    ) {
        let hyper = Hyper { skip_zeros: false, ..hyper };
        let rule = Rule { hyper, format, grad_scale: 1.0, cut: (100, None), foreign };
        let want = pairing((Backend::Scalar, 1), rule, &params, &grads);
        for backend in Backend::available() {
            let got = pairing((backend, 1), rule, &params, &grads);
            prop_assert_eq!(&got, &want, "{:?}", backend);
        }
    }

    /// Down a gradient is up its negative, to the bit.
    #[test]
    fn maximizing_is_minimizing_with_negated_gradients(
        (params, grads) in tensors(),
        hyper in hypers(),
        format in prop::sample::select(FORMATS.to_vec()),
        cut in cuts(),
        backend in prop::sample::select(Backend::available().collect::<Vec<_>>()),
        pairing in prop::sample::select(PAIRINGS.to_vec()),
    ) {
        let run = |maximize, grads: &[Vec<f32>]| {
            let hyper = Hyper { maximize, ..hyper };
            let rule = Rule { hyper, format, grad_scale: 1.0, cut, foreign: false };
            pairing((backend, 1), rule, &params, grads)
        };
        let negated: Vec<Vec<f32>> =
            grads.iter().map(|grad| grad.iter().map(|g| -g).collect()).collect();
        prop_assert_eq!(run(true, &grads), run(false, &negated));
    }

    /// For a power of two, multiplying by the inverse is dividing, to the bit.
    #[test]
    fn scales_of_powers_of_two_divide_the_gradients(
        (params, grads) in tensors(),
        hyper in hypers(),
        format in prop::sample::select(FORMATS.to_vec()),
        exponent in -126_i32..127,
        backend in prop::sample::select(Backend::available().collect::<Vec<_>>()),
    ) {
        // what underflows would be a zero, and what overflows no part of a norm
        let hyper = Hyper { skip_zeros: false, ..hyper };
        let cut = (100, None);
        let scale = 2_f32.powi(exponent);
        let run = |grad_scale, grads: &[Vec<f32>]| {
            let rule = Rule { hyper, format, grad_scale, cut, foreign: false };
            train::<f32, f32>((backend, 1), rule, &params, grads)
        };
        let divided: Vec<Vec<f32>> =
            grads.iter().map(|grad| grad.iter().map(|g| g / scale).collect()).collect();
        prop_assert_eq!(run(scale, &grads), run(1.0, &divided));
    }
}

/// Half of a cell, and what else might be made of one, is then rounded.
#[test]
fn ratios_of_nearly_subnormal_cells_agree() {
    let len = 64 * 256;
    let step = |backend| {
        let adam = Adam::new(Hyper { eps: 0.0, ..Hyper::adam() }, StateFormat::RATIO8).unwrap();
        let mut adam = adam.with_backend(backend).unwrap();
        let id = adam.add(len);
        let mut state = State::zeros(StateFormat::RATIO8, len);
        let State::Coded { exp_avg, exp_avg_sq, .. } = &mut state else { unreachable!() };
        exp_avg.code.iter_mut().enumerate().for_each(|(i, code)| *code = i as u8);
        let first = 3e-37_f32.to_bits();
        for (block, scale) in exp_avg.scale.iter_mut().enumerate() {
            *scale = f32::from_bits(first + block as u32 * 0x1_0001);
        }
        exp_avg_sq.code.fill(200);
        exp_avg_sq.scale.as_chunks_mut().0.fill([1.0, 2.0]);
        adam.load_state(id, state, 5).unwrap();
        let mut params = vec![0.0_f32; len];
        adam.step(&mut [Update::new(id, &mut params[..], &vec![0.0_f32; len][..])]).unwrap();
        params.into_iter().map(f32::to_bits).collect::<Vec<_>>()
    };
    let want = step(Backend::Scalar);
    assert!(want.iter().filter(|&&bits| bits << 1 != 0).count() > len / 2, "they move");
    for backend in Backend::available() {
        assert!(step(backend) == want, "{backend:?}");
    }
}

#[test]
fn thread_counts_agree() {
    // so many chunks that a turn of several begins after another, and a short tail; with scattered trouble
    let len = 9 * 128 * 256 + 77;
    let number = |i: usize, salt: usize| {
        let x = ((i * 2_654_435_761 + salt * 40_503) % 1_000_003) as f32 / 1_000_003.0 - 0.5;
        match i % 10_007 {
            rest if rest == salt => f32::NAN,
            rest if rest < 100 => 0.0,
            _ => x * (-((i % 19) as f32)).exp(),
        }
    };
    let params: Vec<f32> = (0..len).map(|i| number(i, 1)).map(|x| x.max(-1.0)).collect();
    let grads: Vec<Vec<f32>> =
        (2..5).map(|salt| (0..len).map(|i| number(i, salt)).collect()).collect();
    for format in FORMATS {
        for pairing in PAIRINGS {
            let hyper = Hyper { max_unorm: 0.5, skip_zeros: true, ..Hyper::adamw() };
            let cut = (20, Some(30.0));
            let rule = Rule { hyper, format, grad_scale: 0.1, cut, foreign: false };
            let want = pairing((Backend::Scalar, 1), rule, &params, &grads);
            for backend in Backend::available() {
                for threads in 1..=8 {
                    let got = pairing((backend, threads), rule, &params, &grads);
                    assert!(got == want, "{backend:?}, {threads} threads, {format:?}");
                }
            }
        }
    }
}
