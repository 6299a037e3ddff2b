//! Every opcode against results computed by hand or by the PTX manual's own formulas.

mod common;

use common::{op16, op32, op64, opf, opg, opp, rows};

const NAN: u32 = 0x7fff_ffff;
const INF: u32 = 0x7f80_0000;
const M: u32 = u32::MAX;

fn f(x: f32) -> u32 {
    x.to_bits()
}

#[test]
fn integer_add_and_sub() {
    assert_eq!(op32("add.u32 %r0, %r1, %r2;", M, 2, 0), 1);
    assert_eq!(op32("add.s32 %r0, %r1, -5;", 3, 0, 0), -2i32 as u32);
    assert_eq!(op32("sub.s32 %r0, %r1, %r2;", 3, 5, 0), -2i32 as u32);
    assert_eq!(op32("add.sat.s32 %r0, %r1, %r2;", i32::MAX as u32, 1, 0), i32::MAX as u32);
    assert_eq!(op32("sub.sat.s32 %r0, %r1, %r2;", i32::MIN as u32, 1, 0), i32::MIN as u32);
    assert_eq!(op16("add.s16 %h0, %h1, %h2;", 0xffff, 3, 0), 2);
    assert_eq!(op16("sub.u16 %h0, %h1, %h2;", 1, 2, 0), 0xffff);
    assert_eq!(op64("add.s64 %d0, %d1, %d2;", u64::MAX, 2, 0), 1);
    assert_eq!(op64("sub.u64 %d0, %d1, %d2;", 0, 1, 0), u64::MAX);
}

#[test]
fn carry_chains() {
    // 0xffffffff_ffffffff + 1 in two halves: the carry runs through.
    assert_eq!(op32("add.cc.u32 %r4, %r1, %r2;\naddc.u32 %r0, %r1, 0;", M, 1, 0), 0);
    assert_eq!(
        op32("add.cc.u32 %r4, %r1, %r2;\naddc.cc.u32 %r5, %r1, 0;\naddc.u32 %r0, 0, 0;", M, 1, 0),
        1
    );
    assert_eq!(op32("sub.cc.u32 %r4, %r1, %r2;\nsubc.u32 %r0, %r3, 0;", 0, 1, 7), 6);
    assert_eq!(op64("add.cc.u64 %d4, %d1, %d2;\naddc.u64 %d0, 0, 0;", u64::MAX, 1, 0), 1);
}

#[test]
fn integer_products() {
    assert_eq!(op32("mul.lo.s32 %r0, %r1, %r2;", 0x1_0001, 0x1_0001, 0), 0x0002_0001);
    assert_eq!(op32("mul.hi.u32 %r0, %r1, %r2;", M, M, 0), M - 1);
    assert_eq!(op32("mul.hi.s32 %r0, %r1, %r2;", M, M, 0), 0);
    assert_eq!(op32("mul.hi.s32 %r0, %r1, %r2;", M, 2, 0), M);
    assert_eq!(op32("mul.wide.s16 %r0, %h1, %h2;", 0xffff, 2, 0), -2i32 as u32);
    assert_eq!(op32("mul.wide.u16 %r0, %h1, %h2;", 0xffff, 0xffff, 0), 0xfffe_0001);
    assert_eq!(op16("mul.lo.u16 %h0, %h1, %h2;", 0x1234, 0x10, 0), 0x2340);
    assert_eq!(op16("mul.hi.s16 %h0, %h1, %h2;", 0xffff, 1, 0), 0xffff);
    assert_eq!(op64("mul.wide.u32 %d0, %r1, %r2;", M.into(), M.into(), 0), 0xffff_fffe_0000_0001);
    assert_eq!(op64("mul.wide.s32 %d0, %r1, %r2;", M.into(), 3, 0), -3i64 as u64);
    assert_eq!(op64("mul.lo.s64 %d0, %d1, %d2;", u64::MAX, 5, 0), -5i64 as u64);
    assert_eq!(op64("mul.hi.u64 %d0, %d1, %d2;", u64::MAX, u64::MAX, 0), u64::MAX - 1);
    assert_eq!(op64("mul.hi.s64 %d0, %d1, %d2;", u64::MAX, 5, 0), u64::MAX);
    assert_eq!(op32("mad.lo.s32 %r0, %r1, %r2, %r3;", 7, 6, M,), 41);
    assert_eq!(op32("mad.hi.u32 %r0, %r1, %r2, %r3;", M, M, 1), M);
    assert_eq!(op64("mad.lo.u64 %d0, %d1, %d2, %d3;", 1 << 63, 2, 9), 9);
    assert_eq!(
        op64("mad.wide.u32 %d0, %r1, %r2, %d3;", M.into(), M.into(), u64::MAX),
        0xffff_fffe_0000_0000
    );
    assert_eq!(op64("mad.wide.s32 %d0, %r1, %r2, %d3;", M.into(), 4, 10), 6);
}

