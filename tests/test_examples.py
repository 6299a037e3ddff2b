"""The demo and its corpus: `make demo` in miniature, and no file on both sides."""

from __future__ import annotations

import importlib
import json
import math
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch

pytestmark = pytest.mark.cpu_only

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
TORCH = "torch.optim.AdamW(fused=True)"


@pytest.fixture
def stdlib_text(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    return importlib.import_module("stdlib_text")


@pytest.fixture
def demo(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    threads = torch.get_num_threads()
    yield importlib.import_module("demo")
    torch.set_num_threads(threads)  # the demo sets it, for this whole process


def test_the_quick_demo_compares_torchs_optimizer_with_ours(tmp_path: Path) -> None:
    # As a user starts it, in a process of its own.
    command = [sys.executable, str(EXAMPLES / "demo.py"), "--quick", "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr

    report = json.loads((tmp_path / "report.json").read_text())
    assert set(report) == {"machine", "config", "runs"}
    assert {"cpu", "cpu_count", "python", "torch", "qadam"} <= set(report["machine"])
    assert {"steps", "seed", "corpus_sha256"} <= set(report["config"])
    assert [run["optimizer"] for run in report["runs"]] == [
        TORCH,
        "qadam.AdamW",
        "qadam.AdamW8bit",
        "qadam.PagedAdamW8bit",
    ]
    for run in report["runs"]:
        assert run["optimizer"] in done.stdout
        assert run["step_ms"] > 0
        assert 1_000_000 <= run["parameters"] <= 3_000_000
        curve = run["val_loss"]
        assert all(math.isfinite(loss) for _, loss in curve)
        assert [step for step, _ in curve] == [0, 10, 20]
        # The same seed: the same model before the first step, to the last bit.
        assert curve[0] == report["runs"][0]["val_loss"][0]
        assert run["final_val_loss"] < 0.75 * curve[0][1], "nothing was learned"

    baseline, bits32, bits8, paged = report["runs"]
    assert paged["val_loss"] == bits8["val_loss"]
    assert paged["state_bytes_per_param"] == bits8["state_bytes_per_param"]
    for run in (bits32, bits8):
        assert run["final_val_loss"] == pytest.approx(baseline["final_val_loss"], rel=0.05)
    assert baseline["state_bytes_per_param"] == pytest.approx(8, abs=0.001)
    assert bits32["state_bytes_per_param"] == pytest.approx(8, abs=0.001)
    assert 2 < bits8["state_bytes_per_param"] <= 2.04

    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")


def test_a_diverging_run_fails_the_demo(
    demo: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spec = "torch.optim.AdamW(fused=True, lr=1e30)"
    assert demo.main(["--quick", "--out", str(tmp_path), "--optimizers", spec]) == 1
    assert f"diverged: {spec}: the training loss is nan at step 2" in capsys.readouterr().err
    assert not (tmp_path / "report.json").exists()


def test_an_unknown_optimizer_is_refused_before_training(
    demo: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--quick", "--out", str(tmp_path), "--optimizers", TORCH, "torch.optim.AdamV"]
    with pytest.raises(SystemExit, match="2"):
        demo.main(arguments)
    error = capsys.readouterr().err
    assert "'torch.optim.AdamV'" in error
    assert "step/s" not in error


def test_the_corpus_splits_by_file(stdlib_text: ModuleType, tmp_path: Path) -> None:
    # Every file is one line, its own name, so that the text says where it came from.
    for number in range(400):
        name = f"package{number % 7}/module{number}.py"
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    for skipped in ("site-packages/a.py", "package1/test/b.py", "_sysconfigdata_x.py"):
        (tmp_path / skipped).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / skipped).write_text("skipped")

    text = stdlib_text.load(5000, tmp_path)
    assert len(text.train) == 5000
    assert len(text.validation) == 500
    # The last name of each part may be cut.
    train, validation = (
        bytes(part.tolist()).decode().split("\0")[:-1] for part in (text.train, text.validation)
    )
    assert not set(train) & set(validation)
    assert "skipped" not in train + validation
    assert len({name.split("/")[0] for name in train}) == 7, "the order favours a folder"

    # A larger corpus continues a smaller one and moves no file across the split.
    larger = stdlib_text.load(6000, tmp_path)
    assert bytes(larger.train[:5000].tolist()) == bytes(text.train.tolist())
    assert larger.digest != text.digest
    assert stdlib_text.load(5000, tmp_path).digest == text.digest


def test_a_corpus_that_is_too_large_is_refused(stdlib_text: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text("pass\n")
    with pytest.raises(ValueError, match=r"holds \d+ bytes of sources for a part of 5000"):
        stdlib_text.load(5000, tmp_path)
