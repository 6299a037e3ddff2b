//! The PTX that ships, run on the software GPU: bit-equal to the scalar CPU back end.

mod device;
mod layout;
mod model;
mod numbers;

use device::{Gpu, PTX};
use layout::{Chunk, Found, Grad, MEASURED, SCALAR, STRIDED, VECTOR};
use model::{Buffer, Group, Place, Step, Tensor, compare, encode};
use numbers::{Kind, Numbers};
use proptest::prelude::*;
use qadam_core::clip::HISTORY;
use qadam_core::codec::Code;
use qadam_core::codec::dynamic::{Sign, decode};
use qadam_core::codec::ratio::{ZERO_RATIO, ZERO_ROOT};
use qadam_core::{
    BufferSpec, DType, Decay, Hyper, NonFinite, Per, StateCode, StateFormat, StateType,
};

const ONE_SCALE: StateFormat = StateFormat::DYNAMIC8.with_block_wise(false);
const ONE_RANGE: StateFormat = StateFormat::RATIO8.with_block_wise(false);

const FORMATS: [StateFormat; 10] = [
    StateFormat::F32,
    StateFormat::DYNAMIC8,
    StateFormat::RATIO8,
    ONE_SCALE,
    ONE_RANGE,
    StateFormat::F32.with_amsgrad(true),
    StateFormat::DYNAMIC8.with_amsgrad(true),
    StateFormat::RATIO8.with_amsgrad(true),
    ONE_SCALE.with_amsgrad(true),
    ONE_RANGE.with_amsgrad(true),
];

fn pairings() -> impl Iterator<Item = (DType, DType)> {
    DType::ALL.into_iter().flat_map(|param| DType::ALL.map(|grad| (param, grad)))
}

/// Coupled and decoupled decay, and none; both ways with non-finite gradients.
fn groups() -> Vec<Group> {
    let mut groups = Vec::new();
    for nonfinite in [NonFinite::Skip, NonFinite::Propagate] {
        for (decay, weight_decay) in
            [(Decay::Coupled, 0.0), (Decay::Coupled, 0.1), (Decay::Decoupled, 0.01)]
        {
            let hyper = Hyper { lr: 1e-2, weight_decay, decay, nonfinite, ..Hyper::adam() };
            groups.push(Group::from(hyper));
        }
    }
    groups
}

/// `count` steps, each with gradients for all.
fn steps(numbers: &mut Numbers, kind: Kind, tensors: &[Tensor], count: usize) -> Vec<Step> {
    let mut grads = || tensors.iter().map(|tensor| Some(numbers.grad(kind, tensor))).collect();
    (0..count).map(|_| Step::new(groups(), grads())).collect()
}

/// Every format and pairing at all places, in one launch; the groups go round.
fn everywhere(numbers: &mut Numbers, kind: Kind, places: &[Place]) -> Vec<Tensor> {
    let mut tensors = Vec::new();
    for format in FORMATS {
        for pairing in pairings() {
            for place in places {
                let mut tensor = numbers.tensor(kind, place.clone(), pairing, format);
                tensor.group = tensors.len() % groups().len();
                tensors.push(tensor);
            }
        }
    }
    tensors
}

const LENGTHS: [usize; 7] = [0, 1, 255, 256, 257, 4095, 4097];

#[test]
fn all_types_and_lengths() {
    let mut numbers = Numbers(1);
    let places = LENGTHS.map(Place::dense);
    for kind in [Kind::Ordinary, Kind::Adversarial] {
        let tensors = everywhere(&mut numbers, kind, &places);
        compare(&tensors, &steps(&mut numbers, kind, &tensors, 2), 1024);
    }
}

#[test]
fn tensors_aligned_to_an_element_only() {
    let mut numbers = Numbers(2);
    let shifts = [(1, 0), (0, 1), (1, 3), (7, 7)];
    let place = |(i, &len): (usize, &usize)| {
        let (param, grad) = shifts[i % shifts.len()];
        Place::dense(len).shifted(param, grad)
    };
    let places: Vec<Place> = LENGTHS.iter().enumerate().map(place).collect();
    let tensors = everywhere(&mut numbers, Kind::Adversarial, &places);
    compare(&tensors, &steps(&mut numbers, Kind::Adversarial, &tensors, 1), 2048);
}