#[test]
fn integer_division() {
    assert_eq!(op32("div.s32 %r0, %r1, %r2;", -7i32 as u32, 2, 0), -3i32 as u32);
    assert_eq!(op32("rem.s32 %r0, %r1, %r2;", -7i32 as u32, 2, 0), -1i32 as u32);
    assert_eq!(op32("div.u32 %r0, %r1, %r2;", M, 2, 0), 0x7fff_ffff);
    assert_eq!(op32("rem.u32 %r0, %r1, %r2;", M, 10, 0), 5);
    assert_eq!(op32("div.s32 %r0, %r1, %r2;", i32::MIN as u32, M, 0), i32::MIN as u32);
    assert_eq!(op16("div.s16 %h0, %h1, %h2;", -9i16 as u16 as u32, 4, 0), 0xfffe);
    assert_eq!(op16("rem.u16 %h0, %h1, %h2;", 0xffff, 16, 0), 15);
    assert_eq!(op64("div.u64 %d0, %d1, %d2;", u64::MAX, 3, 0), 0x5555_5555_5555_5555);
    assert_eq!(op64("rem.s64 %d0, %d1, %d2;", -7i64 as u64, 4, 0), -3i64 as u64);
}

#[test]
fn integer_sign_min_and_max() {
    assert_eq!(op32("abs.s32 %r0, %r1;", -5i32 as u32, 0, 0), 5);
    assert_eq!(op32("abs.s32 %r0, %r1;", i32::MIN as u32, 0, 0), i32::MIN as u32);
    assert_eq!(op32("neg.s32 %r0, %r1;", 5, 0, 0), -5i32 as u32);
    assert_eq!(op16("neg.s16 %h0, %h1;", 1, 0, 0), 0xffff);
    assert_eq!(op64("abs.s64 %d0, %d1;", -5i64 as u64, 0, 0), 5);
    assert_eq!(op32("min.s32 %r0, %r1, %r2;", M, 1, 0), M);
    assert_eq!(op32("min.u32 %r0, %r1, %r2;", M, 1, 0), 1);
    assert_eq!(op32("max.s32 %r0, %r1, %r2;", M, 1, 0), 1);
    assert_eq!(op32("max.u32 %r0, %r1, %r2;", M, 1, 0), M);
    assert_eq!(op16("max.s16 %h0, %h1, %h2;", 0xffff, 1, 0), 1);
    assert_eq!(op16("max.u16 %h0, %h1, %h2;", 0xffff, 1, 0), 0xffff);
    assert_eq!(op64("min.s64 %d0, %d1, %d2;", u64::MAX, 1, 0), u64::MAX);
    assert_eq!(op64("max.u64 %d0, %d1, %d2;", u64::MAX, 1, 0), u64::MAX);
}

#[test]
fn logic_and_shifts() {
    assert_eq!(op32("and.b32 %r0, %r1, %r2;", 0xff00, 0x0ff0, 0), 0x0f00);
    assert_eq!(op32("or.b32 %r0, %r1, %r2;", 0xff00, 0x0ff0, 0), 0xfff0);
    assert_eq!(op32("xor.b32 %r0, %r1, %r2;", 0xff00, 0x0ff0, 0), 0xf0f0);
    assert_eq!(op32("not.b32 %r0, %r1;", 0xff, 0, 0), 0xffff_ff00);
    assert_eq!(op16("not.b16 %h0, %h1;", 0xff, 0, 0), 0xff00);
    assert_eq!(op16("and.b16 %h0, %h1, 7;", 0xfd, 0, 0), 5);
    assert_eq!(op64("not.b64 %d0, %d1;", 1, 0, 0), !1);
    assert_eq!(op64("xor.b64 %d0, %d1, %d2;", 5, 3, 0), 6);
    assert!(opp("and.pred %p0, %p1, %p2;", 1, 1, 0));
    assert!(!opp("and.pred %p0, %p1, %p2;", 1, 0, 0));
    assert!(opp("or.pred %p0, %p1, %p2;", 1, 0, 0));
    assert!(opp("xor.pred %p0, %p1, %p2;", 1, 0, 0));
    assert!(opp("not.pred %p0, %p1;", 0, 0, 0));
    assert_eq!(op32("shl.b32 %r0, %r1, %r2;", 1, 31, 0), 0x8000_0000);
    assert_eq!(op32("shl.b32 %r0, %r1, %r2;", 1, 32, 0), 0);
    assert_eq!(op32("shr.u32 %r0, %r1, %r2;", 0x8000_0000, 31, 0), 1);
    assert_eq!(op32("shr.s32 %r0, %r1, %r2;", 0x8000_0000, 99, 0), M);
    assert_eq!(op32("shr.b32 %r0, %r1, %r2;", 0x8000_0000, 32, 0), 0);
    assert_eq!(op16("shl.b16 %h0, %h1, 4;", 0xf00f, 0, 0), 0x00f0);
    assert_eq!(op16("shr.s16 %h0, %h1, 4;", 0x8000, 0, 0), 0xf800);
    assert_eq!(op16("shr.u16 %h0, %h1, 4;", 0x8000, 0, 0), 0x0800);
    assert_eq!(op64("shl.b64 %d0, %d1, %r2;", 1, 63, 0), 1 << 63);
    assert_eq!(op64("shr.u64 %d0, %d1, %r2;", u64::MAX, 64, 0), 0);
    assert_eq!(op64("shr.s64 %d0, %d1, %r2;", 1 << 63, 63, 0), u64::MAX);
    assert_eq!(op32("shf.l.wrap.b32 %r0, %r1, %r2, %r3;", 0x8000_0001, 7, 4), 0x78);
    assert_eq!(op32("shf.r.clamp.b32 %r0, %r1, %r2, %r3;", 1, 2, 40), 2);
}

