//! What a launch is to do: tensors in, checked; the table's contents out.

use std::mem::size_of;
use std::ops::Range;
use std::sync::Arc;

use super::request::{DeviceClip, DeviceState, DeviceStep};
use super::table::{
    Access, CUT, Chunk, Clip, DIMS, FOUND, Grad, Hyper as DeviceHyper, Strides, Table, Tally,
    Tensor, bytes, flag,
};
use crate::codec::Code;
use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::layout::Walk;
use crate::norm::CHUNK;
use crate::rule::{Decay, Hyper, NonFinite};

/// Elements whose squares a warp adds up at a time, and sums that are added up in turn: a segment.
const FOLD: u64 = CHUNK as u64;

/// Where the kernels count warps that are done, in the table: behind its head.
const ARRIVED: usize = size_of::<Table>();
/// The head's size.
const HEAD: usize = 128;

/// What a table is for.
#[derive(Debug, Clone, Copy)]
pub(super) enum Purpose<'a> {
    /// Updating parameters.
    Step,
    /// The same, later: to know how much memory that takes.
    Reserve,
    /// Counting gradients that are not finite.
    Count,
    /// Measuring gradients, so that they can be cut.
    Clip(&'a DeviceClip),
}

/// Contents of a table, but for addresses within the table itself.
#[derive(Debug, Clone, Default)]
pub(super) struct Plan {
    hypers: Vec<DeviceHyper>,
    /// `strides` is an index into `self.strides`.
    grads: Vec<Grad>,
    /// One, where gradients are to be cut.
    clip: Vec<Clip>,
    strides: Vec<Strides>,
    tensors: Vec<Tensor>,
    /// One a tensor, where any is to be measured.
    tallies: Vec<Tally>,
    /// Counters, 0 all of them.
    segments: Vec<u32>,
    chunks: Arc<Vec<Chunk>>,
    /// How many folds there are to add up.
    folds: usize,
}

/// Where the parts of a table are, in bytes. What changes often comes first and together; what the
/// kernels alone write and read comes last, and is not uploaded.
#[derive(PartialEq, Eq)]
struct Layout {
    hypers: Range<usize>,
    grads: Range<usize>,
    clip: Range<usize>,
    strides: Range<usize>,
    tensors: Range<usize>,
    tallies: Range<usize>,
    segments: Range<usize>,
    chunks: Range<usize>,
    sums: Range<usize>,
    nodes: Range<usize>,
    found: Range<usize>,
    squares: Range<usize>,
}

/// How much memory a table takes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Room {
    /// Bytes that are uploaded.
    pub image: usize,
    /// Bytes on the device, the same and what the kernels need beside them.
    pub device: usize,
}

