"""Step time on the CPU: qadam beside torch's fused AdamW, interleaved in one process.

    python benches/cpu.py                  # all cases, 2 threads
    python benches/cpu.py --cases a c --rounds 11

Each round times one step of every optimizer, in an order that changes from round to round; what is
reported is the median over the rounds of the ratio to torch's fused step of the same round, as
absolute times drift on shared machines. After the timing every optimizer must have moved its
parameters and kept its gradients. Writes ``target/bench/cpu.json`` with every sample.
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

import qadam

Make = Callable[[list[Tensor]], Optimizer]

BASELINE = "torch.optim.AdamW(fused=True)"
OPTIMIZERS: dict[str, Make] = {
    BASELINE: lambda params: torch.optim.AdamW(params, fused=True),
    "torch.optim.AdamW(foreach=True)": lambda params: torch.optim.AdamW(params, foreach=True),
    "qadam.AdamW": lambda params: qadam.AdamW(params),
    "qadam.AdamW8bit": lambda params: qadam.AdamW8bit(params, min_8bit_size=0),
}


def gpt2_shapes() -> list[tuple[int, ...]]:
    """The 148 parameters of GPT-2 124M."""
    layer = [(768,), (768,), (2304, 768), (2304,), (768, 768), (768,)]
    layer += [(768,), (768,), (3072, 768), (3072,), (768, 3072), (768,)]
    return [(50257, 768), (1024, 768), *(layer * 12), (768,), (768,)]


def small_shapes() -> list[tuple[int, ...]]:
    """2,000 vectors of 1,000 to 5,000 elements."""
    sizes = random.Random(0)
    return [(sizes.randint(1000, 5000),) for _ in range(2000)]


CASES: dict[str, tuple[str, Callable[[], list[tuple[int, ...]]], torch.dtype]] = {
    "a": ("one f32 tensor of 64 M", lambda: [(64_000_000,)], torch.float32),
    "b": ("GPT-2 124M, 148 f32 tensors", gpt2_shapes, torch.float32),
    "c": ("2,000 f32 tensors of 1,000 to 5,000", small_shapes, torch.float32),
    "d": ("one bf16 tensor of 64 M", lambda: [(64_000_000,)], torch.bfloat16),
}


def measure(shapes: list[tuple[int, ...]], dtype: torch.dtype, rounds: int) -> dict[str, Any]:
    """Seconds of each optimizer's step in every round, and its state's bytes a parameter."""
    generator = torch.Generator().manual_seed(0)
    gradients = [torch.randn(s, generator=generator).mul_(0.01).to(dtype) for s in shapes]
    runs: dict[str, tuple[list[Tensor], Optimizer]] = {}
    for name, make in OPTIMIZERS.items():
        params = [torch.full(s, 0.5, dtype=dtype, requires_grad=True) for s in shapes]
        for param, gradient in zip(params, gradients, strict=True):
            param.grad = gradient
        runs[name] = (params, make(params))
    sums = [g.double().sum().item() for g in gradients]
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    order = list(runs)
    for number in range(rounds + 2):  # two to warm up
        random.Random(number).shuffle(order)
        for name in order:
            start = time.perf_counter()
            runs[name][1].step()
            elapsed = time.perf_counter() - start
            if number >= 2:
                seconds[name].append(elapsed)
    if sums != [g.double().sum().item() for g in gradients]:
        msg = "an optimizer changed the gradients"
        raise RuntimeError(msg)
    count = sum(g.numel() for g in gradients)
    result = {}
    for name, (params, optimizer) in runs.items():
        if any((p == 0.5).all() for p in params):
            msg = f"{name} left a parameter where it was"
            raise RuntimeError(msg)
        tensors = [t for s in optimizer.state.values() for t in s.values() if torch.is_tensor(t)]
        state = sum(t.numel() * t.element_size() for t in tensors) / count
        result[name] = {"seconds": seconds[name], "state_bytes_per_param": state}
    return result


def main() -> None:
    """Runs the cases, prints the table and writes the samples."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--rounds", type=int, default=31)
    parser.add_argument("--threads", type=int, default=2)
    out = Path(__file__).resolve().parents[1] / "target" / "bench" / "cpu.json"
    parser.add_argument("--out", type=Path, default=out)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)

    report: dict[str, Any] = {
        "machine": {
            "processor": platform.processor() or platform.machine(),
            "threads": options.threads,
        },
        "versions": {"torch": torch.__version__, "qadam": qadam.__version__},
        "backend": qadam.cpu_backend(),
        "cases": {},
    }
    for case in options.cases:
        title, shapes, dtype = CASES[case]
        result = measure(shapes(), dtype, options.rounds)
        report["cases"][case] = {"title": title, "optimizers": result}
        print(f"\n{case}: {title}")
        base = result[BASELINE]["seconds"]
        count = sum(torch.Size(s).numel() for s in shapes())
        for name, row in result.items():
            ratios = sorted(t / b for t, b in zip(row["seconds"], base, strict=True))
            nanoseconds = statistics.median(row["seconds"]) / count * 1e9
            spread = f"{ratios[0]:5.2f} to {ratios[-1]:5.2f}"
            state = f"{row['state_bytes_per_param']:.2f} B"
            median = statistics.median(ratios)
            print(f"  {name:34} {median:6.2f} x ({spread})  {nanoseconds:6.2f} ns  {state}")
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(report, indent=1))
    print(f"\nwrote {options.out}")


if __name__ == "__main__":
    main()
