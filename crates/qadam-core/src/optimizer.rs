//! The safe API: an optimizer that owns its state and updates slices.

use half::{bf16, f16};

use crate::clip::{self, Gradient, HISTORY, Percentile};
use crate::codec::{BLOCK, Code, Moment};
use crate::cpu::huge::filled;
use crate::cpu::{self, Backend};
use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::layout::Walk;
use crate::rule::{self, Coefficients, Hyper, NonFinite};
use crate::state::{StateCode, StateFormat};
use crate::tensor::{Moments8, Moments32, RawCoded, RawState, TensorStep};

/// A parameter's handle, given by [`Adam::add`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct ParamId(usize);

macro_rules! slices {
    ($name:ident, $doc:literal, $($mutability:tt)?) => {
        #[doc = $doc]
        #[derive(Debug)]
        pub enum $name<'a> {
            /// f32 elements.
            F32(&'a $($mutability)? [f32]),
            /// bfloat16 elements.
            BF16(&'a $($mutability)? [bf16]),
            /// binary16 elements.
            F16(&'a $($mutability)? [f16]),
        }

        impl $name<'_> {
            /// Number of elements.
            #[must_use]
            pub fn len(&self) -> usize {
                match self {
                    Self::F32(slice) => slice.len(),
                    Self::BF16(slice) => slice.len(),
                    Self::F16(slice) => slice.len(),
                }
            }

            /// Whether there are none.
            #[must_use]
            pub fn is_empty(&self) -> bool {
                self.len() == 0
            }

            /// The element type.
            #[must_use]
            pub const fn dtype(&self) -> DType {
                match self {
                    Self::F32(_) => DType::F32,
                    Self::BF16(_) => DType::BF16,
                    Self::F16(_) => DType::F16,
                }
            }
        }

        impl<'a> From<&'a $($mutability)? [f32]> for $name<'a> {
            fn from(slice: &'a $($mutability)? [f32]) -> Self {
                Self::F32(slice)
            }
        }
        impl<'a> From<&'a $($mutability)? [bf16]> for $name<'a> {
            fn from(slice: &'a $($mutability)? [bf16]) -> Self {
                Self::BF16(slice)
            }
        }
        impl<'a> From<&'a $($mutability)? [f16]> for $name<'a> {
            fn from(slice: &'a $($mutability)? [f16]) -> Self {
                Self::F16(slice)
            }
        }
    };
}
slices!(ParamMut, "A parameter to be updated.", mut);
slices!(GradRef, "A gradient.",);

impl ParamMut<'_> {
    const fn pointer(&mut self) -> *mut u8 {
        match self {
            Self::F32(slice) => slice.as_mut_ptr().cast(),
            Self::BF16(slice) => slice.as_mut_ptr().cast(),
            Self::F16(slice) => slice.as_mut_ptr().cast(),
        }
    }
}

impl GradRef<'_> {
    const fn pointer(&self) -> *const u8 {
        match self {
            Self::F32(slice) => slice.as_ptr().cast(),
            Self::BF16(slice) => slice.as_ptr().cast(),
            Self::F16(slice) => slice.as_ptr().cast(),
        }
    }
}

/// One parameter and its gradient, for one step. Their element types may differ.
#[derive(Debug)]
pub struct Update<'a> {
    id: ParamId,
    param: ParamMut<'a>,
    grad: GradRef<'a>,
}

impl<'a> Update<'a> {
    /// Pairs the parameter `id`, at `param`, with its gradient.
    pub fn new(id: ParamId, param: impl Into<ParamMut<'a>>, grad: impl Into<GradRef<'a>>) -> Self {
        Self { id, param: param.into(), grad: grad.into() }
    }
}

/// What a step is told besides its gradients.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct StepOptions {
    /// The scale of the loss, as for mixed precision: gradients are multiplied by its inverse first.
    /// A step whose scale turned out too large is one that is not taken.
    pub grad_scale: f32,
    /// The norm that all gradients together are cut to before anything else (`torch.nn.utils.
    /// clip_grad_norm_`); infinity only measures it.
    pub max_grad_norm: Option<f64>,
}

