"""``make gpu-check`` is right wherever it needs no GPU to be tried."""

import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[1] / "benches" / "gpu_check.py"


def run(*arguments):
    command = [sys.executable, str(SCRIPT), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)


def test_its_self_test_passes():
    done = run("--self-test")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "self-test passed" in done.stdout


def test_a_wheel_that_is_not_there_is_named():
    done = run("--wheel", "nowhere.whl")
    assert done.returncode == 1
    assert "nowhere.whl" in done.stderr
