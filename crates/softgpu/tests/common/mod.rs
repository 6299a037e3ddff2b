//! Runs a few lines of PTX on one warp: inputs in, outputs out.
#![allow(dead_code)] // each test file uses what it needs

use softgpu::error::PtxError;
use softgpu::exec::{Launch, run};
use softgpu::fault::Fault;
use softgpu::memory::managed::Place;
use softgpu::memory::{Kind, Memory};
use softgpu::module::Module;

/// A machine with one device.
pub struct Bench {
    pub mem: Memory,
    pub sm: u32,
}

impl Bench {
    pub fn new() -> Bench {
        Bench { mem: Memory::default(), sm: 90 }
    }

    /// A device buffer holding `data`.
    pub fn buffer<T: Copy>(&mut self, data: &[T]) -> u64 {
        let len = std::mem::size_of_val(data) as u64;
        let at = self.mem.alloc(len, Kind::Device, Some(0)).unwrap();
        // SAFETY: the source is a slice of `len` bytes.
        unsafe { self.mem.upload(at, data.as_ptr().cast(), len, Place::Device(0)).unwrap() };
        at
    }

    /// A device buffer nobody wrote.
    pub fn empty(&mut self, len: u64) -> u64 {
        self.mem.alloc(len, Kind::Device, Some(0)).unwrap()
    }

    /// `n` elements at `at`.
    pub fn read<T: Copy + Default>(&mut self, at: u64, n: usize) -> Vec<T> {
        let mut out = vec![T::default(); n];
        let len = std::mem::size_of_val(out.as_slice()) as u64;
        // SAFETY: the target is a vector of `len` bytes; every bit pattern is a `T` (numbers only here).
        unsafe { self.mem.download(out.as_mut_ptr().cast(), at, len).unwrap() };
        out
    }

    pub fn load(&mut self, text: &str) -> Result<Module, PtxError> {
        Module::load(text, &mut self.mem, 0, self.sm)
    }

    pub fn launch(
        &mut self,
        m: &Module,
        name: &str,
        grid: [u32; 3],
        block: [u32; 3],
        shared: usize,
        params: &[u8],
    ) -> Result<softgpu::exec::Stats, Box<Fault>> {
        let kernel = m.kernel(name).expect(name);
        assert_eq!(kernel.param_bytes, params.len(), "{name}");
        let launch = Launch {
            kernel,
            grid,
            block,
            dynamic_shared: shared,
            params,
            device: 0,
            budget: 1 << 24,
        };
        run(&launch, &mut self.mem)
    }
}

/// A module around `text`.
pub fn module(target: u32, text: &str) -> String {
    format!(".version 8.0\n.target sm_{target}\n.address_size 64\n{text}")
}

/// A kernel `k` over `body`, with registers enough and parameters in, out, n. Line 20 is the body's first.
pub fn kernel(body: &str) -> String {
    module(
        90,
        &format!(
            ".visible .entry k(.param .u64 in, .param .u64 out)\n{{\n\
             .reg .pred %p<16>;\n.reg .b16 %h<16>;\n.reg .b32 %r<32>;\n.reg .f32 %f<16>;\n\
             .reg .b64 %d<32>;\n.reg .f64 %g<16>;\n\
             ld.param.u64 %d30, [in];\nld.param.u64 %d31, [out];\n\
             mov.u32 %r30, %tid.x;\nmul.wide.u32 %d29, %r30, 8;\n\
             add.s64 %d31, %d31, %d29;\nmul.wide.u32 %d29, %r30, 32;\nadd.s64 %d30, %d30, %d29;\n\
             // line 20:\n{body}\nret;\n}}\n"
        ),
    )
}

/// The refusal of a kernel body.
pub fn refused(body: &str) -> PtxError {
    Bench::new().load(&kernel(body)).err().unwrap_or_else(|| panic!("accepted: {body}"))
}

