"""Without a CUDA device: everything for the CPU works, and qadam says what is missing."""

import os
import subprocess
import sys

import pytest

pytestmark = pytest.mark.cpu_only

PROGRAM = """
import torch, qadam
assert not qadam.cuda.is_available()
assert qadam.cuda.device_count() == 0
p = torch.ones(5000, requires_grad=True)
p.grad = torch.ones(5000)
qadam.AdamW8bit([p]).step()
assert (p < 1).all()
print(qadam.cuda.why_not())
"""


def test_import_and_cpu_use_need_no_driver_and_the_reason_is_told():
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}  # hides what a GPU machine has
    run = subprocess.run(
        [sys.executable, "-c", PROGRAM], capture_output=True, text=True, env=environment, check=True
    )
    assert run.stdout.startswith("CUDA is not available: "), run.stdout
    assert len(run.stdout) > 40
