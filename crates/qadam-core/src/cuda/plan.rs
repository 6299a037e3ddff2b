//! What a launch is to do: tensors in, checked; the table's contents out.

use std::mem::size_of;
use std::ops::Range;
use std::sync::Arc;

use super::table::{
    Access, Chunk, DIMS, Grad, Hyper as DeviceHyper, Strides, Table, Tensor, bytes,
};
use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::layout::Walk;
use crate::rule::{Decay, Hyper, NonFinite};
use crate::state::{StateCode, StateFormat};

/// Device addresses of one moment in an 8-bit code.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DeviceCoded {
    /// Codes.
    pub code: u64,
    /// Scales.
    pub scale: u64,
}

/// Device addresses of a parameter's state, each a multiple of 16, as long as
/// [`StateFormat::buffers`] says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DeviceState {
    /// [`StateCode::F32`].
    F32 {
        /// First moments.
        m: u64,
        /// Second moments.
        v: u64,
        /// Largest second moments so far, by which the update divides (`AMSGrad`).
        max_v: Option<u64>,
    },
    /// [`StateCode::Dynamic8`].
    Dynamic8 {
        /// First moments.
        m: DeviceCoded,
        /// Second moments.
        v: DeviceCoded,
        /// Largest second moments so far, by which the update divides (`AMSGrad`).
        max_v: Option<DeviceCoded>,
    },
}

impl DeviceState {
    /// The state of this format whose buffers are at `addresses`, in [`StateFormat::buffers`]'
    /// order; `None` unless there are as many as that says.
    pub fn from_buffers(
        format: StateFormat,
        addresses: impl IntoIterator<Item = u64>,
    ) -> Option<Self> {
        let mut rest = addresses.into_iter();
        let state = match format.code {
            StateCode::F32 => {
                let (m, v) = (rest.next()?, rest.next()?);
                let max_v = if format.amsgrad { Some(rest.next()?) } else { None };
                Self::F32 { m, v, max_v }
            }
            StateCode::Dynamic8 => {
                let mut next = || Some(DeviceCoded { code: rest.next()?, scale: rest.next()? });
                let (m, v) = (next()?, next()?);
                let max_v = if format.amsgrad { Some(next()?) } else { None };
                Self::Dynamic8 { m, v, max_v }
            }
        };
        rest.next().is_none().then_some(state)
    }

    /// Address and bytes of each buffer for `len` elements; those that the format lacks are at 0.
    fn buffers(self, len: u64) -> [(u64, u64); 6] {
        const NONE: (u64, u64) = (0, 0);
        match self {
            Self::F32 { m, v, max_v } => {
                let values = |address| (address, 4 * len);
                [values(m), values(v), max_v.map_or(NONE, values), NONE, NONE, NONE]
            }
            Self::Dynamic8 { m, v, max_v } => {
                let codes = |coded: DeviceCoded| (coded.code, len);
                let scales = |coded: DeviceCoded| (coded.scale, 4 * len.div_ceil(BLOCK));
                let (max_codes, max_scales) =
                    (max_v.map_or(NONE, codes), max_v.map_or(NONE, scales));
                [codes(m), scales(m), codes(v), scales(v), max_codes, max_scales]
            }
        }
    }
}

/// The update of one parameter on a device.
#[derive(Debug, Clone)]
pub struct DeviceStep {
    /// Device address of the parameter's first element.
    pub param: u64,
    /// The parameter's element type.
    pub param_dtype: DType,
    /// Device address of the gradient's first element. 0 leaves the parameter, its state and its
    /// step count as they are; for a parameter without elements any address will do.
    pub grad: u64,
    /// The gradient's element type.
    pub grad_dtype: DType,
    /// Where the elements of both lie.
    pub walk: Walk,
    /// The moments.
    pub state: DeviceState,
    /// Device address of an f32: how many steps the parameter has had. The device adds 1.
    pub step: u64,
    /// Hyperparameters of this step.
    pub hyper: Hyper,
    /// Device address of an f32 that is read in place of `hyper.lr` when the step runs, so that a
    /// replayed graph follows it.
    pub lr_address: Option<u64>,
    /// Device address of an f32, the scale of the loss, by which gradients are divided when the step
    /// runs: as [`Coefficients::with_grad_scale`](crate::rule::Coefficients::with_grad_scale) does.
    pub grad_scale: Option<u64>,
    /// Device address of an f32. If it is not 0 when the step runs, the parameter, its state and its
    /// step count stay as they are, and its non-finite gradients are not counted.
    pub found_inf: Option<u64>,
}

