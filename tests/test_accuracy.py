"""``make accuracy`` and ``make training`` in miniature: the harness, not the figures."""

from __future__ import annotations

import dataclasses
import importlib
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch.nn import Parameter

pytestmark = pytest.mark.cpu_only

ROOT = Path(__file__).resolve().parent.parent
BENCHES = ROOT / "benches"
TORCH, DYNAMIC, RATIO = "torch, 32-bit", "qadam, dynamic", "qadam, ratio"


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch) -> Iterator[object]:
    """Modules of benches, which set torch's threads for the whole process."""
    threads = torch.get_num_threads()
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    monkeypatch.syspath_prepend(str(BENCHES))
    yield importlib.import_module
    torch.set_num_threads(threads)


@pytest.fixture
def accuracy(load) -> ModuleType:
    return load("accuracy")


def run(accuracy, tmp_path, *arguments):
    """The status and the report of a small race."""
    small = ["--elements", "512", "--steps", "30", "--seeds", "0", "--out", str(tmp_path)]
    status = accuracy.main([*small, *arguments])
    return status, json.loads((tmp_path / "report.json").read_text())


def enter(accuracy, monkeypatch, name, cls, package=None):
    """Puts an optimizer in the place of a contender."""
    contenders = importlib.import_module("accuracy_contenders")
    contender = contenders.Contender(lambda groups, hyper: cls(groups, **hyper), package)
    monkeypatch.setitem(accuracy.CONTENDERS, name, contender)


# The whole.


