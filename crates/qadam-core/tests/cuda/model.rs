//! A model twice over: one that the device steps, and one that the CPU does.

use std::sync::Arc;

use qadam_core::clip::{self, Gradient, HISTORY, Percentile};
use qadam_core::cpu::{self, Backend};
use qadam_core::cuda::{DevicePercentile, DeviceState, DeviceStep};
use qadam_core::paging::managed::Arena;
use qadam_core::rule::Coefficients;
use qadam_core::{DType, Error, Hyper, RawState, State, StateFormat, TensorStep, Walk, bf16, f16};

use crate::stand_in::Soft;

const ONE_SCALE: StateFormat = StateFormat::DYNAMIC8.with_block_wise(false);
const ONE_RANGE: StateFormat = StateFormat::RATIO8.with_block_wise(false);

pub const FORMATS: [StateFormat; 10] = [
    StateFormat::F32,
    StateFormat::DYNAMIC8,
    StateFormat::RATIO8,
    StateFormat::F32.with_amsgrad(true),
    StateFormat::DYNAMIC8.with_amsgrad(true),
    StateFormat::RATIO8.with_amsgrad(true),
    ONE_SCALE,
    ONE_RANGE,
    ONE_SCALE.with_amsgrad(true),
    ONE_RANGE.with_amsgrad(true),
];
/// How many of them need no more than a launch.
const PLAIN: usize = 6;

/// Bytes that start at a multiple of 16, plus `skew`; or that lie in an arena.
pub struct Buffer {
    words: Vec<u128>,
    skew: usize,
    len: usize,
    /// The arena that holds them, and where.
    paged: Option<(Arc<Arena>, usize)>,
}

impl Clone for Buffer {
    /// The same bytes, outside of any arena.
    fn clone(&self) -> Self {
        let mut clone = Self::new(self.len, self.skew);
        clone.bytes_mut().copy_from_slice(self.bytes());
        clone
    }
}

impl Buffer {
    pub fn new(len: usize, skew: usize) -> Self {
        Self { words: vec![0; (len + skew).div_ceil(16) + 1], skew, len, paged: None }
    }

    /// The same bytes, at an offset in `arena`.
    fn in_arena(&self, arena: &Arc<Arena>, at: usize) -> Self {
        let paged = Some((Arc::clone(arena), at));
        let mut moved = Self { words: Vec::new(), skew: 0, len: self.len, paged };
        moved.bytes_mut().copy_from_slice(self.bytes());
        moved
    }

    fn is_paged(&self) -> bool {
        self.paged.is_some()
    }

    fn pointer(&self) -> *mut u8 {
        if let Some((arena, at)) = &self.paged {
            return std::ptr::with_exposed_provenance_mut(arena.address() as usize + at);
        }
        // SAFETY: `skew` is within the words.
        unsafe { self.words.as_ptr().cast::<u8>().cast_mut().add(self.skew) }
    }

    pub fn address(&self) -> u64 {
        self.pointer() as u64
    }

    pub fn bytes(&self) -> &[u8] {
        // SAFETY: `len` bytes behind the pointer are within the words, or within the arena.
        unsafe { std::slice::from_raw_parts(self.pointer(), self.len) }
    }

    pub fn bytes_mut(&mut self) -> &mut [u8] {
        // SAFETY: as above, and borrowed mutably.
        unsafe { std::slice::from_raw_parts_mut(self.pointer(), self.len) }
    }

    fn fill(&mut self, dtype: DType, seed: &mut u64, trouble: bool) {
        for element in self.bytes_mut().chunks_exact_mut(dtype.size()) {
            let x = number(seed, trouble);
            match dtype {
                DType::F32 => element.copy_from_slice(&x.to_le_bytes()),
                DType::BF16 => element.copy_from_slice(&bf16::from_f32(x).to_le_bytes()),
                DType::F16 => element.copy_from_slice(&f16::from_f32(x).to_le_bytes()),
            }
        }
    }

    pub fn set_f32(&mut self, x: f32) {
        self.bytes_mut()[..4].copy_from_slice(&x.to_le_bytes());
    }

    pub fn f32(&self) -> f32 {
        f32::from_le_bytes(self.bytes()[..4].try_into().unwrap())
    }

    fn floats<const N: usize>(&self) -> [f32; N] {
        let (floats, _) = self.bytes().as_chunks();
        std::array::from_fn(|i| f32::from_le_bytes(floats[i]))
    }

    fn set_floats(&mut self, floats: &[f32]) {
        for (bytes, x) in self.bytes_mut().chunks_exact_mut(4).zip(floats) {
            bytes.copy_from_slice(&x.to_le_bytes());
        }
    }
}