impl DeviceStep {
    /// Address and bytes of each buffer of the state; those that the format lacks have no bytes.
    pub(super) fn buffers(&self) -> [(u64, u64); 6] {
        self.state.buffers(self.walk.len() as u64)
    }
}

/// Blocks of a chunk begin where those of the 8-bit code do.
const BLOCK: u64 = 256;

/// Where the kernels count warps that are done, in the table: behind its head.
const ARRIVED: usize = size_of::<Table>();
/// The head's size.
const HEAD: usize = 128;

/// Contents of a table, but for addresses within the table itself.
#[derive(Debug, Clone, Default)]
pub(super) struct Plan {
    hypers: Vec<DeviceHyper>,
    /// `strides` is an index into `self.strides`.
    grads: Vec<Grad>,
    strides: Vec<Strides>,
    tensors: Vec<Tensor>,
    chunks: Arc<Vec<Chunk>>,
}

/// Where the parts of a table are, in bytes. What changes often comes first and together.
struct Layout {
    hypers: Range<usize>,
    grads: Range<usize>,
    strides: Range<usize>,
    tensors: Range<usize>,
    chunks: Range<usize>,
}

impl Plan {
    /// Replaces the contents by what `steps` ask for; chunks are taken over from `before` where
    /// they would be the same. Errors name each step by the number that comes with it.
    ///
    /// # Errors
    /// [`Error::Address`], [`Error::Dimensions`] or [`Error::Hyperparameter`].
    pub fn fill<'a>(
        &mut self,
        steps: impl Iterator<Item = (usize, &'a DeviceStep)>,
        before: &Self,
    ) -> Result<()> {
        self.hypers.clear();
        self.grads.clear();
        self.strides.clear();
        self.tensors.clear();
        for (index, step) in steps {
            check_addresses(index, step)?;
            let hyper = self.hyper(step)?;
            let grad = self.grad(index, step)?;
            self.grads.push(grad);
            self.tensors.push(tensor(step, hyper));
        }
        self.chunks = if self.lengths().eq(before.lengths()) {
            Arc::clone(&before.chunks)
        } else {
            Arc::new(chunks(self.lengths()))
        };
        Ok(())
    }

