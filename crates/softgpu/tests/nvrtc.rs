//! Kernels that NVRTC 12.0 compiled from `tests/kernels/*.cu`, against the same arithmetic in Rust.

mod common;

use common::Bench;
use softgpu::alu::convert::{BF16, F16, Round, narrow, widen};
use softgpu::fault::FaultKind;

const ADAM: [&str; 2] = [include_str!("ptx/adam.sm_75.ptx"), include_str!("ptx/adam.sm_80.ptx")];
const BLOCKMAX: [&str; 2] =
    [include_str!("ptx/blockmax.sm_75.ptx"), include_str!("ptx/blockmax.sm_80.ptx")];

/// A small generator, so that inputs are the same everywhere.
struct Rng(u64);

impl Rng {
    fn next(&mut self) -> u32 {
        self.0 =
            self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 32) as u32
    }

    fn float(&mut self) -> f32 {
        let scale = 10f32.powi((self.next() % 12) as i32 - 8);
        (self.next() as f32 / u32::MAX as f32 - 0.5) * scale
    }
}

const HYPER: [f32; 7] = [0.9, 0.999, 0.1, 0.001, 1e-8, 1e-3, 1.5];

/// The rule of `adam.cu`.
fn adam(g: f32, m: &mut f32, v: &mut f32, p: f32) -> f32 {
    let [b1, b2, one_b1, one_b2, eps, step, inv_c2] = HYPER;
    *m = b1.mul_add(*m, one_b1 * g);
    *v = b2.mul_add(*v, one_b2 * g * g);
    let d = v.sqrt() * inv_c2 + eps;
    (-step).mul_add(*m / d, p)
}

fn to_bf16(x: f32) -> u16 {
    let u = x.to_bits();
    ((u + 0x7fff + ((u >> 16) & 1)) >> 16) as u16
}

#[repr(C)]
#[derive(Clone, Copy)]
struct Tensor {
    p: u64,
    g: u64,
    m: u64,
    v: u64,
    absmax: u64,
    n: u64,
}

/// Runs the kernel over tensors of these lengths, shifted by `skew` elements to spoil alignment.
fn step(text: &str, entry: &str, width: usize, lens: &[usize], skew: usize) {
    let mut b = Bench::new();
    let module = b.load(text).unwrap();
    let mut rng = Rng(7);
    let mut tensors = Vec::new();
    let mut host = Vec::new();
    let (mut chunk_tensor, mut chunk_start) = (Vec::new(), Vec::new());
    for (t, &n) in lens.iter().enumerate() {
        let encode = |x: f32| match width {
            4 => x.to_bits().to_le_bytes().to_vec(),
            _ if entry == "adam_bf16" => to_bf16(x).to_le_bytes().to_vec(),
            _ => (narrow(x.into(), F16, Round::Near) as u16).to_le_bytes().to_vec(),
        };
        let draw = |rng: &mut Rng| (0..n + skew).map(|_| rng.float()).collect::<Vec<f32>>();
        let (p, g) = (draw(&mut rng), draw(&mut rng));
        let m = draw(&mut rng);
        let v: Vec<f32> = draw(&mut rng).iter().map(|x| x * x).collect();
        let bytes = |x: &[f32]| x.iter().flat_map(|&x| encode(x)).collect::<Vec<u8>>();
        let (pb, gb) = (bytes(&p), bytes(&g));
        let tensor = Tensor {
            p: b.buffer(&pb) + (skew * width) as u64,
            g: b.buffer(&gb) + (skew * width) as u64,
            m: b.buffer(&m) + 4 * skew as u64,
            v: b.buffer(&v) + 4 * skew as u64,
            absmax: b.empty(4 * n.div_ceil(256).max(1) as u64),
            n: n as u64,
        };
        for c in 0..n.div_ceil(256) {
            chunk_tensor.push(t as u32);
            chunk_start.push(256 * c as u64);
        }
        tensors.push(tensor);
        host.push((pb, gb, m, v));
    }
    let table = b.buffer(&tensors);
    let (ct, cs) = (b.buffer(&chunk_tensor), b.buffer(&chunk_start));
    let hyper = b.buffer(&HYPER);
    let mut params = Vec::new();
    for p in [table, ct, cs] {
        params.extend(p.to_le_bytes());
    }
    params.extend((chunk_tensor.len() as u32).to_le_bytes());
    params.extend([0; 4]);
    params.extend(hyper.to_le_bytes());
    let warps = chunk_tensor.len() as u32;
    b.launch(&module, entry, [warps.div_ceil(8).max(1), 1, 1], [256, 1, 1], 0, &params)
        .unwrap_or_else(|e| panic!("{e}"));

    for (t, (pb, gb, m, v)) in tensors.iter().zip(&host) {
        let n = t.n as usize;
        let decode = |x: &[u8], i: usize| {
            if width == 4 {
                f32::from_le_bytes(x[4 * i..4 * i + 4].try_into().unwrap())
            } else {
                let h = u32::from(u16::from_le_bytes([x[2 * i], x[2 * i + 1]]));
                if entry == "adam_bf16" { f32::from_bits(h << 16) } else { widen(h, F16) as f32 }
            }
        };
        let (got_m, got_v): (Vec<u32>, Vec<u32>) = (b.read(t.m, n), b.read(t.v, n));
        let got_p: Vec<u8> = b.read(t.p, n * width);
        let absmax: Vec<f32> = b.read(t.absmax, n.div_ceil(256));
        let mut want_max = vec![0f32; n.div_ceil(256)];
        for i in 0..n {
            let (mut wm, mut wv) = (m[i + skew], v[i + skew]);
            let wp = adam(decode(gb, i + skew), &mut wm, &mut wv, decode(pb, i + skew));
            assert_eq!(got_m[i], wm.to_bits(), "{entry} m[{i}]");
            assert_eq!(got_v[i], wv.to_bits(), "{entry} v[{i}]");
            let got = decode(&got_p, i);
            let want = match (width, entry) {
                (4, _) => wp,
                (_, "adam_bf16") => f32::from_bits(u32::from(to_bf16(wp)) << 16),
                _ => widen(narrow(wp.into(), F16, Round::Near), F16) as f32,
            };
            assert_eq!(got.to_bits(), want.to_bits(), "{entry} p[{i}]");
            want_max[i / 256] = want_max[i / 256].max(wm.abs());
        }
        assert_eq!(absmax, want_max, "{entry}");
    }
}