#[test]
fn tensors_of_any_strides() {
    let mut numbers = Numbers(3);
    let places = [
        Place::strided(&[37, 23], &[23, 1], &[1, 37]), // the gradient transposed
        Place::strided(&[37, 23], &[1, 37], &[23, 1]), // the parameter transposed
        Place::strided(&[19, 30], &[41, 1], &[30, 1]), // a slice of rows
        Place::strided(&[300], &[3], &[2]),            // every third element
        Place::strided(&[2, 5, 7, 9], &[315, 1, 45, 5], &[315, 63, 9, 1]), // channels_last
        Place::strided(&[20, 30], &[30, 1], &[0, 1]),  // an expanded gradient
        Place::strided(&[600], &[1], &[0]),            // a gradient of one number, as sum() gives
        Place::strided(&[1, 1], &[9, 7], &[3, 5]).shifted(1, 1),
        Place::strided(
            &[2, 3, 2, 2, 2, 2, 2, 3],
            &[400, 130, 60, 29, 13, 6, 3, 1],
            &[1, 2, 6, 12, 24, 48, 96, 192],
        ),
    ];
    let tensors = everywhere(&mut numbers, Kind::Adversarial, &places);
    compare(&tensors, &steps(&mut numbers, Kind::Adversarial, &tensors, 1), 256);
}

#[test]
fn many_steps_with_gradients_that_come_and_go() {
    let mut numbers = Numbers(4);
    let places = [Place::dense(300), Place::dense(20).shifted(1, 2)];
    let tensors = everywhere(&mut numbers, Kind::Ordinary, &places);
    let mut steps = steps(&mut numbers, Kind::Ordinary, &tensors, 12);
    for (i, step) in steps.iter_mut().enumerate() {
        for group in &mut step.groups[..3] {
            group.lr_on_device = true; // and changes
        }
        for (j, group) in step.groups.iter_mut().enumerate() {
            group.hyper.lr = 0.1 / (i + j + 1) as f64;
        }
        for grad in step.grads.iter_mut().skip(i % 5).step_by(3) {
            *grad = None;
        }
    }
    steps[6].grads.fill(None);
    compare(&tensors, &steps, 256);
}

#[test]
fn gradients_are_scaled_and_negated_and_steps_are_not_taken() {
    let mut numbers = Numbers(11);
    let mut groups = Vec::new();
    for (maximize, grad_scale) in
        [(true, None), (false, Some(1024.0)), (true, Some(3.0)), (false, Some(1e-40))]
    {
        for found_inf in [None, Some(0.0), Some(1.0)] {
            for group in self::groups() {
                let hyper = Hyper { maximize, ..group.hyper };
                groups.push(Group { hyper, grad_scale, found_inf, ..group });
            }
        }
    }
    // An infinite factor leaves no gradient finite, nor the padding of a block.
    let nothing = [0.0, f32::NAN].map(|scale| Group {
        grad_scale: Some(scale),
        ..Group::from(Hyper { weight_decay: 1e300, ..Hyper::adam() })
    });
    groups.extend(nothing);
    groups.push(Group::from(Hyper { weight_decay: 1e300, ..Hyper::adam() }));
    let places = [Place::dense(70), Place::dense(513).shifted(1, 0)];
    for kind in [Kind::Ordinary, Kind::Adversarial] {
        let mut tensors = everywhere(&mut numbers, kind, &places);
        for (i, tensor) in tensors.iter_mut().enumerate() {
            tensor.group = i * 7 % groups.len();
        }
        let mut steps = steps(&mut numbers, kind, &tensors, 2);
        for step in &mut steps {
            step.groups.clone_from(&groups);
        }
        // Those that the first step leaves out are in the second.
        for group in &mut steps[1].groups {
            group.found_inf = group.found_inf.map(|found| 1.0 - found);
        }
        compare(&tensors, &steps, 256);
    }
}

