//! What is asked of a device: the update of a parameter, and how gradients are cut before.

use crate::clip::{self, HISTORY};
use crate::codec::{BLOCK, Code, Moment};
use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::layout::Walk;
use crate::rule::Hyper;
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
    /// [`StateCode::Coded`].
    Coded {
        /// In which code.
        code: Code,
        /// First moments.
        m: DeviceCoded,
        /// Second moments.
        v: DeviceCoded,
        /// Largest second moments so far, by which the update divides (`AMSGrad`).
        max_v: Option<DeviceCoded>,
        /// Whether there is a scale a block; else each moment has one ([`StateFormat::block_wise`]).
        block_wise: bool,
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
            StateCode::Coded(code) => {
                let mut next = || Some(DeviceCoded { code: rest.next()?, scale: rest.next()? });
                let (m, v) = (next()?, next()?);
                let max_v = if format.amsgrad { Some(next()?) } else { None };
                Self::Coded { code, m, v, max_v, block_wise: format.block_wise }
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
            Self::Coded { code, m, v, max_v, block_wise } => {
                let blocks = if block_wise { len.div_ceil(BLOCK as u64) } else { len.min(1) };
                let of = |coded: Option<DeviceCoded>, moment| {
                    let bytes = 4 * blocks * code.scales(moment) as u64;
                    coded.map_or([NONE; 2], |coded| [(coded.code, len), (coded.scale, bytes)])
                };
                let [m, v, max_v] = [
                    of(Some(m), Moment::First),
                    of(Some(v), Moment::Second),
                    of(max_v, Moment::Largest),
                ];
                [m[0], m[1], v[0], v[1], max_v[0], max_v[1]]
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
    /// Device address of what [`Stepper::clip`](super::Stepper::clip) found for this gradient, if it is
    /// cut.
    pub cut: Option<u64>,
    /// Where the gradient is limited by its norms so far. Such a step needs a `cut`.
    pub percentile: Option<DevicePercentile>,
}

/// How the norms of a parameter's last gradients limit the next one:
/// [`clip::percentile`](crate::clip::percentile).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DevicePercentile {
    /// Device address of [`HISTORY`] f32: squared norms. The step enters its own, and nothing else does.
    pub history: u64,
    /// Which of the sorted norms is the limit, counted from 0; less than [`HISTORY`].
    pub percentile: usize,
}

/// What the gradients of a step are cut to together: [`clip::gradients`](crate::clip::gradients).
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct DeviceClip {
    /// The largest norm of all gradients together; `None` is no limit.
    pub max_norm: Option<f64>,
    /// Device address of an f32 that gets the norm of all gradients before they are cut.
    pub norm: Option<u64>,
}

impl DeviceClip {
    /// Checks both.
    ///
    /// # Errors
    /// [`Error::Hyperparameter`], [`Error::Address`].
    pub(super) fn check(&self) -> Result<()> {
        self.max_norm.map_or(Ok(()), clip::check_max_grad_norm)?;
        self.norm.map_or(Ok(()), |norm| check("the place of the norm", 0, norm, 4))
    }
}

impl DeviceStep {
    /// Address and bytes of each buffer of the state; those that the format lacks have no bytes.
    pub(super) fn buffers(&self) -> [(u64, u64); 6] {
        self.state.buffers(self.walk.len() as u64)
    }

    /// Whether each moment has one scale for the whole tensor.
    pub(super) const fn has_one_scale(&self) -> bool {
        matches!(self.state, DeviceState::Coded { block_wise: false, .. })
    }

    /// Whether something must be known of the whole tensor before any of it is written.
    pub(super) fn is_to_measure(&self) -> bool {
        !self.walk.is_empty() && (self.hyper.max_unorm > 0.0 || self.has_one_scale())
    }

    /// Checks all that the kernels rely on but hyperparameters; messages say `index`. A step that is
    /// still to be cut has no `cut` yet.
    ///
    /// # Errors
    /// [`Error::Address`], [`Error::Hyperparameter`].
    pub(super) fn check(&self, index: usize, is_cut: bool) -> Result<()> {
        let check = |what, address, accepted| check(what, index, address, accepted);
        check("the step count", self.step, 4)?;
        let read = [
            ("the learning rate", self.lr_address),
            ("the gradient scale", self.grad_scale),
            ("found_inf", self.found_inf),
            ("the history of norms", self.percentile.map(|percentile| percentile.history)),
        ];
        for (what, address) in read {
            if let Some(address) = address {
                check(what, address, 4)?;
            }
        }
        if let Some(DevicePercentile { percentile, .. }) = self.percentile {
            if percentile >= HISTORY {
                let (name, accepted) = ("percentile_clipping", "a whole number less than 100");
                return Err(Error::Hyperparameter { name, value: percentile as f64, accepted });
            }
            if is_cut && self.cut.is_none() {
                check("what clipping found", 0, 16)?;
            }
        }
        self.cut.map_or(Ok(()), |cut| check("what clipping found", cut, 16))?;
        if self.walk.is_empty() {
            return Ok(());
        }
        check("the parameter", self.param, self.param_dtype.size() as u64)?;
        if self.grad != 0 {
            check("the gradient", self.grad, self.grad_dtype.size() as u64)?;
        }
        let state = |address| check("the state", address, 16);
        let coded = |moment: DeviceCoded| {
            state(moment.code)?;
            state(moment.scale)
        };
        match self.state {
            DeviceState::F32 { m, v, max_v } => [m, v].into_iter().chain(max_v).try_for_each(state),
            DeviceState::Coded { m, v, max_v, .. } => {
                [m, v].into_iter().chain(max_v).try_for_each(coded)
            }
        }
    }
}

/// Checks an address on the device.
fn check(what: &'static str, index: usize, address: u64, accepted: u64) -> Result<()> {
    let fits = address != 0 && address.is_multiple_of(accepted);
    if fits { Ok(()) } else { Err(Error::Address { what, index, address, accepted }) }
}
