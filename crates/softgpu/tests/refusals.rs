//! What this device does not know is an error at load, with line and text; never a no-op.

mod common;

use common::{Bench, kernel, module, refused};

#[test]
fn unknown_or_inexact_instructions() {
    for inst in [
        "frobnicate.u32 %r1, %r2;",
        "ex2.approx.ftz.f32 %f1, %f2;",
        "sin.approx.f32 %f1, %f2;",
        "div.approx.f32 %f1, %f2, %f3;",
        "div.full.f32 %f1, %f2, %f3;",
        "sqrt.approx.f32 %f1, %f2;",
        "rsqrt.approx.f32 %f1, %f2;",
        "rcp.approx.ftz.f32 %f1, %f2;",
        "add.rn.ftz.f32 %f1, %f2, %f3;",
        "mul.ftz.f32 %f1, %f2, %f3;",
        "fma.rn.ftz.f32 %f1, %f2, %f3, %f1;",
        "fma.rz.f32 %f1, %f2, %f3, %f1;",
        "add.rz.f32 %f1, %f2, %f3;",
        // May be fused by the assembler: not one result.
        "add.f32 %f1, %f2, %f3;",
        "mul.f32 %f1, %f2, %f3;",
        "sub.f64 %g1, %g2, %g3;",
        "add.f16 %h1, %h2, %h3;",
        "fma.rn.bf16 %h1, %h2, %h3, %h1;",
        "min.ftz.f32 %f1, %f2, %f3;",
        "setp.lt.ftz.f32 %p1, %f2, %f3;",
        "setp.foo.u32 %p1, %r2, %r3;",
        "setp.lo.s32 %p1, %r2, %r3;",
        "setp.lt.b32 %p1, %r2, %r3;",
        "setp.ltu.u32 %p1, %r2, %r3;",
        "cvt.ftz.f32.f32 %f1, %f2;",
        "cvt.s32.f32 %r1, %f2;",
        "cvt.rn.s32.f32 %r1, %f2;",
        "cvt.f32.s32 %f1, %r2;",
        "cvt.rni.f32.s32 %f1, %r2;",
        "cvt.rn.s32.u32 %r1, %r2;",
        "cvt.f16.f32 %h1, %f2;",
        "cvt.rn.relu.f16.f32 %h1, %f2;",
        "cvt.rn.e4m3x2.f32 %h1, %f1, %f2;",
        "prmt.b32.f4e %r1, %r2, %r3, %r4;",
        "lop3.b32 %r1, %r2, %r3, %r4, %r5;",
        "mul24.lo.u32 %r1, %r2, %r3;",
        "dp4a.u32.u32 %r1, %r2, %r3, %r4;",
        "vadd.u32.u32.u32 %r1, %r2, %r3;",
        "ld.global.nc.v8.f32 %f1, [%d1];",
        "ld.global.L2::cache_hint.u32 %r1, [%d1], %d2;",
        "ld.global.u128 %d1, [%d1];",
        "ld.tex.u32 %r1, [%d1];",
        "ld.relaxed.global.u32 %r1, [%d1];",
        "st.param.u32 [in], %r1;",
        "st.const.u32 [%d1], %r1;",
        "st.global.nc.u32 [%d1], %r1;",
        "ldu.global.u32 %r1, [%d1];",
        "prefetch.global.L2 [%d1];",
        "atom.global.add.f16x2 %r1, [%d1], %r2;",
        "atom.global.add.s64 %d1, [%d1], %d2;",
        "red.global.cas.b32 [%d1], %r2, %r3;",
        "bar.sync %r1;",
        "bar.sync 0, 64;",
        "bar.sync 16;",
        "bar.arrive 0, 64;",
        "bar.red.popc.u32 %r1, 0, %p1;",
        "shfl.bfly.b32 %r1, %r2, 1, 31;",
        "shfl.sync.foo.b32 %r1, %r2, 1, 31, -1;",
        "shfl.sync.bfly.b64 %d1, %d2, 1, 31, -1;",
        "vote.ballot.b32 %r1, %p1;",
        "vote.sync.some.pred %p1, %p2, -1;",
        "match.all.sync.b32 %r1|%p1, %r2, -1;",
        "activemask.u32 %r1;",
        "fence.proxy.alias;",
        "membar.cta.foo;",
        "nanosleep.u32 20;",
        "brkpt;",
        "mov.u32 %r1, %clock;",
        "mov.u64 %d1, %globaltimer;",
        "mov.u32 %r1, %smid;",
        "mov.b128 %d1, %d2;",
        "mov.b64 %d1, {%r1, %r2, %r3};",
        "brx.idx %r1, L;",
        "call nothere, (%r1);",
        "bra NOWHERE;",
        "cp.async.ca.shared.global [%d1], [%d2], 16;",
        "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%f1}, {%f2}, {%f3}, {%f4};",
        "wgmma.fence.sync.aligned;",
        "cvta.param.u64 %d1, %d2;",
        "isspacep.global %p1, %d1;",
        "add.u32.foo %r1, %r2, %r3;",
        "mul.u32 %r1, %r2, %r3;",
        "shl.u32 %r1, %r2, 3;",
        "popc.u32 %r1, %r2;",
    ] {
        let e = refused(&format!("mov.u32 %r9, 0;\n{inst}"));
        assert_eq!(e.line, 21, "{inst}: {e}");
        assert_eq!(e.code, 218, "{inst}");
        let op = inst.split([' ', ';']).next().unwrap();
        assert!(op.contains(e.text.as_str()) || inst.contains(e.text.as_str()), "{inst}: {e}");
    }
}

