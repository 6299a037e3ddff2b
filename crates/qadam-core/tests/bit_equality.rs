//! Scalar, AVX2 and AVX-512 code and 1 to 8 threads give the same bits, over adversarial floats:
//! NaN, infinities, subnormals, signed zeros, huge ranges within a block, tails, no element at all.

use proptest::prelude::*;
use qadam_core::cpu::Backend;
use qadam_core::{
    Adam, Decay, GradRef, Hyper, NonFinite, ParamMut, State, StateFormat, Update, bf16, f16,
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
        Self::from_f32(x)
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

fn hypers() -> impl Strategy<Value = Hyper> {
    let nonfinite = prop::sample::select(vec![NonFinite::Skip, NonFinite::Propagate]);
    let beta = prop::sample::select(vec![0.0, 0.5, 0.9, 0.95, 0.999]);
    let decay = prop::sample::select(vec![
        (Decay::Coupled, 0.0),
        (Decay::Coupled, 0.1),
        (Decay::Decoupled, 0.0),
        (Decay::Decoupled, 0.01),
    ]);
    let eps = prop::sample::select(vec![0.0, 1e-8, 1e-3]);
    (nonfinite, beta.clone(), beta, decay, eps).prop_map(
        |(nonfinite, beta1, beta2, (decay, weight_decay), eps)| Hyper {
            lr: 1e-2,
            beta1,
            beta2,
            eps,
            weight_decay,
            decay,
            nonfinite,
        },
    )
}

/// State as bits.
fn state_bits(state: &State) -> Vec<u32> {
    let bits = |values: &[f32]| values.iter().map(|x| x.to_bits()).collect::<Vec<_>>();
    let codes = |codes: &[u8]| codes.iter().map(|&c| c.into()).collect::<Vec<u32>>();
    match state {
        State::F32 { exp_avg, exp_avg_sq } => [bits(exp_avg), bits(exp_avg_sq)].concat(),
        State::Dynamic8 { exp_avg_code, exp_avg_scale, exp_avg_sq_code, exp_avg_sq_scale } => [
            codes(exp_avg_code),
            bits(exp_avg_scale),
            codes(exp_avg_sq_code),
            bits(exp_avg_sq_scale),
        ]
        .concat(),
    }
}

/// Everything a run leaves behind: parameter bits, state bits, non-finite counts.
type Outcome = (Vec<u32>, Vec<u32>, Vec<usize>);

fn train<P: Bits, G: Bits>(
    (backend, threads): (Backend, usize),
    (hyper, format): (Hyper, StateFormat),
    params: &[f32],
    grads: &[Vec<f32>],
) -> Outcome
where
    for<'a> &'a mut [P]: Into<ParamMut<'a>>,
    for<'a> &'a [G]: Into<GradRef<'a>>,
{
    let adam = Adam::new(hyper, format).unwrap().with_threads(threads);
    let mut adam = adam.with_backend(backend).unwrap();
    let id = adam.add(params.len());
    let mut p: Vec<P> = params.iter().map(|&x| P::from_f32(x)).collect();
    let mut counts = Vec::new();
    for grad in grads {
        let g: Vec<G> = grad.iter().map(|&x| G::from_f32(x)).collect();
        let report = adam.step(&mut [Update::new(id, &mut p[..], &g[..])]).unwrap();
        counts.push(report.nonfinite);
    }
    (p.into_iter().map(P::bits).collect(), state_bits(adam.state(id).unwrap().0), counts)
}

/// One function a pairing of element types.
type Train = fn((Backend, usize), (Hyper, StateFormat), &[f32], &[Vec<f32>]) -> Outcome;
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

/// Parameters and three gradients of a length around the places where code paths change.
fn tensors() -> impl Strategy<Value = (Vec<f32>, Vec<Vec<f32>>)> {
    let lengths = prop_oneof![
        prop::sample::select(vec![0, 1, 7, 8, 9, 15, 16, 17, 255, 256, 257, 511, 513]),
        0_usize..1100,
    ];
    lengths.prop_flat_map(|len| {
        let vector = move || prop::collection::vec(adversarial(), len);
        (vector(), prop::collection::vec(vector(), 3))
    })
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, ..ProptestConfig::default() })]

    #[test]
    fn back_ends_agree(
        (params, grads) in tensors(),
        hyper in hypers(),
        format in prop::sample::select(vec![StateFormat::F32, StateFormat::Dynamic8]),
        pairing in prop::sample::select(PAIRINGS.to_vec()),
    ) {
        let want = pairing((Backend::Scalar, 1), (hyper, format), &params, &grads);
        for backend in Backend::available() {
            let got = pairing((backend, 1), (hyper, format), &params, &grads);
            prop_assert_eq!(&got, &want, "{:?}", backend);
        }
    }
}

#[test]
fn thread_counts_agree() {
    // several chunks and a short tail, with scattered trouble
    let len = 5 * 128 * 256 + 77;
    let number = |i: usize, salt: usize| {
        let x = ((i * 2_654_435_761 + salt * 40_503) % 1_000_003) as f32 / 1_000_003.0 - 0.5;
        if i % 10_007 == salt { f32::NAN } else { x * (-((i % 19) as f32)).exp() }
    };
    let params: Vec<f32> = (0..len).map(|i| number(i, 1)).map(|x| x.max(-1.0)).collect();
    let grads: Vec<Vec<f32>> =
        (2..5).map(|salt| (0..len).map(|i| number(i, salt)).collect()).collect();
    for format in [StateFormat::F32, StateFormat::Dynamic8] {
        for pairing in PAIRINGS {
            let rule = (Hyper::adamw(), format);
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
