//! A kernel as it runs: a flat vector of decoded instructions with resolved registers.

use crate::alu::convert::Round;
use crate::ptx::ast::{Space, Ty};
use crate::regs::{Alu, Slot};

/// A decoded instruction.
pub struct Inst {
    /// Guard predicate (index into [`crate::regs::Regs::p`]) and whether it is negated.
    pub guard: Option<(u32, bool)>,
    /// What to do.
    pub op: Op,
    /// Registers read, as flat indices, checked for being written before.
    pub reads: Box<[u32]>,
    /// Registers written.
    pub writes: Box<[u32]>,
    /// PTX line.
    pub line: u32,
    /// The opcode as written, for messages.
    pub text: Box<str>,
}

/// An address operand: register plus offset, or a constant.
#[derive(Clone, Copy, Debug)]
pub struct Addr {
    /// Base register, 32 or 64 bits wide.
    pub base: Option<Slot>,
    /// Bytes added.
    pub offset: i64,
}

/// A load or a store.
#[derive(Debug)]
pub struct Mem {
    /// State space, `Generic` to be resolved by address.
    pub space: Space,
    /// Element type.
    pub ty: Ty,
    /// One, two or four registers; `None` is `_`.
    pub regs: Vec<Option<Slot>>,
    /// The destination registers' width, as a mask a loaded and extended value is cut to.
    pub keep: u64,
    /// Where.
    pub addr: Addr,
}

/// What an atomic does with the old value.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs)] // PTX's own names
pub enum AtomOp {
    Add,
    Min,
    Max,
    And,
    Or,
    Xor,
    Exch,
    Cas,
    Inc,
    Dec,
}

/// `atom` and `red`.
#[derive(Debug)]
pub struct Atom {
    /// State space.
    pub space: Space,
    /// The operation.
    pub op: AtomOp,
    /// Its type.
    pub ty: Ty,
    /// Old value, absent for `red`.
    pub dest: Option<Slot>,
    /// Where.
    pub addr: Addr,
    /// Operand.
    pub b: Slot,
    /// New value of `cas`.
    pub c: Option<Slot>,
}

/// `shfl.sync` modes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs)]
pub enum Shuffle {
    Up,
    Down,
    Bfly,
    Idx,
}

/// `vote.sync` modes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs)]
pub enum Vote {
    All,
    Any,
    Uni,
    Ballot,
}

/// What the lanes of a `.sync` instruction do together.
#[derive(Debug)]
#[allow(missing_docs)]
pub enum Meet {
    Shfl { mode: Shuffle, dest: Option<Slot>, pred: Option<Slot>, a: Slot, b: Slot, c: Slot },
    Vote { mode: Vote, dest: Slot, src: Slot, negate: bool },
    Redux { op: AtomOp, signed: bool, dest: Slot, src: Slot },
    MatchAny { dest: Slot, src: Slot },
    Barrier,
}

/// What an instruction does.
#[allow(missing_docs)]
pub enum Op {
    /// Register arithmetic that cannot fail.
    Alu(Alu),
    /// Integer division: fails where the divisor is zero.
    Divide(Alu, Slot),
    Load(Mem),
    Store(Mem),
    Atom(Atom),
    Branch(u32),
    /// A `.sync` instruction of the lanes in `mask`.
    Meet(Meet, Slot),
    ActiveMask(Slot),
    /// `bar.sync id`; `aligned` wants all threads of the warp at this very instruction.
    Barrier {
        id: u32,
        aligned: bool,
    },
    Exit,
    Trap,
    /// Memory fences: this device's memory is sequentially consistent already.
    Fence,
}

/// Rounding suffixes to [`Round`].
pub fn rounding(s: &str) -> Option<(Round, bool)> {
    Some(match s {
        "rn" => (Round::Near, false),
        "rz" => (Round::Zero, false),
        "rm" => (Round::Down, false),
        "rp" => (Round::Up, false),
        "rni" => (Round::Near, true),
        "rzi" => (Round::Zero, true),
        "rmi" => (Round::Down, true),
        "rpi" => (Round::Up, true),
        _ => return None,
    })
}

/// Registers the launch fills in before a block starts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[allow(missing_docs)]
pub enum Special {
    Tid(u8),
    Ntid(u8),
    Ctaid(u8),
    Nctaid(u8),
    LaneId,
    WarpId,
    NWarpId,
    LaneMask(MaskKind),

    DynamicShared,
    TotalShared,
}

/// `%lanemask_*`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[allow(missing_docs)]
pub enum MaskKind {
    Eq,
    Le,
    Lt,
    Ge,
    Gt,
}

impl Special {
    /// The register of that name, if this device has it, and its type.
    pub fn named(name: &str) -> Option<(Special, Ty)> {
        let axis = |s: &str| ["x", "y", "z"].iter().position(|a| *a == s).map(|i| i as u8);
        if let Some((base, ax)) = name.split_once('.') {
            let ax = axis(ax)?;
            return Some((
                match base {
                    "%tid" => Special::Tid(ax),
                    "%ntid" => Special::Ntid(ax),
                    "%ctaid" => Special::Ctaid(ax),
                    "%nctaid" => Special::Nctaid(ax),
                    _ => return None,
                },
                Ty::U32,
            ));
        }
        Some((
            match name {
                "%laneid" => Special::LaneId,
                "%warpid" => Special::WarpId,
                "%nwarpid" => Special::NWarpId,
                "%lanemask_eq" => Special::LaneMask(MaskKind::Eq),
                "%lanemask_le" => Special::LaneMask(MaskKind::Le),
                "%lanemask_lt" => Special::LaneMask(MaskKind::Lt),
                "%lanemask_ge" => Special::LaneMask(MaskKind::Ge),
                "%lanemask_gt" => Special::LaneMask(MaskKind::Gt),
                "%dynamic_smem_size" => Special::DynamicShared,
                "%total_smem_size" => Special::TotalShared,
                _ => return None,
            },
            Ty::U32,
        ))
    }
}

/// A kernel ready to run.
pub struct Kernel {
    /// PTX name.
    pub name: String,
    /// The code; falls off its end only through `Exit`.
    pub code: Vec<Inst>,
    /// Registers: how many of each class.
    pub counts: [usize; 3],
    /// Constants to fill in once.
    pub consts: Vec<(Slot, u64)>,
    /// Special registers to fill in.
    pub specials: Vec<(Special, Slot)>,
    /// Names of registers by flat index, for messages.
    pub names: Vec<String>,
    /// Offset and size of each parameter.
    pub params: Vec<(usize, usize)>,
    /// Bytes of all parameters.
    pub param_bytes: usize,
    /// Static shared memory.
    pub shared_bytes: usize,
    /// Local memory a thread.
    pub local_bytes: usize,
    /// `.maxntid` or `.reqntid` as a product.
    pub max_threads: Option<u32>,
    /// `.reqntid`.
    pub req_threads: Option<[u32; 3]>,
    /// PTX version and target of its module: (80, 75) for PTX 8.0, sm_75.
    pub built_for: (u32, u32),
}