impl Default for StepOptions {
    fn default() -> Self {
        Self { grad_scale: 1.0, max_grad_norm: None }
    }
}

/// What a step did.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct Report {
    /// How many elements had a non-finite gradient; unless the optimizer propagates them, they
    /// were left as they were.
    pub nonfinite: usize,
    /// The norm of all gradients before they were cut, where [`StepOptions::max_grad_norm`] asked.
    pub grad_norm: Option<f64>,
}

/// A buffer of a parameter's state.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Buffer<'a> {
    /// Values, or scales.
    F32(&'a [f32]),
    /// Codes.
    U8(&'a [u8]),
}

/// One moment in an 8-bit code.
#[derive(Debug, Clone, PartialEq)]
pub struct Coded {
    /// A code an element.
    pub code: Vec<u8>,
    /// [`Code::scales`] a block of 256 elements, or so many in all; finite and at least 0.
    pub scale: Vec<f32>,
}

impl Coded {
    fn zeros(code: Code, moment: Moment, len: usize, block_wise: bool) -> Self {
        let blocks = if block_wise { len.div_ceil(BLOCK) } else { len.min(1) };
        let scale = vec![0.0; blocks * code.scales(moment)];
        Self { code: filled(code.zero(moment), len), scale }
    }

    const fn raw(&mut self) -> RawCoded {
        RawCoded { code: self.code.as_mut_ptr(), scale: self.scale.as_mut_ptr() }
    }
}

/// The moments of one parameter, dense and in its memory order.
#[derive(Debug, Clone, PartialEq)]
pub enum State {
    /// [`StateCode::F32`].
    F32 {
        /// First moments (torch: `exp_avg`).
        exp_avg: Vec<f32>,
        /// Second moments (torch: `exp_avg_sq`), none negative.
        exp_avg_sq: Vec<f32>,
        /// With `AMSGrad`, the largest second moments so far (torch: `max_exp_avg_sq`).
        max_exp_avg_sq: Option<Vec<f32>>,
    },
    /// [`StateCode::Coded`].
    Coded {
        /// In which code.
        code: Code,
        /// First moments.
        exp_avg: Coded,
        /// Second moments.
        exp_avg_sq: Coded,
        /// With `AMSGrad`, the largest second moments so far.
        max_exp_avg_sq: Option<Coded>,
        /// Whether there is a scale a block, as there should be; else each moment has one.
        block_wise: bool,
    },
}

impl State {
    /// Zero moments for `len` elements.
    #[must_use]
    pub fn zeros(format: StateFormat, len: usize) -> Self {
        match format.code {
            StateCode::F32 => Self::F32 {
                exp_avg: filled(0.0, len),
                exp_avg_sq: filled(0.0, len),
                max_exp_avg_sq: format.amsgrad.then(|| filled(0.0, len)),
            },
            StateCode::Coded(code) => {
                let zeros = |moment| Coded::zeros(code, moment, len, format.block_wise);
                Self::Coded {
                    code,
                    exp_avg: zeros(Moment::First),
                    exp_avg_sq: zeros(Moment::Second),
                    max_exp_avg_sq: format.amsgrad.then(|| zeros(Moment::Largest)),
                    block_wise: format.block_wise,
                }
            }
        }
    }

    /// The format of this state.
    #[must_use]
    pub const fn format(&self) -> StateFormat {
        match self {
            Self::F32 { max_exp_avg_sq, .. } => {
                StateFormat::F32.with_amsgrad(max_exp_avg_sq.is_some())
            }
            Self::Coded { code, max_exp_avg_sq, block_wise, .. } => StateFormat::coded(*code)
                .with_amsgrad(max_exp_avg_sq.is_some())
                .with_block_wise(*block_wise),
        }
    }

    /// Checks that this could be the state of a parameter of `len` elements: lengths, finite
    /// values, no negative second moment or scale.
    ///
    /// # Errors
    /// [`Error::Length`] or [`Error::StateValue`], for the first buffer that could not.
    pub fn validate(&self, len: usize) -> Result<()> {
        for (spec, buffer) in self.format().buffers(len).into_iter().zip(self.buffers()) {
            let (what, expected) = (spec.name, spec.len);
            let values = match buffer {
                Buffer::F32(values) => values,
                Buffer::U8(codes) if codes.len() == expected => continue, // any code will do
                Buffer::U8(codes) => {
                    let (what, got) = (what.to_owned(), codes.len());
                    return Err(Error::Length { what, got, expected });
                }
            };
            if values.len() != expected {
                let (what, got) = (what.to_owned(), values.len());
                return Err(Error::Length { what, got, expected });
            }
            let signed = what == "exp_avg";
            let ok = |x: f32| x.is_finite() && (signed || x >= 0.0);
            let accepted = if signed { "a finite number" } else { "a finite number of at least 0" };
            if let Some(index) = values.iter().position(|&x| !ok(x)) {
                let value = values[index];
                return Err(Error::StateValue { what, value, index, accepted });
            }
        }
        Ok(())
    }

    /// The buffers, in [`StateFormat::buffers`]' order.
    #[must_use]
    pub fn buffers(&self) -> Vec<Buffer<'_>> {
        match self {
            Self::F32 { exp_avg, exp_avg_sq, max_exp_avg_sq } => {
                let moments = [exp_avg, exp_avg_sq].into_iter().chain(max_exp_avg_sq);
                moments.map(|moment| Buffer::F32(moment)).collect()
            }
            Self::Coded { exp_avg, exp_avg_sq, max_exp_avg_sq, .. } => {
                let moments = [exp_avg, exp_avg_sq].into_iter().chain(max_exp_avg_sq);
                moments.flat_map(|m| [Buffer::U8(&m.code), Buffer::F32(&m.scale)]).collect()
            }
        }
    }

    fn raw(&mut self) -> RawState {
        match self {
            Self::F32 { exp_avg, exp_avg_sq, max_exp_avg_sq } => RawState::F32(Moments32 {
                m: exp_avg.as_mut_ptr(),
                v: exp_avg_sq.as_mut_ptr(),
                max_v: max_exp_avg_sq.as_mut().map(Vec::as_mut_ptr),
            }),
            Self::Coded { code, exp_avg, exp_avg_sq, max_exp_avg_sq, block_wise } => {
                RawState::Coded(Moments8 {
                    code: *code,
                    m: exp_avg.raw(),
                    v: exp_avg_sq.raw(),
                    max_v: max_exp_avg_sq.as_mut().map(Coded::raw),
                    block_wise: *block_wise,
                })
            }
        }
    }
}