    fn lengths(&self) -> impl Iterator<Item = u64> + Clone + '_ {
        self.tensors.iter().map(|tensor| tensor.len)
    }

    /// The index of the step's hyperparameters; neighbours that have the same share one.
    fn hyper(&mut self, step: &DeviceStep) -> Result<u32> {
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
        } = step.hyper;
        let hyper = DeviceHyper {
            lr,
            beta1,
            beta2,
            eps,
            weight_decay,
            lr_address: step.lr_address.unwrap_or(0),
            grad_scale: step.grad_scale.unwrap_or(0),
            found_inf: step.found_inf.unwrap_or(0),
            decoupled: u32::from(decay == Decay::Decoupled),
            propagate: u32::from(nonfinite == NonFinite::Propagate),
            maximize: u32::from(maximize),
            skip_zeros: u32::from(skip_zeros),
        };
        let same = |last: &DeviceHyper| {
            bytes(std::slice::from_ref(last)) == bytes(std::slice::from_ref(&hyper))
        };
        if !self.hypers.last().is_some_and(same) {
            // as on the CPU, what a schedule makes of these may pass a little below zero
            let Hyper { lr, weight_decay, .. } = step.hyper;
            let (lr, weight_decay) = (lr.abs(), weight_decay.abs());
            Hyper { lr, weight_decay, ..step.hyper }.validate()?;
            self.hypers.push(hyper);
        }
        Ok(self.hypers.len() as u32 - 1) // not empty; fewer than 2^32 tensors
    }

    fn grad(&mut self, index: usize, step: &DeviceStep) -> Result<Grad> {
        let guarded = u32::from(step.found_inf.is_some());
        let mut grad = Grad { address: step.grad, strides: 0, access: 0, guarded };
        let access = if step.walk.is_flat() {
            let vector =
                |address: u64, dtype: DType| address.is_multiple_of(4 * dtype.size() as u64);
            let aligned =
                vector(step.param, step.param_dtype) && vector(step.grad, step.grad_dtype);
            if aligned { Access::Vector } else { Access::Scalar }
        } else {
            grad.strides = self.strides.len() as u64;
            self.strides.push(strides(index, &step.walk)?);
            Access::Strided
        };
        grad.access = access as u32;
        if step.walk.is_empty() {
            grad.address = step.step; // not 0: no element is read, and the step counts
        }
        Ok(grad)
    }

    fn layout(&self) -> Layout {
        let after = |start: usize, bytes: &[u8]| start..start + bytes.len();
        let hypers = after(HEAD, bytes(&self.hypers));
        let grads = after(hypers.end, bytes(&self.grads));
        let strides = after(grads.end, bytes(&self.strides));
        let tensors = after(strides.end, bytes(&self.tensors));
        let chunks = after(tensors.end, bytes(&self.chunks));
        Layout { hypers, grads, strides, tensors, chunks }
    }

    /// How many bytes the table takes.
    pub fn bytes(&self) -> usize {
        self.layout().chunks.end
    }

    /// How many chunks there are.
    pub fn chunk_count(&self) -> usize {
        self.chunks.len()
    }

    /// The bytes of a table that has `before`'s contents which have to be written; empty if none.
    pub fn changed(&self, before: &Self) -> Range<usize> {
        let (layout, old) = (self.layout(), before.layout());
        if self.parts(&layout).map(|(range, _)| range) != before.parts(&old).map(|(range, _)| range)
        {
            return 0..self.bytes();
        }
        let mut changed = 0..0;
        for ((range, new), (_, old)) in self.parts(&layout).into_iter().zip(before.parts(&old)) {
            // Chunks taken over are the same list: no need to read it.
            if !std::ptr::eq(new, old) && new != old {
                changed = if changed.is_empty() { range } else { changed.start..range.end };
            }
        }
        changed
    }

    fn parts(&self, layout: &Layout) -> [(Range<usize>, &[u8]); 5] {
        [
            (layout.hypers.clone(), bytes(&self.hypers)),
            (layout.grads.clone(), bytes(&self.grads)),
            (layout.strides.clone(), bytes(&self.strides)),
            (layout.tensors.clone(), bytes(&self.tensors)),
            (layout.chunks.clone(), bytes(&self.chunks)),
        ]
    }

    /// Writes bytes `range` (of [`Plan::changed`], or all) of a table that will be at device
    /// address `base` to the same place in `image`.
    pub fn write(&self, range: &Range<usize>, base: u64, nonfinite: u64, image: &mut [u8]) {
        let layout = self.layout();
        let at = |part: &Range<usize>| base + part.start as u64;
        if range.start == 0 {
            let head = Table {
                tensors: at(&layout.tensors),
                grads: at(&layout.grads),
                chunks: at(&layout.chunks),
                hypers: at(&layout.hypers),
                nonfinite,
                arrived: base + ARRIVED as u64,
                chunk_count: self.chunks.len() as u64,
                tensor_count: self.tensors.len() as u64,
            };
            image[..ARRIVED].copy_from_slice(bytes(&[head]));
            image[ARRIVED..HEAD].fill(0); // no warp has arrived
        }
        for (part, content) in self.parts(&layout) {
            if range.start <= part.start && part.end <= range.end {
                image[part].copy_from_slice(content);
            }
        }
        if range.start > layout.grads.start || range.end < layout.grads.end {
            return;
        }
        let strides = at(&layout.strides);
        let of_grads = image[layout.grads].chunks_exact_mut(size_of::<Grad>());
        for (grad, image) in self.grads.iter().zip(of_grads) {
            if grad.access == Access::Strided as u32 {
                let strides = strides + grad.strides * size_of::<Strides>() as u64;
                image.copy_from_slice(bytes(&[Grad { strides, ..*grad }]));
            }
        }
    }
}