#[test]
fn bit_counting_fields_and_permutation() {
    assert_eq!(op32("popc.b32 %r0, %r1;", 0xf0f0, 0, 0), 8);
    assert_eq!(op32("clz.b32 %r0, %r1;", 0, 0, 0), 32);
    assert_eq!(op32("clz.b32 %r0, %r1;", 1, 0, 0), 31);
    assert_eq!(op64("popc.b64 %r4, %d1;\ncvt.u64.u32 %d0, %r4;", u64::MAX, 0, 0), 64);
    assert_eq!(op64("clz.b64 %r4, %d1;\ncvt.u64.u32 %d0, %r4;", 1 << 40, 0, 0), 23);
    assert_eq!(op32("brev.b32 %r0, %r1;", 1, 0, 0), 0x8000_0000);
    assert_eq!(op64("brev.b64 %d0, %d1;", 1, 0, 0), 1 << 63);
    assert_eq!(op32("bfind.u32 %r0, %r1;", 0x0001_0000, 0, 0), 16);
    assert_eq!(op32("bfind.shiftamt.u32 %r0, %r1;", 0x0001_0000, 0, 0), 15);
    assert_eq!(op32("bfind.shiftamt.u32 %r0, %r1;", 0, 0, 0), M);
    assert_eq!(op32("bfind.s32 %r0, %r1;", -2i32 as u32, 0, 0), 0);
    assert_eq!(op32("fns.b32 %r0, %r1, %r2, %r3;", 0b1011_0100, 0, 3), 5);
    assert_eq!(op32("bfe.u32 %r0, %r1, %r2, %r3;", 0xabcd, 4, 8), 0xbc);
    assert_eq!(op32("bfe.s32 %r0, %r1, %r2, %r3;", 0xabcd, 4, 8), 0xffff_ffbc);
    assert_eq!(op64("bfe.u64 %d0, %d1, %r2, %r3;", 0xabcd_0000_0000, 32, 8), 0xcd);
    assert_eq!(op32("bfi.b32 %r0, %r1, %r2, 8, 8;", 0xab, M, 0), 0xffff_abff);
    assert_eq!(op64("bfi.b64 %d0, %d1, %d2, 60, 8;", 0xff, 0, 0), 0xf << 60);
    assert_eq!(op32("prmt.b32 %r0, %r1, %r2, 0x5140;", 0x3322_1100, 0x7766_5544, 0), 0x5511_4400);
    assert_eq!(op32("prmt.b32 %r0, %r1, %r2, 0x9999;", 0x0000_8000, 0, 0), M);
    assert_eq!(op32("lop3.b32 %r0, %r1, %r2, %r3, 0x96;", 0x5, 0x9, 0x11), 0x1d);
    assert_eq!(op32("lop3.b32 %r0, %r1, %r2, %r3, 0xe8;", 0b1100, 0b1010, 0b0110), 0b1110);
}

#[test]
fn f32_arithmetic_rounds_to_nearest_and_keeps_subnormals() {
    assert_eq!(opf("add.rn.f32 %f0, %f1, %f2;", f(1.0), f(2f32.powi(-24)), 0), f(1.0));
    assert_eq!(opf("add.rn.f32 %f0, %f1, %f2;", 0x3f80_0001, f(2f32.powi(-24)), 0), 0x3f80_0002);
    assert_eq!(opf("add.rn.f32 %f0, %f1, %f2;", 1, 1, 0), 2);
    assert_eq!(opf("sub.rn.f32 %f0, %f1, %f2;", INF, INF, 0), NAN);
    assert_eq!(opf("sub.rn.f32 %f0, %f1, %f2;", 0x0080_0000, 1, 0), 0x007f_ffff);
    assert_eq!(opf("mul.rn.f32 %f0, %f1, %f2;", 0x0080_0000, f(0.5), 0), 0x0040_0000);
    assert_eq!(opf("mul.rn.f32 %f0, %f1, %f2;", f(-0.0), f(5.0), 0), f(-0.0));
    assert_eq!(opf("mul.rn.f32 %f0, %f1, %f2;", 0x7f7f_ffff, f(2.0), 0), INF);
    assert_eq!(opf("div.rn.f32 %f0, %f1, %f2;", f(1.0), f(3.0), 0), 0x3eaa_aaab);
    assert_eq!(opf("div.rn.f32 %f0, %f1, %f2;", f(1.0), 0, 0), INF);
    assert_eq!(opf("div.rn.f32 %f0, %f1, %f2;", 0, 0, 0), NAN);
    assert_eq!(opf("sqrt.rn.f32 %f0, %f1;", f(2.0), 0, 0), 0x3fb5_04f3);
    assert_eq!(opf("sqrt.rn.f32 %f0, %f1;", f(-1.0), 0, 0), NAN);
    assert_eq!(opf("rcp.rn.f32 %f0, %f1;", f(3.0), 0, 0), 0x3eaa_aaab);
    let x = 0x3f80_0001;
    assert_eq!(opf("fma.rn.f32 %f0, %f1, %f2, %f3;", x, x, 0xbf80_0002), f(2f32.powi(-46)));
    assert_eq!(opf("mad.rn.f32 %f0, %f1, %f2, %f3;", x, x, 0xbf80_0002), f(2f32.powi(-46)));
    assert_eq!(opf("mul.rn.f32 %f4, %f1, %f2;\nadd.rn.f32 %f0, %f4, %f3;", x, x, 0xbf80_0002), 0);
    assert_eq!(opf("fma.rn.f32 %f0, %f1, %f2, %f3;", 0xffc0_0001, 0, 0), NAN);
    assert_eq!(opf("add.rn.sat.f32 %f0, %f1, %f2;", f(1.0), f(1.0), 0), f(1.0));
    assert_eq!(opf("fma.rn.sat.f32 %f0, %f1, %f2, %f3;", f(1.0), f(-1.0), 0), 0);
}

