"""``make bench`` in miniature: what it would say of optimizers that do too little or too much."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch

pytestmark = pytest.mark.cpu_only

BENCHES = Path(__file__).resolve().parent.parent / "benches"
TORCH = "torch.optim.AdamW(fused=True)"


def load(name: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHES))
    return importlib.import_module(name)


@pytest.fixture
def cpu(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    return load("cpu", monkeypatch)


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """``cpu_race``, which sets torch's threads for the whole process, with little to wait for."""
    found = load("cpu_race", monkeypatch)
    monkeypatch.setattr(found, "SCRUB_BYTES", 1 << 20)
    monkeypatch.setattr(found, "SETTLE", 0.0)
    monkeypatch.setattr(found.gc, "collect", lambda: 0)
    found.scrub.cache_clear()
    threads = torch.get_num_threads()
    yield found
    torch.set_num_threads(threads)
    found.scrub.cache_clear()


def settings(bench, *names, case="a", **options):
    made = {"threads": 1, "out": "", "rounds": 2, "elements": 25_600, **options}
    return bench.Settings(case=case, names=list(names), **made)


def enter(bench, monkeypatch, make, name="other", **options):
    """Adds a contender."""
    contender = bench.Contender(make, 1.0, **options)
    monkeypatch.setitem(bench.CONTENDERS, name, contender)


# The whole.


