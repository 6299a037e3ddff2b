"""What a contest of optimizers is made of, on the CPU (``cpu.py``) and on a GPU (``gpu_check.py``).

Shapes, byte counts, optimizers of packages that may not be there, and the checks that a step did
its work and nothing else.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import random
import signal
import statistics
import subprocess
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from gpu_bits import chunks
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer

Shapes = list[tuple[int, ...]]

BASELINE = "torch.optim.AdamW(fused=True)"
HYPER: dict[str, Any] = {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.01}
MIN_ROUNDS = 3
"""Fewer would say nothing; 31 and more are meant."""
ROOT = Path(__file__).resolve().parents[1]


# Shapes.


def gpt2_shapes() -> Shapes:
    """The 148 parameters of GPT-2 124M."""
    layer: Shapes = [(768,), (768,), (2304, 768), (2304,), (768, 768), (768,)]
    layer += [(768,), (768,), (3072, 768), (3072,), (768, 3072), (768,)]
    return [(50257, 768), (1024, 768), *(layer * 12), (768,), (768,)]


def small_shapes() -> Shapes:
    """2,000 vectors of 1,000 to 5,000 elements."""
    sizes = random.Random(0)
    return [(sizes.randint(1000, 5000),) for _ in range(2000)]


# Bytes.


def step_bytes(param: float, grad: float, state: float) -> float:
    """Bytes an element that a step must move: parameter and state in and out, gradient in."""
    return 2 * param + grad + 2 * state


def tensors_in(value: object, depth: int = 4) -> Iterator[Tensor]:
    """The plain tensors that a state is made of, also where a class of its own wraps them."""
    if depth == 0:
        return
    if isinstance(value, Tensor):
        flatten = getattr(value, "__tensor_flatten__", None)
        if flatten is None:
            yield value
            return
        inner: list[Any] = [getattr(value, name) for name in flatten()[0]]
    elif isinstance(value, dict):
        inner = list(value.values())
    elif isinstance(value, (list, tuple)):
        inner = list(value)
    else:
        inner = list(getattr(value, "__dict__", {}).values())
    for item in inner:
        yield from tensors_in(item, depth - 1)


def state_bytes(optimizer: Optimizer) -> int:
    """Bytes of state; what parameters share is counted once, step counts not at all."""
    found: dict[int, int] = {}
    for entry in optimizer.state.values():
        for tensor in tensors_in(entry):
            if tensor.numel() > 1:
                found[tensor.data_ptr()] = tensor.numel() * tensor.element_size()
    return sum(found.values())


# Optimizers.

Make = Callable[[list[Parameter], torch.dtype], Optimizer]


class AbsentError(Exception):
    """A package that is not there."""


def find(modules: list[str], cls: str) -> Callable[..., Optimizer]:
    """A class of the first of ``modules`` that there is."""
    errors = []
    for name in modules:
        try:
            found: Callable[..., Optimizer] = getattr(importlib.import_module(name), cls)
        except Exception as error:  # noqa: BLE001, RUF100 - packages fail as they like
            errors.append(f"{name}: {type(error).__name__}: {error}")
            continue
        return found
    raise AbsentError("; ".join(errors))


def from_package(modules: list[str], cls: str, **options: object) -> Make:
    """Makes an optimizer of a class that is looked up when it is wanted."""

    def make(params: list[Parameter], dtype: torch.dtype) -> Optimizer:
        del dtype
        return find(modules, cls)(params, **HYPER, **options)

    return make


# Checks.


def moved(params: list[Parameter], start: list[Tensor]) -> float:
    """The share of elements that are finite and not where they were."""
    count = total = 0
    for param, before in zip(params, start, strict=True):
        for now, then in zip(chunks(param.detach()), chunks(before), strict=True):
            count += int(((now != then) & now.isfinite()).sum().item())
        total += param.numel()
    return count / total


def checksum(tensors: list[Tensor]) -> list[int]:
    """A sum of each tensor's bits."""
    integer = {4: torch.int32, 2: torch.int16}
    return [
        sum(int(chunk.sum(dtype=torch.int64)) for chunk in chunks(t.view(integer[t.itemsize])))
        for t in tensors
    ]


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raises TimeoutError in what takes longer: other packages may compile for minutes."""

    def stop(number: int, frame: FrameType | None) -> None:
        del number, frame
        msg = f"took longer than {seconds:.0f} s"
        raise TimeoutError(msg)

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, max(seconds, 0.1))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


# Reports.


def spread(values: list[float]) -> dict[str, float]:
    """Median, minimum and maximum."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def versions(packages: Iterable[str | None]) -> dict[str, str | None]:
    """Of torch, qadam and others; None where one is not installed."""
    found: dict[str, str | None] = {}
    for package in ("torch", "qadam", *sorted({name for name in packages if name is not None})):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = None
    return found


def commit() -> str:
    """What is checked out, and whether it was changed."""
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603
    return done.stdout.strip() or "unknown"
