//! How many thread instructions a second: one Adam-like step over a million elements.
//!
//!     cargo run --release -p softgpu --example speed

use std::time::Instant;

use softgpu::exec::{Launch, run};
use softgpu::memory::managed::Place;
use softgpu::memory::{Kind, Memory};
use softgpu::module::Module;

fn buffer<T: Copy>(mem: &mut Memory, data: &[T]) -> u64 {
    let len = std::mem::size_of_val(data) as u64;
    let at = mem.alloc(len, Kind::Device, Some(0)).expect("memory");
    // SAFETY: the source is a slice of `len` bytes.
    unsafe { mem.upload(at, data.as_ptr().cast(), len, Place::Device(0)) }.expect("in bounds");
    at
}

fn main() {
    let mut mem = Memory::default();
    let module =
        Module::load(include_str!("../tests/ptx/adam.sm_80.ptx"), &mut mem, 0, 80).expect("loads");
    let n = 1usize << 20;
    let x: Vec<f32> = (0..n).map(|i| (i % 1000) as f32 * 1e-3 + 1e-4).collect();
    let chunks: Vec<u64> = (0..n as u64 / 256).map(|c| 256 * c).collect();
    for (entry, width) in [("adam_f32", 4), ("adam_f16", 2), ("adam_bf16", 2)] {
        let halves = vec![0x3c00u16; n];
        let weights =
            |mem: &mut Memory| if width == 4 { buffer(mem, &x) } else { buffer(mem, &halves) };
        let table = [
            weights(&mut mem),
            weights(&mut mem),
            buffer(&mut mem, &x),
            buffer(&mut mem, &x),
            buffer(&mut mem, &vec![0f32; n / 256]),
            n as u64,
        ];
        let mut params = Vec::new();
        for p in [
            buffer(&mut mem, &table),
            buffer(&mut mem, &vec![0u32; chunks.len()]),
            buffer(&mut mem, &chunks),
        ] {
            params.extend(p.to_le_bytes());
        }
        params.extend((chunks.len() as u64).to_le_bytes());
        params
            .extend(buffer(&mut mem, &[0.9f32, 0.999, 0.1, 0.001, 1e-8, 1e-3, 1.5]).to_le_bytes());
        let kernel = module.kernel(entry).expect("entry");
        let grid = [chunks.len() as u32 / 8, 1, 1];
        let launch = Launch {
            kernel,
            grid,
            block: [256, 1, 1],
            dynamic_shared: 0,
            params: &params,
            device: 0,
            budget: 1 << 32,
        };
        let start = Instant::now();
        let stats = run(&launch, &mut mem).expect("no fault");
        let s = start.elapsed().as_secs_f64();
        println!(
            "{entry}: {n} elements in {s:.3} s, {:.0} M thread instructions/s, {:.1} instructions an element",
            stats.thread_instructions as f64 / s / 1e6,
            stats.thread_instructions as f64 / n as f64
        );
    }
}