/// Numbers over many magnitudes; with `trouble`, some that are not finite.
fn number(seed: &mut u64, trouble: bool) -> f32 {
    *seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
    let bits = *seed >> 33;
    if trouble && bits.is_multiple_of(97) {
        return [f32::NAN, f32::INFINITY, f32::NEG_INFINITY][bits as usize / 97 % 3];
    }
    let x = (bits & 0xFFFF) as f32 / 65536.0 - 0.5;
    x * (-((bits >> 16 & 15) as f32)).exp2()
}

/// Shape, strides of the parameter, strides of the gradient.
pub type Shape = (Vec<usize>, Vec<isize>, Vec<isize>);

/// A parameter with its gradient and state.
#[derive(Clone)]
pub struct Param {
    pub dtype: DType,
    pub grad_dtype: DType,
    pub format: StateFormat,
    pub walk: Walk,
    pub hyper: Hyper,
    /// What the CPU divides gradients by.
    pub grad_scale: f32,
    pub p: Buffer,
    pub g: Buffer,
    pub has_grad: bool,
    pub state: Vec<Buffer>,
    pub step: Buffer,
    /// Squared norms of the last gradients, and which of them limits the next.
    pub history: Buffer,
    pub percentile: Option<usize>,
}

impl Param {
    /// Random, with zero state; `skew` counts elements.
    pub fn new(
        (dtype, grad_dtype, format): (DType, DType, StateFormat),
        (shape, param, grad): &Shape,
        skew: (usize, usize),
        hyper: Hyper,
        seed: &mut u64,
    ) -> Self {
        let walk = Walk::new(shape, param, grad).unwrap();
        let span = |strides: &[isize]| {
            if walk.is_empty() {
                return 0;
            }
            shape.iter().zip(strides).map(|(n, s)| (n - 1) * *s as usize).sum::<usize>() + 1
        };
        let mut p = Buffer::new(span(param) * dtype.size(), skew.0 * dtype.size());
        p.fill(dtype, seed, false);
        let mut g = Buffer::new(span(grad) * grad_dtype.size(), skew.1 * grad_dtype.size());
        g.fill(grad_dtype, seed, true);
        let state = State::zeros(format, walk.len());
        let state = state.buffers().into_iter().map(|zeros| {
            let bytes: Vec<u8> = match zeros {
                qadam_core::Buffer::F32(values) => vec![0; 4 * values.len()],
                qadam_core::Buffer::U8(codes) => codes.to_vec(),
            };
            let mut buffer = Buffer::new(bytes.len(), 0);
            buffer.bytes_mut().copy_from_slice(&bytes);
            buffer
        });
        let (state, step) = (state.collect(), Buffer::new(4, 0));
        Self {
            dtype,
            grad_dtype,
            format,
            walk,
            hyper,
            grad_scale: 1.0,
            p,
            g,
            has_grad: true,
            state,
            step,
            history: Buffer::new(4 * HISTORY, 0),
            percentile: None,
        }
    }

    pub fn flat(kind: (DType, DType, StateFormat), len: usize, seed: &mut u64) -> Self {
        let shape = (vec![len], vec![1], vec![1]);
        Self::new(kind, &shape, (0, 0), Hyper::adamw(), seed)
    }

    /// For a launcher, if the buffers are known to the device.
    pub fn device_step(&self) -> DeviceStep {
        let addresses = self.state.iter().map(Buffer::address);
        DeviceStep {
            param: self.p.address(),
            param_dtype: self.dtype,
            grad: if self.has_grad { self.g.address() } else { 0 },
            grad_dtype: self.grad_dtype,
            walk: self.walk.clone(),
            state: DeviceState::from_buffers(self.format, addresses).unwrap(),
            step: self.step.address(),
            hyper: self.hyper,
            lr_address: None,
            grad_scale: None,
            found_inf: None,
            cut: None,
            percentile: self.percentile.map(|percentile| {
                let history = self.history.address();
                DevicePercentile { history, percentile }
            }),
        }
    }

    /// The number of the coming step.
    fn t(&self) -> u64 {
        self.step.f32() as u64 + 1
    }

    fn coefficients(&self) -> Coefficients {
        Coefficients::new(&self.hyper, self.t()).with_grad_scale(self.grad_scale)
    }

    /// The same step on the CPU.
    fn tensor_step(&mut self, coefficients: Coefficients) -> TensorStep {
        let pointers = self.state.iter().map(Buffer::pointer);
        let state = RawState::from_buffers(self.format, pointers).unwrap();
        // SAFETY: the buffers are as long as `new` made them, for this walk; nothing else uses them.
        unsafe {
            TensorStep::new(
                (self.p.pointer(), self.dtype),
                (self.g.pointer(), self.grad_dtype),
                self.walk.clone(),
                state,
                coefficients,
            )
        }
    }