#[test]
fn operands_of_the_wrong_kind() {
    for inst in [
        "add.u32 %r1, %r2;",
        "add.u32 %r1, %r2, %r3, %r4;",
        "add.u32 %d1, %r2, %r3;",
        "add.u32 %r1, %d2, %r3;",
        "add.rn.f32 %f1, %d2, %f3;",
        "add.s32 %f1, %r2, %r3;",
        "add.rn.f64 %f1, %g2, %g3;",
        "add.u32 5, %r2, %r3;",
        "add.rn.f32 %f1, %f2, 1;",
        "add.u32 %r1, %r2, 0f3F800000;",
        "mov.u32 %r1, %p1;",
        "selp.u32 %r1, %r2, %r3, %r4;",
        "selp.u32 %r1, %r2, %r3, !%p1;",
        "ld.global.u32 %r1, %d1;",
        "ld.global.u32 %r1, [%r2];",
        "ld.global.u32 %r1, [%f2];",
        "ld.global.u64 %r1, [%d1];",
        "ld.global.v2.u32 %r1, [%d1];",
        "ld.global.v4.u64 {%d1,%d2,%d3,%d4}, [%d1];",
        "ld.global.v4.u32 {%r1,%r2}, [%d1];",
        "ld.param.u32 %r1, [nothere];",
        "ld.global.u32 %r1, [in];",
        "st.global.u32 [%d1], {%r1};",
        "setp.eq.u32 %r1, %r2, %r3;",
        "@%r1 add.u32 %r1, %r2, %r3;",
        "bra %r1;",
        "mov.u32 %r1, in;\nadd.u32 %r1, undeclared, 1;",
        "shl.b64 %d1, %d2, %d3;",
    ] {
        refused(inst);
    }
}

#[test]
fn instructions_that_need_a_newer_target() {
    for (inst, sm) in [
        ("redux.sync.add.u32 %r1, %r2, -1;", 80),
        ("cvt.rn.bf16.f32 %h1, %f1;", 80),
        ("cvt.rn.f16x2.f32 %r1, %f1, %f2;", 80),
        ("max.NaN.f32 %f1, %f2, %f3;", 80),
        ("cvt.f32.bf16 %f1, %h1;", 90),
    ] {
        for target in [75, 80, 90] {
            let text = kernel(inst).replace("sm_90", &format!("sm_{target}"));
            let r = Bench::new().load(&text).err();
            assert_eq!(r.is_none(), target >= sm, "{inst} on sm_{target}: {r:?}");
        }
    }
    let mut old = Bench { sm: 75, ..Bench::new() };
    assert!(
        old.load(&module(80, ".visible .entry k() { ret; }")).is_err(),
        "target above the device"
    );
}

#[test]
fn functions_nobody_calls_are_checked_too() {
    let e = Bench::new().load(&module(75, ".func f() {\nfrobnicate;\n}")).err().unwrap();
    assert_eq!(e.line, 5);
    let e = Bench::new()
        .load(&module(75, ".func f() { call f; ret; }\n.entry k() { call f; ret; }"))
        .err()
        .unwrap();
    assert!(e.why.contains("recursive"), "{e}");
}

#[test]
fn a_refused_module_leaves_no_memory_behind() {
    let mut b = Bench::new();
    assert!(b.load(&module(75, ".global .u32 x;\n.entry k() { frobnicate; }")).is_err());
    assert!(b.mem.regions().is_empty());
}

#[test]
fn garbage_never_panics() {
    // Cut and twist a real module in many ways: each is refused or loads, none panics.
    let text = include_str!("ptx/blockmax.sm_75.ptx");
    let mut seed = 1u64;
    for _ in 0..300 {
        seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        let at = (seed >> 33) as usize % text.len();
        let n = (seed >> 20) as usize % 9;
        let mut t = text.to_string();
        if t.is_char_boundary(at) && t.is_char_boundary((at + n).min(t.len())) {
            t.replace_range(
                at..(at + n).min(t.len()),
                ["", ";", "9", "%r1", "{", "]", ".f64"][(seed >> 50) as usize % 7],
            );
        }
        let _ = Bench::new().load(&t);
    }
}