def test_the_report_has_every_row_and_contender_and_the_chart_is_drawn(tmp_path):
    # As a user starts it, in a process of its own.
    command = [
        sys.executable,
        str(BENCHES / "accuracy.py"),
        "--beta2",
        "0.95",
        "--elements",
        "2048",
    ]
    command += ["--steps", "10", "30", "--seeds", "0", "7", "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr

    report = json.loads((tmp_path / "report.json").read_text())
    assert {"machine", "load", "commit", "versions", "arguments", "settings"} <= set(report)
    rows = [result["row"] for result in report["results"]]
    assert rows[:5] == [
        "one scale a row",
        "five decades within a block",
        "2% of rows active",
        "Zipf rows",
        "constant drift plus noise",
    ]
    assert rows[: len(rows) // 2] == rows[len(rows) // 2 :]  # after 10 steps and after 30
    assert {result["steps"] for result in report["results"]} == {10, 30}
    contenders = {TORCH, DYNAMIC, RATIO, "bitsandbytes", "torchao", "FlashOptim, formulas"}
    for result in report["results"]:
        assert set(result["contenders"]) | set(report["absent"]) == contenders
        assert {TORCH, DYNAMIC, RATIO, "FlashOptim, formulas"} <= set(result["contenders"])
        for own in result["contenders"].values():
            assert len(own["error"]) == len(own["worst"]) == 2
        assert max(result["contenders"][TORCH]["error"]) < 1e-4
        assert min(result["contenders"][DYNAMIC]["error"]) > 1e-3
        for name in (*rows, *contenders):
            assert name in done.stdout
    assert report["bounds"] == []  # they are for 0.999
    assert (tmp_path / "accuracy.png").read_bytes().startswith(b"\x89PNG")


# The reference and the rows.


def test_the_reference_is_torchs_adam_in_float64(accuracy):
    gen = torch.Generator().manual_seed(0)
    reference = accuracy.Reference((2, 3, 8), (0.9, 0.999))
    params = [Parameter(torch.zeros(3, 8, dtype=torch.float64)) for _ in range(2)]
    groups = [{"params": [param]} for param in params]
    adam = torch.optim.Adam(groups, lr=1e-3, betas=(0.9, 0.999), eps=accuracy.EPS)
    moves = []
    for step in range(40):
        gradients = 10 ** (-8 * torch.rand(2, 3, 8, generator=gen))
        rates = torch.tensor([1e-3, 1e-3 / (1 + step)], dtype=torch.float64)
        before = reference.values.clone()
        reference.step(gradients, rates)
        moves.append((reference.values - before).abs())
        for number, param in enumerate(params):
            param.grad = gradients[number].double()
            adam.param_groups[number]["lr"] = rates[number].item()
        adam.step()
    torch.testing.assert_close(reference.values, torch.stack(params).data, rtol=1e-12, atol=1e-18)
    mean = torch.stack(moves).mean(-1).mean(0)
    torch.testing.assert_close(reference.mean_update(), mean, rtol=1e-9, atol=0)
    torch.testing.assert_close(reference.worst[0], torch.stack(moves).amax((0, -1))[0] / 1e-3)


def test_a_row_is_the_same_whatever_runs_beside_it(accuracy):
    for row in accuracy.ROWS:
        one, again, other = (row.draw(seed, 512, 30) for seed in (0, 0, 1))
        for step in range(1, 5):
            gradient = one(step)
            assert gradient.shape == (512,)
            assert gradient.dtype == torch.float32
            assert gradient.isfinite().all()
            assert torch.equal(gradient, again(step))
        assert not torch.equal(one(5), other(5)) or row.title == "2% of rows active"


def test_words_are_absent_or_there_as_a_whole(accuracy):
    row = next(row for row in accuracy.ROWS if row.title == "Zipf rows")
    draw = row.draw(0, 64 * 64, 100)
    counts = sum((draw(step) != 0).view(64, 64).float().mean(1) for step in range(1, 101))
    assert torch.equal(counts, counts.round())
    assert counts[:6].eq(100).all()
    assert counts[32:].mean() < 25


# FlashOptim's formulas.


def test_flash_formulas_keep_what_the_paper_says(load):
    contenders = load("accuracy_contenders")
    param = Parameter(torch.zeros(64))
    param.grad = torch.linspace(-1, 1, 64)
    optimizer = contenders.FlashFormulas([param], lr=1e-3, betas=(0.9, 0.999), eps=1e-8)
    optimizer.step()
    assert param.detach().abs().sub(1e-3).abs().max() < 1e-8  # no state was rounded as yet
    (m, m_scale), (v, v_scale) = optimizer.state[param]["m"], optimizer.state[param]["v"]
    assert (m.dtype, v.dtype, m_scale.dtype) == (torch.int8, torch.uint8, torch.float16)
    assert (m.shape, m_scale.shape) == ((2, 32), (2, 1))
    assert m[0, 0] == -127
    assert v[0, 0] == 255
    assert torch.equal(m_scale[:, 0], torch.tensor([0.1, 0.1], dtype=torch.float16))
    assert v_scale[0, 0].item() == pytest.approx(0.001**0.5, rel=1e-3)
    x = param.grad[40].item()  # in the second group, whose largest is 1
    assert m[1, 8] == round(127 * 2 * x / (1 + x))
    assert v[1, 8] == round(255 * x)


# Contenders that fail.


class Wild(torch.optim.Adam):
    """Moves one element too far, once."""

    def step(self, closure=None):
        super().step(closure)
        for group in self.param_groups:
            param = group["params"][0]
            if self.state[param]["step"] == 20:
                param.data[100] += 2 * group["lr"]


class Lost(torch.optim.Adam):
    """Ends in NaN."""

    def step(self, closure=None):
        super().step(closure)
        self.param_groups[0]["params"][0].data[3] = float("nan")


class Lazy(torch.optim.SGD):
    """Does nothing."""

    def __init__(self, groups, lr, betas, eps):
        super().__init__(groups, lr=0.0)

    def step(self, closure=None):
        pass


class Failing(torch.optim.Adam):
    def step(self, closure=None):
        raise RuntimeError("no more")


BOUNDED = ("--beta2", "0.999", "--only", "qadam", "--rows", "drift plus", "one scale")


def test_a_code_that_keeps_its_bounds_passes(accuracy, monkeypatch, tmp_path):
    enter(accuracy, monkeypatch, RATIO, torch.optim.Adam)
    status, report = run(accuracy, tmp_path, *BOUNDED)
    assert status == 0
    assert [bound["kept"] for bound in report["bounds"]] == [True, True]


@pytest.mark.parametrize("cls", [Wild, Lost, Lazy])
def test_a_code_that_misses_a_bound_is_caught(accuracy, monkeypatch, tmp_path, capsys, cls):
    enter(accuracy, monkeypatch, RATIO, cls)
    status, report = run(accuracy, tmp_path, *BOUNDED)
    assert status == 1
    assert not report["bounds"][0]["kept"]
    assert "WRONG one scale a row, 30 steps" in capsys.readouterr().out
    error = report["results"][0]["contenders"][RATIO]["error"]
    assert (error == [None]) == (cls is Lost)  # JSON has no NaN


def test_a_peer_that_fails_is_absent_and_our_own_is_not(accuracy, monkeypatch, tmp_path):
    enter(accuracy, monkeypatch, "other", Failing, package="other")
    status, report = run(accuracy, tmp_path, "--only", "other", "torch,")
    assert status == 0
    assert report["absent"] == {"other": "RuntimeError: no more"}
    assert set(report["results"][0]["contenders"]) == {TORCH}
    enter(accuracy, monkeypatch, RATIO, Failing)
    with pytest.raises(RuntimeError, match="no more"):
        run(accuracy, tmp_path, "--only", "ratio")


# Training.


@pytest.fixture
def training(load, monkeypatch) -> ModuleType:
    """With a word model that is small."""
    found, model = load("training"), load("word_model")
    config = model.WordConfig(vocabulary=300, context=4, width=8, hidden=16)
    settings = {"batch": 16, "evaluation_windows": 64, "corpus_bytes": 100_000}
    task = dataclasses.replace(
        found.TASKS["words"],
        build=lambda: model.WordModel(config),
        text=lambda size: model.load_words(size, config.vocabulary),
        context=config.context,
        train=dataclasses.replace(found.TASKS["words"].train, **settings),
    )
    monkeypatch.setitem(found.TASKS, "words", task)
    monkeypatch.setattr(found, "EVALUATE_EVERY", 10)
    found.text_of.cache_clear()
    yield found
    found.text_of.cache_clear()


def test_runs_of_a_seed_differ_by_their_optimizer_alone(training):
    runs = [
        training.train("words", name, seed, 25) for name in training.OPTIMIZERS for seed in (1, 2)
    ]
    again = training.train("words", DYNAMIC, 1, 25)
    by_name = {(run.optimizer, run.seed): run for run in runs}
    assert again.val_loss == by_name[DYNAMIC, 1].val_loss
    assert [step for step, _ in again.val_loss] == [10, 20, 25]
    assert again.state_bytes_per_param < 2.2  # the embedding and everything else
    assert by_name[TORCH, 1].state_bytes_per_param == 8
    for (_, seed), run in by_name.items():
        assert run.loss == pytest.approx(by_name[TORCH, seed].loss, rel=0.01)
    assert by_name[TORCH, 1].loss != by_name[TORCH, 2].loss

    rows = training.summarize(runs)
    assert [row["optimizer"] for row in rows] == [TORCH, DYNAMIC, RATIO]
    assert rows[0]["difference"] == [0, 0]
    spread = abs(by_name[TORCH, 1].loss - by_name[TORCH, 2].loss)
    for row in rows:
        assert row["spread_of_32_bit"] == spread
        assert row["within_spread"] == [abs(x) <= spread for x in row["difference"]]
        assert row["embedding_norm_ratio"] == pytest.approx([1, 1], rel=0.02)
    table = training.table("words", runs, rows)
    for run in runs:
        assert f"{run.loss:9.4f}" in table


def test_words_are_the_most_frequent_ones(load):
    model = load("word_model")
    text = model.load_words(100_000, 300)
    counts = torch.bincount(text.train, minlength=300)
    assert text.train.max() == 299
    assert counts[1:].diff().le(0).all()  # by frequency
    assert counts[0] > 0
    assert model.words(torch.tensor(list(b"if x_1: #2"), dtype=torch.uint8)) == [
        *("if", "x_1", ":", "#", "2"),
    ]
    with pytest.raises(ValueError, match=r"100000 bytes have \d+ words, not 999999"):
        model.load_words(100_000, 1_000_000)
