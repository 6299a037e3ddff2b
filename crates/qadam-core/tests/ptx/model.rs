//! The same tensors on both sides: stepped by the kernel and by the scalar CPU back end, then
//! compared byte for byte, gaps between strided elements included.

use qadam_core::clip::{self, Gradient, HISTORY, Percentile};
use qadam_core::codec::Code;
use qadam_core::cpu::{self, Backend, squared_norms};
use qadam_core::rule::Coefficients;
use qadam_core::{
    DType, Decay, Hyper, NonFinite, RawState, StateCode, StateFormat, TensorStep, Walk, bf16, f16,
};

use crate::device::{Gpu, PTX};
use crate::layout::{
    self, Chunk, FOLD, Grad, IS_8BIT, IS_AMSGRAD, IS_RATIO, MEASURED, ONE_SCALE, SCALAR, STRIDED,
    VECTOR,
};

/// Bytes, the first of which is aligned for any element type.
#[derive(Clone, Default)]
pub struct Buffer {
    words: Vec<u64>,
    len: usize,
}

impl Buffer {
    pub fn new(bytes: &[u8]) -> Self {
        let mut buffer = Self { words: vec![0; bytes.len().div_ceil(8)], len: bytes.len() };
        buffer.bytes_mut().copy_from_slice(bytes);
        buffer
    }

    pub fn floats(values: &[f32]) -> Self {
        Self::new(&values.iter().flat_map(|x| x.to_le_bytes()).collect::<Vec<_>>())
    }

    pub fn bytes(&self) -> &[u8] {
        // SAFETY: `len` bytes lie within the words.
        unsafe { std::slice::from_raw_parts(self.words.as_ptr().cast(), self.len) }
    }

    fn bytes_mut(&mut self) -> &mut [u8] {
        // SAFETY: as above.
        unsafe { std::slice::from_raw_parts_mut(self.words.as_mut_ptr().cast(), self.len) }
    }

    fn pointer<T>(&mut self) -> *mut T {
        self.words.as_mut_ptr().cast()
    }
}

/// Elements of `dtype` nearest to `values`, NaNs with their payloads.
pub fn encode(values: &[f32], dtype: DType) -> Vec<u8> {
    let encode = |&x: &f32| match dtype {
        DType::F32 => x.to_le_bytes().to_vec(),
        DType::BF16 => bf16::from_f32(x).to_le_bytes().to_vec(),
        DType::F16 => f16::from_f32(x).to_le_bytes().to_vec(),
    };
    values.iter().flat_map(encode).collect()
}

/// Where the elements of a parameter and its gradient are, in elements from an aligned address.
#[derive(Debug, Clone)]
pub struct Place {
    pub shape: Vec<usize>,
    pub param: Vec<isize>,
    pub grad: Vec<isize>,
    /// Elements before the first of the parameter, and of the gradient.
    pub shift: (usize, usize),
}

impl Place {
    pub fn dense(len: usize) -> Self {
        Self { shape: vec![len], param: vec![1], grad: vec![1], shift: (0, 0) }
    }

    pub fn strided(shape: &[usize], param: &[isize], grad: &[isize]) -> Self {
        Self { shape: shape.into(), param: param.into(), grad: grad.into(), shift: (0, 0) }
    }

    pub fn shifted(mut self, param: usize, grad: usize) -> Self {
        self.shift = (param, grad);
        self
    }

    pub fn len(&self) -> usize {
        self.shape.iter().product()
    }

    fn span(&self, strides: &[isize]) -> usize {
        if self.len() == 0 {
            return 0;
        }
        let last = self.shape.iter().zip(strides).map(|(&n, &s)| (n - 1) * s as usize);
        last.sum::<usize>() + 1
    }

    /// How many elements their buffers have.
    pub fn param_span(&self) -> usize {
        self.shift.0 + self.span(&self.param)
    }

    pub fn grad_span(&self) -> usize {
        self.shift.1 + self.span(&self.grad)
    }

    fn walk(&self) -> Walk {
        Walk::new(&self.shape, &self.param, &self.grad).unwrap()
    }