impl Room {
    /// Whether this is enough for `other`.
    pub const fn holds(self, other: Self) -> bool {
        self.image >= other.image && self.device >= other.device
    }
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
        purpose: Purpose<'_>,
        before: &Self,
    ) -> Result<()> {
        self.hypers.clear();
        self.grads.clear();
        self.clip.clear();
        self.strides.clear();
        self.tensors.clear();
        self.tallies.clear();
        self.folds = 0;
        let (mut segments, mut is_measured) = (0, false);
        if let Purpose::Clip(clip) = purpose {
            clip.check()?;
            self.clip.push(Clip {
                max_norm: clip.max_norm.unwrap_or(0.0),
                norm: clip.norm.unwrap_or(0),
                is_limited: clip.max_norm.is_some().into(),
                unused: 0,
            });
            is_measured = true;
        }
        for (index, step) in steps {
            step.check(index, matches!(purpose, Purpose::Step))?;
            let hyper = self.hyper(step)?;
            let grad = self.grad(index, step)?;
            self.grads.push(grad);
            let mut tensor = tensor(step, hyper);
            let counts = match purpose {
                // counted or stepped, the table is the same
                Purpose::Step | Purpose::Reserve | Purpose::Count => step.is_to_measure(),
                Purpose::Clip(_) => true,
            };
            let (fold, segment) = (self.folds as u32, segments as u32); // of 2^44 elements in all
            let (arrived, keeps, reach, unused) = (0, 0, [0; 5], 0);
            self.tallies.push(Tally { fold, segment, arrived, keeps, reach, unused });
            if counts {
                let folds = step.walk.len().div_ceil(CHUNK);
                self.folds += folds;
                segments += folds.div_ceil(CHUNK);
                tensor.flags |= flag::MEASURED;
                is_measured = true;
            }
            self.tensors.push(tensor);
        }
        if !is_measured {
            self.tallies.clear();
        }
        self.segments.clear();
        self.segments.resize(segments.next_multiple_of(2), 0); // so that what follows is aligned
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
            max_unorm,
        } = step.hyper;
        let hyper = DeviceHyper {
            lr,
            beta1,
            beta2,
            eps,
            weight_decay,
            max_unorm,
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
        let (cut, guarded) = (step.cut.unwrap_or(0), u32::from(step.found_inf.is_some()));
        let mut grad = Grad { address: step.grad, strides: 0, cut, access: 0, guarded };
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
        let clip = after(grads.end, bytes(&self.clip));
        let strides = after(clip.end, bytes(&self.strides));
        let tensors = after(strides.end, bytes(&self.tensors));
        let tallies = after(tensors.end, bytes(&self.tallies));
        let segments = after(tallies.end, bytes(&self.segments));
        let chunks = after(segments.end, bytes(&self.chunks));
        // of a gradient's elements, or of a parameter's and of its update's
        let beside = if self.clip.is_empty() { 2 } else { 1 };
        let room = |start: usize, bytes: usize| start..start + bytes;
        let sums = room(chunks.end.next_multiple_of(16), 8 * beside * self.folds);
        let nodes = room(sums.end, 8 * beside * self.segments.len());
        let each = if self.clip.is_empty() { FOUND } else { CUT };
        let found = room(nodes.end.next_multiple_of(each), each * self.tallies.len());
        let tensors_of_clip = if self.clip.is_empty() { 0 } else { self.tensors.len() };
        let squares = tensors_of_clip + tensors_of_clip.div_ceil(CHUNK);
        let squares = room(found.end, 8 * squares);
        Layout {
            hypers,
            grads,
            clip,
            strides,
            tensors,
            tallies,
            segments,
            chunks,
            sums,
            nodes,
            found,
            squares,
        }
    }

    /// How much memory the table takes.
    pub fn room(&self) -> Room {
        let layout = self.layout();
        Room { image: layout.chunks.end, device: layout.squares.end }
    }

    /// Where in the table the kernels put what they find of the tensors, [`CUT`] bytes each where
    /// gradients are to be cut.
    pub fn found(&self) -> Range<usize> {
        self.layout().found
    }

    /// Whether a tensor is to be measured before it is stepped.
    pub fn measures(&self) -> bool {
        self.clip.is_empty() && !self.tallies.is_empty()
    }

    /// How many tensors there are.
    pub fn tensor_count(&self) -> usize {
        self.tensors.len()
    }

    /// How many chunks there are.
    pub fn chunk_count(&self) -> usize {
        self.chunks.len()
    }

    /// The bytes of a table that has `before`'s contents which have to be written; empty if none.
    pub fn changed(&self, before: &Self) -> Range<usize> {
        let (layout, old) = (self.layout(), before.layout());
        if layout != old {
            return 0..self.room().image;
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

    /// What is uploaded.
    fn parts(&self, layout: &Layout) -> [(Range<usize>, &[u8]); 8] {
        [
            (layout.hypers.clone(), bytes(&self.hypers)),
            (layout.grads.clone(), bytes(&self.grads)),
            (layout.clip.clone(), bytes(&self.clip)),
            (layout.strides.clone(), bytes(&self.strides)),
            (layout.tensors.clone(), bytes(&self.tensors)),
            (layout.tallies.clone(), bytes(&self.tallies)),
            (layout.segments.clone(), bytes(&self.segments)),
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
                tallies: at(&layout.tallies),
                segments: at(&layout.segments),
                sums: at(&layout.sums),
                nodes: at(&layout.nodes),
                found: at(&layout.found),
                squares: at(&layout.squares),
                clip: at(&layout.clip),
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
    let (mut flags, [m, v, max_v, m_scale, v_scale, max_v_scale]) = match step.state {
        DeviceState::F32 { .. } => (0, buffers),
        DeviceState::Coded { code, .. } => {
            let [m, m_scale, v, v_scale, max_v, max_v_scale] = buffers;
            let is_ratio = if code == Code::Ratio { flag::IS_RATIO } else { 0 };
            (flag::IS_8BIT | is_ratio, [m, v, max_v, m_scale, v_scale, max_v_scale])
        }
    };
    if step.has_one_scale() {
        flags |= flag::ONE_SCALE;
    }
    if max_v != 0 {
        flags |= flag::IS_AMSGRAD;
    }
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
        history: step.percentile.map_or(0, |percentile| percentile.history),
        hyper,
        param_dtype: dtype(step.param_dtype),
        grad_dtype: dtype(step.grad_dtype),
        flags,
        percentile: step.percentile.map_or(0, |percentile| percentile.percentile as u8), // checked
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

/// How long the chunks of a launch over `total` elements are: about 16 Ki of them, within bounds
/// that keep both the table and the wait for the last warp short, and whole folds.
fn chunk_len(total: u64) -> u64 {
    (total / (16 << 10)).next_multiple_of(FOLD).clamp(FOLD, 65536)
}

/// Cuts tensors of these lengths into chunks, the first of which may have no element.
fn chunks(lengths: impl Iterator<Item = u64> + Clone) -> Vec<Chunk> {
    let step = chunk_len(lengths.clone().fold(0, u64::saturating_add));
    let mut chunks = Vec::new();
    for (tensor, total) in lengths.enumerate() {
        let mut start = 0;
        loop {
            let len = step.min(total - start) as u32; // at most 65536
            chunks.push(Chunk { start, len, tensor: tensor as u32 });
            start += step;
            if start >= total {
                break;
            }
        }
    }
    chunks
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::state::{StateCode, StateFormat};

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
            cut: None,
            percentile: None,
        }
    }

    fn plan(steps: &[DeviceStep], before: &Plan) -> Plan {
        let mut plan = Plan::default();
        plan.fill(steps.iter().enumerate(), Purpose::Step, before).unwrap();
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
                assert!(chunk.start.is_multiple_of(4096) && chunk.len <= 65536);
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
        assert_eq!(first.changed(&Plan::default()), 0..first.room().image);
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
        assert_eq!(plan(&other, &first).changed(&first).end, first.room().image);
        let fewer = plan(&steps[..1], &first);
        assert_eq!(fewer.changed(&first), 0..fewer.room().image);
    }

    #[test]
    fn what_the_kernels_cannot_use_is_refused() {
        let refused = |step: DeviceStep| {
            let steps = [(0, &step)].into_iter();
            Plan::default().fill(steps, Purpose::Step, &Plan::default()).unwrap_err().to_string()
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
        for format in [StateFormat::F32, StateFormat::DYNAMIC8, StateFormat::RATIO8] {
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
                    StateCode::Coded(Code::Dynamic) => [
                        "exp_avg_code",
                        "exp_avg_sq_code",
                        "max_exp_avg_sq_code",
                        "exp_avg_scale",
                        "exp_avg_sq_scale",
                        "max_exp_avg_sq_scale",
                    ],
                    StateCode::Coded(Code::Ratio) => [
                        "exp_avg_code",
                        "exp_avg_sq_code",
                        "max_exp_avg_sq_code",
                        "exp_avg_scale",
                        "exp_avg_sq_range",
                        "max_exp_avg_sq_range",
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
