//! The same tensors on both sides: stepped by the kernel and by the scalar CPU back end, then
//! compared byte for byte, gaps between strided elements included.

use qadam_core::cpu::{self, Backend};
use qadam_core::rule::Coefficients;
use qadam_core::{
    DType, Decay, Hyper, NonFinite, RawState, StateCode, StateFormat, TensorStep, Walk, bf16, f16,
};

use crate::device::{Gpu, PTX};
use crate::layout::{self, Chunk, Grad, SCALAR, STRIDED, VECTOR};

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
            ..
        } = self.hyper;
        let (lr, lr_address) =
            if self.lr_on_device { (f64::NAN, gpu.upload(&[lr as f32])) } else { (lr, 0) };
        layout::Hyper {
            lr,
            beta1,
            beta2,
            eps,
            weight_decay,
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
}

/// Chunks of `size` elements. An empty tensor has an empty chunk, so that every launch has a warp.
pub fn chunks(tensors: &[Tensor], size: usize) -> Vec<Chunk> {
    let mut chunks = Vec::new();
    for (index, tensor) in tensors.iter().enumerate() {
        let total = tensor.place.len();
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
            assert_eq!(got, want, "non-finite gradients in step {number}");
        }
    }
}

pub fn step_on_cpu(tensors: &mut [Tensor], step: &Step) -> u64 {
    let mut nonfinite = 0;
    for (tensor, grad) in tensors.iter_mut().zip(&step.grads) {
        let Some(mut grad) = grad.clone() else { continue };
        let place = &tensor.place;
        assert_eq!(tensor.param.len, place.param_span() * tensor.param_dtype.size());
        assert_eq!(grad.len, place.grad_span() * tensor.grad_dtype.size());
        let group = step.groups[tensor.group];
        if group.is_off() {
            continue;
        }
        let coefficients = group.coefficients(tensor.step as u64 + 1);
        let pointers = tensor.state.iter_mut().map(Buffer::pointer::<u8>);
        let state = RawState::from_buffers(tensor.format, pointers).unwrap();
        // SAFETY: the buffers have the lengths of the place, as just asserted, and nobody else has
        // them.
        nonfinite += unsafe {
            let param = tensor.param.pointer::<u8>();
            let param = param.add(place.shift.0 * tensor.param_dtype.size());
            let grad = grad.pointer::<u8>().add(place.shift.1 * tensor.grad_dtype.size());
            let step = TensorStep::new(
                (param, tensor.param_dtype),
                (grad, tensor.grad_dtype),
                place.walk(),
                state,
                coefficients,
            );
            cpu::run(&[step], Backend::Scalar, 1).unwrap() as u64
        };
        tensor.step += 1.0;
    }
    nonfinite
}

/// The addresses of buffers in a format's order, as the kernel's tensor has them: three moments, then
/// their scales; 0 for what is not there.
pub fn moments(format: StateFormat, buffers: &[u64]) -> [u64; 6] {
    assert_eq!(buffers.len(), format.buffers(0).len());
    let at = |i: usize| buffers.get(i).copied().unwrap_or(0);
    match format.code {
        StateCode::F32 => [at(0), at(1), at(2), 0, 0, 0],
        StateCode::Dynamic8 => [at(0), at(2), at(4), at(1), at(3), at(5)],
    }
}

/// Addresses.
struct OnDevice {
    step: u64,
    param: u64,
    state: Vec<u64>,
}

impl OnDevice {
    fn new(tensor: &Tensor, gpu: &mut Gpu) -> Self {
        Self {
            step: gpu.upload(&[tensor.step]),
            param: gpu.upload(tensor.param.bytes()),
            state: tensor.state.iter().map(|buffer| gpu.upload(buffer.bytes())).collect(),
        }
    }

    fn table(&self, tensor: &Tensor) -> layout::Tensor {
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
            hyper: tensor.group as u32,
            param_dtype: tensor.param_dtype as u32,
            grad_dtype: tensor.grad_dtype as u32,
            is_8bit: (tensor.format.code == StateCode::Dynamic8).into(),
        }
    }

    fn assert_equal(&self, tensor: &Tensor, gpu: &mut Gpu, what: &str) {
        assert_eq!(gpu.read::<f32>(self.step, 1), [tensor.step], "{what}: steps");
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
) -> u64 {
    let hypers: Vec<layout::Hyper> = step.groups.iter().map(|group| group.table(gpu)).collect();
    let table: Vec<layout::Tensor> =
        tensors.iter().zip(device).map(|(tensor, device)| device.table(tensor)).collect();
    let grads: Vec<Grad> = (0..tensors.len())
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
            let guarded = step.groups[tensors[i].group].found_inf.is_some();
            Grad { address, strides, access, guarded: guarded.into() }
        })
        .collect();
    gpu.step((&table, &hypers), &grads, &chunks(tensors, chunk))
}

/// Thread instructions (of PTX) an element that one step of `tensor` takes.
pub fn instructions(ptx: (u32, &str), tensor: &Tensor, step: &Step) -> f64 {
    let mut gpu = Gpu::new(ptx);
    let device = [OnDevice::new(tensor, &mut gpu)];
    step_on_gpu(&mut gpu, std::slice::from_ref(tensor), &device, step, 4096);
    gpu.stats.thread_instructions as f64 / tensor.place.len() as f64
}
