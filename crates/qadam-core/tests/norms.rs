//! Sums of squares: the same bits from every back end and thread count, and near the exact sum.

use proptest::prelude::*;
use qadam_core::cpu::{self, Backend};
use qadam_core::rule::Coefficients;
use qadam_core::{DType, Hyper, Moments32, NonFinite, RawState, TensorStep, Walk, bf16};

const SKIP: NonFinite = NonFinite::Skip;

/// A step whose gradient alone is read.
fn step(grad: *const u8, dtype: DType, walk: Walk, nonfinite: NonFinite) -> TensorStep {
    let state =
        RawState::F32(Moments32 { m: std::ptr::null_mut(), v: std::ptr::null_mut(), max_v: None });
    let coefficients = Coefficients::new(&Hyper { nonfinite, ..Hyper::adam() }, 1);
    let param = (std::ptr::null_mut(), DType::F32);
    // SAFETY: only the gradient is read, which the caller keeps alive.
    unsafe { TensorStep::new(param, (grad, dtype), walk, state, coefficients) }
}

fn norms(steps: &[TensorStep]) -> Vec<f64> {
    let of = |backend, threads| {
        // SAFETY: the gradients live and the walks are within them.
        unsafe { cpu::squared_norms(steps, backend, threads) }.unwrap()
    };
    let bits = |norms: &[f64]| norms.iter().map(|norm| norm.to_bits()).collect::<Vec<_>>();
    let want = of(Backend::Scalar, 1);
    for backend in Backend::available() {
        for threads in [1, 2, 3, 8] {
            assert_eq!(bits(&of(backend, threads)), bits(&want), "{backend:?}, {threads} threads");
        }
    }
    want
}

fn float() -> impl Strategy<Value = f32> {
    prop_oneof![
        6 => -3.0_f32..3.0,
        1 => any::<u32>().prop_map(f32::from_bits).prop_filter("finite", |x| x.is_finite()),
        1 => prop_oneof![Just(0.0), Just(-0.0), Just(1e-42_f32), Just(f32::MAX)],
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn every_back_end_agrees_and_is_exact_to_1e_14(
        lengths in prop::collection::vec(0_usize..20_000, 1..5),
        values in prop::collection::vec(float(), 997),
    ) {
        let gradient = |len: usize| -> Vec<f32> { values.iter().copied().cycle().take(len).collect() };
        let gradients: Vec<Vec<f32>> = lengths.iter().map(|&len| gradient(len)).collect();
        let flat = |g: &Vec<f32>| step(g.as_ptr().cast(), DType::F32, Walk::flat(g.len()), SKIP);
        let steps: Vec<_> = gradients.iter().map(flat).collect();
        for (norm, gradient) in norms(&steps).iter().zip(&gradients) {
            let exact: f64 = gradient.iter().map(|&x| f64::from(x) * f64::from(x)).sum();
            prop_assert!((norm - exact).abs() <= 1e-13 * exact, "{norm} {exact}");
        }
    }
}

#[test]
fn elements_that_are_not_finite_count_or_do_not() {
    let gradient = [3.0, f32::NAN, 4.0, f32::INFINITY];
    let steps = [step(gradient.as_ptr().cast(), DType::F32, Walk::flat(4), SKIP)];
    assert_eq!(norms(&steps), [25.0]);
    let passed = [3.0, f32::INFINITY];
    let propagate = NonFinite::Propagate;
    let steps = [step(passed.as_ptr().cast(), DType::F32, Walk::flat(2), propagate)];
    assert_eq!(norms(&steps), [f64::INFINITY]);
}

#[test]
fn strides_and_types_do_not_matter() {
    let len = 100 * 70;
    let values: Vec<f32> = (0..len).map(|i| (i % 251) as f32 * 0.25 - 31.0).collect(); // exact in bf16
    let transposed: Vec<f32> = (0..len).map(|i| values[i % 70 * 100 + i / 70]).collect();
    let half: Vec<bf16> = values.iter().map(|&x| bf16::from_f32(x)).collect();
    let walk = Walk::new(&[70, 100], &[100, 1], &[1, 70]).unwrap();
    let steps = [
        step(values.as_ptr().cast(), DType::F32, Walk::flat(len), SKIP),
        step(transposed.as_ptr().cast(), DType::F32, walk, SKIP),
        step(half.as_ptr().cast(), DType::BF16, Walk::flat(len), SKIP),
    ];
    let norms = norms(&steps);
    assert!(norms[0] > 0.0 && norms[0] == norms[1] && norms[0] == norms[2], "{norms:?}");
}