#[test]
fn adam_matches_rust_bit_for_bit_in_every_dtype_and_alignment() {
    for text in ADAM {
        for (entry, width) in [("adam_f32", 4), ("adam_f16", 2), ("adam_bf16", 2)] {
            for skew in [0, 1] {
                step(text, entry, width, &[1, 255, 256, 257, 2048, 4097], skew);
            }
        }
    }
}

#[test]
fn adam_past_the_end_of_a_buffer_is_caught() {
    let mut b = Bench::new();
    let module = b.load(ADAM[0]).unwrap();
    let data = vec![1f32; 256];
    let n = 257; // one more than the buffers hold
    let t = Tensor {
        p: b.buffer(&data),
        g: b.buffer(&data),
        m: b.buffer(&data),
        v: b.buffer(&data),
        absmax: b.empty(8),
        n,
    };
    let (table, ct, cs, h) =
        (b.buffer(&[t]), b.buffer(&[0u32, 0]), b.buffer(&[0u64, 256]), b.buffer(&HYPER));
    let mut params: Vec<u8> = [table, ct, cs, 2].iter().flat_map(|p| p.to_le_bytes()).collect();
    params.extend(h.to_le_bytes());
    let e = b.launch(&module, "adam_f32", [1; 3], [64, 1, 1], 0, &params).unwrap_err();
    assert_eq!((e.kind, e.thread), (FaultKind::OutOfBounds, [32, 0, 0]), "{e}");
    assert!([t.p, t.g, t.m, t.v].iter().any(|x| e.addr == Some(x + 1024)), "{e}");
    assert_eq!(
        ADAM[0].lines().nth(e.line as usize - 1).unwrap().split_whitespace().next(),
        Some(&*e.text)
    );
}

#[test]
fn block_maximum_through_shared_memory_and_a_barrier() {
    for text in BLOCKMAX {
        let mut b = Bench::new();
        let module = b.load(text).unwrap();
        let mut rng = Rng(3);
        let n = 1000usize;
        let x: Vec<f32> = (0..n).map(|_| rng.float()).collect();
        let (xin, out) = (b.buffer(&x), b.empty(16));
        let params: Vec<u8> = [xin, out, n as u64].iter().flat_map(|p| p.to_le_bytes()).collect();
        b.launch(&module, "block_max", [4, 1, 1], [256, 1, 1], 0, &params)
            .unwrap_or_else(|e| panic!("{e}"));
        let got: Vec<f32> = b.read(out, 4);
        for (k, chunk) in x.chunks(256).enumerate() {
            let want = chunk.iter().fold(0f32, |a, x| a.max(x.abs())) * [1.0, 0.5, 0.25, 0.125][k];
            assert_eq!(got[k], want);
        }
        let total = module.globals.iter().find(|g| g.0 == "total").unwrap().1;
        assert_eq!(b.read::<u64>(total, 1), [4]);
    }
}

