//! A software GPU with the kernel loaded.

use softgpu::exec::{Launch, Stats, run};
use softgpu::memory::managed::Place;
use softgpu::memory::{Kind, Memory};
use softgpu::module::Module;

use crate::layout::{Chunk, Grad, Hyper, Table, Tensor};

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

    /// One launch, with all tables given anew; returns what was added to the non-finite count.
    pub fn step(
        &mut self,
        (tensors, hypers): (&[Tensor], &[Hyper]),
        grads: &[Grad],
        chunks: &[Chunk],
    ) -> u64 {
        assert_eq!(tensors.len(), grads.len());
        let table = Table {
            tensors: self.upload(tensors),
            grads: self.upload(grads),
            chunks: self.upload(chunks),
            hypers: self.upload(hypers),
            nonfinite: self.nonfinite,
            arrived: self.arrived,
            chunk_count: chunks.len() as u64,
            tensor_count: tensors.len() as u64,
        };
        let table = self.upload(&[table]);
        let before = self.read::<u64>(self.nonfinite, 1)[0];
        let launch = Launch {
            kernel: self.module.kernel("qadam_step").unwrap(),
            grid: [(chunks.len() as u32 * 32).div_ceil(THREADS), 1, 1],
            block: [THREADS, 1, 1],
            dynamic_shared: 0,
            params: &table.to_le_bytes(),
            device: 0,
            budget: 1 << 32,
        };
        self.stats = run(&launch, &mut self.memory).unwrap_or_else(|fault| panic!("{fault}"));
        assert_eq!(self.read::<u32>(self.arrived, 1), [0], "ready for the next launch");
        self.read::<u64>(self.nonfinite, 1)[0] - before
    }
}