def test_the_report_has_every_sample_and_the_chart_is_drawn(tmp_path):
    command = [sys.executable, str(BENCHES / "cpu.py"), "--quick", "--only", "qadam"]
    command += ["--cases", "a", "--rounds", "2", "--elements", "25600", "--threads", "1"]
    done = subprocess.run(
        [*command, "--out", str(tmp_path)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr

    report = json.loads((tmp_path / "cpu.json").read_text())
    assert {"machine", "load", "commit", "versions", "backend", "not_installed"} <= set(report)
    assert {"torch", "qadam", "deepspeed", "bitsandbytes", "torchao"} <= set(report["versions"])
    (race,) = report["races"]
    assert (race["case"], race["threads"], race["elements"]) == ("a", 1, 25600)
    assert race["absent"] == race["broken"] == {}
    rows = race["optimizers"]
    assert list(rows) == [
        "stream copy, 28 B",
        "stream in place, 28 B",
        "stream in place, 16 B",
        TORCH,
        "qadam.AdamW",
        "qadam.AdamW8bit",
        "qadam.AdamW8bit, ratio",
    ]
    for name, row in rows.items():
        assert name in done.stdout
        assert row["rounds"] == [0, 1]
        for key in ("seconds", "cpu_seconds", "baseline_seconds"):
            assert len(row[key]) == 2
        for key in ("ratio", "ns_per_param", "gb_per_second"):
            assert row[key]["min"] <= row[key]["median"] <= row[key]["max"]
    assert rows[TORCH]["ratio"] == {"median": 1, "min": 1, "max": 1}
    assert rows["qadam.AdamW"]["state_bytes_per_param"] == 8
    assert rows["qadam.AdamW"]["step_bytes_per_param"] == 28
    assert rows["qadam.AdamW8bit"]["step_bytes_per_param"] == 16.0625
    assert rows["qadam.AdamW8bit, ratio"]["step_bytes_per_param"] == 16.09375
    assert (tmp_path / "cpu.png").read_bytes().startswith(b"\x89PNG")


def test_bytes_of_bfloat16(bench):
    found = bench.measure(settings(bench, "qadam.AdamW", "qadam.AdamW8bit", case="d"))
    assert {name: row["step_bytes_per_param"] for name, row in found["optimizers"].items()} == {
        "stream copy, 22 B": 22,
        "stream in place, 22 B": 22,
        "stream in place, 10 B": 10,
        TORCH: 14,  # its state is bfloat16
        "qadam.AdamW": 22,
        "qadam.AdamW8bit": 10.0625,
    }
    assert found["title"] == "one bf16 tensor of 0.0256 M"


def test_what_does_not_fit_goes_into_another_group_beside_torch(bench, monkeypatch):
    monkeypatch.setattr(bench, "MEMORY_SHARE", 0.0)
    found = bench.measure(settings(bench, "qadam.AdamW", "qadam.AdamW8bit"))
    assert found["groups"] == 3  # none fits beside the streams
    rows = found["optimizers"]
    assert [rows[name]["group"] for name in ("qadam.AdamW", "qadam.AdamW8bit")] == [1, 2]
    assert rows[TORCH]["group"] == 0
    assert rows["qadam.AdamW"]["baseline_seconds"] != rows[TORCH]["seconds"]


def test_groups_keep_the_back_ends_of_one_optimizer_together(bench):
    names = ["qadam.AdamW", "qadam.AdamW8bit", "qadam.AdamW8bit, avx2", "DeepSpeedCPUAdam"]
    assert bench.plan(names, 16, 20, 1000) == [names]
    assert bench.plan(names, 16, 20, 60) == [
        ["qadam.AdamW", "DeepSpeedCPUAdam"],
        ["qadam.AdamW8bit", "qadam.AdamW8bit, avx2"],
    ]


def test_a_contender_may_have_threads_of_its_own(bench, monkeypatch):
    counts = []

    class Noting(torch.optim.AdamW):
        def step(self, closure=None):
            counts.append(torch.get_num_threads())
            return super().step(closure)

    enter(bench, monkeypatch, lambda params, _: Noting(params, fused=True), threads=1)
    found = bench.measure(settings(bench, "other", threads=2))
    assert "other" in found["optimizers"]
    assert set(counts) == {1}
    assert torch.get_num_threads() == 2
    found = bench.measure(settings(bench, "other", threads=1))  # where it would be nothing special
    assert "other" not in found["optimizers"]


def test_another_process_takes_turns(bench):
    name = "qadam.AdamW8bit, avx2"
    found = bench.measure(settings(bench, name))
    if "AVX2" not in torch.backends.cpu.get_cpu_capability().replace("512", "2"):
        assert "avx2" in found["absent"][name]
        return
    row = found["optimizers"][name]
    assert row["backend"] == "avx2"
    assert row["moved"] > 0.98
    assert len(row["seconds"]) == 2


# Contenders that fail.


def test_a_peer_that_cannot_be_imported_is_absent(bench, cpu, monkeypatch):
    make = bench.from_package(["nowhere.optim"], "Adam")
    enter(bench, monkeypatch, make, package="nowhere")
    found = bench.measure(settings(bench, "other"))
    assert "No module named 'nowhere'" in found["absent"]["other"]
    assert found["broken"] == {}
    assert list(found["optimizers"])[-1] == TORCH
    cpu.summarize(found)
    assert "absent: other: " in cpu.table(found)

    cpu.explain_absence(found, {"nowhere": "a\nfailed to build it"})
    assert found["absent"]["other"].endswith("failed to build it")


def test_a_peer_that_takes_too_long_is_absent(bench, monkeypatch):
    def slow(params, dtype):
        time.sleep(10)

    enter(bench, monkeypatch, slow, package="slow")
    found = bench.measure(settings(bench, "other", limit=0.1))
    assert "took longer" in found["absent"]["other"]


class Faulty(torch.optim.AdamW):
    """Does what it should twice; from the third step on something else."""

    steps = 0

    def step(self, closure=None):
        self.steps += 1
        if self.steps <= 3:
            return super().step(closure)
        return self.fault(self.param_groups[0]["params"])


class Lazy(Faulty):
    def fault(self, params):
        with torch.no_grad():
            params[0].add_(1)  # but not the others


class Infinite(Faulty):
    def fault(self, params):
        with torch.no_grad():
            for param in params:
                param.fill_(float("inf"))


class Greedy(Faulty):
    def fault(self, params):
        torch.optim.AdamW.step(self)
        params[-1].grad[-1].neg_()


class Replacing(Faulty):
    def fault(self, params):
        torch.optim.AdamW.step(self)
        params[0].grad = params[0].grad.clone()


class Failing(Faulty):
    def fault(self, params):
        raise RuntimeError("no more")


@pytest.mark.parametrize(
    ("cls", "reason"),
    [
        (Lazy, "left 2 of 3 tensors where they were: [1, 2]"),
        (Infinite, "left 3 of 3 tensors"),
        (Greedy, "changed the gradients"),
        (Replacing, "replaced the gradients"),
        (Failing, "no more"),
    ],
)
def test_a_step_that_goes_wrong_is_caught_in_its_round(bench, monkeypatch, cls, reason):
    enter(bench, monkeypatch, lambda params, dtype: cls(params))
    shapes = [(300,), (7,), (40, 40)]
    arena = bench.Field(shapes, torch.float32)
    out = bench.Outcome()
    names = (TORCH, "other", "qadam.AdamW")
    bench.race([bench.build(n, arena, settings(bench), out) for n in names], 3, 60.0, 0, out)
    assert reason in out.broken["other"]
    assert set(out.records) == {TORCH, "qadam.AdamW"}


def test_an_optimizer_that_moves_nothing_is_caught_at_once(bench, cpu, monkeypatch):
    enter(bench, monkeypatch, lambda params, dtype: torch.optim.SGD(params, lr=0.0))
    found = bench.measure(settings(bench, "other"))
    assert "left 1 of 1 tensors where they were" in found["broken"]["other"]
    assert "other" not in found["optimizers"]
    cpu.summarize(found)
    assert "WRONG: other: " in cpu.table(found)


def test_an_optimizer_that_leaves_part_of_a_large_tensor_is_caught(bench, monkeypatch):
    class Half(torch.optim.Optimizer):
        def step(self, closure=None):
            for param in self.param_groups[0]["params"]:
                with torch.no_grad():
                    param[: 3 * len(param) // 4].sub_(1e-3)

    enter(bench, monkeypatch, lambda params, dtype: Half(params, {}))
    found = bench.measure(settings(bench, "other"))
    assert "moved only 0.75" in found["broken"]["other"]


def test_without_torch_there_are_no_ratios(bench, monkeypatch):
    monkeypatch.setitem(
        bench.CONTENDERS, TORCH, bench.Contender(lambda params, dtype: Failing(params), 1)
    )
    with pytest.raises(RuntimeError, match="no more"):
        bench.measure(settings(bench))


# Figures.


class Clock:
    """An entrant whose steps take so many seconds."""

    facts = {}  # noqa: RUF012 - nothing is added

    def __init__(self, bench, name, seconds, peer=False):
        self.name, self.peer = name, peer
        self._samples = iter([bench.Sample(s, 2 * s) for s in seconds])

    def turn(self):
        return next(self._samples)

    def finish(self):
        pass

    def close(self):
        pass


def test_a_slow_peer_stops_early_and_keeps_its_rounds(bench):
    entrants = [
        Clock(bench, TORCH, [1.0, 2, 4, 8, 16, 32]),
        Clock(bench, "slow", [10.0, 10, 10], peer=True),
        Clock(bench, "fast", [1.0, 1, 1, 1, 1, 1], peer=True),
        Clock(bench, "ours", [100.0, 100, 100, 100, 100, 100]),
    ]
    out = bench.Outcome()
    bench.race(entrants, 6, 5.5, 0, out)
    records = out.records
    assert records["slow"].rounds == [0, 1, 2]  # three, whatever they cost
    assert records["slow"].baseline_seconds == [1, 2, 4]
    assert len(records["fast"].rounds) == 6
    assert len(records["ours"].rounds) == 6


def test_ratios_are_taken_round_by_round(cpu):
    def row(rounds, seconds, base):
        return {
            "rounds": rounds,
            "seconds": seconds,
            "cpu_seconds": [2 * s for s in seconds],
            "baseline_seconds": base,
            "step_bytes_per_param": 16,
        }

    avx2, avx512 = cpu.PAIRS["AVX2 by AVX-512"]
    race = {
        "case": "a",
        "elements": 10**9,
        "threads": 2,
        "optimizers": {
            avx2: row([0, 1, 2], [2.0, 9.0, 8.0], [1.0, 3.0, 2.0]),
            avx512: row([0, 2], [1.0, 8.0], [1.0, 2.0]),
        },
    }
    cpu.summarize(race)
    found = race["optimizers"][avx2]
    assert found["ratio"] == {"median": 3, "min": 2, "max": 4}  # of medians it would be 4
    assert found["ns_per_param"] == {"median": 8, "min": 2, "max": 9}
    assert found["gb_per_second"] == {"median": 2, "min": 16 / 9, "max": 8}
    assert found["cores"] == 2
    assert race["pairs"] == {"AVX2 by AVX-512": {"median": 1.5, "min": 1, "max": 2}}


def test_a_busy_machine_is_named(cpu):
    row = {
        "rounds": [0, 1],
        "seconds": [1.0, 1.0],
        "cpu_seconds": [1.7, 1.7],
        "baseline_seconds": [1.0, 1.0],
        "step_bytes_per_param": 28,
    }
    race = {"case": "a", "threads": 2, "elements": 1, "optimizers": {"stream copy": row}}
    race |= {"absent": {}, "broken": {}}
    cpu.summarize(race)
    assert race["busy"]
    enough = row | {"cpu_seconds": [1.9, 1.9]}  # the other one may have waited for a thread
    longer = race | {"optimizers": {"stream copy": row, "stream in place": enough}}
    cpu.summarize(longer)
    assert not longer["busy"]
    nobody = race | {"optimizers": {}}
    cpu.summarize(nobody)
    assert not nobody["busy"]
    assert "other programs" in cpu.table(race)
    small = race | {"case": "c"}  # of which torch streams each with one thread
    cpu.summarize(small)
    assert not small["busy"]
    row["cpu_seconds"] = [1.9, 1.9]
    cpu.summarize(race)
    assert not race["busy"]


def test_the_peak_of_a_step_is_what_it_took_for_its_duration(bench):
    def step():
        torch.ones(4_000_000)

    step()  # malloc may keep it
    if sys.platform != "linux":
        assert bench.peak_of(step) is None
        return
    assert 15_900_000 < bench.peak_of(step) < 17_000_000  # whole pages
    assert bench.peak_of(lambda: None) < 1_000_000


def test_a_peer_that_does_not_install_says_why(monkeypatch):
    peers = load("install_peers", monkeypatch)
    error = peers.install("qadam-nowhere", ("--no-index",))
    assert "qadam-nowhere" in error
    assert len(error.splitlines()) <= peers.LAST_LINES


def test_quick_has_torch_alone(cpu):
    quick = cpu.chosen(None, quick=True)
    own = ["qadam.AdamW", "qadam.AdamW8bit", "qadam.AdamW8bit, ratio", "qadam.AdamW8bit, 1 thread"]
    assert quick == ["torch.optim.AdamW(foreach=True)", *own]
    assert cpu.chosen(["AdamW8bit, avx2", "DeepSpeed"], quick=False) == [
        "qadam.AdamW8bit, avx2",
        "DeepSpeedCPUAdam",
    ]
