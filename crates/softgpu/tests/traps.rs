//! Every fault a kernel can commit, seen with its place.

mod common;

use common::{Bench, kernel, module};
use softgpu::fault::{Fault, FaultKind};

/// PTX line of a body's first line in [`kernel`].
const FIRST: u32 = 20;

/// Runs `body` on `threads` threads with a 64-byte input a thread and a 64-byte output, expecting a fault.
fn fault(body: &str, threads: u32) -> Fault {
    try_run(body, threads).expect_err(body)
}

fn try_run(body: &str, threads: u32) -> Result<(), Fault> {
    let mut b = Bench::new();
    let m = b.load(&kernel(body)).unwrap_or_else(|e| panic!("{e}\n{body}"));
    let (i, o) = (b.buffer(&vec![1u64; 8 * threads as usize]), b.empty(8 * u64::from(threads)));
    let params: Vec<u8> = [i, o].iter().flat_map(|p| p.to_le_bytes()).collect();
    b.launch(&m, "k", [1; 3], [threads, 1, 1], 0, &params).map(drop).map_err(|f| *f)
}

#[test]
fn out_of_bounds_names_address_and_thread() {
    let f =
        fault("setp.eq.u32 %p1, %r30, 5;\nmov.u64 %d1, 7;\n@%p1 st.global.u64 [%d31+64], %d1;", 8);
    assert_eq!(
        (f.kind, f.line, f.thread, f.block),
        (FaultKind::OutOfBounds, FIRST + 2, [5, 0, 0], [0; 3]),
        "{f}"
    );
    assert!(f.to_string().contains("behind the 64 bytes"), "{f}");
    assert_eq!(f.text, "st.global.u64");
    let f = fault("mov.u64 %d1, 0;\nld.global.u32 %r1, [%d1+8];", 1);
    assert_eq!((f.kind, f.addr), (FaultKind::OutOfBounds, Some(8)));
    // The last bytes of an allocation, one too many.
    let f = fault(
        "ld.global.v4.u32 {%r1,%r2,%r3,%r4}, [%d30+48];\nld.global.v4.u32 {%r1,%r2,%r3,%r4}, [%d30+64];",
        1,
    );
    assert_eq!((f.kind, f.line), (FaultKind::OutOfBounds, FIRST + 1));
    let f = fault("mov.u64 %d1, 1;\nred.global.add.u64 [%d31+8], %d1;", 1);
    assert_eq!(f.kind, FaultKind::OutOfBounds);
}

#[test]
fn misaligned_accesses_by_width() {
    for (access, bad) in [
        ("ld.global.u16 %r1, [%d30+1];", true),
        ("ld.global.u32 %r1, [%d30+2];", true),
        ("ld.global.u64 %d1, [%d30+4];", true),
        ("ld.global.v4.u32 {%r1,%r2,%r3,%r4}, [%d30+8];", true),
        ("ld.global.v2.u32 {%r1,%r2}, [%d30+8];", false),
        ("ld.global.u8 %r1, [%d30+3];", false),
    ] {
        match try_run(access, 1) {
            Err(f) => assert!(bad && f.kind == FaultKind::Misaligned && f.line == FIRST, "{f}"),
            Ok(()) => assert!(!bad, "{access}"),
        }
    }
    let f = fault("mov.u32 %r1, 0;\natom.global.add.u32 %r2, [%d30+2], %r1;", 1);
    assert_eq!(f.kind, FaultKind::Misaligned);
}