/// Gradients of zeros of both signs in some elements of a block, in all, in all but what is not finite,
/// and in its tail; with what turns a zero into something else.
#[test]
fn zero_gradients_are_skipped() {
    let mut numbers = Numbers(12);
    let mut groups = groups();
    for group in &mut groups {
        group.hyper.skip_zeros = true;
    }
    let scaled = groups.clone().into_iter().zip([f32::NAN, 1e-40, 0.0, 4.0, 1e30, -1.0]);
    let scaled = scaled.map(|(group, scale)| Group { grad_scale: Some(scale), ..group });
    groups.extend(scaled.collect::<Vec<_>>());
    groups.push(Group::from(Hyper { weight_decay: 1e300, skip_zeros: true, ..Hyper::adam() }));
    let places = [1, 256, 700, 1030]
        .map(Place::dense)
        .into_iter()
        .chain([Place::dense(513).shifted(1, 0), Place::strided(&[37, 23], &[23, 1], &[1, 37])]);
    let places: Vec<Place> = places.collect();
    for kind in [Kind::Ordinary, Kind::Adversarial] {
        let mut tensors = everywhere(&mut numbers, kind, &places);
        for (i, tensor) in tensors.iter_mut().enumerate() {
            tensor.group = i * 5 % groups.len();
        }
        let mut step = || {
            let grads = tensors.iter().map(|tensor| {
                let mut values = numbers.floats(kind, tensor.place.grad_span());
                for block in values.chunks_mut(256) {
                    let zeros = [0, 1, 2, 16, 16, 17, 17][numbers.below(7)];
                    for value in block {
                        let zero = numbers.below(16) < zeros;
                        let nan = zeros == 17 && numbers.below(3) == 0;
                        match (zero, nan) {
                            (true, false) => *value = [0.0, -0.0][numbers.below(2)],
                            (true, true) => *value = f32::NAN,
                            _ => {}
                        }
                    }
                }
                Some(Buffer::new(&encode(&values, tensor.grad_dtype)))
            });
            Step::new(groups.clone(), grads.collect())
        };
        let steps = [step(), step()];
        compare(&tensors, &steps, 512);
    }
}

#[test]
fn hyperparameters_at_their_ends() {
    let mut numbers = Numbers(5);
    let tensors: Vec<Tensor> = FORMATS
        .into_iter()
        .flat_map(|format| (0..8).map(move |group| (format, group)))
        .map(|(format, group)| {
            let pairing = (DType::F32, DType::F32);
            let mut tensor = numbers.tensor(Kind::Ordinary, Place::dense(257), pairing, format);
            tensor.group = group;
            tensor.step = [0.0, 1.0, 9_999.0, 1_000_000.0][group % 4];
            tensor
        })
        .collect();
    let hyper = |lr, beta1, beta2, eps| Hyper { lr, beta1, beta2, eps, ..Hyper::adamw() };
    let groups = [
        hyper(1e-3, 0.0, 0.0, 0.0),
        hyper(0.0, 0.9, 0.999, 1e-8),
        hyper(1e30, 0.9, 0.999, 1e-8),
        hyper(1e-30, 0.5, 0.999_999_9, 1e30),
        hyper(1e-3, 0.999_999_999_999, 0.1, 1e-45),
        Hyper { weight_decay: 1e30, ..Hyper::adam() },
        Hyper { weight_decay: 1e30, ..Hyper::adamw() },
        Hyper { nonfinite: NonFinite::Propagate, weight_decay: 1e38, ..Hyper::adam() },
    ];
    let grads = tensors.iter().map(|tensor| Some(numbers.grad(Kind::Ordinary, tensor)));
    let step = Step::new(groups.map(Group::from).to_vec(), grads.collect());
    compare(&tensors, &[step.clone(), step], 512);
}

#[test]
fn blocks_without_one_finite_gradient_keep_their_state() {
    let mut numbers = Numbers(6);
    let places = [256, 512, 70].map(Place::dense);
    let mut tensors = everywhere(&mut numbers, Kind::Adversarial, &places);
    for tensor in &mut tensors {
        // a signalling NaN, which becomes a quiet one
        let nan: &[u8] = match tensor.param_dtype {
            DType::F32 => &0x7F80_0001_u32.to_le_bytes(),
            DType::BF16 => &0x7F81_u16.to_le_bytes(),
            DType::F16 => &0x7D00_u16.to_le_bytes(),
        };
        let rest = &tensor.param.bytes()[nan.len()..];
        tensor.param = Buffer::new(&[nan, rest].concat());
    }
    let grads = tensors.iter().map(|tensor| {
        let mut values = vec![f32::NAN; tensor.place.len()];
        if let Some(in_second_block) = values.get_mut(259) {
            *in_second_block = 0.5;
        }
        Some(Buffer::new(&encode(&values, tensor.grad_dtype)))
    });
    let step = Step::new(groups(), grads.collect());
    compare(&tensors, &[step], 256);
}

