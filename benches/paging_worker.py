"""One optimizer in a process of its own, which ``paging.py`` starts under a memory limit.

Reads ``step`` or ``load`` from its input, a line each, does that, and writes what it took as JSON.
Parameters and gradients lie in a file in memory that the starter made and touched, so that they do
not count towards the limit.
"""

from __future__ import annotations

import argparse
import json
import resource
import sys
import time
from pathlib import Path

import torch
from torch import Tensor

import qadam

ELEMENTS = 32 << 20
"""Of each parameter."""


def tensors(file: int, count: int) -> tuple[list[Tensor], list[Tensor]]:
    """Parameters and gradients, ``count`` elements of bfloat16 each, in the open file."""
    both = torch.from_file(
        f"/proc/self/fd/{file}", shared=True, size=2 * count, dtype=torch.bfloat16
    )
    params, grads = both.view(2, count)
    return list(torch.split(params, ELEMENTS)), list(torch.split(grads, ELEMENTS))


def moved() -> dict[str, int]:
    """Bytes that this process had read from disks so far, and changed in memory for a disk."""
    lines = (line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    counts = {name: int(count) for name, count in lines}
    return {"read": counts["read_bytes"], "written": counts["write_bytes"]}


def limit_data(count: int) -> None:
    """Allows ``count`` bytes of private memory in addition to what there is."""
    status = Path("/proc/self/status").read_text()
    kibibytes = next(line for line in status.splitlines() if line.startswith("VmData:"))
    limit = int(kibibytes.split()[1]) * 1024 + count
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))


def main() -> None:
    """Makes the optimizer, then does as it is told."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--optimizer", required=True)
    parser.add_argument("--file", type=int, required=True)
    parser.add_argument("--count", type=int, required=True)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--data-limit", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    params, grads = tensors(options.file, options.count)
    for param, grad in zip(params, grads, strict=True):
        param.requires_grad_().grad = grad
    if options.data_limit:
        limit_data(options.data_limit)
    optimizer = getattr(qadam, options.optimizer)(params)
    for line in sys.stdin:
        before, start = moved(), time.perf_counter()
        if line == "step\n":
            optimizer.step()
        else:
            optimizer.load_state_dict(optimizer.state_dict())
        seconds = time.perf_counter() - start
        counts = {name: count - before[name] for name, count in moved().items()}
        places = optimizer.memory().values()
        state = sum(uses["state"] + uses["scales"] for uses in places)
        print(json.dumps({"seconds": seconds, "state": state, **counts}), flush=True)


if __name__ == "__main__":
    main()