#[test]
fn uninitialised_reads_of_every_space() {
    let f = fault("ld.global.u64 %d1, [%d31];", 3);
    assert_eq!((f.kind, f.line, f.thread), (FaultKind::Uninitialised, FIRST, [0; 3]), "{f}");
    // Half written is not written.
    let f = fault("mov.u32 %r1, 1;\nst.global.u32 [%d31], %r1;\nld.global.u64 %d1, [%d31];", 1);
    assert_eq!((f.kind, f.line), (FaultKind::Uninitialised, FIRST + 2));
    let f = fault("add.u32 %r1, %r2, 1;", 1);
    assert_eq!((f.kind, f.line), (FaultKind::Uninitialised, FIRST));
    assert!(f.detail.contains("%r2"), "{f}");
    // Written by some lanes only.
    let f = fault("setp.lt.u32 %p1, %r30, 4;\n@%p1 mov.u32 %r2, 1;\nadd.u32 %r1, %r2, 1;", 8);
    assert_eq!((f.kind, f.thread), (FaultKind::Uninitialised, [4, 0, 0]));
    let f = fault("@%p3 mov.u32 %r2, 1;", 1);
    assert!(f.detail.contains("%p3"), "{f}");
    let f = fault(
        ".local .align 4 .b8 x[8];\nmov.u32 %r1, 1;\nst.local.u16 [x], %r1;\nld.local.u32 %r1, [x];",
        1,
    );
    assert_eq!((f.kind, f.line), (FaultKind::Uninitialised, FIRST + 3), "{f}");
    let f = fault(".shared .align 4 .b8 x[8];\nld.shared.u32 %r1, [x+4];", 1);
    assert_eq!((f.kind, f.addr), (FaultKind::Uninitialised, Some(4)), "{f}");
    let f = fault("atom.global.add.u32 %r1, [%d31], 1;", 1);
    assert_eq!(f.kind, FaultKind::Uninitialised);
}

#[test]
fn shared_memory_starts_anew_in_each_block() {
    let text = module(
        75,
        ".visible .entry k() { .shared .align 4 .b8 x[4]; .reg .u32 %r<4>; .reg .pred %p; mov.u32 %r0, %ctaid.x;
        setp.ne.u32 %p, %r0, 0; @%p bra SECOND; st.shared.u32 [x], %r0; ret; SECOND: ld.shared.u32 %r1, [x]; ret; }",
    );
    let mut b = Bench::new();
    let m = b.load(&text).unwrap();
    let f = b.launch(&m, "k", [2, 1, 1], [1; 3], 0, &[]).unwrap_err();
    assert_eq!((f.kind, f.block), (FaultKind::Uninitialised, [1, 0, 0]), "{f}");
}

#[test]
fn bounds_of_shared_local_and_parameters() {
    let f = fault(".shared .align 4 .b8 x[8];\nmov.u32 %r1, 1;\nst.shared.u32 [x+8], %r1;", 1);
    assert_eq!((f.kind, f.addr), (FaultKind::OutOfBounds, Some(8)), "{f}");
    let f = fault(".local .align 4 .b8 x[8];\nmov.u32 %r1, 1;\nst.local.u32 [x+8], %r1;", 1);
    assert_eq!((f.kind, f.addr), (FaultKind::OutOfBounds, Some(8)), "{f}");
    let f = fault("ld.param.u64 %d1, [out+8];", 1);
    assert_eq!((f.kind, f.addr), (FaultKind::OutOfBounds, Some(16)), "{f}");
}

#[test]
fn constant_memory_is_read_only_and_its_own_space() {
    let run = |access: &str| {
        let text = module(
            75,
            &format!(
                ".const .align 4 .u32 c = 5;\n.global .align 4 .u32 g = 6;\n.visible .entry k() {{ .reg .u32 %r<4>; .reg .u64 %d<4>;
            mov.u32 %r0, 1; mov.u64 %d0, c; mov.u64 %d1, g; cvta.const.u64 %d2, %d0; {access} ret; }}"
            ),
        );
        let mut b = Bench::new();
        let m = b.load(&text).unwrap_or_else(|e| panic!("{e}"));
        b.launch(&m, "k", [1; 3], [1; 3], 0, &[]).map_err(|f| f.kind).map(drop)
    };
    assert_eq!(run("ld.const.u32 %r1, [c];"), Ok(()));
    assert_eq!(run("ld.u32 %r1, [%d2];"), Ok(()));
    assert_eq!(run("ld.global.u32 %r1, [g];"), Ok(()));
    assert_eq!(run("st.u32 [%d2], %r0;"), Err(FaultKind::ReadOnly));
    assert_eq!(run("ld.const.u32 %r1, [%d1];"), Err(FaultKind::OutOfBounds));
    assert_eq!(run("ld.global.u32 %r1, [%d0];"), Err(FaultKind::OutOfBounds));
}