    fn buffers(&self) -> impl Iterator<Item = &Buffer> {
        [&self.p, &self.g, &self.step, &self.history].into_iter().chain(&self.state)
    }
}

/// The parameters.
#[derive(Clone)]
pub struct Model(pub Vec<Param>);

impl Model {
    /// Every pairing of element types, both states, lengths where the code changes, alignments,
    /// strides, and parameters without elements or without a gradient.
    pub fn mixed() -> Self {
        let mut seed = 1;
        let mut params = Vec::new();
        let lengths = [0, 1, 255, 256, 257, 4095, 4097, 513, 10_000];
        for format in FORMATS {
            for (i, len) in lengths.into_iter().enumerate() {
                let kind = (DType::ALL[i % 3], DType::ALL[i / 3], format);
                let hyper = if i % 2 == 0 { Hyper::adamw() } else { Hyper::adam() };
                let shape = (vec![len], vec![1], vec![1]);
                params.push(Param::new(kind, &shape, (i % 4, i % 3), hyper, &mut seed));
            }
            let kind = (DType::F32, DType::BF16, format);
            for shape in [
                (vec![20, 30], vec![30, 1], vec![1, 20]), // a transposed gradient
                (vec![7, 5, 3, 2], vec![100, 1, 20, 7], vec![0, 2, 1, 0]), // anything goes
            ] {
                params.push(Param::new(kind, &shape, (0, 0), Hyper::adam(), &mut seed));
            }
            params.push(Param::flat(kind, 300, &mut seed));
            if let Some(last) = params.last_mut() {
                last.has_grad = false;
            }
        }
        Self(params)
    }

    /// `count` small tensors.
    pub fn small(count: usize) -> Self {
        let mut seed = 7;
        let kind = |i| {
            let format = FORMATS[i % PLAIN];
            (DType::F32, DType::F32, format)
        };
        Self((0..count).map(|i| Param::flat(kind(i), 16 + i % 300, &mut seed)).collect())
    }

    /// The same, of which some must be measured before they are stepped: for their update's length,
    /// for a scale, or both.
    pub fn measured(mut self) -> Self {
        for (i, param) in self.0.iter_mut().enumerate() {
            param.hyper.max_unorm = [0.0, 1e-3, 0.5][i % 3];
            param.hyper.skip_zeros = i % 4 == 1;
        }
        self
    }

    /// The same, of which some are limited by the norms of their last gradients.
    pub fn limited(mut self) -> Self {
        for (i, param) in self.0.iter_mut().enumerate() {
            param.percentile = [None, Some(0), Some(50)][i % 3];
        }
        self
    }

