"""The demo and its corpus: `make demo` in miniature, and no file on both sides."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
TORCH = "torch.optim.AdamW(fused=True)"


def run_demo(out: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """The demo as a user starts it, in a process of its own."""
    command = [sys.executable, str(EXAMPLES / "demo.py"), "--quick", "--out", str(out)]
    return subprocess.run([*command, *arguments], capture_output=True, text=True, check=False)


def test_the_quick_demo_compares_three_optimizers(tmp_path: Path) -> None:
    done = run_demo(tmp_path)
    assert done.returncode == 0, done.stderr

    report = json.loads((tmp_path / "report.json").read_text())
    assert set(report) == {"machine", "config", "runs"}
    assert {"cpu", "cpu_count", "python", "torch", "qadam"} <= set(report["machine"])
    assert {"steps", "seed", "corpus_sha256"} <= set(report["config"])
    assert [run["optimizer"] for run in report["runs"]] == [
        TORCH,
        "qadam.AdamW",
        "qadam.AdamW8bit",
    ]
    for run in report["runs"]:
        assert run["optimizer"] in done.stdout
        assert run["step_ms"] > 0
        assert 1_000_000 <= run["parameters"] <= 3_000_000
        curve = run["val_loss"]
        assert all(math.isfinite(loss) for _, loss in curve)
        assert [step for step, _ in curve] == [0, 10, 20, 30]
        # The same seed: the same model before the first step, to the last bit.
        assert curve[0] == report["runs"][0]["val_loss"][0]
        assert run["final_val_loss"] < 0.75 * curve[0][1], "nothing was learned"

    baseline, bits32, bits8 = report["runs"]
    for run in (bits32, bits8):
        assert run["final_val_loss"] == pytest.approx(baseline["final_val_loss"], rel=0.05)
    assert baseline["state_bytes_per_param"] == pytest.approx(8, abs=0.001)
    assert bits32["state_bytes_per_param"] == pytest.approx(8, abs=0.001)
    assert 2 < bits8["state_bytes_per_param"] <= 2.04

    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")


def test_a_diverging_run_fails_the_demo(tmp_path: Path) -> None:
    done = run_demo(tmp_path, "--optimizers", "torch.optim.AdamW(fused=True, lr=1e30)")
    assert done.returncode == 1
    assert "diverged: torch.optim.AdamW(fused=True, lr=1e30)" in done.stderr
    assert not (tmp_path / "report.json").exists()


def test_an_unknown_optimizer_is_refused_before_training(tmp_path: Path) -> None:
    done = run_demo(tmp_path, "--optimizers", TORCH, "torch.optim.AdamV")
    assert done.returncode == 2
    assert "'torch.optim.AdamV'" in done.stderr
    assert "step/s" not in done.stderr


@pytest.fixture
def stdlib_text(monkeypatch: pytest.MonkeyPatch):  # type: ignore[no-untyped-def]
    monkeypatch.syspath_prepend(str(EXAMPLES))
    import stdlib_text

    return stdlib_text


def test_the_corpus_splits_by_file(stdlib_text, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
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


def test_a_corpus_that_is_too_large_is_refused(stdlib_text, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    (tmp_path / "a.py").write_text("pass\n")
    with pytest.raises(ValueError, match=r"holds \d+ bytes of sources for a part of 5000"):
        stdlib_text.load(5000, tmp_path)