    /// Innermost dimension of the parameter first.
    pub fn table(&self) -> layout::Strides {
        let mut order: Vec<usize> = (0..self.shape.len()).filter(|&d| self.shape[d] > 1).collect();
        order.sort_by_key(|&d| self.param[d]);
        let (size, zero) = ([1; layout::DIMS], [0; layout::DIMS]);
        let mut table = layout::Strides { size, param: zero, grad: zero };
        for (i, d) in order.into_iter().enumerate() {
            table.size[i] = self.shape[d] as u64;
            table.param[i] = self.param[d] as i64;
            table.grad[i] = self.grad[d] as i64;
        }
        table
    }
}

#[derive(Clone)]
pub struct Tensor {
    pub place: Place,
    pub param_dtype: DType,
    pub grad_dtype: DType,
    pub format: StateFormat,
    /// Which hyperparameters.
    pub group: usize,
    /// How many steps it has had.
    pub step: f32,
    pub param: Buffer,
    /// In the format's order.
    pub state: Vec<Buffer>,
    /// Squared norms, and which of them limits the gradient.
    pub percentile: Option<([f32; HISTORY], usize)>,
}

impl Tensor {
    /// How many sums its squares give at first.
    fn folds(&self) -> usize {
        self.place.len().div_ceil(FOLD)
    }

    /// Whether the whole tensor is measured before a step with this group.
    fn is_measured(&self, group: &Group) -> bool {
        let one_scale = !self.format.block_wise;
        self.place.len() > 0 && (one_scale || group.hyper.max_unorm > 0.0)
    }

    /// The step with gradient `grad`.
    fn with(&mut self, grad: &mut Buffer, coefficients: Coefficients) -> TensorStep {
        let place = &self.place;
        assert_eq!(self.param.len, place.param_span() * self.param_dtype.size());
        assert_eq!(grad.len, place.grad_span() * self.grad_dtype.size());
        let state = self.state.iter_mut().map(Buffer::pointer::<u8>);
        let state = RawState::from_buffers(self.format, state).unwrap();
        // SAFETY: the buffers have the lengths of the place, as just asserted.
        unsafe {
            let param = self.param.pointer::<u8>().add(place.shift.0 * self.param_dtype.size());
            let grad = grad.pointer::<u8>().add(place.shift.1 * self.grad_dtype.size());
            let (param, grad) = ((param, self.param_dtype), (grad.cast_const(), self.grad_dtype));
            TensorStep::new(param, grad, place.walk(), state, coefficients)
        }
    }
}

#[derive(Debug, Clone, Copy)]
pub struct Group {
    pub hyper: Hyper,
    /// Whether the kernel finds the learning rate behind `lr_address`.
    pub lr_on_device: bool,
    /// What the kernel finds behind `grad_scale`.
    pub grad_scale: Option<f32>,
    /// What the kernel finds behind `found_inf`.
    pub found_inf: Option<f32>,
}

impl From<Hyper> for Group {
    fn from(hyper: Hyper) -> Self {
        Self { hyper, lr_on_device: false, grad_scale: None, found_inf: None }
    }
}

impl Group {
    /// What the CPU works with: a learning rate on the device is an f32.
    fn effective(&self) -> Hyper {
        let lr = if self.lr_on_device { f64::from(self.hyper.lr as f32) } else { self.hyper.lr };
        Hyper { lr, ..self.hyper }
    }

    /// Whether a step is not to be taken.
    fn is_off(&self) -> bool {
        self.found_inf.is_some_and(|found| found != 0.0)
    }

    fn coefficients(&self, t: u64) -> Coefficients {
        let coefficients = Coefficients::new(&self.effective(), t);
        match self.grad_scale {
            Some(scale) => coefficients.with_grad_scale(scale),
            None => coefficients,
        }
    }

    pub fn table(&self, gpu: &mut Gpu) -> layout::Hyper {
        let Hyper {
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
        } = self.hyper;
        let (lr, lr_address) =
            if self.lr_on_device { (f64::NAN, gpu.upload(&[lr as f32])) } else { (lr, 0) };
        layout::Hyper {
            lr,
            beta1,
            beta2,
            eps,
            weight_decay,
            max_unorm,
            lr_address,
            grad_scale: self.grad_scale.map_or(0, |scale| gpu.upload(&[scale])),
            found_inf: self.found_inf.map_or(0, |found| gpu.upload(&[found])),
            decoupled: (decay == Decay::Decoupled).into(),
            propagate: (nonfinite == NonFinite::Propagate).into(),
            maximize: maximize.into(),
            skip_zeros: skip_zeros.into(),
        }
    }
}

