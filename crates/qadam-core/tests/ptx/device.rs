//! A software GPU with the kernel loaded.

use softgpu::exec::{Launch, Stats, run};
use softgpu::memory::managed::Place;
use softgpu::memory::{Kind, Memory};
use softgpu::module::Module;

use crate::layout::{Chunk, FOLD, Found, Grad, Hyper, Table, Tally, Tensor};

/// The files that ship, by the compute capability they are loaded on.
pub const PTX: [(u32, &str); 2] = [
    (75, include_str!("../../kernels/ptx/qadam_sm_75.ptx")),
    (80, include_str!("../../kernels/ptx/qadam_sm_80.ptx")),
];

const THREADS: u32 = 256;

pub struct Gpu {
    memory: Memory,
    module: Module,
    nonfinite: u64,
    arrived: u64,
    /// Of the last launch.
    pub stats: Stats,
}

impl Gpu {
    pub fn new((sm, text): (u32, &str)) -> Self {
        let mut memory = Memory::default();
        let module = Module::load(text, &mut memory, 0, sm).unwrap();
        let nonfinite = memory.alloc(8, Kind::Pinned, None).unwrap();
        let mut gpu = Self { memory, module, nonfinite, arrived: 0, stats: Stats::default() };
        gpu.arrived = gpu.upload(&[0_u32]);
        gpu
    }

    /// Memory of which no byte is written, and of which untouched pages cost nothing.
    pub fn reserve(&mut self, bytes: u64) -> u64 {
        self.memory.alloc(bytes, Kind::Device, Some(0)).unwrap()
    }

    pub fn write<T: Copy>(&mut self, at: u64, data: &[T]) {
        let len = std::mem::size_of_val(data) as u64;
        // SAFETY: the source is a slice of `len` bytes.
        unsafe { self.memory.upload(at, data.as_ptr().cast(), len, Place::Device(0)) }.unwrap();
    }

    /// An allocation that ends where `data` does, so that not one byte more may be touched.
    pub fn upload<T: Copy>(&mut self, data: &[T]) -> u64 {
        let at = self.reserve(std::mem::size_of_val(data).max(1) as u64);
        self.write(at, data);
        at
    }

    pub fn read<T: Copy + Default>(&mut self, at: u64, len: usize) -> Vec<T> {
        let mut out = vec![T::default(); len];
        let bytes = std::mem::size_of_val(&out[..]) as u64;
        // SAFETY: the target is a vector of that many bytes; `T` is a number.
        unsafe { self.memory.download(out.as_mut_ptr().cast(), at, bytes) }.unwrap();
        out
    }

    /// A table, but for what measuring needs.
    pub fn table(
        &mut self,
        (tensors, hypers): (&[Tensor], &[Hyper]),
        grads: &[Grad],
        chunks: &[Chunk],
    ) -> Table {
        assert_eq!(tensors.len(), grads.len());
        Table {
            tensors: self.upload(tensors),
            grads: self.upload(grads),
            chunks: self.upload(chunks),
            hypers: self.upload(hypers),
            nonfinite: self.nonfinite,
            arrived: self.arrived,
            chunk_count: chunks.len() as u64,
            tensor_count: tensors.len() as u64,
            ..Table::default()
        }
    }

    /// One launch of `warps`.
    pub fn launch(&mut self, kernel: &str, warps: u64, table: Table) {
        let table = self.upload(&[table]);
        let launch = Launch {
            kernel: self.module.kernel(kernel).unwrap(),
            grid: [(warps as u32 * 32).div_ceil(THREADS), 1, 1],
            block: [THREADS, 1, 1],
            dynamic_shared: 0,
            params: &table.to_le_bytes(),
            device: 0,
            budget: 1 << 32,
        };
        self.stats = run(&launch, &mut self.memory).unwrap_or_else(|fault| panic!("{fault}"));
        assert_eq!(self.read::<u32>(self.arrived, 1), [0], "ready for the next launch");
    }

    /// What `qadam_step` does with a table; returns what was added to the non-finite count.
    pub fn step(&mut self, table: Table) -> u64 {
        let before = self.read::<u64>(self.nonfinite, 1)[0];
        self.launch("qadam_step", table.chunk_count, table);
        self.read::<u64>(self.nonfinite, 1)[0] - before
    }

    /// Memory for measuring tensors that have so many folds, `beside` sums each; what the kernels write
    /// is not written yet. Tensors without a fold are not measured.
    pub fn measuring(&mut self, table: &mut Table, folds: &[usize], beside: u64) -> Scratch {
        let (mut tallies, mut fold, mut segment) = (Vec::new(), 0, 0);
        for &folds in folds {
            tallies.push(Tally { fold, segment, ..Tally::default() });
            fold += folds as u32;
            segment += folds.div_ceil(FOLD) as u32;
        }
        table.tallies = self.upload(&tallies);
        table.segments = self.upload(&vec![0_u32; segment as usize]);
        table.sums = self.reserve((8 * beside * u64::from(fold)).max(1));
        table.nodes = self.reserve((8 * beside * u64::from(segment)).max(1));
        table.found = self.reserve((size_of::<Found>() * folds.len()).max(1) as u64);
        let tensors = folds.len();
        table.squares = self.reserve((8 * (tensors + tensors.div_ceil(FOLD)) as u64).max(1));
        Scratch { tallies, segments: segment as usize }
    }

    /// Fails unless all that counts is 0 again.
    pub fn assert_at_rest(&mut self, table: &Table, scratch: &Scratch) {
        assert_eq!(self.read::<Tally>(table.tallies, scratch.tallies.len()), scratch.tallies);
        assert!(self.read::<u32>(table.segments, scratch.segments).iter().all(|&count| count == 0));
    }
}

/// What measuring began with.
pub struct Scratch {
    tallies: Vec<Tally>,
    segments: usize,
}
