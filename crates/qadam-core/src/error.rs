//! The one error type of the crate. Every message names the argument, carries the value that was
//! given and says what would be accepted.

use crate::dtype::DType;
use crate::state::StateFormat;

/// Everything that can go wrong, always reported before the first write.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A hyperparameter is outside the range for which Adam is defined.
    #[error("{name} must be {accepted}, got {value}")]
    Hyperparameter {
        /// The argument's name, as the user wrote it.
        name: &'static str,
        /// The value given.
        value: f64,
        /// The accepted range, in words.
        accepted: &'static str,
    },
    /// A buffer does not have the length that the parameter asks for.
    #[error("{what} has {got} elements, the parameter needs {expected}")]
    Length {
        /// Which buffer, with the parameter's index.
        what: String,
        /// Its length, in elements.
        got: usize,
        /// The length needed, in elements.
        expected: usize,
    },
    /// A parameter index that this optimizer has not handed out.
    #[error("parameter index {index} is unknown: this optimizer has {count} parameters")]
    UnknownParameter {
        /// The index given.
        index: usize,
        /// How many parameters there are.
        count: usize,
    },
    /// One parameter occurs twice in a step.
    #[error("parameter {index} is given twice in one step; each may be given once")]
    DuplicateParameter {
        /// The index given twice.
        index: usize,
    },
    /// Sizes and strides that do not describe distinct elements.
    #[error(
        "{what} of shape {shape:?} and strides {strides:?} is expanded or overlaps itself; each \
         element must have an address of its own (call .contiguous() first)"
    )]
    Overlap {
        /// Which tensor.
        what: &'static str,
        /// Its sizes.
        shape: Vec<usize>,
        /// Its strides, in elements.
        strides: Vec<isize>,
    },
    /// Sizes and strides of different rank.
    #[error("{what} has {sizes} sizes and {strides} strides; the counts must be equal")]
    Rank {
        /// Which tensor.
        what: &'static str,
        /// How many sizes were given.
        sizes: usize,
        /// How many strides were given.
        strides: usize,
    },
    /// A gradient of another shape than its parameter.
    #[error("the gradient has shape {gradient:?}, its parameter {parameter:?}; they must be equal")]
    GradientShape {
        /// The gradient's sizes.
        gradient: Vec<usize>,
        /// The parameter's sizes.
        parameter: Vec<usize>,
    },
    /// A gradient holds NaN or an infinity and [`NonFinite::Raise`](crate::NonFinite::Raise) is set.
    #[error(
        "parameter {index} has {count} non-finite gradient elements and nonfinite is \"raise\"; \
         nothing was written (\"skip\" leaves such elements as they are, \"propagate\" does as \
         torch.optim)"
    )]
    NonFiniteGradient {
        /// Position of the first such parameter among those given to the step.
        index: usize,
        /// How many of its elements are not finite.
        count: usize,
    },
    /// `QADAM_CPU` asks for something that is not there.
    #[error("QADAM_CPU is {value:?}; this machine accepts {accepted}")]
    Backend {
        /// The variable's value.
        value: String,
        /// The names accepted on this machine.
        accepted: String,
    },
    /// `QADAM_NUM_THREADS` is not a count.
    #[error("QADAM_NUM_THREADS is {value:?}; a whole number from 1 to 1024 is accepted")]
    Threads {
        /// The variable's value.
        value: String,
    },
    /// The threads of the pool could not be started.
    #[error("could not start {count} threads: {reason}")]
    ThreadPool {
        /// How many were asked for.
        count: usize,
        /// The operating system's reason.
        reason: String,
    },
    /// State that could not have come from Adam.
    #[error("{what} holds {value} at element {index}; {accepted} is accepted")]
    StateValue {
        /// Which buffer.
        what: &'static str,
        /// The offending value.
        value: f32,
        /// Where it is.
        index: usize,
        /// What would be accepted, in words.
        accepted: &'static str,
    },
    /// State of another format than the optimizer keeps.
    #[error("the state is {got}, this optimizer keeps {expected}")]
    StateFormat {
        /// The format given.
        got: StateFormat,
        /// The format kept.
        expected: StateFormat,
    },
    /// There is no CUDA device that this crate could use.
    #[error("CUDA is not available: {reason}")]
    CudaUnavailable {
        /// What is missing, in words.
        reason: String,
    },
    /// A call of the CUDA driver failed.
    #[error("{name} ({code}) while {doing}{}", crate::cuda::consequence(*code))]
    Cuda {
        /// The driver's name of the error.
        name: String,
        /// Its number.
        code: u32,
        /// What was being done.
        doing: String,
    },
    /// Something that a CUDA graph cannot capture.
    #[error("this step cannot be captured in a CUDA graph: {reason}")]
    Capture {
        /// Why, and what to do about it.
        reason: String,
    },
    /// A device that has no managed memory, which paged state needs.
    #[error(
        "device {ordinal} has no managed memory, which paged state needs; use a class that is not \
         paged"
    )]
    NoManagedMemory {
        /// The device's number.
        ordinal: usize,
    },
    /// The file that holds paged state could not be made, or not be written.
    #[error("{doing} in QADAM_PAGE_DIR={directory:?}: {reason}")]
    PageFile {
        /// The directory.
        directory: String,
        /// What was being done.
        doing: String,
        /// The operating system's error number, 0 if it is not one of its errors.
        errno: i32,
        /// The error in words, and what would be accepted.
        reason: String,
    },
    /// `QADAM_PAGE_MEMORY` is not a number of bytes.
    #[error("QADAM_PAGE_MEMORY is {value:?}; a whole number of bytes is accepted")]
    PageMemory {
        /// The variable's value.
        value: String,
    },
    /// Paged state that belongs to the process from which this one was forked.
    #[error(
        "the paged state of tensor {index} belongs to process {owner}, from which this process \
         ({process}) was forked: both would write it; give the optimizer state of its own with \
         optimizer.load_state_dict(optimizer.state_dict())"
    )]
    Forked {
        /// Position of the tensor among those given.
        index: usize,
        /// The process that made the state.
        owner: u32,
        /// This process.
        process: u32,
    },
    /// An address on a device that the kernels cannot use.
    #[error(
        "{what} of tensor {index} is at device address {address:#x}; a multiple of {accepted} \
         other than 0 is accepted"
    )]
    Address {
        /// Which buffer.
        what: &'static str,
        /// Position of the tensor among those given.
        index: usize,
        /// The address.
        address: u64,
        /// What it must be a multiple of, in bytes.
        accepted: u64,
    },
    /// More dimensions than the kernels can walk.
    #[error(
        "tensor {index} and its gradient have {got} dimensions that cannot be merged; at most \
         {accepted} are accepted (call .contiguous() on the gradient)"
    )]
    Dimensions {
        /// Position of the tensor among those given.
        index: usize,
        /// How many dimensions are left after merging.
        got: usize,
        /// How many are accepted.
        accepted: usize,
    },
    /// A name that is not a supported element type.
    #[error("{name:?} is not an element type of qadam; {accepted} are", accepted = DType::NAMES)]
    UnknownDType {
        /// The name given.
        name: String,
    },
}

/// A [`std::result::Result`] with this crate's [`Error`].
pub type Result<T> = std::result::Result<T, Error>;
