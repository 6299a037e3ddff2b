//! What lanes of a warp and warps of a block do together: shuffles, votes, divergence, barriers, calls.

mod common;

use common::{Bench, kernel, module, rows};

/// Runs `body` on 32 lanes; lane `i` leaves `%r0`.
fn lanes(body: &str) -> Vec<u32> {
    let body =
        format!("{body}\nmov.u64 %d1, 0;\ncvt.u64.u32 %d1, %r0;\nst.global.u64 [%d31], %d1;");
    let inputs: Vec<[u64; 4]> = (0..32).map(|i| [i, 100 + i, 0, 0]).collect();
    rows(&body, &inputs)
        .unwrap_or_else(|e| panic!("{e}\n{body}"))
        .iter()
        .map(|x| *x as u32)
        .collect()
}

#[test]
fn shuffles_in_every_mode() {
    let value = "add.u32 %r1, %r30, 100;\n";
    let all = |f: fn(u32) -> u32| (0..32).map(f).collect::<Vec<u32>>();
    assert_eq!(lanes(&format!("{value}shfl.sync.idx.b32 %r0, %r1, 5, 31, -1;")), [105; 32]);
    assert_eq!(
        lanes(&format!("{value}shfl.sync.bfly.b32 %r0, %r1, 3, 31, -1;")),
        all(|l| 100 + (l ^ 3))
    );
    // __shfl_up: c = 0; lanes below the offset keep their own.
    assert_eq!(
        lanes(&format!("{value}shfl.sync.up.b32 %r0, %r1, 4, 0, -1;")),
        all(|l| 100 + if l < 4 { l } else { l - 4 })
    );
    assert_eq!(
        lanes(&format!("{value}shfl.sync.down.b32 %r0, %r1, 4, 31, -1;")),
        all(|l| 100 + if l > 27 { l } else { l + 4 })
    );
    // Width 8: c = ((32 - 8) << 8) | 31.
    assert_eq!(
        lanes(&format!("{value}shfl.sync.down.b32 %r0, %r1, 2, 0x181f, -1;")),
        all(|l| 100 + if l % 8 > 5 { l } else { l + 2 })
    );
    assert_eq!(
        lanes(&format!("{value}shfl.sync.idx.b32 %r0, %r1, 9, 0x181f, -1;")),
        all(|l| 100 + l / 8 * 8 + 1)
    );
    assert_eq!(
        lanes(&format!("{value}shfl.sync.up.b32 %r0, %r1, 3, 0x1800, -1;")),
        all(|l| 100 + if l % 8 < 3 { l } else { l - 3 })
    );
    // The predicate says whether the source was in range.
    assert_eq!(
        lanes(&format!(
            "{value}shfl.sync.down.b32 _|%p1, %r1, 4, 31, -1;\nselp.u32 %r0, 1, 0, %p1;"
        )),
        all(|l| u32::from(l <= 27))
    );
}

#[test]
fn votes_and_reductions() {
    let odd = "and.b32 %r1, %r30, 1;\nsetp.eq.u32 %p1, %r1, 1;\n";
    assert_eq!(lanes(&format!("{odd}vote.sync.ballot.b32 %r0, %p1, -1;")), [0xaaaa_aaaa; 32]);
    assert_eq!(lanes(&format!("{odd}vote.sync.ballot.b32 %r0, !%p1, -1;")), [0x5555_5555; 32]);
    let pred = |v: &str| lanes(&format!("{odd}{v}\nselp.u32 %r0, 1, 0, %p2;"))[0];
    assert_eq!(pred("vote.sync.any.pred %p2, %p1, -1;"), 1);
    assert_eq!(pred("vote.sync.all.pred %p2, %p1, -1;"), 0);
    assert_eq!(pred("vote.sync.uni.pred %p2, %p1, -1;"), 0);
    assert_eq!(lanes("activemask.b32 %r0;"), [u32::MAX; 32]);
    assert_eq!(lanes("redux.sync.add.u32 %r0, %r30, -1;"), [496; 32]);
    assert_eq!(
        lanes("sub.s32 %r1, %r30, 16;\nredux.sync.min.s32 %r0, %r1, -1;"),
        [-16i32 as u32; 32]
    );
    assert_eq!(lanes("sub.s32 %r1, %r30, 16;\nredux.sync.max.u32 %r0, %r1, -1;"), [u32::MAX; 32]);
    assert_eq!(lanes("redux.sync.or.b32 %r0, %r30, -1;"), [31; 32]);
    let m = lanes("shr.u32 %r1, %r30, 3;\nmatch.any.sync.b32 %r0, %r1, -1;");
    assert_eq!((m[0], m[9], m[31]), (0xff, 0xff00, 0xff00_0000));
}