#[test]
fn shuffles_that_name_absent_lanes() {
    let half = "setp.lt.u32 %p1, %r30, 16;\n";
    // The others go past and end.
    let f = fault(
        &format!("{half}@!%p1 bra OUT;\nshfl.sync.bfly.b32 %r1, %r30, 1, 31, -1;\nOUT:\n"),
        32,
    );
    assert_eq!((f.kind, f.line), (FaultKind::Divergent, FIRST + 2), "{f}");
    // The others wait elsewhere.
    let f = fault(
        &format!(
            "{half}@!%p1 bra OUT;\nshfl.sync.bfly.b32 %r1, %r30, 1, 31, -1;\nOUT:\nvote.sync.any.pred %p2, %p1, -1;"
        ),
        32,
    );
    assert_eq!(f.kind, FaultKind::Divergent, "{f}");
    assert!(f.detail.contains("names lane"), "{f}");
    // A short last warp.
    let f = fault("shfl.sync.bfly.b32 %r1, %r30, 1, 31, -1;", 40);
    assert_eq!((f.kind, f.thread), (FaultKind::Divergent, [32, 0, 0]), "{f}");
    assert!(f.detail.contains("lane 8"), "{f}");
    // A caller its own mask leaves out.
    let f = fault("shfl.sync.bfly.b32 %r1, %r30, 1, 31, 1;", 2);
    assert!(f.detail.contains("does not name the calling lane"), "{f}");
    // Lanes that exited before.
    let f = fault(&format!("{half}@%p1 exit;\nbar.warp.sync -1;"), 32);
    assert!(f.detail.contains("has ended"), "{f}");
    // Masks that disagree.
    let f = fault(
        "setp.eq.u32 %p1, %r30, 0;\nselp.b32 %r1, 3, 2, %p1;\nvote.sync.any.pred %p2, %p1, %r1;",
        2,
    );
    assert_eq!(f.kind, FaultKind::Divergent, "{f}");
}

#[test]
fn a_value_shuffled_from_outside_the_mask_may_not_be_used() {
    let shuffle = "shfl.sync.down.b32 %r1, %r30, 4, 31, 0xff;\n";
    assert!(try_run(shuffle, 8).is_ok(), "unused, it harms nobody");
    let f = fault(&format!("{shuffle}add.u32 %r2, %r1, 1;"), 8);
    assert_eq!((f.kind, f.thread), (FaultKind::Uninitialised, [4, 0, 0]), "{f}");
}

#[test]
fn barriers_not_all_threads_reach() {
    // Part of a warp.
    let f = fault("setp.lt.u32 %p1, %r30, 4;\n@%p1 bar.sync 0;", 8);
    assert_eq!((f.kind, f.line), (FaultKind::Divergent, FIRST + 1), "{f}");
    // A warp that left.
    let f = fault("setp.gt.u32 %p1, %r30, 31;\n@%p1 exit;\nbar.sync 0;", 64);
    assert_eq!((f.kind, f.thread), (FaultKind::Divergent, [0; 3]), "{f}");
    assert!(f.detail.contains("thread 32"), "{f}");
    // Two instructions within a warp.
    let f = fault(
        "setp.lt.u32 %p1, %r30, 4;\n@%p1 bra A;\nbar.sync 0;\nbra B;\nA:\nbar.sync 0;\nB:\n",
        8,
    );
    assert_eq!(f.kind, FaultKind::Divergent, "{f}");
    // Two barriers.
    let f = fault(
        "setp.gt.u32 %p1, %r30, 31;\n@%p1 bra A;\nbar.sync 0;\nbra B;\nA:\nbar.sync 1;\nB:\n",
        64,
    );
    assert!(f.detail.contains("waits at"), "{f}");
    // Whole warps may use different instructions of one barrier.
    assert!(
        try_run(
            "setp.gt.u32 %p1, %r30, 31;\n@%p1 bra A;\nbar.sync 0;\nbra B;\nA:\nbar.sync 0;\nB:\n",
            64
        )
        .is_ok()
    );
    // The unaligned form allows it within a warp.
    let un = "setp.lt.u32 %p1, %r30, 4;\n@%p1 bra A;\nbarrier.sync 0;\nbra B;\nA:\nbarrier.sync 0;\nB:\n";
    assert!(try_run(un, 8).is_ok());
}