#[test]
fn f32_sign_min_and_max() {
    assert_eq!(opf("abs.f32 %f0, %f1;", f(-3.0), 0, 0), f(3.0));
    assert_eq!(opf("neg.f32 %f0, %f1;", 0, 0, 0), f(-0.0));
    assert_eq!(opf("min.f32 %f0, %f1, %f2;", 0, f(-0.0), 0), f(-0.0));
    assert_eq!(opf("max.f32 %f0, %f1, %f2;", f(-0.0), 0, 0), 0);
    assert_eq!(opf("max.f32 %f0, %f1, %f2;", 0x7fc0_0000, f(-3.0), 0), f(-3.0));
    assert_eq!(opf("max.f32 %f0, %f1, %f2;", 0x7fc0_0000, 0xffc0_0000, 0), NAN);
    assert_eq!(opf("max.NaN.f32 %f0, %f1, %f2;", 0x7fc0_0000, f(-3.0), 0), NAN);
    assert_eq!(opf("min.NaN.f32 %f0, %f1, %f2;", f(1.0), f(-3.0), 0), f(-3.0));
    assert_eq!(opf("copysign.f32 %f0, %f1, %f2;", f(-1.0), f(7.0), 0), f(-7.0));
}

#[test]
fn f64_arithmetic() {
    assert_eq!(opg("add.rn.f64 %g0, %g1, %g2;", 0.1, 0.2, 0.0), 0.1 + 0.2);
    assert_eq!(opg("sub.rn.f64 %g0, %g1, %g2;", 1.0, 1e-17, 0.0), 1.0);
    assert_eq!(opg("mul.rn.f64 %g0, %g1, %g2;", 5e-324, 1.0, 0.0), 5e-324);
    assert_eq!(opg("div.rn.f64 %g0, %g1, %g2;", 1.0, 3.0, 0.0), 1.0 / 3.0);
    assert_eq!(opg("sqrt.rn.f64 %g0, %g1;", 2.0, 0.0, 0.0), 2f64.sqrt());
    assert_eq!(opg("rcp.rn.f64 %g0, %g1;", 7.0, 0.0, 0.0), 1.0 / 7.0);
    assert_eq!(opg("fma.rn.f64 %g0, %g1, %g2, %g3;", 0.1, 10.0, -1.0), 0.1f64.mul_add(10.0, -1.0));
    assert_eq!(opg("neg.f64 %g0, %g1;", 2.0, 0.0, 0.0), -2.0);
    assert_eq!(opg("abs.f64 %g0, %g1;", -2.0, 0.0, 0.0), 2.0);
    assert_eq!(opg("max.f64 %g0, %g1, %g2;", f64::NAN, -2.0, 0.0), -2.0);
    assert_eq!(opg("min.f64 %g0, %g1, %g2;", 3.0, -2.0, 0.0), -2.0);
    assert_eq!(opg("mov.f64 %g0, 0d3FF8000000000000;", 0.0, 0.0, 0.0), 1.5);
}

#[test]
fn comparisons() {
    let nan = 0x7fc0_0000;
    for (cmp, lt, eq, gt, un) in [
        ("eq", false, true, false, false),
        ("ne", true, false, true, false),
        ("lt", true, false, false, false),
        ("le", true, true, false, false),
        ("gt", false, false, true, false),
        ("ge", false, true, true, false),
        ("equ", false, true, false, true),
        ("neu", true, false, true, true),
        ("ltu", true, false, false, true),
        ("leu", true, true, false, true),
        ("gtu", false, false, true, true),
        ("geu", false, true, true, true),
        ("num", true, true, true, false),
        ("nan", false, false, false, true),
    ] {
        let i = format!("setp.{cmp}.f32 %p0, %f1, %f2;");
        let got = [(f(1.0), f(2.0)), (f(0.0), f(-0.0)), (f(2.0), f(1.0)), (nan, f(1.0))]
            .map(|(a, b)| opp(&i, a, b, 0));
        assert_eq!(got, [lt, eq, gt, un], "{cmp}");
    }
    assert!(opp("setp.lt.s32 %p0, %r1, %r2;", M, 0, 0));
    assert!(!opp("setp.lt.u32 %p0, %r1, %r2;", M, 0, 0));
    for (cmp, want) in [("lo", false), ("ls", false), ("hi", true), ("hs", true)] {
        assert_eq!(opp(&format!("setp.{cmp}.u32 %p0, %r1, %r2;"), M, 0, 0), want, "{cmp}");
    }
    assert!(opp("setp.gt.s16 %p0, %h1, -1;", 0, 0, 0));
    assert!(opp("setp.eq.b16 %p0, %h1, %h2;", 7, 7, 0));
    assert!(opp("setp.ne.b32 %p0, %r1, %r2;", 7, 8, 0));
    assert_eq!(op64("setp.ge.s64 %p0, %d1, %d2;\nselp.b64 %d0, 1, 0, %p0;", 0, u64::MAX, 0), 1);
    assert_eq!(op64("setp.ge.u64 %p0, %d1, %d2;\nselp.b64 %d0, 1, 0, %p0;", 0, u64::MAX, 0), 0);
    assert_eq!(
        op64("setp.ltu.f64 %p0, %g1, %g2;\nselp.b64 %d0, 1, 0, %p0;", f64::NAN.to_bits(), 0, 0),
        1
    );
}