#[test]
fn special_registers() {
    assert_eq!(lanes("mov.u32 %r0, %laneid;"), (0..32).collect::<Vec<_>>());
    assert_eq!(
        lanes("mov.u32 %r0, %lanemask_lt;"),
        (0..32).map(|l| (1u32 << l) - 1).collect::<Vec<_>>()
    );
    assert_eq!(
        lanes("mov.u32 %r0, %lanemask_ge;"),
        (0..32).map(|l| u32::MAX << l).collect::<Vec<_>>()
    );
    assert_eq!(lanes("mov.u32 %r0, %ntid.x;"), [32; 32]);
    let text = module(
        75,
        ".visible .entry k(.param .u64 out) { .reg .u32 %r<20>; .reg .u64 %d<4>;
        mov.u32 %r0, %tid.x; mov.u32 %r1, %tid.y; mov.u32 %r2, %tid.z; mov.u32 %r3, %ctaid.x; mov.u32 %r4, %ctaid.y;
        mov.u32 %r5, %nctaid.x; mov.u32 %r6, %warpid; mov.u32 %r7, %ctaid.z;
        mad.lo.u32 %r8, %r2, 3, %r1; mad.lo.u32 %r8, %r8, 5, %r0; // 5 x 3 x 4 threads
        mad.lo.u32 %r9, %r7, 2, %r4; mad.lo.u32 %r9, %r9, %r5, %r3; mad.lo.u32 %r9, %r9, 60, %r8;
        ld.param.u64 %d0, [out]; mul.wide.u32 %d1, %r9, 4; add.u64 %d0, %d0, %d1;
        shr.u32 %r10, %r8, 5; sub.u32 %r10, %r10, %r6; add.u32 %r9, %r9, %r10; st.global.u32 [%d0], %r9; ret; }",
    );
    let mut b = Bench::new();
    let m = b.load(&text).unwrap();
    let n = 3 * 2 * 2 * 60;
    let out = b.empty(4 * n);
    b.launch(&m, "k", [3, 2, 2], [5, 3, 4], 0, &out.to_le_bytes())
        .unwrap_or_else(|e| panic!("{e}"));
    assert_eq!(b.read::<u32>(out, n as usize), (0..n as u32).collect::<Vec<_>>());
}

#[test]
fn divergent_lanes_come_together_again() {
    // Two branches, then a full shuffle: the lanes must have met.
    let body = "and.b32 %r1, %r30, 1;\nsetp.eq.u32 %p1, %r1, 1;\n@%p1 bra ODD;\nadd.u32 %r2, %r30, 1000;\nbra JOIN;\n\
                ODD:\nadd.u32 %r2, %r30, 2000;\nJOIN:\nshfl.sync.bfly.b32 %r0, %r2, 1, 31, -1;";
    assert_eq!(
        lanes(body),
        (0..32).map(|l: u32| if l & 1 == 0 { 2001 + l } else { 999 + l }).collect::<Vec<_>>()
    );
    // A loop of different length a lane; the exit lies below the body.
    let body = "mov.u32 %r0, 0;\nmov.u32 %r1, 0;\nbra TEST;\nOUT:\nbra.uni DONE;\nBODY:\nadd.u32 %r0, %r0, 3;\n\
                add.u32 %r1, %r1, 1;\nTEST:\nsetp.lt.u32 %p1, %r1, %r30;\n@%p1 bra BODY;\nbra OUT;\n\
                DONE:\nvote.sync.ballot.b32 %r2, %p1, -1;\nadd.u32 %r0, %r0, %r2;";
    assert_eq!(lanes(body), (0..32).map(|l| 3 * l).collect::<Vec<_>>());
    // Half-warps shuffle apart, each with its own mask, in different branches.
    let body = "setp.lt.u32 %p1, %r30, 16;\n@%p1 bra LOW;\nshfl.sync.bfly.b32 %r0, %r30, 1, 31, 0xffff0000;\nbra.uni JOIN;\n\
                LOW:\nshfl.sync.bfly.b32 %r0, %r30, 2, 31, 0x0000ffff;\nJOIN:\nbar.warp.sync 0xffffffff;";
    assert_eq!(
        lanes(body),
        (0..32).map(|l| if l < 16 { l ^ 2 } else { l ^ 1 }).collect::<Vec<_>>()
    );
    // The same instruction, two masks.
    let body = "setp.lt.u32 %p1, %r30, 16;\nselp.b32 %r1, 0x0000ffff, 0xffff0000, %p1;\nredux.sync.add.u32 %r0, %r30, %r1;";
    assert_eq!(lanes(body), (0..32).map(|l| if l < 16 { 120 } else { 376 }).collect::<Vec<_>>());
}