/// With betas of 0 a moment is its gradient, or that squared: every code's edges, and the numbers
/// next to them, in blocks of scale 1 and of scales whose reciprocal needs help.
#[test]
fn the_edges_of_all_codes() {
    let mut grads = Vec::new();
    for (sign, root) in [(Sign::Signed, false), (Sign::Unsigned, true)] {
        for code in 0..255 {
            let edge = f32::midpoint(decode(code, sign), decode(code + 1, sign));
            let edge = if root { edge.sqrt() } else { edge };
            for ulps in -4..=4 {
                grads.push(f32::from_bits(edge.to_bits().wrapping_add_signed(ulps)));
            }
        }
    }
    let mut all = Vec::new();
    for scale in [1.0, 0.75, 2.0_f32.powi(-62), 2.0_f32.powi(62), 2.0_f32.powi(-90)] {
        for block in grads.chunks(255) {
            all.push(scale);
            all.extend(block.iter().map(|g| g * scale));
        }
    }
    let pairing = (DType::F32, DType::F32);
    let mut tensor =
        Numbers(10).tensor(Kind::Ordinary, Place::dense(all.len()), pairing, StateFormat::DYNAMIC8);
    tensor.step = 5.0;
    let hyper = Hyper { beta1: 0.0, beta2: 0.0, ..Hyper::adam() };
    let grad = Buffer::new(&encode(&all, DType::F32));
    let step = Step::new(vec![Group::from(hyper)], vec![Some(grad)]);
    compare(&[tensor], &[step.clone(), step], 4096);
}

/// Blocks of gradients whose magnitudes span anything from nothing to all of f32: ranges of one root, of
/// none, and such that are cut; and with betas of 0, moments that leave f32 at either end.
#[test]
fn roots_and_ratios_of_all_magnitudes() {
    let mut numbers = Numbers(12);
    let mut grads = Vec::new();
    for span in [0, 1, 3, 20, 60, 250] {
        for block in 0..6 {
            let middle = [0.0, -30.0, 30.0, -70.0, 60.0, -140.0][block];
            let magnitudes = (0..256).map(|_| {
                let exponent = middle + (numbers.below(span * 16 + 1) as f32) / 16.0;
                let sign = [1.0, -1.0, if numbers.below(4) == 0 { 0.0 } else { 1.0 }];
                sign[numbers.below(3)] * exponent.exp2().min(f32::MAX)
            });
            grads.extend(magnitudes.collect::<Vec<f32>>());
        }
    }
    // too small to have a square, some skipped: the block's old range stays, though it has no root
    grads.extend((0..156).map(|i| if i % 3 == 0 { 0.0 } else { 1e-30 }));
    let mut tensors = Vec::new();
    for format in FORMATS.into_iter().filter(|f| f.code == StateCode::Coded(Code::Ratio)) {
        for group in 0..3 {
            let (place, pairing) = (Place::dense(grads.len()), (DType::F32, DType::F32));
            let mut tensor = numbers.tensor(Kind::Ordinary, place, pairing, format);
            tensor.group = group;
            for (buffer, spec) in tensor.state.iter_mut().zip(format.buffers(grads.len())) {
                if spec.dtype == StateType::U8 {
                    let zero = if spec.name == "exp_avg_code" { ZERO_RATIO } else { ZERO_ROOT };
                    let rest = spec.len - 156;
                    *buffer = Buffer::new(&[&buffer.bytes()[..rest], &[zero; 156]].concat());
                }
            }
            tensors.push(tensor);
        }
    }
    let hyper = Hyper { beta1: 0.0, beta2: 0.0, ..Hyper::adam() };
    let groups = vec![
        Group::from(hyper),
        Group::from(Hyper { beta1: 0.5, eps: 1e3, lr: 1e30, skip_zeros: true, ..hyper }),
        Group::from(Hyper { eps: 0.0, ..Hyper::adamw() }),
    ];
    let grads = Buffer::new(&encode(&grads, DType::F32));
    let step = Step::new(groups, vec![Some(grads); tensors.len()]);
    compare(&tensors, &vec![step; 3], 4096);
}