#[test]
fn comparisons_combined_with_predicates_and_in_pairs() {
    assert!(!opp("setp.eq.and.u32 %p0, %r1, %r2, %p3;", 1, 1, 0));
    assert!(opp("setp.eq.and.u32 %p0, %r1, %r2, !%p3;", 1, 1, 0));
    assert!(opp("setp.eq.or.u32 %p0, %r1, %r2, %p3;", 1, 2, 1));
    assert!(!opp("setp.eq.xor.u32 %p0, %r1, %r2, %p3;", 1, 1, 1));
    assert!(opp("setp.eq.u32 %p4|%p0, %r1, %r2;", 1, 2, 0));
    // The second predicate combines the complement of the comparison.
    assert!(!opp("setp.eq.and.u32 %p4|%p0, %r1, %r2, %p3;", 1, 2, 0));
    assert_eq!(op32("set.gt.s32.s32 %r0, %r1, %r2;", 2, 1, 0), M);
    assert_eq!(op32("set.lt.u32.f32 %r0, %f1, %f2;", f(2.0), f(1.0), 0), 0);
    assert_eq!(opf("set.eq.f32.u32 %f0, %r1, %r2;", 5, 5, 0), f(1.0));
}

#[test]
fn selection() {
    assert_eq!(op32("selp.b32 %r0, %r1, %r2, %p3;", 5, 6, 1), 5);
    assert_eq!(op32("selp.b32 %r0, %r1, %r2, %p3;", 5, 6, 0), 6);
    assert_eq!(op16("selp.b16 %h0, %h1, %h2, %p3;", 5, 6, 0), 6);
    assert_eq!(op32("slct.u32.s32 %r0, %r1, %r2, %r3;", 5, 6, M), 6);
    assert_eq!(op32("slct.u32.s32 %r0, %r1, %r2, %r3;", 5, 6, 0), 5);
    assert_eq!(op32("slct.b32.f32 %r0, %r1, %r2, %f3;", 5, 6, f(-0.0)), 5);
    assert_eq!(op32("slct.b32.f32 %r0, %r1, %r2, %f3;", 5, 6, 0x7fc0_0000), 6);
    assert!(opp("testp.subnormal.f32 %p0, %f1;", 1, 0, 0));
    assert!(!opp("testp.normal.f32 %p0, %f1;", 0, 0, 0));
    assert!(opp("testp.notanumber.f32 %p0, %f1;", 0xff80_0001, 0, 0));
    assert!(opp("testp.infinite.f32 %p0, %f1;", INF, 0, 0));
    assert!(opp("testp.finite.f32 %p0, %f1;", 0, 0, 0));
    assert!(!opp("testp.number.f32 %p0, %f1;", NAN, 0, 0));
}

#[test]
fn conversions_between_integers() {
    assert_eq!(op32("cvt.s32.s16 %r0, %r1;", 0x1_8000, 0, 0), 0xffff_8000);
    assert_eq!(op32("cvt.u32.u8 %r0, %r1;", 0x1ff, 0, 0), 0xff);
    assert_eq!(op32("cvt.s32.s8 %r0, %r1;", 0x180, 0, 0), 0xffff_ff80);
    assert_eq!(op16("cvt.u16.u32 %h0, %r1;", 0x12345, 0, 0), 0x2345);
    assert_eq!(op16("cvt.s16.s8 %h0, %r1;", 0xff, 0, 0), 0xffff);
    assert_eq!(op32("cvt.sat.u8.s32 %r0, %r1;", -1i32 as u32, 0, 0), 0);
    assert_eq!(op32("cvt.sat.s8.s32 %r0, %r1;", 300, 0, 0), 127);
    assert_eq!(op32("cvt.sat.u32.s32 %r0, %r1;", M, 0, 0), 0);
    assert_eq!(op64("cvt.s64.s32 %d0, %r1;", 0xffff_fff0, 0, 0), -16i64 as u64);
    assert_eq!(op64("cvt.u64.u32 %d0, %r1;", 0xffff_fff0, 0, 0), 0xffff_fff0);
    assert_eq!(op64("cvt.u32.u64 %r4, %d1;\ncvt.u64.u32 %d0, %r4;", 0x1_0000_0007, 0, 0), 7);
    assert_eq!(op64("cvt.u64.u16 %d0, %d1;", 0x1_ffff, 0, 0), 0xffff);
}