fn tensor(step: &DeviceStep, hyper: u32) -> Tensor {
    let dtype = |dtype| match dtype {
        DType::F32 => 0,
        DType::BF16 => 1,
        DType::F16 => 2,
    };
    let buffers = step.buffers().map(|(address, _)| address);
    let (is_8bit, [m, v, max_v, m_scale, v_scale, max_v_scale]) = match step.state {
        DeviceState::F32 { .. } => (0, buffers),
        DeviceState::Dynamic8 { .. } => {
            let [m, m_scale, v, v_scale, max_v, max_v_scale] = buffers;
            (1, [m, v, max_v, m_scale, v_scale, max_v_scale])
        }
    };
    Tensor {
        param: step.param,
        m,
        v,
        m_scale,
        v_scale,
        max_v,
        max_v_scale,
        step: step.step,
        len: step.walk.len() as u64,
        hyper,
        param_dtype: dtype(step.param_dtype),
        grad_dtype: dtype(step.grad_dtype),
        is_8bit,
    }
}

/// The walk as the kernels read it: dimensions that are not there have size 1.
fn strides(index: usize, walk: &Walk) -> Result<Strides> {
    let dims = walk.dims();
    let got = dims.len();
    if got > DIMS {
        return Err(Error::Dimensions { index, got, accepted: DIMS });
    }
    let mut strides = Strides { size: [1; DIMS], param: [0; DIMS], grad: [0; DIMS] };
    for (d, (size, param, grad)) in dims.enumerate() {
        strides.size[d] = size as u64;
        strides.param[d] = param as i64;
        strides.grad[d] = grad as i64;
    }
    Ok(strides)
}

fn check_addresses(index: usize, step: &DeviceStep) -> Result<()> {
    let check = |what, address: u64, accepted: u64| {
        let fits = address != 0 && address.is_multiple_of(accepted);
        if fits { Ok(()) } else { Err(Error::Address { what, index, address, accepted }) }
    };
    check("the step count", step.step, 4)?;
    let read = [
        ("the learning rate", step.lr_address),
        ("the gradient scale", step.grad_scale),
        ("found_inf", step.found_inf),
    ];
    for (what, address) in read {
        if let Some(address) = address {
            check(what, address, 4)?;
        }
    }
    if step.walk.is_empty() {
        return Ok(());
    }
    check("the parameter", step.param, step.param_dtype.size() as u64)?;
    if step.grad != 0 {
        check("the gradient", step.grad, step.grad_dtype.size() as u64)?;
    }
    let state = |address| check("the state", address, 16);
    let coded = |moment: DeviceCoded| {
        state(moment.code)?;
        state(moment.scale)
    };
    match step.state {
        DeviceState::F32 { m, v, max_v } => [m, v].into_iter().chain(max_v).try_for_each(state),
        DeviceState::Dynamic8 { m, v, max_v } => {
            [m, v].into_iter().chain(max_v).try_for_each(coded)
        }
    }
}

/// How long the chunks of a launch over `total` elements are: about 16 Ki of them, within bounds
/// that keep both the table and the wait for the last warp short.
fn chunk_len(total: u64) -> u64 {
    (total / (16 << 10)).next_multiple_of(BLOCK).clamp(4096, 65536)
}

/// Cuts tensors of these lengths into chunks; there is at least one, of no element if need be.
fn chunks(lengths: impl Iterator<Item = u64> + Clone) -> Vec<Chunk> {
    let step = chunk_len(lengths.clone().fold(0, u64::saturating_add));
    let mut chunks = Vec::new();
    for (tensor, len) in lengths.enumerate() {
        let mut start = 0;
        while start < len {
            let len = step.min(len - start) as u32; // at most 65536
            chunks.push(Chunk { start, len, tensor: tensor as u32 });
            start += step;
        }
    }
    if chunks.is_empty() {
        chunks.push(Chunk { start: 0, len: 0, tensor: 0 });
    }
    chunks
}

#[cfg(test)]
mod tests {
    use super::*;

    fn step(param: u64, grad: u64, walk: Walk) -> DeviceStep {
        DeviceStep {
            param,
            param_dtype: DType::F32,
            grad,
            grad_dtype: DType::BF16,
            walk,
            state: DeviceState::F32 { m: 0x1000, v: 0x2000, max_v: None },
            step: 0x3000,
            hyper: Hyper::adam(),
            lr_address: None,
            grad_scale: None,
            found_inf: None,
        }
    }

    fn plan(steps: &[DeviceStep], before: &Plan) -> Plan {
        let mut plan = Plan::default();
        plan.fill(steps.iter().enumerate(), before).unwrap();
        plan
    }