/// One step: the hyperparameters of each group, and for each tensor the bytes of its gradient.
#[derive(Clone)]
pub struct Step {
    pub groups: Vec<Group>,
    pub grads: Vec<Option<Buffer>>,
    /// Whether gradients are cut first, and to what norm.
    #[expect(clippy::option_option, reason = "measured only, or cut")]
    pub clip: Option<Option<f64>>,
}

impl Step {
    /// A step whose gradients are not cut.
    pub fn new(groups: Vec<Group>, grads: Vec<Option<Buffer>>) -> Self {
        Self { groups, grads, clip: None }
    }
}

/// Chunks of `size` elements, of more where whole folds are needed. An empty tensor has an empty chunk.
fn chunks(tensors: &[Tensor], size: usize, folds: impl Fn(&Tensor) -> bool) -> Vec<Chunk> {
    let mut chunks = Vec::new();
    for (index, tensor) in tensors.iter().enumerate() {
        let total = tensor.place.len();
        let size = if folds(tensor) { size.next_multiple_of(FOLD) } else { size };
        for start in (0..total.max(1)).step_by(size) {
            let len = size.min(total - start) as u32;
            chunks.push(Chunk { start: start as u64, len, tensor: index as u32 });
        }
    }
    chunks
}

/// Runs `steps` on both sides with both PTX files.
pub fn compare(tensors: &[Tensor], steps: &[Step], chunk: usize) {
    for ptx in PTX {
        let mut gpu = Gpu::new(ptx);
        let mut reference = tensors.to_vec();
        let device: Vec<OnDevice> = tensors.iter().map(|t| OnDevice::new(t, &mut gpu)).collect();
        for (number, step) in steps.iter().enumerate() {
            let want = step_on_cpu(&mut reference, step);
            let got = step_on_gpu(&mut gpu, tensors, &device, step, chunk);
            for (index, (tensor, device)) in reference.iter().zip(&device).enumerate() {
                let what = format!(
                    "sm_{}, step {number}, tensor {index}: {} and {}, {}, {:?}",
                    ptx.0,
                    tensor.param_dtype.name(),
                    tensor.grad_dtype.name(),
                    tensor.format,
                    tensor.place,
                );
                device.assert_equal(tensor, &mut gpu, &what);
            }
            assert_eq!(got, want, "step {number}");
        }
    }
}

/// What a step did besides writing tensors.
#[derive(Debug, Default, PartialEq)]
pub struct Outcome {
    pub nonfinite: u64,
    /// What each gradient was multiplied by, and the norm of all, as bits.
    pub cuts: Vec<u32>,
    pub norm: Option<u32>,
}

/// Any NaN is one.
fn bits(x: f32) -> u32 {
    if x.is_nan() { 0x7FC0_0000 } else { x.to_bits() }
}

pub fn step_on_cpu(tensors: &mut [Tensor], step: &Step) -> Outcome {
    let mut grads = step.grads.clone();
    let (mut used, mut coefficients) = (vec![false; tensors.len()], Vec::new());
    for ((tensor, grad), used) in tensors.iter().zip(&step.grads).zip(&mut used) {
        let group = &step.groups[tensor.group];
        *used = grad.is_some() && !group.is_off();
        coefficients.push(group.coefficients(tensor.step as u64 + 1));
    }
    let mut outcome = Outcome::default();
    if let Some(max_norm) = step.clip {
        let mut histories: Vec<_> = tensors.iter().map(|tensor| tensor.percentile).collect();
        let mut gradients = Vec::new();
        for (i, history) in histories.iter_mut().enumerate() {
            let (squares, factor, percentile) = (0.0, 1.0, None);
            gradients.push(Gradient { squares, factor, percentile });
            if !used[i] {
                continue; // counts as 0
            }
            let step = tensors[i].with(grads[i].as_mut().unwrap(), coefficients[i]);
            // SAFETY: nobody else has the buffers.
            let squares = unsafe { squared_norms(&[step], BACKEND, 1) }.unwrap()[0];
            let (t, factor) = (tensors[i].step as u64 + 1, coefficients[i].factor);
            let percentile = history.as_mut().map(|(history, percentile)| Percentile {
                history,
                t,
                percentile: *percentile,
            });
            gradients[i] = Gradient { squares, factor, percentile };
        }
        let (norm, factors) = clip::gradients(&mut gradients, max_norm);
        outcome.norm = Some(bits(norm as f32));
        for (i, factor) in factors.into_iter().enumerate() {
            outcome.cuts.push(if used[i] { bits(factor) } else { 1.0_f32.to_bits() });
            coefficients[i] = coefficients[i].with_factor(factor);
        }
        for (tensor, history) in tensors.iter_mut().zip(histories) {
            tensor.percentile = history;
        }
    }
    for (i, tensor) in tensors.iter_mut().enumerate().filter(|(i, _)| used[*i]) {
        let step = tensor.with(grads[i].as_mut().unwrap(), coefficients[i]);
        // SAFETY: nobody else has the buffers.
        outcome.nonfinite += unsafe { cpu::run(&[step], BACKEND, 1).unwrap() as u64 };
        tensor.step += 1.0;
    }
    outcome
}

