"""How fast a GPU's optimizer steps are, beside its own copy and other optimizers.

Used by ``gpu_check.py``. All contenders of a case are in memory at once and take turns, in an order
that changes from round to round. Every sample is kept: the device's time of a step whose launches
were all queued before it began, the device's and the host's time of a step on an idle device, and
how long the host was busy dispatching it. Before each, other memory is read, several times the L2's
size, so that no step finds its data there, and none has to write another's back. (A queue holds
about a thousand launches: who launches more waits for the host in either time.)
"""

from __future__ import annotations

import gc
import math
import random
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from contest import (
    BASELINE,
    HYPER,
    MIN_ROUNDS,
    AbsentError,
    Make,
    Shapes,
    checksum,
    from_package,
    gpt2_shapes,
    moved,
    small_shapes,
    spread,
    state_bytes,
    step_bytes,
    time_limit,
)
from gpu_bits import CUDA, chunks
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer

COPY = "device-to-device copy"


def nominal_state_bytes(name: str, dtype: torch.dtype) -> float | None:
    """State in bytes an element, where the optimizer's name determines it."""
    return {
        BASELINE: 2.0 * dtype.itemsize,  # in the parameter's dtype
        "qadam.AdamW": 8.0,
        "qadam.AdamW8bit": 2 + 2 * 4 / 256,
        "qadam.AdamW8bit, ratio": 2 + 3 * 4 / 256,
    }.get(name)


# Contenders.


def flash(params: list[Parameter], dtype: torch.dtype) -> Optimizer:
    """FlashAdamW with its defaults: 24-bit masters where parameters are narrower than f32."""
    bits = None if dtype == torch.float32 else 24
    return from_package(["flashoptim"], "FlashAdamW", master_weight_bits=bits)(params, dtype)


CONTENDERS: dict[str, Make] = {
    BASELINE: lambda params, _: torch.optim.AdamW(params, fused=True, **HYPER),
    "qadam.AdamW": from_package(["qadam"], "AdamW"),
    "qadam.AdamW8bit": from_package(["qadam"], "AdamW8bit", min_8bit_size=0),
    "qadam.AdamW8bit, ratio": from_package(
        ["qadam"], "AdamW8bit", min_8bit_size=0, state_code="ratio"
    ),
    "bitsandbytes AdamW8bit": from_package(["bitsandbytes.optim"], "AdamW8bit"),
    "flashoptim FlashAdamW": flash,
    "torchao AdamW8bit": from_package(
        ["torchao.optim", "torchao.prototype.low_bit_optim"], "AdamW8bit"
    ),
    "bitsandbytes AdamW": from_package(["bitsandbytes.optim"], "AdamW"),
}
"""In this order they are given memory."""
REQUIRED = (BASELINE, "qadam.AdamW", "qadam.AdamW8bit", "qadam.AdamW8bit, ratio")
"""Where one of these cannot be measured, the check fails."""


# Cases.

CASES: dict[str, tuple[str, Callable[[int], Shapes]]] = {
    "large": ("one tensor of {large:,} elements", lambda large: [(large,)]),
    "small": ("2,000 tensors of 1,000 to 5,000 elements", lambda _: small_shapes()),
    "gpt2": ("GPT-2 124M: 148 tensors", lambda _: gpt2_shapes()),
}
DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16}
LEFT_OUT = {("small", "torchao AdamW8bit"): "compiles for each of some 1,600 sizes anew: hours"}


# Clocks.


@dataclass
class Sample:
    """Seconds that one step took."""

    queued_device: float
    """On the device, with every launch queued before it began: the kernels' own time."""
    device: float
    """On the device when it was idle: waits for the host's launches are in it."""
    wall: float
    """From the call to the end of the work, on an idle device."""
    host: float
    """From the call to its return: dispatch."""


class Meter(Protocol):
    """A device, as far as timing it goes."""

    device: str

    def time(self, step: Callable[[], object], host: float) -> Sample:
        """Times a step; ``host`` is about how long its dispatch takes."""

    def peak(self, step: Callable[[], object]) -> int:
        """Bytes that a step takes beyond what was there before it."""

    def free(self) -> int:
        """Free bytes, those that torch keeps for itself counted in."""

    def outside_torch(self) -> int:
        """Bytes in use on the device that torch did not allocate."""

    def synchronize(self) -> None:
        """Waits for the device."""