    #[test]
    fn chunks_cover_every_element_once_and_are_neither_short_nor_long() {
        for lengths in [vec![0, 1, 4096, 4097], vec![], vec![1 << 33, 3], vec![100_000_000, 0, 7]] {
            let chunks = chunks(lengths.iter().copied());
            let total: u64 = chunks.iter().map(|chunk| u64::from(chunk.len)).sum();
            assert_eq!(total, lengths.iter().sum::<u64>());
            let mut ends = vec![0; lengths.len()];
            for chunk in chunks.iter().filter(|chunk| chunk.len > 0) {
                assert_eq!(chunk.start, ends[chunk.tensor as usize]);
                assert!(chunk.start.is_multiple_of(256) && chunk.len <= 65536);
                ends[chunk.tensor as usize] += u64::from(chunk.len);
            }
            assert_eq!(ends, lengths);
        }
        assert_eq!(chunk_len(1000), 4096);
        assert_eq!(chunk_len(256 << 20), 16384);
        assert_eq!(chunk_len(1 << 40), 65536);
    }

    #[test]
    fn access_follows_alignment_and_strides() {
        let flat = || Walk::flat(100);
        let strided = Walk::new(&[10, 10], &[10, 1], &[1, 10]).unwrap();
        let steps = [
            step(0x100, 0x208, flat()),
            step(0x104, 0x208, flat()),
            step(0x100, 0x202, flat()),
            step(0x104, 0x202, strided),
        ];
        let plan = plan(&steps, &Plan::default());
        let access: Vec<u32> = plan.grads.iter().map(|grad| grad.access).collect();
        assert_eq!(access, [0, 1, 1, 2]);
        assert_eq!(plan.strides[0].size, [10, 10, 1, 1, 1, 1, 1, 1]);
        assert_eq!(plan.strides[0].param[..3], [1, 10, 0]);
        assert_eq!(plan.strides[0].grad[..3], [10, 1, 0]);
        assert_eq!(plan.hypers.len(), 1);
    }

    #[test]
    fn only_what_changed_is_to_be_written() {
        let steps = [step(0x100, 0x200, Walk::flat(9000)), step(0x400, 0x600, Walk::flat(3))];
        let first = plan(&steps, &Plan::default());
        assert_eq!(first.changed(&Plan::default()), 0..first.bytes());
        assert!(plan(&steps, &first).changed(&first).is_empty());

        let mut other = steps.clone();
        other[1].grad = 0x700;
        let grads = first.layout().grads;
        assert_eq!(plan(&other, &first).changed(&first), grads);
        for step in &mut other {
            step.hyper.lr = 1.0;
        }
        let both = first.layout().hypers.start..grads.end;
        assert_eq!(plan(&other, &first).changed(&first), both);
        other[0].walk = Walk::flat(9001);
        assert_eq!(plan(&other, &first).changed(&first).end, first.bytes());
        let fewer = plan(&steps[..1], &first);
        assert_eq!(fewer.changed(&first), 0..fewer.bytes());
    }

