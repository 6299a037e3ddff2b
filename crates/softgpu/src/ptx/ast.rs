//! What a PTX module says, with register and variable names resolved.

use crate::error::PtxError;

/// A fundamental PTX type.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[allow(missing_docs)] // the names are PTX's own
pub enum Ty {
    Pred,
    B8,
    U8,
    S8,
    B16,
    U16,
    S16,
    F16,
    BF16,
    B32,
    U32,
    S32,
    F32,
    F16x2,
    BF16x2,
    B64,
    U64,
    S64,
    F64,
}

impl Ty {
    /// The type a PTX suffix names (without its dot).
    pub fn named(s: &str) -> Option<Ty> {
        Some(match s {
            "pred" => Ty::Pred,
            "b8" => Ty::B8,
            "u8" => Ty::U8,
            "s8" => Ty::S8,
            "b16" => Ty::B16,
            "u16" => Ty::U16,
            "s16" => Ty::S16,
            "f16" => Ty::F16,
            "bf16" => Ty::BF16,
            "b32" => Ty::B32,
            "u32" => Ty::U32,
            "s32" => Ty::S32,
            "f32" => Ty::F32,
            "f16x2" => Ty::F16x2,
            "bf16x2" => Ty::BF16x2,
            "b64" => Ty::B64,
            "u64" => Ty::U64,
            "s64" => Ty::S64,
            "f64" => Ty::F64,
            _ => return None,
        })
    }

    /// Size in memory; a predicate has none.
    pub fn bytes(self) -> usize {
        match self {
            Ty::Pred => 0,
            Ty::B8 | Ty::U8 | Ty::S8 => 1,
            Ty::B16 | Ty::U16 | Ty::S16 | Ty::F16 | Ty::BF16 => 2,
            Ty::B32 | Ty::U32 | Ty::S32 | Ty::F32 | Ty::F16x2 | Ty::BF16x2 => 4,
            Ty::B64 | Ty::U64 | Ty::S64 | Ty::F64 => 8,
        }
    }

    /// A floating-point type, packed ones included.
    pub fn is_float(self) -> bool {
        matches!(self, Ty::F16 | Ty::BF16 | Ty::F32 | Ty::F64 | Ty::F16x2 | Ty::BF16x2)
    }

    /// A signed integer type.
    pub fn is_signed(self) -> bool {
        matches!(self, Ty::S8 | Ty::S16 | Ty::S32 | Ty::S64)
    }

    /// An integer type with a sign convention (`.u` or `.s`).
    pub fn is_int(self) -> bool {
        self.is_signed() || matches!(self, Ty::U8 | Ty::U16 | Ty::U32 | Ty::U64)
    }

    /// An untyped-bits type.
    pub fn is_bits(self) -> bool {
        matches!(self, Ty::B8 | Ty::B16 | Ty::B32 | Ty::B64)
    }
}

/// A state space.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[allow(missing_docs)]
pub enum Space {
    Generic,
    Global,
    Shared,
    Local,
    Const,
    Param,
}

/// A variable outside the register space.
#[derive(Clone, Debug)]
pub struct Var {
    /// PTX name.
    pub name: String,
    /// Where it lives.
    pub space: Space,
    /// Alignment in bytes.
    pub align: usize,
    /// Size in bytes; 0 for `extern .shared x[]`.
    pub size: usize,
    /// Initial bytes, zero-extended to `size`; `None` where nothing was written.
    pub init: Option<Vec<u8>>,
    /// Declared with an empty `[]`: dynamic shared memory.
    pub dynamic: bool,
    /// PTX line of the declaration.
    pub line: u32,
}

/// A register of a function.
#[derive(Clone, Debug)]
pub struct Reg {
    /// PTX name.
    pub name: String,
    /// Declared type.
    pub ty: Ty,
}

/// A literal.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Imm {
    /// An integer, as its 64-bit two's complement.
    Int(i64),
    /// `0f…`: the bits of an f32.
    F32(u32),
    /// `0d…` or a decimal float: the bits of an f64.
    F64(u64),
}

/// An instruction operand.
#[derive(Clone, Debug, PartialEq)]
pub enum Operand {
    /// A register, by index into [`Func::regs`].
    Reg(usize),
    /// `!%p`.
    NotReg(usize),
    /// A literal.
    Imm(Imm),
    /// A special register such as `%tid.x`.
    Special(String),
    /// A variable (index into [`Func::vars`] or, with `global`, [`Module::vars`]) plus an offset.
    Var {
        /// Module scope rather than function scope.
        global: bool,
        /// The index.
        index: usize,
        /// Bytes added.
        offset: i64,
    },
    /// A formal parameter of the function (input), plus an offset.
    Formal {
        /// Index into [`Func::params`].
        index: usize,
        /// Bytes added.
        offset: i64,
    },
    /// The formal return parameter of a device function, plus an offset.
    FormalRet {
        /// Index into [`Func::rets`].
        index: usize,
        /// Bytes added.
        offset: i64,
    },
    /// A name still unresolved when read: a label or a function.
    Name(String),
    /// A label, by index into [`Func::body`].
    Label(usize),
    /// `[...]` around a register with an offset, a variable, or a plain number.
    Mem(Box<Operand>, i64),
    /// `{a, b, ...}`.
    Vector(Vec<Operand>),
    /// `p|q` destinations.
    Pair(Box<Operand>, Box<Operand>),
    /// `(a, b)` in a call.
    List(Vec<Operand>),
    /// `_`: a destination nobody reads.
    Sink,
}

/// One instruction as written.
#[derive(Clone, Debug)]
pub struct Stmt {
    /// Guard predicate: register index and whether it is negated.
    pub guard: Option<(usize, bool)>,
    /// Mnemonic before the first dot.
    pub op: String,
    /// What follows, split at dots.
    pub mods: Vec<String>,
    /// Operands in order.
    pub args: Vec<Operand>,
    /// PTX line.
    pub line: u32,
}

/// A formal parameter.
#[derive(Clone, Debug)]
pub struct Param {
    /// PTX name.
    pub name: String,
    /// Alignment in bytes.
    pub align: usize,
    /// Size in bytes.
    pub size: usize,
}

/// An entry or a device function.
#[derive(Clone, Debug)]
pub struct Func {
    /// PTX name.
    pub name: String,
    /// `.entry` rather than `.func`.
    pub entry: bool,
    /// Inputs.
    pub params: Vec<Param>,
    /// Return parameters of a `.func`.
    pub rets: Vec<Param>,
    /// Declared registers.
    pub regs: Vec<Reg>,
    /// Shared, local and call-parameter variables declared inside.
    pub vars: Vec<Var>,
    /// Instructions.
    pub body: Vec<Stmt>,
    /// `.maxntid`, as the product of its dimensions.
    pub max_threads: Option<u32>,
    /// `.reqntid`.
    pub req_threads: Option<[u32; 3]>,
    /// PTX line of the declaration.
    pub line: u32,
    /// Only declared so far.
    pub declared_only: bool,
}

/// A module.
#[derive(Clone, Debug)]
pub struct Module {
    /// `.version`, as (major, minor).
    pub version: (u32, u32),
    /// `.target sm_NN`.
    pub target: u32,
    /// Module-scope variables.
    pub vars: Vec<Var>,
    /// Functions in order.
    pub funcs: Vec<Func>,
}

impl Module {
    /// The function of that name.
    pub fn func(&self, name: &str) -> Option<&Func> {
        self.funcs.iter().find(|f| f.name == name)
    }
}

/// The result of everything that can refuse PTX.
pub type Ptx<T> = Result<T, PtxError>;