/// Where all scales stay, elements that are kept keep their codes: also those of roots that encoding
/// would give to a neighbour, as it may where codes are a bit of a float apart.
#[test]
fn skipped_elements_keep_their_codes_in_narrow_ranges() {
    const LEN: usize = 700;
    let mut numbers = Numbers(13);
    let mut tensors = Vec::new();
    for format in FORMATS.into_iter().filter(|f| f.code == StateCode::Coded(Code::Ratio)) {
        let pairing = (DType::F32, DType::F32);
        let mut tensor = numbers.tensor(Kind::Ordinary, Place::dense(LEN), pairing, format);
        for (buffer, spec) in tensor.state.iter_mut().zip(format.buffers(LEN)) {
            // elements that move have roots in the middle, which stay within the range
            let (codes, middle): (&[u8], u8) = match spec.name {
                "exp_avg_code" => (&[0x80; LEN], 0x90),
                _ => (buffer.bytes(), 0x80),
            };
            let code = |(i, &code): (usize, &u8)| if i % 16 == 0 { middle } else { code };
            let near = |low: f32| [low, f32::from_bits(low.to_bits() + 600)];
            *buffer = match spec.name {
                "exp_avg_scale" => Buffer::floats(&vec![1.0; spec.len]),
                "exp_avg_sq_range" => Buffer::floats(&near(0.01).repeat(spec.len / 2)),
                "max_exp_avg_sq_range" => Buffer::floats(&near(0.02).repeat(spec.len / 2)),
                _ => Buffer::new(&codes.iter().enumerate().map(code).collect::<Vec<_>>()),
            };
        }
        tensors.push(tensor);
    }
    let grads: Vec<f32> = (0..LEN).map(|i| if i % 16 == 0 { 0.01 } else { 0.0 }).collect();
    let grads = Buffer::new(&encode(&grads, DType::F32));
    let group = Group::from(Hyper { skip_zeros: true, ..Hyper::adamw() });
    let step = Step::new(vec![group], vec![Some(grads); tensors.len()]);
    compare(&tensors, &vec![step; 3], 256);
}

/// The bytes of a run with each of several cuts of the same work.
#[test]
fn no_cut_into_chunks_changes_a_bit() {
    let mut numbers = Numbers(7);
    let tensors =
        everywhere(&mut numbers, Kind::Ordinary, &[Place::dense(5000), Place::dense(256)]);
    let steps = steps(&mut numbers, Kind::Ordinary, &tensors, 1);
    for chunk in [256, 768, 4096, 1 << 20] {
        compare(&tensors, &steps, chunk);
    }
}