#[test]
fn conversions_from_floats_to_integers() {
    let cases: [(&str, f32, i32); 10] = [
        ("rni", 2.5, 2),
        ("rni", 3.5, 4),
        ("rni", -0.5, 0),
        ("rzi", -1.9, -1),
        ("rmi", -1.1, -2),
        ("rpi", -1.9, -1),
        ("rpi", 1.1, 2),
        ("rzi", 3e9, i32::MAX),
        ("rzi", -3e9, i32::MIN),
        ("rzi", f32::NAN, 0),
    ];
    for (r, x, want) in cases {
        assert_eq!(op32(&format!("cvt.{r}.s32.f32 %r0, %f1;"), f(x), 0, 0) as i32, want, "{r} {x}");
    }
    assert_eq!(op32("cvt.rzi.u32.f32 %r0, %f1;", f(-7.0), 0, 0), 0);
    assert_eq!(op32("cvt.rzi.u32.f32 %r0, %f1;", f(1e20), 0, 0), M);
    assert_eq!(op32("cvt.rzi.u32.f32 %r0, %f1;", NAN, 0, 0), 0);
    assert_eq!(op16("cvt.rni.u16.f32 %h0, %f1;", f(70000.0), 0, 0), 0xffff);
    assert_eq!(op32("cvt.rzi.u8.f32 %r0, %f1;", f(300.0), 0, 0), 255);
    assert_eq!(op32("cvt.rzi.s8.f32 %r0, %f1;", f(-300.0), 0, 0), 0xffff_ff80);
    assert_eq!(
        op64("cvt.rzi.s64.f32 %d0, %f1;", f(-3e18).into(), 0, 0),
        -2_999_999_884_200_771_584i64 as u64
    );
    assert_eq!(op64("cvt.rzi.s64.f32 %d0, %f1;", NAN.into(), 0, 0), 1 << 63);
    assert_eq!(op64("cvt.rni.s64.f64 %d0, %g1;", 2.5f64.to_bits(), 0, 0), 2);
    assert_eq!(op64("cvt.rzi.u64.f64 %d0, %g1;", 1e30f64.to_bits(), 0, 0), u64::MAX);
}

#[test]
fn conversions_from_integers_to_floats() {
    assert_eq!(opf("cvt.rn.f32.u32 %f0, %r1;", 16_777_217, 0, 0), f(16_777_216.0));
    assert_eq!(opf("cvt.rp.f32.u32 %f0, %r1;", 16_777_217, 0, 0), f(16_777_218.0));
    assert_eq!(opf("cvt.rz.f32.s32 %f0, %r1;", -16_777_217i32 as u32, 0, 0), f(-16_777_216.0));
    assert_eq!(opf("cvt.rm.f32.s32 %f0, %r1;", -16_777_217i32 as u32, 0, 0), f(-16_777_218.0));
    assert_eq!(opf("cvt.rn.f32.u16 %f0, %h1;", 0xffff, 0, 0), f(65535.0));
    assert_eq!(opf("cvt.rn.f32.s16 %f0, %h1;", 0xffff, 0, 0), f(-1.0));
    assert_eq!(opf("cvt.rn.f32.u8 %f0, %r1;", 0x1ff, 0, 0), f(255.0));
    assert_eq!(opg("cvt.rn.f64.s32 %g0, %r1;", f64::from_bits(0xffff_ffff), 0.0, 0.0), -1.0);
    assert_eq!(
        opg("cvt.rn.f64.u64 %g0, %d1;", f64::from_bits(u64::MAX), 0.0, 0.0),
        18_446_744_073_709_551_616.0
    );
    assert_eq!(
        opg("cvt.rz.f64.u64 %g0, %d1;", f64::from_bits(u64::MAX), 0.0, 0.0),
        18_446_744_073_709_549_568.0
    );
}