#[test]
fn guards_leave_other_lanes_alone() {
    let body = "mov.u32 %r0, 7;\nsetp.gt.u32 %p1, %r30, 15;\n@%p1 mov.u32 %r0, 8;\n@!%p1 add.u32 %r0, %r0, %r30;";
    assert_eq!(lanes(body), (0..32).map(|l| if l > 15 { 8 } else { 7 + l }).collect::<Vec<_>>());
    let text = kernel(
        "mov.u64 %d1, 1;\nsetp.gt.u32 %p1, %r30, 3;\n@%p1 exit;\nst.global.u64 [%d31], %d1;",
    );
    let mut b = Bench::new();
    let m = b.load(&text).unwrap();
    let (i, o) = (b.buffer(&[0u64; 32]), b.buffer(&[9u64; 8]));
    let params: Vec<u8> = [i, o].iter().flat_map(|p| p.to_le_bytes()).collect();
    b.launch(&m, "k", [1; 3], [8, 1, 1], 0, &params).unwrap();
    assert_eq!(b.read::<u64>(o, 8), [1, 1, 1, 1, 9, 9, 9, 9]);
}

#[test]
fn shared_memory_passes_values_between_warps() {
    let text = module(
        75,
        ".shared .align 4 .b8 tile[512];
.visible .entry k(.param .u64 out) { .reg .u32 %r<8>; .reg .u64 %d<8>;
        mov.u32 %r0, %tid.x; mul.wide.u32 %d0, %r0, 4; mov.u64 %d1, tile; add.u64 %d2, %d1, %d0;
        st.shared.u32 [%d2], %r0; barrier.sync.aligned 0;
        mov.u32 %r1, 127; sub.u32 %r1, %r1, %r0; mul.wide.u32 %d3, %r1, 4; add.u64 %d3, %d1, %d3;
        cvta.shared.u64 %d4, %d3; ld.u32 %r2, [%d4]; // through a generic address
        bar.sync 0; st.shared.u32 [%d2], %r2; bar.sync 1;
        ld.shared.u32 %r3, [%d2]; ld.param.u64 %d5, [out]; add.u64 %d5, %d5, %d0; st.global.u32 [%d5], %r3; ret; }",
    );
    let mut b = Bench::new();
    let m = b.load(&text).unwrap();
    let out = b.empty(512);
    b.launch(&m, "k", [2, 1, 1], [128, 1, 1], 0, &out.to_le_bytes())
        .unwrap_or_else(|e| panic!("{e}"));
    assert_eq!(b.read::<u32>(out, 128), (0..128).rev().collect::<Vec<_>>());
}