const BACKEND: Backend = Backend::Scalar;
/// The addresses of buffers in a format's order, as the kernel's tensor has them: three moments, then
/// their scales; 0 for what is not there.
pub fn moments(format: StateFormat, buffers: &[u64]) -> [u64; 6] {
    assert_eq!(buffers.len(), format.buffers(0).len());
    let at = |i: usize| buffers.get(i).copied().unwrap_or(0);
    match format.code {
        StateCode::F32 => [at(0), at(1), at(2), 0, 0, 0],
        StateCode::Coded(_) => [at(0), at(2), at(4), at(1), at(3), at(5)],
    }
}

/// The flags of a state's format.
pub fn flags(format: StateFormat) -> u8 {
    let code = match format.code {
        StateCode::F32 => 0,
        StateCode::Coded(Code::Dynamic) => IS_8BIT,
        StateCode::Coded(Code::Ratio) => IS_8BIT | IS_RATIO,
    };
    let amsgrad = if format.amsgrad { IS_AMSGRAD } else { 0 };
    code | amsgrad | if format.block_wise { 0 } else { ONE_SCALE }
}

/// Addresses.
struct OnDevice {
    step: u64,
    param: u64,
    state: Vec<u64>,
    history: u64,
}

impl OnDevice {
    fn new(tensor: &Tensor, gpu: &mut Gpu) -> Self {
        Self {
            step: gpu.upload(&[tensor.step]),
            param: gpu.upload(tensor.param.bytes()),
            state: tensor.state.iter().map(|buffer| gpu.upload(buffer.bytes())).collect(),
            history: tensor.percentile.map_or(0, |(history, _)| gpu.upload(&history)),
        }
    }

    fn table(&self, tensor: &Tensor, group: &Group) -> layout::Tensor {
        let [m, v, max_v, m_scale, v_scale, max_v_scale] = moments(tensor.format, &self.state);
        layout::Tensor {
            param: self.param + (tensor.place.shift.0 * tensor.param_dtype.size()) as u64,
            m,
            v,
            m_scale,
            v_scale,
            max_v,
            max_v_scale,
            step: self.step,
            len: tensor.place.len() as u64,
            history: self.history,
            hyper: tensor.group as u32,
            param_dtype: tensor.param_dtype as u8,
            grad_dtype: tensor.grad_dtype as u8,
            flags: flags(tensor.format) | if tensor.is_measured(group) { MEASURED } else { 0 },
            percentile: tensor.percentile.map_or(0, |(_, percentile)| percentile as u8),
        }
    }

    fn assert_equal(&self, tensor: &Tensor, gpu: &mut Gpu, what: &str) {
        assert_eq!(gpu.read::<f32>(self.step, 1), [tensor.step], "{what}: steps");
        if let Some((history, _)) = tensor.percentile {
            let got = gpu.read::<u32>(self.history, HISTORY);
            assert_eq!(got, history.map(f32::to_bits), "{what}: history");
        }
        let names = tensor.format.buffers(0).into_iter().map(|spec| spec.name);
        let buffers = tensor.state.iter().zip(&self.state).zip(names);
        let param = ((&tensor.param, &self.param), "param");
        for ((buffer, &address), name) in std::iter::once(param).chain(buffers) {
            let got = gpu.read::<u8>(address, buffer.len);
            if let Some(at) = buffer.bytes().iter().zip(&got).position(|(a, b)| a != b) {
                let end = buffer.len.min(at + 8);
                let want = &buffer.bytes()[at..end];
                panic!("{what}: {name}, byte {at}: got {:02x?}, want {want:02x?}", &got[at..end]);
            }
        }
    }
}