class CudaMeter:
    """The current CUDA device."""

    device = "cuda"
    CYCLES = 2e9
    """A second's; a little more than any GPU's clock."""
    LONGEST = 0.25
    """Seconds to hold a queue up at most."""

    def __init__(self) -> None:
        l2 = getattr(torch.cuda.get_device_properties(0), "L2_cache_size", 0) or 64 << 20
        self.other = torch.ones(4 * l2 // 4, device="cuda")

    def synchronize(self) -> None:  # noqa: D102 - as in Meter
        torch.cuda.synchronize()

    def empty_l2(self) -> None:
        """Fills the L2 with other data, none of which has to be written back."""
        self.other.sum()

    def time(self, step: Callable[[], object], host: float) -> Sample:  # noqa: D102 - as in Meter
        start, end = CUDA.Event(enable_timing=True), CUDA.Event(enable_timing=True)
        self.empty_l2()
        torch.cuda.synchronize()
        start.record()
        before = time.perf_counter()
        step()
        after = time.perf_counter()
        end.record()
        torch.cuda.synchronize()
        done = time.perf_counter()
        idle = start.elapsed_time(end) / 1e3
        self.empty_l2()
        CUDA._sleep(int(self.CYCLES * min(self.LONGEST, 1.5 * host + 1e-4)))
        start.record()
        step()
        end.record()
        torch.cuda.synchronize()
        queued = start.elapsed_time(end) / 1e3
        return Sample(queued, idle, done - before, after - before)

    def peak(self, step: Callable[[], object]) -> int:  # noqa: D102 - as in Meter
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before

    def free(self) -> int:  # noqa: D102 - as in Meter
        kept = torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
        return torch.cuda.mem_get_info()[0] + kept

    def outside_torch(self) -> int:  # noqa: D102 - as in Meter
        free, total = torch.cuda.mem_get_info()
        return total - free - torch.cuda.memory_reserved()


class HostMeter:
    """The CPU in a GPU's place, for the self-test."""

    device = "cpu"

    def synchronize(self) -> None:  # noqa: D102 - as in Meter
        pass

    def time(self, step: Callable[[], object], host: float) -> Sample:  # noqa: ARG002, D102
        before = time.perf_counter()
        step()
        seconds = time.perf_counter() - before
        return Sample(seconds, seconds, seconds, seconds)

    def peak(self, step: Callable[[], object]) -> int:  # noqa: D102 - as in Meter
        step()
        return 0

    def free(self) -> int:  # noqa: D102 - as in Meter
        return 1 << 34

    def outside_torch(self) -> int:  # noqa: D102 - as in Meter
        return 0


# A case.


@dataclass
class Entrant:
    """A contender in a case, or the copy."""

    name: str
    step: Callable[[], object]
    step_bytes: float
    facts: dict[str, Any]
    params: list[Parameter] = field(default_factory=list)
    optimizer: Optimizer | None = None
    samples: list[Sample] = field(default_factory=list)
    host: float = 0.0

    def take_turn(self, meter: Meter, keep: bool) -> None:
        """Times one step."""
        sample = meter.time(self.step, self.host)
        self.host = sample.host if self.host == 0 else min(self.host, sample.host)
        if keep:
            self.samples.append(sample)


class Case:
    """Contenders side by side on tensors of the same shapes."""

    def __init__(self, shapes: Shapes, dtype: torch.dtype, meter: Meter) -> None:
        self.dtype, self.meter = dtype, meter
        self.elements = sum(math.prod(shape) for shape in shapes)
        self.source = torch.Generator(meter.device).manual_seed(0)
        self.start = [self.random(shape, 0.02) for shape in shapes]
        self.grads = [self.random(shape, 0.01) for shape in shapes]
        self.sums = checksum(self.grads)
        self.entrants: list[Entrant] = []
        self.absent: dict[str, str] = {}
        self.errors: dict[str, str] = {}

    def random(self, shape: tuple[int, ...], scale: float) -> Tensor:
        """Normal numbers, made in parts."""
        tensor = torch.empty(shape, dtype=self.dtype, device=self.meter.device)
        for chunk in chunks(tensor):
            chunk.normal_(std=scale, generator=self.source)
        return tensor

    def add_copy(self, elements: int) -> None:
        """The ceiling: a copy, among the contenders."""
        source = self.random((elements,), 1.0)
        target = torch.empty_like(source)
        moved_bytes = 2.0 * source.numel() * source.element_size()
        step = lambda: target.copy_(source)  # noqa: E731
        self.entrants.append(Entrant(COPY, step, moved_bytes, {}))

    def add(self, name: str, make: Make, seconds: float) -> None:
        """Builds a contender and takes its first steps, or notes why it cannot."""
        need = self.elements * (self.dtype.itemsize + (nominal_state_bytes(name, self.dtype) or 2))
        if need * 1.05 > self.meter.free():
            self.errors[name] = f"needs {need:.3g} bytes, {self.meter.free():.3g} are free"
            return
        try:
            with time_limit(seconds):
                self.entrants.append(self.build(name, make))
        except AbsentError as error:
            self.absent[name] = str(error)[:500]
        except Exception as error:  # noqa: BLE001, RUF100 - packages fail as they like
            self.errors[name] = f"{type(error).__name__}: {error}"[:1500]
        finally:
            gc.collect()
            if self.meter.device == "cuda":
                torch.cuda.empty_cache()  # what is not torch's allocates for itself

    def build(self, name: str, make: Make) -> Entrant:
        """Takes two steps, and checks what they did."""
        params = [Parameter(start.clone()) for start in self.start]
        for param, grad in zip(params, self.grads, strict=True):
            param.grad = grad
        outside = self.meter.outside_torch()
        begin = time.perf_counter()
        optimizer = make(params, self.dtype)
        optimizer.step()
        self.meter.synchronize()
        facts: dict[str, Any] = {"first_step_seconds": time.perf_counter() - begin}
        facts["outside_torch_bytes"] = self.meter.outside_torch() - outside
        facts["peak_bytes_of_a_step"] = self.meter.peak(optimizer.step)
        state = state_bytes(optimizer) / self.elements
        nominal = nominal_state_bytes(name, self.dtype)
        if nominal is not None and abs(state - nominal) > 0.02 * nominal:
            msg = f"keeps {state:.3f} bytes an element of state instead of {nominal:.3f}"
            raise RuntimeError(msg)
        facts["state_bytes_per_element"] = state
        size = self.dtype.itemsize
        facts["step_bytes_per_element"] = step_bytes(size, size, state)
        entrant = Entrant(
            name,
            optimizer.step,
            facts["step_bytes_per_element"] * self.elements,
            facts,
            params,
            optimizer,
        )
        self.inspect(entrant)
        return entrant

    def inspect(self, entrant: Entrant) -> None:
        """Fails unless parameters moved and gradients did not change."""
        share = moved(entrant.params, self.start)
        entrant.facts["moved"] = share
        if share < 0.98:
            msg = f"moved only {share:.4f} of the elements, or made them infinite"
            raise RuntimeError(msg)
        if checksum(self.grads) != self.sums:
            msg = "changed the gradients"
            raise RuntimeError(msg)
        for param, grad in zip(entrant.params, self.grads, strict=True):
            if param.grad is None or param.grad.data_ptr() != grad.data_ptr():
                msg = "replaced the gradients"
                raise RuntimeError(msg)

    def round(self, number: int, keep: bool) -> None:
        """One step of each, in the order of this round. Who fails is out."""
        order = list(self.entrants)
        random.Random(number).shuffle(order)
        for entrant in order:
            try:
                entrant.take_turn(self.meter, keep)
            except Exception as error:  # noqa: BLE001, RUF100 - packages fail as they like
                self.errors[entrant.name] = f"{type(error).__name__}: {error}"[:1500]
                self.entrants.remove(entrant)

    def warm_up(self) -> float:
        """Two rounds; seconds of the second."""
        seconds = 0.0
        for number in range(2):
            begin = time.perf_counter()
            self.round(number, keep=False)
            seconds = time.perf_counter() - begin
        return seconds

    def race(self, rounds: int, deadline: float) -> int:
        """Interleaved rounds, as many as there is time for; how many."""
        seconds = self.warm_up()
        fitting = int((deadline - time.monotonic()) * 0.85 / max(seconds, 1e-9))
        rounds = max(MIN_ROUNDS, min(rounds, fitting))
        for number in range(rounds):
            self.round(number, keep=True)
        for entrant in self.entrants:
            if entrant.optimizer is not None:
                self.inspect(entrant)
        return rounds


# What the samples say.

TIMES = ("queued_device", "device", "wall", "host")


def summarize(optimizers: dict[str, dict[str, Any]]) -> None:
    """Adds to each its times, its ratios to torch's fused step, its share of the copy's bandwidth.

    Ratios are taken round by round. Shares are of the kernels' own time.
    """
    copy = optimizers.get(COPY)
    base = optimizers.get(BASELINE)
    for row in optimizers.values():
        samples = row["samples"]
        row["seconds"] = {key: spread(samples[key]) for key in TIMES}
        rate = row["step_bytes"] / statistics.median(samples["queued_device"])
        row["bytes_per_second"] = rate
        if copy is not None:
            ceiling = copy["step_bytes"] / statistics.median(copy["samples"]["queued_device"])
            row["share_of_copy"] = rate / ceiling
        if base is not None:
            row["ratio_to_fused"] = {
                key: spread(
                    [a / b for a, b in zip(samples[key], base["samples"][key], strict=True)]
                )
                for key in TIMES
            }


COPY_BYTES = 2 << 30
"""Read, and as many written."""


def measure_case(
    case: str,
    dtype_name: str,
    meter: Meter,
    rounds: int,
    deadline: float,
    large: int,
    copy_bytes: int = COPY_BYTES,
    names: tuple[str, ...] = tuple(CONTENDERS),
) -> dict[str, Any]:
    """Everything about one case; ``failures`` says what went wrong with those that are required."""
    title, make_shapes = CASES[case]
    dtype = DTYPES[dtype_name]
    shapes = make_shapes(large)
    result: dict[str, Any] = {"title": title.format(large=large), "dtype": dtype_name}
    elements = sum(math.prod(shape) for shape in shapes)
    # start and gradients; torch's parameters and state; qadam's; the copy
    per_element = 2 * dtype.itemsize + 3 * dtype.itemsize + 2 * dtype.itemsize + 8 + 2.1
    need = elements * per_element + 2 * copy_bytes
    if need * 1.02 > meter.free():
        skipped = f"needs {need:.3g} bytes of device memory, {meter.free():.3g} are free"
        return {**result, "skipped": skipped, "failures": []}
    arena = Case(shapes, dtype, meter)
    arena.add_copy(copy_bytes // dtype.itemsize)
    for name in names:
        make = CONTENDERS[name]
        reason = LEFT_OUT.get((case, name))
        left = deadline - time.monotonic()
        if reason is None and name not in REQUIRED and left < 10:
            reason = "no time left"
        if reason is not None:
            arena.absent[name] = reason
            continue
        arena.add(name, make, left if name in REQUIRED else 0.7 * left)
    done = arena.race(rounds, deadline)
    optimizers = {
        entrant.name: {
            **entrant.facts,
            "step_bytes": entrant.step_bytes,
            "samples": {key: [getattr(s, key) for s in entrant.samples] for key in TIMES},
        }
        for entrant in arena.entrants
    }
    summarize(optimizers)
    return {
        **result,
        "elements": elements,
        "tensors": len(shapes),
        "rounds": done,
        "rounds_wanted": rounds,
        "optimizers": optimizers,
        "absent": arena.absent,
        "errors": arena.errors,
        "failures": [f"{k}: {v}" for k, v in arena.errors.items() if k in (*REQUIRED, COPY)],
    }


# The ceiling by itself.


def measure_bandwidth(meter: Meter, rounds: int, sizes: tuple[int, ...]) -> dict[str, Any]:
    """Copies of several sizes, and an update in place, counting bytes read and written."""
    streams: dict[str, Any] = {}
    for size in sizes:
        if 2.1 * size > meter.free():
            streams[f"{size} bytes"] = {"skipped": f"{meter.free()} bytes are free"}
            continue
        source = torch.empty(size // 4, device=meter.device)
        for chunk in chunks(source):
            chunk.normal_()
        target = torch.empty_like(source)

        def copy(target: Tensor = target, source: Tensor = source) -> object:
            return target.copy_(source)

        def in_place(target: Tensor = target) -> object:
            return target.neg_()

        entrants = [Entrant(n, f, 2.0 * size, {}) for n, f in (("copy", copy), ("neg_", in_place))]
        for number in range(rounds + 3):  # three to warm up
            for entrant in entrants:
                entrant.take_turn(meter, keep=number >= 3)
        for entrant in entrants:
            seconds = [sample.queued_device for sample in entrant.samples]
            rates = [entrant.step_bytes / s for s in seconds]
            streams[f"{entrant.name}, {size} bytes read"] = {
                "seconds": seconds,
                "bytes_per_second": spread(rates),
            }
        pairs = zip(chunks(target), chunks(source), strict=True)
        if not all(torch.equal(a.abs(), b.abs()) for a, b in pairs):
            return {"streams": streams, "failures": ["a copy did not copy"]}
        del source, target, entrants, copy, in_place
    medians = [s["bytes_per_second"]["median"] for s in streams.values() if "seconds" in s]
    return {"streams": streams, "best_bytes_per_second": max(medians, default=0.0), "failures": []}