#[test]
fn shared_memory_races() {
    let shared = ".shared .align 4 .b8 x[256];\nmul.wide.u32 %d1, %r30, 4;\nmov.u64 %d2, x;\nadd.u64 %d1, %d1, %d2;\n";
    // A neighbour's value without a barrier.
    let f = fault(
        &format!(
            "{shared}st.shared.u32 [%d1], %r30;\nsetp.gt.u32 %p1, %r30, 0;\n@%p1 ld.shared.u32 %r1, [%d1+-4];"
        ),
        8,
    );
    assert_eq!((f.kind, f.thread, f.line), (FaultKind::SharedRace, [1, 0, 0], FIRST + 6), "{f}");
    assert!(f.detail.contains("thread 0"), "{f}");
    // All write one place, different values.
    let f = fault(&format!("{shared}st.shared.u32 [x], %r30;"), 8);
    assert_eq!(f.kind, FaultKind::SharedRace, "{f}");
    // The same value is allowed; from another warp it is not.
    assert!(try_run(&format!("{shared}mov.u32 %r1, 5;\nst.shared.u32 [x], %r1;"), 32).is_ok());
    assert!(try_run(&format!("{shared}mov.u32 %r1, 5;\nst.shared.u32 [x], %r1;"), 64).is_err());
    // Read, then overwritten before a barrier.
    let f = fault(
        &format!(
            "{shared}st.shared.u32 [%d1], %r30;\nbar.sync 0;\nld.shared.u32 %r1, [x];\nst.shared.u32 [%d1], %r1;"
        ),
        64,
    );
    assert_eq!((f.kind, f.line), (FaultKind::SharedRace, FIRST + 7), "{f}");
    // A shuffle orders nothing, a warp barrier does.
    let pass = |sync: &str| {
        try_run(
            &format!(
                "{shared}st.shared.u32 [%d1], %r30;\n{sync}\nxor.b32 %r2, %r30, 1;\nmul.wide.u32 %d3, %r2, 4;\nadd.u64 %d3, %d3, %d2;\nld.shared.u32 %r1, [%d3];"
            ),
            32,
        )
    };
    assert_eq!(
        pass("shfl.sync.bfly.b32 %r3, %r30, 1, 31, -1;").unwrap_err().kind,
        FaultKind::SharedRace
    );
    assert!(pass("bar.warp.sync -1;").is_ok());
    // Atomics do not race with each other.
    let zero =
        "setp.eq.u32 %p1, %r30, 0;\nmov.u32 %r1, 0;\n@%p1 st.shared.u32 [x], %r1;\nbar.sync 0;\n";
    assert!(try_run(&format!("{shared}{zero}red.shared.add.u32 [x], %r30;"), 64).is_ok());
    let f = fault(
        &format!("{shared}{zero}red.shared.add.u32 [x], %r30;\n@%p1 ld.shared.u32 %r2, [x];"),
        64,
    );
    assert_eq!(f.kind, FaultKind::SharedRace, "{f}");
}

#[test]
fn integer_division_by_zero_traps_only_running_lanes() {
    for op in ["div.s32 %r1, 7, %r30;", "rem.u32 %r1, 7, %r30;"] {
        let f = fault(op, 4);
        assert_eq!((f.kind, f.thread), (FaultKind::DivideByZero, [0; 3]), "{f}");
    }
    assert!(try_run("setp.ne.u32 %p1, %r30, 0;\n@%p1 div.s32 %r1, 7, %r30;", 4).is_ok());
    let f = fault("cvt.u64.u32 %d1, %r30;\ndiv.s64 %d2, %d1, %d1;", 4);
    assert_eq!(f.kind, FaultKind::DivideByZero);
}

#[test]
fn trap_and_endless_loops_end_the_launch() {
    let f = fault("setp.eq.u32 %p1, %r30, 2;\n@%p1 trap;", 4);
    assert_eq!((f.kind, f.thread), (FaultKind::Trap, [2, 0, 0]));
    let f = fault("L:\nbra L;", 4);
    assert_eq!(f.kind, FaultKind::Timeout);
}

#[test]
fn a_freed_buffer_is_named() {
    let mut b = Bench::new();
    let m = b.load(&kernel("ld.global.u64 %d1, [%d30];")).unwrap();
    let (i, o) = (b.buffer(&[1u64; 8]), b.empty(64));
    b.mem.free(i, &[softgpu::memory::Kind::Device]).unwrap();
    let params: Vec<u8> = [i, o].iter().flat_map(|p| p.to_le_bytes()).collect();
    let f = b.launch(&m, "k", [1; 3], [1; 3], 0, &params).unwrap_err();
    assert!(f.detail.contains("into a freed allocation"), "{f}");
}