fn step_on_gpu(
    gpu: &mut Gpu,
    tensors: &[Tensor],
    device: &[OnDevice],
    step: &Step,
    chunk: usize,
) -> Outcome {
    let hypers: Vec<layout::Hyper> = step.groups.iter().map(|group| group.table(gpu)).collect();
    let group = |tensor: &Tensor| &step.groups[tensor.group];
    let table: Vec<layout::Tensor> = tensors
        .iter()
        .zip(device)
        .map(|(tensor, device)| device.table(tensor, group(tensor)))
        .collect();
    let mut grads: Vec<Grad> = (0..tensors.len())
        .map(|i| {
            let Some(grad) = &step.grads[i] else { return Grad::default() };
            let place = &tensors[i].place;
            let address =
                gpu.upload(grad.bytes()) + (place.shift.1 * tensors[i].grad_dtype.size()) as u64;
            let (access, strides) = if !place.walk().is_flat() {
                (STRIDED, gpu.upload(&[place.table()]))
            } else if address.is_multiple_of(16) && table[i].param.is_multiple_of(16) {
                (VECTOR, 0)
            } else {
                (SCALAR, 0)
            };
            let guarded = group(&tensors[i]).found_inf.is_some().into();
            Grad { address, strides, cut: 0, access, guarded }
        })
        .collect();
    let mut outcome = Outcome::default();
    if let Some(max_norm) = step.clip {
        let chunks = chunks(tensors, chunk, |_| true);
        let mut table = gpu.table((&table, &hypers), &grads, &chunks);
        let folds: Vec<usize> = tensors.iter().map(Tensor::folds).collect();
        let scratch = gpu.measuring(&mut table, &folds, 1);
        let norm = gpu.reserve(4);
        let (is_limited, max_norm) = (max_norm.is_some().into(), max_norm.unwrap_or(f64::NAN));
        table.clip = gpu.upload(&[layout::Clip { max_norm, norm, is_limited, unused: 0 }]);
        gpu.launch("qadam_squares", table.chunk_count, table);
        gpu.assert_at_rest(&table, &scratch);
        gpu.launch("qadam_cut", table.tensor_count, table);
        let cuts: Vec<layout::Cut> = gpu.read(table.found, tensors.len());
        outcome.cuts = cuts.iter().map(|cut| bits(cut.factor)).collect();
        outcome.norm = Some(gpu.read::<u32>(norm, 1)[0]);
        for (i, grad) in grads.iter_mut().enumerate() {
            grad.cut = table.found + 16 * i as u64;
        }
    }
    let is_measured = |tensor: &Tensor| tensor.is_measured(group(tensor));
    let chunks = chunks(tensors, chunk, is_measured);
    let mut table = gpu.table((&table, &hypers), &grads, &chunks);
    if tensors.iter().any(is_measured) {
        let folds = |tensor: &Tensor| if is_measured(tensor) { tensor.folds() } else { 0 };
        let folds: Vec<usize> = tensors.iter().map(folds).collect();
        let scratch = gpu.measuring(&mut table, &folds, 2);
        gpu.launch("qadam_measure", table.chunk_count, table);
        gpu.assert_at_rest(&table, &scratch);
    }
    outcome.nonfinite = gpu.step(table);
    outcome
}

/// Thread instructions (of PTX) an element that one step of `tensor` takes.
pub fn instructions(ptx: (u32, &str), tensor: &Tensor, step: &Step) -> f64 {
    let mut gpu = Gpu::new(ptx);
    let device = [OnDevice::new(tensor, &mut gpu)];
    step_on_gpu(&mut gpu, std::slice::from_ref(tensor), &device, step, 4096);
    gpu.stats.thread_instructions as f64 / tensor.place.len() as f64
}
