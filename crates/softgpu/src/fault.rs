//! What a kernel did wrong: kernel, PTX line, block, thread, address and values.

use std::fmt;

/// The kinds of fault. What a GPU would hide counts as well.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FaultKind {
    /// No allocation of this device covers the access.
    OutOfBounds,
    /// The address is not a multiple of the access size.
    Misaligned,
    /// A byte or register was read before anything wrote it.
    Uninitialised,
    /// Threads named in a membermask, or threads of a block at a barrier, are not there.
    Divergent,
    /// Two threads touched a shared byte between barriers, one of them writing.
    SharedRace,
    /// Integer division or remainder by zero.
    DivideByZero,
    /// A store into constant memory.
    ReadOnly,
    /// `trap`.
    Trap,
    /// The instruction budget ran out.
    Timeout,
}

impl FaultKind {
    /// The CUDA error a context reports from then on.
    pub fn code(self) -> i32 {
        match self {
            FaultKind::OutOfBounds | FaultKind::ReadOnly => 700,
            FaultKind::Misaligned => 716,
            FaultKind::Timeout => 702,
            // A GPU would not notice these; a failed launch is the nearest it has.
            _ => 719,
        }
    }
}

/// A fault with everything needed to find it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Fault {
    /// What happened.
    pub kind: FaultKind,
    /// Kernel name.
    pub kernel: String,
    /// PTX line.
    pub line: u32,
    /// Opcode at that line.
    pub text: String,
    /// Block index.
    pub block: [u32; 3],
    /// Thread index.
    pub thread: [u32; 3],
    /// Address, where there is one.
    pub addr: Option<u64>,
    /// Sizes, values, and the other party.
    pub detail: String,
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [bx, by, bz] = self.block;
        let [tx, ty, tz] = self.thread;
        let what = match self.kind {
            FaultKind::OutOfBounds => "out-of-bounds access",
            FaultKind::Misaligned => "misaligned access",
            FaultKind::Uninitialised => "uninitialised read",
            FaultKind::Divergent => "divergent synchronisation",
            FaultKind::SharedRace => "shared-memory race",
            FaultKind::DivideByZero => "integer division by zero",
            FaultKind::ReadOnly => "store to constant memory",
            FaultKind::Trap => "trap instruction",
            FaultKind::Timeout => "instruction budget exhausted",
        };
        write!(
            f,
            "{what} in kernel {} at PTX line {} ({}), block ({bx},{by},{bz}), thread ({tx},{ty},{tz})",
            self.kernel, self.line, self.text
        )?;
        if let Some(a) = self.addr {
            write!(f, ", address {a:#x}")?;
        }
        if !self.detail.is_empty() {
            write!(f, ": {}", self.detail)?;
        }
        Ok(())
    }
}

impl std::error::Error for Fault {}