#[test]
fn double_precision_powers() {
    for text in BLOCKMAX {
        let mut b = Bench::new();
        let module = b.load(text).unwrap();
        let bases = vec![0.9f64, 0.999, 0.5, 0.1];
        let exps = vec![1u32, 1000, 7, 40];
        let (bi, ti, out) = (b.buffer(&bases), b.buffer(&exps), b.empty(32));
        let params: Vec<u8> =
            [bi, ti, out].iter().flat_map(|p| p.to_le_bytes()).chain(4u32.to_le_bytes()).collect();
        b.launch(&module, "powers", [1; 3], [32, 1, 1], 0, &params)
            .unwrap_or_else(|e| panic!("{e}"));
        let got: Vec<f64> = b.read(out, 4);
        for i in 0..4 {
            let (mut r, mut x, mut k) = (1f64, bases[i], exps[i]);
            while k > 0 {
                if k & 1 == 1 {
                    r *= x;
                }
                x *= x;
                k >>= 1;
            }
            assert_eq!(got[i].to_bits(), ((1.0 - r).sqrt() / (1.0 - r)).to_bits());
        }
    }
}

#[test]
fn dynamic_shared_memory_and_a_switch() {
    for text in BLOCKMAX {
        let mut b = Bench::new();
        let module = b.load(text).unwrap();
        let x: Vec<f32> = (0..64).map(|i| 1.0 + i as f32).collect();
        let (xin, out) = (b.buffer(&x), b.empty(256));
        let params: Vec<u8> = [xin, out].iter().flat_map(|p| p.to_le_bytes()).collect();
        b.launch(&module, "dynshared", [1; 3], [64, 1, 1], 256, &params)
            .unwrap_or_else(|e| panic!("{e}"));
        let got: Vec<f32> = b.read(out, 64);
        for t in 0..64 {
            let want = match t % 8 {
                0 => x[0],
                1 => x[1] * 2.0,
                2 => x[2] - 2.0,
                3 => x[5].sqrt(),
                4 => x[7] / x[3],
                5 => x[63 - t],
                6 => 1.0 / x[4],
                _ => 7.0,
            };
            assert_eq!(got[t], want, "{t}");
        }
        let e = b.launch(&module, "dynshared", [1; 3], [64, 1, 1], 252, &params).unwrap_err();
        assert_eq!(
            (e.kind, e.thread, e.addr),
            (FaultKind::OutOfBounds, [63, 0, 0], Some(252)),
            "{e}"
        );
    }
}

#[test]
fn mixed_integer_and_library_code() {
    for text in BLOCKMAX {
        let mut b = Bench::new();
        let module = b.load(text).unwrap();
        let x: Vec<f32> = (0..64).map(|i| 0.37 * i as f32 - 5.5).collect();
        let (xin, out, iout) = (b.buffer(&x), b.empty(256), b.empty(256));
        let k = 3i32;
        let params: Vec<u8> = [xin, out, iout]
            .iter()
            .flat_map(|p| p.to_le_bytes())
            .chain(64u32.to_le_bytes())
            .chain(k.to_le_bytes())
            .collect();
        b.launch(&module, "mixed", [1; 3], [64, 1, 1], 0, &params)
            .unwrap_or_else(|e| panic!("{e}"));
        let (got, goti): (Vec<f32>, Vec<i32>) = (b.read(out, 64), b.read(iout, 64));
        for i in 0..64usize {
            let a = x[i] + x[i];
            let mut local = [0f32; 8];
            for j in 0..8 {
                local[(j * 3) & 7] = a + j as f32;
            }
            let half = widen(narrow(a.into(), F16, Round::Near), F16) as f32;
            let bf = widen(narrow(a.into(), BF16, Round::Near), BF16) as f32;
            let want = local[i & 7] + ((half + bf) + 1f32.copysign(a));
            assert_eq!(got[i], want, "{i}");
            let u = i as u32;
            let gts = |a: i16, b: i16| if a > b { 0xffffu32 } else { 0 };
            let vcmp = (gts((u >> 16) as i16, 0) << 16) | gts(u as i16, 3);
            let bytes = |s: u32| (((0x0102_0304u64 << 32) | u64::from(u)) >> (8 * s)) as u32 & 0xff;
            let perm = bytes(0) | (bytes(4) << 8) | (bytes(1) << 16) | (bytes(5) << 24);
            let warp = i / 32 * 32;
            let ballot =
                (0..32).fold(0u32, |m, l| m | (u32::from(x[warp + l] + x[warp + l] > 1.0) << l));
            let sum = [
                (a.round_ties_even() as i32 / k) as u32,
                (a as i32 % k) as u32,
                u.count_ones(),
                u.leading_zeros(),
                if u == 0 { 0 } else { u.trailing_zeros() + 1 },
                u.reverse_bits(),
                a.abs().floor() as u32,
                vcmp,
                perm,
                ((u64::from(u) * 0x9e37_79b9) >> 32) as u32,
                a.round_ties_even() as i32 as u32,
                a.floor() as i32 as u32,
                a.trunc() as i32 as u32,
                ballot,
            ];
            let mut want = sum.iter().fold(0u32, |s, v| s.wrapping_add(*v)) as i32;
            if i == 0 {
                want = want.max(0);
            }
            assert_eq!(goti[i], want, "{i}");
        }
    }
}