#[test]
fn device_functions_take_and_return_values() {
    let text = module(
        75,
        ".func (.param .b32 ret) twice(.param .b32 x);
.func (.param .b32 ret) quad(.param .b32 x) { .reg .b32 %r<3>; ld.param.u32 %r0, [x];
        { .param .b32 p; st.param.b32 [p+0], %r0; .param .b32 q; call.uni (q), twice, (p); ld.param.b32 %r1, [q+0]; }
        { .param .b32 p; st.param.b32 [p+0], %r1; .param .b32 q; call.uni (q), twice, (p); ld.param.b32 %r2, [q+0]; }
        st.param.b32 [ret+0], %r2; ret; }
.func (.param .b32 ret) twice(.param .b32 x) { .reg .b32 %r<3>; .reg .pred %p; ld.param.u32 %r0, [x];
        setp.eq.u32 %p, %r0, 3; @%p bra THREE; add.u32 %r1, %r0, %r0; st.param.b32 [ret+0], %r1; ret;
        THREE: mov.u32 %r1, 0; st.param.b32 [ret+0], %r1; ret; }
.visible .entry k(.param .u64 out) { .reg .b32 %r<3>; .reg .u64 %d<3>; mov.u32 %r0, %tid.x;
        .param .b32 a; .param .b32 b; st.param.b32 [a], %r0; call (b), quad, (a); ld.param.b32 %r1, [b];
        ld.param.u64 %d0, [out]; mul.wide.u32 %d1, %r0, 4; add.u64 %d0, %d0, %d1; st.global.u32 [%d0], %r1; ret; }",
    );
    let mut b = Bench::new();
    let m = b.load(&text).unwrap_or_else(|e| panic!("{e}"));
    let out = b.empty(32);
    b.launch(&m, "k", [1; 3], [8, 1, 1], 0, &out.to_le_bytes()).unwrap_or_else(|e| panic!("{e}"));
    assert_eq!(b.read::<u32>(out, 8), [0, 4, 8, 0, 16, 20, 24, 28]);
}

#[test]
fn local_memory_is_each_threads_own() {
    let text = module(
        75,
        ".visible .entry k(.param .u64 out) { .local .align 8 .b8 depot[64]; .reg .u32 %r<8>; .reg .u64 %d<8>;
        mov.u64 %d0, depot; cvta.local.u64 %d1, %d0; mov.u32 %r0, %tid.x; and.b32 %r1, %r0, 7;
        mul.wide.u32 %d2, %r1, 4; add.u64 %d3, %d0, %d2; st.local.u32 [%d3], %r0;
        add.u64 %d4, %d1, %d2; ld.u32 %r2, [%d4]; mul.wide.u32 %d5, %r0, 4; ld.param.u64 %d6, [out];
        add.u64 %d6, %d6, %d5; st.global.u32 [%d6], %r2; ret; }",
    );
    let mut b = Bench::new();
    let m = b.load(&text).unwrap();
    let out = b.empty(256);
    b.launch(&m, "k", [1; 3], [64, 1, 1], 0, &out.to_le_bytes()).unwrap_or_else(|e| panic!("{e}"));
    assert_eq!(b.read::<u32>(out, 64), (0..64).collect::<Vec<_>>());
}

#[test]
fn structures_by_value_and_computed_parameter_addresses() {
    let text = module(
        75,
        ".visible .entry k(.param .u64 out, .param .align 8 .b8 s[24]) { .reg .u32 %r<8>; .reg .u64 %d<8>;
        ld.param.u64 %d0, [out]; mov.u32 %r0, %tid.x; mul.wide.u32 %d1, %r0, 8; mov.b64 %d2, s; add.u64 %d2, %d2, %d1;
        ld.param.u64 %d3, [%d2]; ld.param.u32 %r1, [s+4]; add.u64 %d0, %d0, %d1; cvt.u64.u32 %d4, %r1;
        add.u64 %d3, %d3, %d4; st.global.u64 [%d0], %d3; ret; }",
    );
    let mut b = Bench::new();
    let m = b.load(&text).unwrap();
    let out = b.empty(24);
    let params: Vec<u8> = [out, 5 << 32, 20, 30].iter().flat_map(|p| p.to_le_bytes()).collect();
    b.launch(&m, "k", [1; 3], [3, 1, 1], 0, &params).unwrap_or_else(|e| panic!("{e}"));
    assert_eq!(b.read::<u64>(out, 3), [(5 << 32) + 5, 25, 35]);
}