#[test]
fn conversions_between_floats() {
    assert_eq!(opf("cvt.rni.f32.f32 %f0, %f1;", f(2.5), 0, 0), f(2.0));
    assert_eq!(opf("cvt.rzi.f32.f32 %f0, %f1;", f(-2.7), 0, 0), f(-2.0));
    assert_eq!(opf("cvt.rmi.f32.f32 %f0, %f1;", f(-2.1), 0, 0), f(-3.0));
    assert_eq!(opf("cvt.rpi.f32.f32 %f0, %f1;", f(-0.5), 0, 0), f(-0.0));
    assert_eq!(opf("cvt.sat.f32.f32 %f0, %f1;", NAN, 0, 0), 0);
    assert_eq!(op16("cvt.rn.f16.f32 %h0, %f1;", f(65520.0), 0, 0), 0x7c00);
    assert_eq!(op16("cvt.rz.f16.f32 %h0, %f1;", f(65520.0), 0, 0), 0x7bff);
    assert_eq!(op16("cvt.rn.f16.f32 %h0, %f1;", f(2f32.powi(-25) * 1.5), 0, 0), 1);
    assert_eq!(op16("cvt.rn.f16.f32 %h0, %f1;", 0xffc0_0000, 0, 0), 0x7fff);
    assert_eq!(opf("cvt.f32.f16 %f0, %h1;", 1, 0, 0), f(2f32.powi(-24)));
    assert_eq!(opf("cvt.f32.f16 %f0, %h1;", 0xfc00, 0, 0), f(f32::NEG_INFINITY));
    assert_eq!(opf("cvt.f32.f16 %f0, %h1;", 0x7e00, 0, 0), NAN);
    assert_eq!(op16("cvt.rn.bf16.f32 %h0, %f1;", 0x3f80_8000, 0, 0), 0x3f80);
    assert_eq!(op16("cvt.rn.bf16.f32 %h0, %f1;", 0x3f81_8000, 0, 0), 0x3f82);
    assert_eq!(op16("cvt.rn.bf16.f32 %h0, %f1;", 0x0000_8001, 0, 0), 1);
    assert_eq!(op16("cvt.rn.bf16.f32 %h0, %f1;", NAN, 0, 0), 0x7fff);
    assert_eq!(opf("cvt.f32.bf16 %f0, %h1;", 0x4049, 0, 0), 0x4049_0000);
    assert_eq!(op32("cvt.rn.f16x2.f32 %r0, %f1, %f2;", f(1.0), f(2.0), 0), 0x3c00_4000);
    assert_eq!(op32("cvt.rn.bf16x2.f32 %r0, %f1, %f2;", f(1.0), f(2.0), 0), 0x3f80_4000);
    assert_eq!(
        opg("cvt.f64.f32 %g0, %f1;", f64::from_bits(f(0.1).into()), 0.0, 0.0),
        f64::from(0.1f32)
    );
    let to32 = |i: &str, x: f64| {
        op64(&format!("{i}\nmov.b32 %r4, %f4;\ncvt.u64.u32 %d0, %r4;"), x.to_bits(), 0, 0)
    };
    assert_eq!(to32("cvt.rn.f32.f64 %f4, %g1;", 1.1), 0x3f8c_cccd);
    assert_eq!(to32("cvt.rz.f32.f64 %f4, %g1;", 1.1), 0x3f8c_cccc);
    assert_eq!(to32("cvt.rn.f32.f64 %f4, %g1;", 1e-46), 0);
    assert_eq!(to32("cvt.rp.f32.f64 %f4, %g1;", 1e-46), 1);
    assert_eq!(to32("cvt.rn.f32.f64 %f4, %g1;", f64::NAN), NAN.into());
    assert_eq!(opg("cvt.rpi.f64.f64 %g0, %g1;", 1.2, 0.0, 0.0), 2.0);
}

#[test]
fn moves_pack_and_unpack() {
    assert_eq!(op32("mov.b32 %r0, {%h1, %h2};", 0x1111, 0x2222, 0), 0x2222_1111);
    assert_eq!(op32("mov.b32 %r0, {0, %h2};", 0x1111, 0x2222, 0), 0x2222_0000);
    assert_eq!(op16("mov.b32 {%h4, %h0}, %r1;", 0x2222_1111, 0, 0), 0x2222);
    assert_eq!(op16("mov.b32 {%h0, _}, %r1;", 0x2222_1111, 0, 0), 0x1111);
    assert_eq!(op64("mov.b64 %d0, {%r2, %r1};", 1, 2, 0), 0x1_0000_0002);
    assert_eq!(op64("mov.b64 {%r4, %r5}, %d1;\ncvt.u64.u32 %d0, %r5;", 0x7_0000_0001, 0, 0), 7);
    assert_eq!(
        op64(
            "mov.b64 {%h1, %h2, %h3, %h4}, %d1;\nmov.b64 %d0, {%h4, %h3, %h2, %h1};",
            0x0004_0003_0002_0001,
            0,
            0
        ),
        0x0001_0002_0003_0004
    );
    assert_eq!(op32("mov.b32 %r0, 0f3F800000;", 0, 0, 0), f(1.0));
    assert_eq!(opf("mov.f32 %f0, 0.1;", 0, 0, 0), f(0.1));
    assert!(opp("mov.pred %p0, %p1;", 1, 0, 0));
    assert_eq!(op16("mov.u16 %h0, -1;", 0, 0, 0), 0xffff);
}

#[test]
fn loads_and_stores_of_every_width() {
    let x = 0x8899_aabb_ccdd_eeffu64;
    let load = |i: &str| {
        rows(&format!("{i}\nst.global.u64 [%d31], %d0;"), &[[x, 0x1122_3344_5566_7788, 0, 0]])
            .unwrap()[0]
    };
    assert_eq!(load("ld.global.u8 %d0, [%d30+1];"), 0xee);
    assert_eq!(load("ld.global.s8 %d0, [%d30+1];"), 0xffff_ffff_ffff_ffee);
    assert_eq!(load("ld.global.s8 %h1, [%d30+1];\ncvt.u64.u16 %d0, %h1;"), 0xffee);
    assert_eq!(load("ld.global.u16 %d0, [%d30+2];"), 0xccdd);
    assert_eq!(load("ld.global.s16 %r1, [%d30+2];\ncvt.u64.u32 %d0, %r1;"), 0xffff_ccdd);
    assert_eq!(load("ld.global.s32 %d0, [%d30];"), 0xffff_ffff_ccdd_eeff);
    assert_eq!(load("ld.global.b64 %d0, [%d30+8];"), 0x1122_3344_5566_7788);
    assert_eq!(load("ld.u32 %r1, [%d30+4];\ncvt.u64.u32 %d0, %r1;"), 0x8899_aabb);
    for hint in [
        "nc",
        "ca",
        "cg",
        "cs",
        "lu",
        "cv",
        "L1::evict_last",
        "L1::no_allocate",
        "nc.L1::no_allocate.L2::128B",
    ] {
        assert_eq!(load(&format!("ld.global.{hint}.u64 %d0, [%d30];")), x, "{hint}");
    }
    for how in ["volatile.global", "relaxed.gpu.global", "acquire.sys.global", "weak.global"] {
        assert_eq!(load(&format!("ld.{how}.u64 %d0, [%d30];")), x, "{how}");
    }
    let v = "ld.global.v4.u32 {%r1, %r2, %r3, %r4}, [%d30];\nmov.b64 %d0, {%r1, %r4};";
    assert_eq!(load(v), 0x1122_3344_ccdd_eeff);
    assert_eq!(load("ld.global.v2.u64 {_, %d0}, [%d30];"), 0x1122_3344_5566_7788);
    let store = |i: &str| rows(i, &[[x, 7, 0, 0]]).unwrap()[0];
    assert_eq!(store("mov.u16 %h1, 0x1234;\nst.global.u8 [%d31+1], %h1;"), 0xdead_beef_dead_34ef);
    assert_eq!(
        store("mov.u32 %r1, 0x12345678;\nst.global.cs.u16 [%d31+2], %r1;"),
        0xdead_beef_5678_beef
    );
    assert_eq!(
        store("mov.u32 %r1, 1;\nmov.u32 %r2, 2;\nst.global.v2.u32 [%d31], {%r1, %r2};"),
        0x2_0000_0001
    );
    assert_eq!(store("mov.u64 %d1, 5;\nst.release.gpu.global.u64 [%d31], %d1;"), 5);
    assert_eq!(store("mov.f32 %f1, 0f3F800000;\nst.f32 [%d31+4], %f1;"), 0x3f80_0000_dead_beef);
    for m in ["wb", "cg", "wt"] {
        assert_eq!(store(&format!("mov.u64 %d1, 5;\nst.global.{m}.u64 [%d31], %d1;")), 5);
    }
}