/// The last blocks of a tensor of more than 2^33 elements, whose other pages are never touched.
#[test]
fn the_end_of_a_huge_tensor() {
    const START: u64 = (1 << 33) - 256;
    const LEN: usize = 256 + 77;
    let mut numbers = Numbers(8);
    for (ptx, format) in PTX.into_iter().flat_map(|ptx| FORMATS.map(|format| (ptx, format))) {
        for access in [VECTOR, SCALAR, STRIDED] {
            let pairing = (DType::BF16, DType::F16);
            let place = match access {
                STRIDED => Place::strided(&[LEN], &[2], &[3]),
                _ => Place::dense(LEN).shifted(usize::from(access == SCALAR), 0),
            };
            let mut end = numbers.tensor(Kind::Ordinary, place.clone(), pairing, format);
            let mut grad = numbers.grad(Kind::Ordinary, &end);
            if format.code == StateCode::Coded(Code::Ratio) {
                // Chance depends on where a block is, and this one is elsewhere on the CPU: all roots are
                // the largest, of which the code does not.
                let span = place.grad_span();
                grad = Buffer::new(&encode(&vec![0.5; span], pairing.1));
                for (buffer, spec) in end.state.iter_mut().zip(format.buffers(LEN)) {
                    if spec.dtype == StateType::U8 {
                        *buffer = Buffer::new(&vec![0xFF; LEN]);
                    }
                }
            }

            let mut gpu = Gpu::new(ptx);
            let total = START + LEN as u64;
            // the buffer that ends with `bytes`, which belong to elements from START on
            let mut reserve = |buffer: &Buffer, before: u64| {
                let at = gpu.reserve(before + buffer.bytes().len() as u64);
                gpu.write(at + before, buffer.bytes());
                at
            };
            let strides = (place.param[0] as u64, place.grad[0] as u64);
            let param = reserve(&end.param, START * strides.0 * 2);
            let grad_at = reserve(&grad, START * strides.1 * 2);
            let each = |spec: BufferSpec| match (spec.dtype, spec.per) {
                (StateType::U8, _) => START,
                (StateType::F32, Per::Element) => START * 4,
                (StateType::F32, Per::Block) => START / 64 * spec.len as u64,
                (StateType::F32, Per::Tensor) => 0,
            };
            let before: Vec<u64> = format.buffers(1).into_iter().map(each).collect();
            let state: Vec<u64> = end
                .state
                .iter()
                .zip(&before)
                .map(|(buffer, &before)| reserve(buffer, before))
                .collect();
            let [m, v, max_v, m_scale, v_scale, max_v_scale] = model::moments(format, &state);
            let mut table = place.table();
            table.size[0] = total;
            let shift = (place.shift.0 * 2) as u64;
            let tensor = layout::Tensor {
                param: param + shift,
                m,
                v,
                m_scale,
                v_scale,
                max_v,
                max_v_scale,
                step: gpu.upload(&[end.step]),
                len: total,
                history: 0,
                hyper: 0,
                param_dtype: pairing.0 as u8,
                grad_dtype: pairing.1 as u8,
                flags: model::flags(format) | if format.block_wise { 0 } else { MEASURED },
                percentile: 0,
            };
            let strides_at = gpu.upload(&[table]);
            let grads = [Grad { address: grad_at, strides: strides_at, access, ..Grad::default() }];
            let chunk = Chunk { start: START, len: LEN as u32, tensor: 0 };
            let group = Group::from(Hyper::adamw());
            let hypers = [group.table(&mut gpu)];
            let step = Step::new(vec![group], vec![Some(grad)]);
            model::step_on_cpu(std::slice::from_mut(&mut end), &step);
            let mut work = gpu.table((&[tensor], &hypers), &grads, &[chunk]);
            let mut found = Found { update_scale: 1.0, ..Found::default() };
            if !format.block_wise {
                // as if the rest of the tensor had been measured, too
                let scales = end.state.chunks(2).map(|moment| moment[1].bytes());
                for (found, scale) in found.scale.iter_mut().zip(scales) {
                    *found = match scale.as_chunks().0 {
                        [high] => [0.0, f32::from_le_bytes(*high)],
                        [low, high] => [*low, *high].map(f32::from_le_bytes),
                        _ => unreachable!(),
                    };
                }
            }
            work.found = gpu.upload(&[found]);
            gpu.step(work);

            let before = std::iter::once(START * strides.0 * 2).chain(before);
            let buffers = std::iter::once(&end.param).chain(&end.state);
            let addresses = std::iter::once(param).chain(state);
            for ((buffer, address), before) in buffers.zip(addresses).zip(before) {
                let got = gpu.read::<u8>(address + before, buffer.bytes().len());
                assert!(got == buffer.bytes(), "sm_{}, {format:?}, access {access}", ptx.0);
            }
        }
    }
}

/// Work that creeps into the loops shows here first; the aim is memory's speed.
#[test]
fn instructions_an_element() {
    let mut numbers = Numbers(9);
    for format in FORMATS {
        for dtype in DType::ALL {
            let place = Place::dense(1 << 16);
            let tensor = numbers.tensor(Kind::Ordinary, place, (dtype, dtype), format);
            let step = &steps(&mut numbers, Kind::Ordinary, std::slice::from_ref(&tensor), 1)[0];
            for ptx in PTX {
                let count = model::instructions(ptx, &tensor, step);
                let most = match (format.code, format.amsgrad) {
                    (StateCode::F32, false) => 64.0,
                    (StateCode::F32, true) => 86.0,
                    (StateCode::Coded(Code::Dynamic), false) => 156.0,
                    (StateCode::Coded(Code::Dynamic), true) => 223.0,
                    (StateCode::Coded(Code::Ratio), false) => 180.0,
                    (StateCode::Coded(Code::Ratio), true) => 275.0,
                };
                println!("sm_{}, {}, {format}: {count:.1}", ptx.0, dtype.name());
                assert!(count < most, "sm_{}, {dtype:?}, {format:?}: {count}", ptx.0);
            }
        }
    }
}