/// A parameter's state and age.
#[derive(Debug, Clone)]
struct Slot {
    len: usize,
    step: u64,
    state: State,
    /// For percentile clipping.
    norms: [f32; HISTORY],
}

/// Adam or AdamW over slices; the state is in here, the parameters stay the caller's.
#[derive(Debug, Clone)]
pub struct Adam {
    hyper: Hyper,
    format: StateFormat,
    percentile: Option<usize>,
    threads: usize,
    backend: Backend,
    slots: Vec<Slot>,
}

impl Adam {
    /// An optimizer without parameters, on the back end of [`Backend::current`] and as many threads
    /// as `QADAM_NUM_THREADS` or the machine says.
    ///
    /// # Errors
    /// [`Error::Hyperparameter`], or what [`Backend::current`] and [`cpu::pool::threads`] return.
    pub fn new(hyper: Hyper, format: StateFormat) -> Result<Self> {
        hyper.validate()?;
        let machine = std::thread::available_parallelism().map_or(1, usize::from);
        let threads = cpu::pool::threads(machine)?;
        let (percentile, backend) = (None, Backend::current()?);
        Ok(Self { hyper, format, percentile, threads, backend, slots: Vec::new() })
    }

    /// The same, with each gradient cut to this percentile of its parameter's last 100 gradient norms
    /// ([`clip::percentile`]); 100 is no clipping.
    ///
    /// # Errors
    /// [`Error::Hyperparameter`] unless it is from 1 to 100.
    pub fn with_percentile_clipping(mut self, percentile: usize) -> Result<Self> {
        if !(1..=HISTORY).contains(&percentile) {
            let (name, accepted) = ("percentile_clipping", "a whole number from 1 to 100");
            return Err(Error::Hyperparameter { name, value: percentile as f64, accepted });
        }
        self.percentile = (percentile < HISTORY).then_some(percentile);
        Ok(self)
    }