    #[test]
    fn what_the_kernels_cannot_use_is_refused() {
        let refused = |step: DeviceStep| {
            let steps = [(0, &step)].into_iter();
            Plan::default().fill(steps, &Plan::default()).unwrap_err().to_string()
        };
        let good = || step(0x100, 0x200, Walk::flat(5));
        let with_state = |m, max_v| {
            let state = DeviceState::F32 { m, v: 0x10, max_v };
            DeviceStep { state, ..good() }
        };
        assert!(refused(with_state(0x10, Some(0))).starts_with("the state of tensor 0"));
        let format = StateFormat::DYNAMIC8.with_amsgrad(true);
        let state = |last| {
            let addresses = [0x10, 0x20, 0x30, 0x40, 0x50, last];
            DeviceState::from_buffers(format, addresses).unwrap()
        };
        assert!(refused(DeviceStep { state: state(0x64), ..good() }).contains("address 0x64"));
        let text = refused(with_state(0x1008, None));
        assert_eq!(
            text,
            "the state of tensor 0 is at device address 0x1008; a multiple of 16 other than 0 is \
             accepted"
        );
        assert!(refused(step(0, 0x200, Walk::flat(5))).starts_with("the parameter of"));
        assert!(refused(step(0x100, 0x201, Walk::flat(5))).starts_with("the gradient of"));
        assert!(refused(DeviceStep { step: 2, ..good() }).starts_with("the step count of"));
        let lr_address = Some(0);
        assert!(refused(DeviceStep { lr_address, ..good() }).starts_with("the learning rate of"));
        let grad_scale = Some(0x102);
        assert!(refused(DeviceStep { grad_scale, ..good() }).starts_with("the gradient scale of"));
        let found_inf = Some(1);
        assert!(refused(DeviceStep { found_inf, ..good() }).starts_with("found_inf of"));
        let hyper = Hyper { eps: -1.0, ..Hyper::adam() };
        assert!(refused(DeviceStep { hyper, ..good() }).starts_with("eps must be"));
        let param: Vec<isize> = (0..9).map(|d| 4_isize.pow(8 - d)).collect();
        let grad: Vec<isize> = (0..9).map(|d| 3_isize.pow(d)).collect();
        let walk = Walk::new(&[2; 9], &param, &grad).unwrap();
        assert!(refused(step(0x100, 0x200, walk)).contains("9 dimensions that cannot be merged"));
    }

    #[test]
    fn state_is_laid_out_as_the_format_says() {
        for format in [StateFormat::F32, StateFormat::DYNAMIC8] {
            for format in [format, format.with_amsgrad(true)] {
                let specs = format.buffers(1000);
                let addresses: Vec<u64> = (1..=specs.len() as u64).map(|i| i << 12).collect();
                let make = |n| DeviceState::from_buffers(format, addresses.iter().copied().take(n));
                assert_eq!(make(specs.len() - 1), None);
                let more = addresses.iter().copied().chain([0]);
                assert_eq!(DeviceState::from_buffers(format, more), None);
                let state = make(specs.len()).unwrap();
                let step = DeviceStep { state, ..step(0x100, 0x200, Walk::flat(1000)) };
                let size = |dtype| if dtype == crate::StateType::F32 { 4 } else { 1 };
                let bytes = specs.iter().map(|spec| (spec.len * size(spec.dtype)) as u64);
                let mut want: Vec<(u64, u64)> = addresses.iter().copied().zip(bytes).collect();
                want.resize(6, (0, 0));
                assert_eq!(step.buffers()[..], want, "{format}");
                let of_kernel = tensor(&step, 0);
                let at = |name| specs.iter().position(|b| b.name == name).map_or(0, |i| want[i].0);
                let names = match format.code {
                    StateCode::F32 => ["exp_avg", "exp_avg_sq", "max_exp_avg_sq", "", "", ""],
                    StateCode::Dynamic8 => [
                        "exp_avg_code",
                        "exp_avg_sq_code",
                        "max_exp_avg_sq_code",
                        "exp_avg_scale",
                        "exp_avg_sq_scale",
                        "max_exp_avg_sq_scale",
                    ],
                };
                let Tensor { m, v, max_v, m_scale, v_scale, max_v_scale, .. } = of_kernel;
                assert_eq!([m, v, max_v, m_scale, v_scale, max_v_scale], names.map(at), "{format}");
            }
        }
    }

    #[test]
    fn what_the_device_reads_tells_hyperparameters_apart() {
        let good = || step(0x100, 0x200, Walk::flat(5));
        let steps = [
            good(),
            DeviceStep { grad_scale: Some(0x40), ..good() },
            DeviceStep { grad_scale: Some(0x40), ..good() },
            DeviceStep { grad_scale: Some(0x40), found_inf: Some(0x44), ..good() },
            DeviceStep { hyper: Hyper { maximize: true, ..Hyper::adam() }, ..good() },
        ];
        let plan = plan(&steps, &Plan::default());
        let read = |h: &DeviceHyper| (h.grad_scale, h.found_inf, h.maximize);
        let hypers: Vec<_> = plan.hypers.iter().map(read).collect();
        assert_eq!(hypers, [(0, 0, 0), (0x40, 0, 0), (0x40, 0x44, 0), (0, 0, 1)]);
        let guarded: Vec<_> = plan.grads.iter().map(|grad| grad.guarded).collect();
        assert_eq!(guarded, [0, 0, 0, 1, 0]);
    }
}