    /// A copy that device `ordinal` can use.
    pub fn on_device<'a>(&self, soft: &'a Soft, ordinal: i32) -> OnDevice<'a> {
        let mut device = OnDevice { soft, ordinal, model: self.clone() };
        device.adopt();
        device
    }

    pub fn device_steps(&self) -> Vec<DeviceStep> {
        self.0.iter().map(Param::device_step).collect()
    }

    /// One step on the CPU; counts what is not finite.
    pub fn step(&mut self) -> u64 {
        let ones = vec![1.0; self.0.len()];
        self.step_by(&ones)
    }

    /// The same with gradients multiplied by these factors besides.
    fn step_by(&mut self, factors: &[f32]) -> u64 {
        let mut steps = Vec::new();
        for (param, &factor) in self.0.iter_mut().zip(factors).filter(|(param, _)| param.has_grad) {
            steps.push(param.tensor_step(param.coefficients().with_factor(factor)));
            param.step.set_f32(param.t() as f32);
        }
        // SAFETY: all buffers are distinct.
        unsafe { cpu::run(&steps, Backend::Scalar, 1).unwrap() as u64 }
    }

    /// One step whose gradients are cut first; also returns their norm.
    pub fn cut_and_step(&mut self, max_norm: Option<f64>) -> (u64, f32) {
        let mut histories: Vec<[f32; HISTORY]> =
            self.0.iter().map(|param| param.history.floats()).collect();
        let mut gradients = Vec::new();
        for (param, history) in self.0.iter_mut().zip(&mut histories) {
            let (mut squares, mut percentile) = (0.0, None);
            if param.has_grad {
                let step = param.tensor_step(param.coefficients());
                // SAFETY: the gradient is valid, and nobody writes it.
                squares = unsafe { cpu::squared_norms(&[step], Backend::Scalar, 1) }.unwrap()[0];
                let t = param.t();
                percentile =
                    param.percentile.map(|percentile| Percentile { history, t, percentile });
            }
            gradients.push(Gradient { squares, factor: param.coefficients().factor, percentile });
        }
        let (norm, factors) = clip::gradients(&mut gradients, max_norm);
        for (param, history) in self.0.iter_mut().zip(histories) {
            param.history.set_floats(&history);
        }
        (self.step_by(&factors), norm as f32)
    }

    /// The first parameter with non-finite gradients, and how many, by the CPU.
    pub fn count_nonfinite(&self) -> Option<(usize, usize)> {
        let mut model = self.clone();
        let step = |param: &mut Param| param.tensor_step(param.coefficients());
        let steps: Vec<TensorStep> = model.0.iter_mut().map(step).collect();
        // SAFETY: all buffers are distinct.
        match unsafe { cpu::count_nonfinite(&steps, 1) } {
            Ok(()) => None,
            Err(Error::NonFiniteGradient { index, count }) => Some((index, count)),
            Err(error) => panic!("{error}"),
        }
    }

    pub fn set_lr(&mut self, lr: f64) {
        self.0.iter_mut().for_each(|param| param.hyper.lr = lr);
    }

    pub fn set_grad_scale(&mut self, scale: f32) {
        self.0.iter_mut().for_each(|param| param.grad_scale = scale);
    }

    /// New gradients, the same for every copy of the model.
    pub fn refill_grads(&mut self, mut seed: u64) {
        for param in &mut self.0 {
            param.g.fill(param.grad_dtype, &mut seed, true);
        }
    }

    /// Fails where a bit differs, but for gradients.
    #[track_caller]
    pub fn assert_same(&self, other: &Self, what: &str) {
        for (i, (a, b)) in self.0.iter().zip(&other.0).enumerate() {
            let about = format!("{what}: {} of {:?}", i, (a.dtype, a.grad_dtype, a.format));
            assert!(a.p.bytes() == b.p.bytes(), "parameter {about}");
            assert_eq!(a.step.f32(), b.step.f32(), "step count {about}");
            assert!(a.history.bytes() == b.history.bytes(), "history of {about}");
            for (k, (a, b)) in a.state.iter().zip(&b.state).enumerate() {
                assert!(a.bytes() == b.bytes(), "state {k} of {about}");
            }
        }
    }
}

/// A model whose buffers a device takes for its own memory.
pub struct OnDevice<'a> {
    soft: &'a Soft,
    ordinal: i32,
    pub model: Model,
}

impl OnDevice<'_> {
    fn adopt(&mut self) {
        for param in &mut self.model.0 {
            let Param { p, g, step, state, history, .. } = param;
            for buffer in [p, g, step, history].into_iter().chain(state) {
                if buffer.len > 0 && !buffer.is_paged() {
                    assert_eq!(self.soft.adopt(buffer.bytes_mut(), self.ordinal), 0);
                }
            }
        }
    }

    fn release(&self) {
        for buffer in self.model.0.iter().flat_map(Param::buffers) {
            if buffer.len > 0 && !buffer.is_paged() {
                self.soft.unadopt(buffer.address());
            }
        }
    }

    /// Moves the state of these parameters to an arena of their own.
    pub fn page(&mut self, which: impl Fn(usize) -> bool) -> Arc<Arena> {
        let which = |(i, _): &(usize, &mut Param)| which(*i);
        let formats = self.model.0.iter_mut().enumerate().filter(which);
        let formats: Vec<_> = formats.map(|(_, p)| (p.format, p.walk.len())).collect();
        let arena = Arena::new(self.ordinal as usize, &formats).unwrap();
        let paged = self.model.0.iter_mut().enumerate().filter(which);
        for ((_, param), places) in paged.zip(arena.extents().buffers()) {
            for (buffer, place) in param.state.iter_mut().zip(places) {
                assert_eq!(buffer.len, place.len());
                if buffer.len > 0 {
                    assert_eq!(self.soft.unadopt(buffer.address()), 0);
                    *buffer = buffer.in_arena(&arena, place.start);
                }
            }
        }
        arena
    }

    /// Moves every gradient to new memory.
    pub fn move_grads(&mut self) {
        for param in &mut self.model.0 {
            let moved = param.g.clone();
            if moved.bytes().is_empty() {
                continue;
            }
            assert_eq!(self.soft.unadopt(param.g.address()), 0);
            param.g = moved;
            assert_eq!(self.soft.adopt(param.g.bytes_mut(), self.ordinal), 0);
        }
    }
}

impl Drop for OnDevice<'_> {
    fn drop(&mut self) {
        self.release();
    }
}