    /// The same, with this many threads. Their number does not change the result.
    #[must_use]
    pub fn with_threads(mut self, threads: usize) -> Self {
        self.threads = threads.max(1);
        self
    }

    /// The same, on this back end. It does not change the result.
    ///
    /// # Errors
    /// [`Error::Backend`] where the processor does not have it.
    pub fn with_backend(mut self, backend: Backend) -> Result<Self> {
        if !backend.is_available() {
            let accepted = Backend::available().map(Backend::name).collect::<Vec<_>>().join(", ");
            return Err(Error::Backend { value: backend.name().to_owned(), accepted });
        }
        self.backend = backend;
        Ok(self)
    }

    /// Adds a parameter of `len` elements, with zero state.
    pub fn add(&mut self, len: usize) -> ParamId {
        let state = State::zeros(self.format, len);
        self.slots.push(Slot { len, step: 0, state, norms: [0.0; HISTORY] });
        ParamId(self.slots.len() - 1)
    }

    /// The hyperparameters.
    #[must_use]
    pub const fn hyper(&self) -> &Hyper {
        &self.hyper
    }

    /// Replaces the hyperparameters from the next step on, as a learning-rate schedule does.
    ///
    /// # Errors
    /// [`Error::Hyperparameter`]; the old ones then stay.
    pub fn set_hyper(&mut self, hyper: Hyper) -> Result<()> {
        hyper.validate()?;
        self.hyper = hyper;
        Ok(())
    }