#[test]
fn atomics_return_the_old_value() {
    let run = |i: &str, old: u64| {
        let body = format!(
            "mov.u64 %d1, {old};\nst.global.u64 [%d31], %d1;\nmov.u32 %r1, 5;\nmov.u32 %r2, 9;\nmov.u64 %d2, 5;\nmov.f32 %f1, 0f3FC00000;\nmov.f64 %g1, 0d3FF8000000000000;\n{i}"
        );
        rows(&body, &[[0; 4]]).unwrap()[0]
    };
    assert_eq!(run("atom.global.add.u32 %r0, [%d31], %r1;", 3), 8);
    assert_eq!(run("atom.add.u64 %d0, [%d31], %d2;\nst.global.u64 [%d31], %d0;", 3), 3);
    assert_eq!(run("atom.global.min.s32 %r0, [%d31], %r1;", 0xffff_ffff), 0xffff_ffff);
    assert_eq!(run("atom.global.min.u32 %r0, [%d31], %r1;", 0xffff_ffff), 5);
    assert_eq!(run("atom.global.max.s32 %r0, [%d31], %r1;", 0xffff_ffff), 5);
    assert_eq!(run("red.global.max.u64 [%d31], %d2;", 3), 5);
    assert_eq!(run("atom.global.and.b32 %r0, [%d31], %r1;", 6), 4);
    assert_eq!(run("red.relaxed.gpu.global.or.b32 [%d31], %r1;", 6), 7);
    assert_eq!(run("atom.global.xor.b32 _, [%d31], %r1;", 6), 3);
    assert_eq!(run("atom.global.sys.xor.b32 %r0, [%d31], %r1;", 6), 3, "as NVRTC writes it");
    assert_eq!(run("atom.sys.global.xor.b32 %r0, [%d31], %r1;", 3), 6, "as the manual does");
    assert_eq!(run("atom.acq_rel.gpu.global.exch.b32 %r0, [%d31], %r1;", 6), 5);
    assert_eq!(run("atom.global.cas.b32 %r0, [%d31], %r1, %r2;", 5), 9);
    assert_eq!(run("atom.global.cas.b32 %r0, [%d31], %r1, %r2;", 6), 6);
    assert_eq!(run("atom.global.inc.u32 %r0, [%d31], %r1;", 5), 0);
    assert_eq!(run("atom.global.inc.u32 %r0, [%d31], %r1;", 4), 5);
    assert_eq!(run("atom.global.dec.u32 %r0, [%d31], %r1;", 0), 5);
    assert_eq!(run("atom.global.add.f32 %f0, [%d31], %f1;", f(1.0).into()), f(2.5).into());
    assert_eq!(run("atom.global.add.f64 %g0, [%d31], %g1;", 1f64.to_bits()), 2.5f64.to_bits());
    // In global memory f32 addition flushes subnormals; in shared memory it does not.
    assert_eq!(run("mov.b32 %f1, 1;\nred.global.add.f32 [%d31], %f1;", 1), 0);
}

#[test]
fn all_lanes_add_to_one_place() {
    let body = "mov.u32 %r1, 1;\nsub.u64 %d31, %d31, %d29;\nmul.wide.u32 %d1, %r30, 8;\n";
    // %d31 was advanced by 8*tid; go back to the first row.
    let body = format!(
        "{body}ld.param.u64 %d2, [out];\nsetp.eq.u32 %p1, %r30, 0;\nmov.u64 %d3, 0;\n@%p1 st.global.u64 [%d2], %d3;\nbar.warp.sync -1;\nred.global.add.u32 [%d2], %r1;"
    );
    assert_eq!(rows(&body, &[[0; 4]; 32]).unwrap()[0], 32);
}