/// A place of one to four dimensions in any memory order, possibly with gaps, with a gradient of
/// any other order, possibly expanded.
fn places() -> impl Strategy<Value = Place> {
    let dense = (0_usize..600, 0_usize..9, 0_usize..9)
        .prop_map(|(len, param, grad)| Place::dense(len).shifted(param, grad));
    let dims = prop::collection::vec((1_usize..9, 0_isize..3, any::<bool>()), 1..=4);
    let strided = dims.prop_flat_map(|dims| {
        let order: Vec<usize> = (0..dims.len()).collect();
        (Just(dims), Just(order.clone()).prop_shuffle(), Just(order).prop_shuffle())
    });
    let strided = strided.prop_map(|(dims, param_order, grad_order)| {
        let shape: Vec<usize> = dims.iter().map(|dim| dim.0).collect();
        let (mut param, mut grad) = (vec![0; shape.len()], vec![0; shape.len()]);
        let mut stride = 1;
        for d in param_order {
            stride += dims[d].1;
            param[d] = stride;
            stride *= shape[d] as isize;
        }
        let mut stride = 1;
        for d in grad_order {
            let expanded = dims[d].2 && dims[d].1 == 0;
            grad[d] = if expanded { 0 } else { stride };
            stride *= shape[d] as isize;
        }
        Place { shape, param, grad, shift: (0, 0) }
    });
    prop_oneof![dense, strided]
}

fn hypers() -> impl Strategy<Value = Group> {
    let beta = prop::sample::select(vec![0.0, 0.5, 0.9, 0.95, 0.999]);
    let decay = prop::sample::select(vec![Decay::Coupled, Decay::Decoupled]);
    let nonfinite = prop::sample::select(vec![NonFinite::Skip, NonFinite::Propagate]);
    let rate = prop::sample::select(vec![0.0, 1e-8, 1e-3, 0.1, 1e3]);
    let rates = (rate.clone(), rate.clone(), rate);
    let flags = (any::<bool>(), any::<bool>(), any::<bool>());
    // of the loss: usual ones, and those whose inverse is subnormal, infinite, or no number
    let scale = vec![65_536.0, 3.0, 1e-3, f32::MAX, 1e-40, 0.0, -2.0, f32::INFINITY, f32::NAN];
    let scale = prop::option::of(prop::sample::select(scale));
    let unorm = prop::sample::select(vec![0.0, 0.0, 1e-9, 0.02, 1.0, 1e30]);
    let found = prop::option::of(prop::sample::select(vec![0.0, -0.0, 0.0, 1.0, f32::NAN]));
    (rates, (beta.clone(), beta), decay, nonfinite, flags, unorm, scale, found).prop_map(
        |(rates, (beta1, beta2), decay, nonfinite, flags, max_unorm, grad_scale, found_inf)| {
            let ((lr, eps, weight_decay), (lr_on_device, maximize, skip_zeros)) = (rates, flags);
            let hyper = Hyper {
                lr,
                beta1,
                beta2,
                eps,
                weight_decay,
                decay,
                nonfinite,
                maximize,
                skip_zeros,
                max_unorm,
            };
            Group { hyper, lr_on_device, grad_scale, found_inf }
        },
    )
}

/// Whether gradients are cut, and to what norm.
fn clips() -> impl Strategy<Value = Option<Option<f64>>> {
    let norm = vec![0.0, 1e-30, 0.1, 3.0, 1e30, f64::INFINITY];
    prop::option::of(prop::option::of(prop::sample::select(norm)))
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 60, ..ProptestConfig::default() })]

    #[test]
    fn anything_goes(
        places in prop::collection::vec(places(), 1..5),
        groups in prop::collection::vec(hypers(), 3),
        chunk in 1_usize..5,
        clip in clips(),
        seed in any::<u64>(),
    ) {
        let mut numbers = Numbers(seed);
        let pairings: Vec<_> = pairings().collect();
        let tensors: Vec<Tensor> = places
            .into_iter()
            .map(|place| {
                let pairing = pairings[numbers.below(9)];
                let format = FORMATS[numbers.below(FORMATS.len())];
                let mut tensor = numbers.tensor(Kind::Adversarial, place, pairing, format);
                tensor.group = numbers.below(3);
                if clip.is_some() && numbers.below(2) == 0 {
                    tensor.percentile = Some((numbers.history(), numbers.below(HISTORY)));
                }
                tensor
            })
            .collect();
        let mut step = || {
            let grads = tensors.iter().map(|tensor| {
                let grad = numbers.grad(Kind::Adversarial, tensor);
                (numbers.below(6) > 0).then_some(grad)
            });
            Step { clip, ..Step::new(groups.clone(), grads.collect()) }
        };
        let steps = [step(), step()];
        compare(&tensors, &steps, chunk * 256);
    }
}