    /// Updates the given parameters; those not given stay as they are, as does their step count.
    ///
    /// # Errors
    /// [`Error::UnknownParameter`], [`Error::DuplicateParameter`], [`Error::Length`] (naming the
    /// position in `updates`), [`Error::NonFiniteGradient`], [`Error::ThreadPool`]; all before
    /// anything is written.
    pub fn step(&mut self, updates: &mut [Update<'_>]) -> Result<Report> {
        self.step_with(updates, &StepOptions::default())
    }

    /// [`Adam::step`], told more.
    ///
    /// # Errors
    /// As [`Adam::step`], and what [`rule::check_grad_scale`] and [`clip::check_max_grad_norm`]
    /// return.
    pub fn step_with(
        &mut self,
        updates: &mut [Update<'_>],
        options: &StepOptions,
    ) -> Result<Report> {
        rule::check_grad_scale(options.grad_scale)?;
        options.max_grad_norm.map_or(Ok(()), clip::check_max_grad_norm)?;
        self.check(updates)?;
        let mut steps = Vec::with_capacity(updates.len());
        for update in updates.iter_mut() {
            let slot = &mut self.slots[update.id.0];
            let coefficients = Coefficients::new(&self.hyper, slot.step + 1);
            let coefficients = coefficients.with_grad_scale(options.grad_scale);
            let param = (update.param.pointer(), update.param.dtype());
            let grad = (update.grad.pointer(), update.grad.dtype());
            let walk = Walk::flat(slot.len);
            // SAFETY: `check` found all lengths equal to the slot's, whose state has that length;
            // the borrows of `updates` and `self` last beyond the run, and ids are distinct.
            steps.push(unsafe {
                TensorStep::new(param, grad, walk, slot.state.raw(), coefficients)
            });
        }
        // Histories change once the step is done.
        let mut norms: Vec<_> =
            updates.iter().map(|update| self.slots[update.id.0].norms).collect();
        let mut grad_norm = None;
        // SAFETY: parameters are distinct `&mut` slices, states belong to distinct slots.
        let nonfinite = unsafe {
            if self.hyper.nonfinite == NonFinite::Raise {
                cpu::count_nonfinite(&steps, self.threads)?;
            }
            if self.percentile.is_some() || options.max_grad_norm.is_some() {
                let norm = self.cut(&mut steps, updates, &mut norms, options.max_grad_norm)?;
                grad_norm = options.max_grad_norm.map(|_| norm);
            }
            cpu::run(&steps, self.backend, self.threads)?
        };
        for (update, norms) in updates.iter().zip(norms) {
            let slot = &mut self.slots[update.id.0];
            slot.step += 1;
            slot.norms = norms;
        }
        Ok(Report { nonfinite, grad_norm })
    }

    /// Cuts gradients, and returns the norm of all.
    ///
    /// # Safety
    /// As [`cpu::squared_norms`].
    unsafe fn cut(
        &self,
        steps: &mut [TensorStep],
        updates: &[Update<'_>],
        norms: &mut [[f32; HISTORY]],
        max_norm: Option<f64>,
    ) -> Result<f64> {
        // SAFETY: by contract.
        let squares = unsafe { cpu::squared_norms(steps, self.backend, self.threads)? };
        let gradients = steps.iter().zip(updates).zip(norms).zip(squares);
        let gradients = gradients.map(|(((step, update), history), squares)| {
            let t = self.slots[update.id.0].step + 1;
            let percentile =
                self.percentile.map(|percentile| Percentile { history, t, percentile });
            Gradient { squares, factor: step.factor(), percentile }
        });
        let (norm, factors) = clip::gradients(&mut gradients.collect::<Vec<_>>(), max_norm);
        for (step, factor) in steps.iter_mut().zip(factors) {
            step.multiply(factor);
        }
        Ok(norm)
    }

    fn check(&self, updates: &[Update<'_>]) -> Result<()> {
        let mut seen = vec![false; self.slots.len()];
        for (position, update) in updates.iter().enumerate() {
            let slot = self.slot(update.id)?;
            if std::mem::replace(&mut seen[update.id.0], true) {
                return Err(Error::DuplicateParameter { index: update.id.0 });
            }
            for (what, got) in [("param", update.param.len()), ("grad", update.grad.len())] {
                if got != slot.len {
                    let what = format!("updates[{position}].{what}");
                    return Err(Error::Length { what, got, expected: slot.len });
                }
            }
        }
        Ok(())
    }

    fn slot(&self, id: ParamId) -> Result<&Slot> {
        let unknown = Error::UnknownParameter { index: id.0, count: self.slots.len() };
        self.slots.get(id.0).ok_or(unknown)
    }

    /// A parameter's state and how many steps it has seen, to be saved.
    ///
    /// # Errors
    /// [`Error::UnknownParameter`].
    pub fn state(&self, id: ParamId) -> Result<(&State, u64)> {
        let slot = self.slot(id)?;
        Ok((&slot.state, slot.step))
    }

    /// The squared norms of a parameter's last gradients, to be saved beside its state; all 0 without
    /// [percentile clipping](Adam::with_percentile_clipping).
    ///
    /// # Errors
    /// [`Error::UnknownParameter`].
    pub fn norms(&self, id: ParamId) -> Result<&[f32; HISTORY]> {
        Ok(&self.slot(id)?.norms)
    }

    /// Replaces them by saved ones.
    ///
    /// # Errors
    /// [`Error::UnknownParameter`], or [`Error::StateValue`] for one that is negative or not finite.
    pub fn load_norms(&mut self, id: ParamId, norms: [f32; HISTORY]) -> Result<()> {
        self.slot(id)?;
        if let Some(index) = norms.iter().position(|norm| !(norm.is_finite() && *norm >= 0.0)) {
            let (what, accepted) = ("gnorm_vec", "a finite number of at least 0");
            return Err(Error::StateValue { what, value: norms[index], index, accepted });
        }
        self.slots[id.0].norms = norms;
        Ok(())
    }

    /// Replaces a parameter's state and step count by saved ones.
    ///
    /// # Errors
    /// [`Error::UnknownParameter`], [`Error::StateFormat`], or what [`State::validate`] returns;
    /// the old state then stays.
    pub fn load_state(&mut self, id: ParamId, state: State, step: u64) -> Result<()> {
        let len = self.slot(id)?.len;
        if state.format() != self.format {
            return Err(Error::StateFormat { got: state.format(), expected: self.format });
        }
        state.validate(len)?;
        let slot = &mut self.slots[id.0];
        (slot.step, slot.state) = (step, state);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn formats() -> impl Iterator<Item = StateFormat> {
        let amsgrad = |format: StateFormat| [false, true].map(|on| format.with_amsgrad(on));
        let whole = StateFormat::DYNAMIC8.with_block_wise(false);
        let eight = Code::ALL.map(StateFormat::coded);
        let all = [StateFormat::F32, whole].into_iter().chain(eight);
        all.chain([StateFormat::RATIO8.with_block_wise(false)]).flat_map(amsgrad)
    }

    fn adam(format: StateFormat) -> Adam {
        Adam::new(Hyper::adamw(), format).unwrap()
    }

    #[test]
    fn errors_come_before_the_first_write() {
        let mut adam = adam(StateFormat::F32);
        let (a, b) = (adam.add(3), adam.add(2));
        let (mut p, mut q) = ([1.0_f32; 3], [1.0_f32; 2]);
        let mut step = |updates: &mut [Update<'_>]| adam.step(updates).unwrap_err().to_string();
        let text = step(&mut [
            Update::new(a, &mut p[..], &[1.0_f32; 3][..]),
            Update::new(b, &mut q[..], &[1.0_f32; 3][..]),
        ]);
        assert_eq!(text, "updates[1].grad has 3 elements, the parameter needs 2");
        let text = step(&mut [
            Update::new(a, &mut p[..], &[1.0_f32; 3][..]),
            Update::new(a, &mut q[..], &[1.0_f32; 2][..]),
        ]);
        assert!(text.contains("parameter 0 is given twice"), "{text}");
        let text = step(&mut [Update::new(ParamId(7), &mut q[..], &[1.0_f32; 2][..])]);
        assert!(text.contains("parameter index 7 is unknown"), "{text}");
        assert_eq!((p, q), ([1.0; 3], [1.0; 2]));
        assert_eq!(adam.state(a).unwrap(), (&State::zeros(StateFormat::F32, 3), 0));
    }

    #[test]
    fn raise_refuses_the_step_and_names_the_parameter() {
        let hyper = Hyper { nonfinite: NonFinite::Raise, ..Hyper::adam() };
        let mut adam = Adam::new(hyper, StateFormat::DYNAMIC8).unwrap();
        let (a, b) = (adam.add(300), adam.add(300));
        let (mut p, mut q) = (vec![1.0_f32; 300], vec![1.0_f32; 300]);
        let mut bad = vec![0.5_f32; 300];
        (bad[7], bad[299]) = (f32::NAN, f32::INFINITY);
        let good = vec![0.5_f32; 300];
        let error = adam
            .step(&mut [
                Update::new(a, &mut p[..], &good[..]),
                Update::new(b, &mut q[..], &bad[..]),
            ])
            .unwrap_err();
        assert_eq!(error, Error::NonFiniteGradient { index: 1, count: 2 });
        assert_eq!((p, q), (vec![1.0; 300], vec![1.0; 300]));
        assert_eq!(adam.state(a).unwrap().1, 0);
    }

    #[test]
    fn saved_state_resumes_bit_for_bit() {
        for format in formats() {
            let mut first = adam(format);
            let id = first.add(1000);
            let grad = |t: usize| -> Vec<f32> {
                (0..1000).map(|i| ((i * 37 + t * 11) % 97) as f32 / 50.0 - 1.0).collect()
            };
            let mut p = vec![0.1_f32; 1000];
            for t in 0..5 {
                first.step(&mut [Update::new(id, &mut p[..], &grad(t)[..])]).unwrap();
            }
            let (state, step) = first.state(id).unwrap();
            let mut second = adam(format);
            let copy = second.add(1000);
            second.load_state(copy, state.clone(), step).unwrap();
            let mut q = p.clone();
            for t in 5..9 {
                first.step(&mut [Update::new(id, &mut p[..], &grad(t)[..])]).unwrap();
                second.step(&mut [Update::new(copy, &mut q[..], &grad(t)[..])]).unwrap();
            }
            assert_eq!((p, first.state(id).unwrap()), (q, second.state(copy).unwrap()));
        }
    }

    #[test]
    fn impossible_state_is_refused() {
        let mut adam = adam(StateFormat::F32);
        let id = adam.add(2);
        let state = |m: f32, v: f32, len| State::F32 {
            exp_avg: vec![m; len],
            exp_avg_sq: vec![v; len],
            max_exp_avg_sq: None,
        };
        let mut text = |state| adam.load_state(id, state, 1).unwrap_err().to_string();
        assert!(text(state(0.0, 0.0, 3)).contains("exp_avg has 3 elements"));
        assert!(text(state(f32::NAN, 0.0, 2)).contains("exp_avg holds NaN at element 0"));
        assert!(text(state(0.0, -1.0, 2)).contains("exp_avg_sq holds -1"));
        let other = State::zeros(StateFormat::DYNAMIC8, 2);
        assert!(text(other).contains("8-bit (dynamic), this optimizer keeps 32-bit"));
        let other = State::zeros(StateFormat::F32.with_amsgrad(true), 2);
        assert!(text(other).ends_with("32-bit with AMSGrad, this optimizer keeps 32-bit"));
    }

    #[test]
    fn impossible_third_moments_are_refused() {
        for format in formats().filter(|format| format.amsgrad) {
            let mut adam = adam(format);
            let id = adam.add(300);
            let mut text = |state| adam.load_state(id, state, 1).unwrap_err().to_string();
            let mut state = State::zeros(format, 300);
            match &mut state {
                State::F32 { max_exp_avg_sq, .. } => max_exp_avg_sq.as_mut().unwrap()[7] = -1.0,
                State::Coded { max_exp_avg_sq, .. } => {
                    let scale = &mut max_exp_avg_sq.as_mut().unwrap().scale;
                    *scale.last_mut().unwrap() = f32::INFINITY;
                }
            }
            let found = text(state.clone());
            assert!(found.starts_with("max_exp_avg_sq"), "{found}");
            match &mut state {
                State::F32 { max_exp_avg_sq, .. } => *max_exp_avg_sq = Some(vec![0.0; 299]),
                State::Coded { max_exp_avg_sq, .. } => {
                    max_exp_avg_sq.as_mut().unwrap().code.pop();
                }
            }
            let found = text(state);
            assert!(found.contains("has 299 elements, the parameter needs 300"), "{found}");
        }
    }

    #[test]
    fn buffers_are_those_of_the_format() {
        for format in formats() {
            let state = State::zeros(format, 300);
            assert_eq!(state.format(), format);
            let buffers = state.buffers();
            let lengths = buffers.iter().map(|buffer| match buffer {
                Buffer::F32(values) => (crate::StateType::F32, values.len()),
                Buffer::U8(codes) => (crate::StateType::U8, codes.len()),
            });
            let specs = format.buffers(300);
            assert!(lengths.eq(specs.iter().map(|spec| (spec.dtype, spec.len))));
        }
    }

    #[test]
    fn a_scaled_step_is_a_step_with_gradients_divided() {
        for format in formats() {
            let (mut plain, mut scaled) = (adam(format), adam(format));
            let (a, b) = (plain.add(300), scaled.add(300));
            let (mut p, mut q) = (vec![1.0_f32; 300], vec![1.0_f32; 300]);
            for scale in [65_536.0, 0.25, 1.0_f32] {
                let small: Vec<f32> = (0..300).map(|i| i as f32 / 7.0 - 20.0).collect();
                let large: Vec<f32> = small.iter().map(|g| g * scale).collect();
                plain.step(&mut [Update::new(a, &mut p[..], &small[..])]).unwrap();
                let update = Update::new(b, &mut q[..], &large[..]);
                let options = StepOptions { grad_scale: scale, ..StepOptions::default() };
                scaled.step_with(&mut [update], &options).unwrap();
            }
            assert_eq!((&p, plain.state(a).unwrap()), (&q, scaled.state(b).unwrap()));
            let update = Update::new(b, &mut q[..], &p[..]);
            let options = StepOptions { grad_scale: 0.0, ..StepOptions::default() };
            let error = scaled.step_with(&mut [update], &options).unwrap_err();
            assert!(matches!(error, Error::Hyperparameter { name: "grad_scale", .. }));
            assert_eq!(scaled.state(b).unwrap().1, 3);
        }
    }
}