/// Runs `body` on one thread a row: up to four 64-bit inputs at `[%d30]`, one 64-bit output at `[%d31]`.
pub fn rows(body: &str, inputs: &[[u64; 4]]) -> Result<Vec<u64>, Box<Fault>> {
    let mut b = Bench::new();
    let m = b.load(&kernel(body)).unwrap_or_else(|e| panic!("{e}\n{body}"));
    let input = b.buffer(inputs);
    let out = b.buffer(&vec![0xdead_beef_dead_beefu64; inputs.len()]);
    let params: Vec<u8> = [input, out].iter().flat_map(|p| p.to_le_bytes()).collect();
    b.launch(&m, "k", [1; 3], [inputs.len() as u32, 1, 1], 0, &params)?;
    Ok(b.read(out, inputs.len()))
}

/// One instruction on 32-bit operands `%r1, %r2, %r3` into `%r0`; the result widened.
pub fn op32(inst: &str, a: u32, b: u32, c: u32) -> u32 {
    let body = format!(
        "ld.global.u32 %r1, [%d30];\nld.global.u32 %r2, [%d30+8];\nld.global.u32 %r3, [%d30+16];\n\
         mov.b32 %f1, %r1;\nmov.b32 %f2, %r2;\nmov.b32 %f3, %r3;\ncvt.u16.u32 %h1, %r1;\ncvt.u16.u32 %h2, %r2;\ncvt.u16.u32 %h3, %r3;\n\
         setp.ne.u32 %p1, %r1, 0;\nsetp.ne.u32 %p2, %r2, 0;\nsetp.ne.u32 %p3, %r3, 0;\n\
         mov.u32 %r0, 0;\nmov.f32 %f0, 0f00000000;\nmov.u16 %h0, 0;\nsetp.ne.u32 %p0, %r1, %r1;\n\
         {inst}\nst.global.u32 [%d31], %r0;"
    );
    rows(&body, &[[a.into(), b.into(), c.into(), 0]]).unwrap_or_else(|e| panic!("{e}\n{inst}"))[0]
        as u32
}

/// An f32 instruction on `%f1, %f2, %f3` into `%f0`, in bits.
pub fn opf(inst: &str, a: u32, b: u32, c: u32) -> u32 {
    op32(&format!("{inst}\nmov.b32 %r0, %f0;"), a, b, c)
}

/// A 16-bit instruction into `%h0`.
pub fn op16(inst: &str, a: u32, b: u32, c: u32) -> u32 {
    op32(&format!("{inst}\ncvt.u32.u16 %r0, %h0;"), a, b, c)
}

/// A predicate instruction into `%p0`.
pub fn opp(inst: &str, a: u32, b: u32, c: u32) -> bool {
    op32(&format!("{inst}\nselp.u32 %r0, 1, 0, %p0;"), a, b, c) == 1
}

/// One instruction on 64-bit operands `%d1, %d2, %d3` (also `%g1..3`, `%r1..3` their low words) into `%d0`.
pub fn op64(inst: &str, a: u64, b: u64, c: u64) -> u64 {
    let body = format!(
        "ld.global.u64 %d1, [%d30];\nld.global.u64 %d2, [%d30+8];\nld.global.u64 %d3, [%d30+16];\n\
         mov.b64 %g1, %d1;\nmov.b64 %g2, %d2;\nmov.b64 %g3, %d3;\n\
         cvt.u32.u64 %r1, %d1;\ncvt.u32.u64 %r2, %d2;\ncvt.u32.u64 %r3, %d3;\nmov.b32 %f1, %r1;\n\
         mov.u64 %d0, 0;\n{inst}\nst.global.u64 [%d31], %d0;"
    );
    rows(&body, &[[a, b, c, 0]]).unwrap_or_else(|e| panic!("{e}\n{inst}"))[0]
}

/// An f64 instruction into `%g0`.
pub fn opg(inst: &str, a: f64, b: f64, c: f64) -> f64 {
    f64::from_bits(op64(
        &format!("{inst}\nmov.b64 %d0, %g0;"),
        a.to_bits(),
        b.to_bits(),
        c.to_bits(),
    ))
}
