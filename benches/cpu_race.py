"""One case of ``cpu.py`` on one number of threads, in a process of its own.

    python benches/cpu_race.py '{"case": "a", "threads": 2, "out": "race.json"}'

All contenders that fit in memory together take turns, one step each a round, in an order that
changes from round to round; those that do not fit go into another group, which has torch's fused
step in it as well. A ratio is always between two steps of the same round. Before each step other
memory is read, more than the caches hold, and then nothing is done for a moment: no step finds its
data in a cache, or the other threads still spinning after somebody else's work. After each, every
tensor must have moved and no gradient changed.

Contenders are told their number of threads by torch and by ``OMP_NUM_THREADS``, which ``cpu.py``
sets, as packages bring OpenMP libraries of their own.
"""

from __future__ import annotations

import ctypes
import gc
import itertools
import json
import math
import os
import random
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, Protocol

import torch
from contest import (
    BASELINE,
    HYPER,
    MIN_ROUNDS,
    Make,
    Shapes,
    checksum,
    from_package,
    gpt2_shapes,
    moved,
    small_shapes,
    state_bytes,
    step_bytes,
    time_limit,
)
from torch import Tensor
from torch.nn import Parameter

import qadam

SCRUB_BYTES = 128 << 20
"""Of other memory are read before a step."""
SETTLE = 0.01
"""Seconds of rest before a step: OpenMP's threads spin for a few milliseconds after work."""
PROBES = 64
"""Elements of each tensor that are looked at after each step."""
MEMORY_SHARE = 0.75
"""Of what is available is used at most."""


class BrokenError(Exception):
    """A step did not do its work, or did something else."""


# Cases.


@dataclass(frozen=True)
class Case:
    """Tensors to update."""

    title: str
    shapes: Callable[[int], Shapes]
    """Takes the number of elements of a large tensor."""
    dtype: torch.dtype


CASES = {
    "a": Case("one f32 tensor of {:.4g} M", lambda n: [(n,)], torch.float32),
    "b": Case("GPT-2 124M, 148 f32 tensors", lambda _: gpt2_shapes(), torch.float32),
    "c": Case("2,000 f32 tensors of 1,000 to 5,000", lambda _: small_shapes(), torch.float32),
    "d": Case("one bf16 tensor of {:.4g} M", lambda n: [(n,)], torch.bfloat16),
}
STATE_ITEMS = {32: 4, 8: 1}
"""Bytes of an element of a moment, by bits; scales add 0.06 a parameter at 8 bits."""


@dataclass(frozen=True)
class Settings:
    """What one process measures."""

    case: str
    threads: int
    out: str
    """The file for what was found."""
    names: list[str]
    """Contenders besides torch's fused AdamW and the streams."""
    rounds: int = 31
    elements: int = 64_000_000
    """Of a large tensor."""
    budget: float = 60.0
    """Seconds of steps after which a peer's rounds end, if there were three."""
    limit: float = 300.0
    """Seconds that a peer may take until it is ready: some compile."""


# Contenders.


@dataclass(frozen=True)
class Contender:
    """An optimizer to measure."""

    make: Make
    needs: float
    """Bytes a parameter at most, f32: the parameter, state, temporaries."""
    package: str | None = None
    """The distribution, where it is a peer's: one that fails is absent, and a slow one stops."""
    backend: str | None = None
    """``QADAM_CPU``, which is read once a process: this one steps in a process of its own."""
    threads: int | None = None
    """Where these are not the race's."""


QADAM_8BIT = from_package(["qadam"], "AdamW8bit", min_8bit_size=0)
CONTENDERS: dict[str, Contender] = {
    BASELINE: Contender(lambda params, _: torch.optim.AdamW(params, fused=True, **HYPER), 12),
    "torch.optim.AdamW(foreach=True)": Contender(
        lambda params, _: torch.optim.AdamW(params, foreach=True, **HYPER), 20
    ),
    "qadam.AdamW": Contender(from_package(["qadam"], "AdamW"), 12),
    "qadam.AdamW8bit": Contender(QADAM_8BIT, 6.1),
    "qadam.AdamW8bit, ratio": Contender(
        from_package(["qadam"], "AdamW8bit", min_8bit_size=0, state_code="ratio"), 6.1
    ),
    "qadam.AdamW8bit, 1 thread": Contender(QADAM_8BIT, 6.1, threads=1),
    "qadam.AdamW8bit, avx512": Contender(QADAM_8BIT, 16, backend="avx512"),
    "qadam.AdamW8bit, avx2": Contender(QADAM_8BIT, 16, backend="avx2"),
    "DeepSpeedCPUAdam": Contender(
        from_package(["deepspeed.ops.adam"], "DeepSpeedCPUAdam", adamw_mode=True), 12, "deepspeed"
    ),
    "bitsandbytes AdamW32bit": Contender(
        from_package(["bitsandbytes.optim"], "AdamW32bit"), 24, "bitsandbytes"
    ),
    "bitsandbytes AdamW8bit": Contender(
        from_package(["bitsandbytes.optim"], "AdamW8bit", min_8bit_size=0), 26, "bitsandbytes"
    ),
    "torchao AdamW8bit": Contender(
        from_package(["torchao.optim", "torchao.prototype.low_bit_optim"], "AdamW8bit"),
        14,
        "torchao",
    ),
}
FIELD_NEEDS, STREAM_NEEDS = 8, 16
"""Bytes a parameter of the gradients and where parameters start, and of the streams."""
LEFT_OUT = {("c", "torchao AdamW8bit"): "compiles for each of some 1,600 sizes anew: 40 minutes"}


# What is measured.


@dataclass(frozen=True)
class Sample:
    """One step."""

    seconds: float
    cpu_seconds: float
    """Of all threads together: by ``seconds``, how many cores were busy."""


def timed(step: Callable[[], object]) -> Sample:
    """Times a step, with caches empty and threads at rest."""
    scrub().sum()
    time.sleep(SETTLE)
    cpu = time.process_time()
    start = time.perf_counter()
    step()
    return Sample(time.perf_counter() - start, time.process_time() - cpu)


@contextmanager
def use_threads(count: int | None) -> Iterator[None]:
    """Has torch's number of threads be another one for a while."""
    before = torch.get_num_threads()
    if count is not None:
        torch.set_num_threads(count)
    try:
        yield
    finally:
        if count is not None:
            torch.set_num_threads(before)


@cache
def scrub() -> Tensor:
    """Memory that nothing else uses."""
    return torch.ones(SCRUB_BYTES // 4)


def peak_of(step: Callable[[], object]) -> int | None:
    """Bytes by which resident memory rises in a step above what was there before it.

    The kernel's own high-water mark, which ``/proc/self/clear_refs`` resets: whoever allocates, in
    Python or not, is counted, in whole pages, if the memory is written. What malloc had kept from
    before is given back first, so that using it again counts. None where there is no such file.
    """
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
    try:
        Path("/proc/self/clear_refs").write_text("5")
        before = high_water()
    except OSError:
        step()
        return None
    step()
    return max(0, high_water() - before)


def high_water() -> int:
    """The most bytes that were resident since the mark was reset."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("VmHWM:"))


class Field:
    """The tensors of a case: where parameters start, and gradients, which all share."""

    def __init__(self, shapes: Shapes, dtype: torch.dtype) -> None:
        source = torch.Generator().manual_seed(0)
        self.dtype = dtype
        self.start, self.grads = (
            [torch.randn(shape, generator=source).mul_(scale).to(dtype) for shape in shapes]
            for scale in (0.02, 0.01)
        )
        self.elements = sum(math.prod(shape) for shape in shapes)
        self.sums = checksum(self.grads)
        self._strides = [max(1, t.numel() // PROBES) for t in self.start]
        counts = torch.tensor([p.numel() for p in self._probes(self.start)])
        self._counts = counts
        self._owners = torch.arange(len(counts)).repeat_interleave(counts)

    def params(self) -> list[Parameter]:
        """Parameters for one contender."""
        params = [Parameter(start.clone()) for start in self.start]
        for param, grad in zip(params, self.grads, strict=True):
            param.grad = grad
        return params

    def _probes(self, tensors: Iterable[Tensor]) -> list[Tensor]:
        pairs = zip(tensors, self._strides, strict=True)
        return [t.detach().view(-1)[::stride][:PROBES] for t, stride in pairs]

    def probe(self, params: Sequence[Tensor]) -> Tensor:
        """Some elements of each tensor."""
        return torch.cat(self._probes(params))

    def check_step(self, params: list[Parameter], before: Tensor) -> None:
        """Raises unless a step moved half of the probes of every tensor, and kept the gradients."""
        now = self.probe(params)
        there = ((now != before) & now.isfinite()).long()
        moves = torch.zeros_like(self._counts).index_add_(0, self._owners, there)
        still = (2 * moves < self._counts).nonzero().flatten().tolist()
        if still:
            msg = f"left {len(still)} of {len(self._counts)} tensors where they were: {still[:5]}"
            raise BrokenError(msg)
        for param, grad in zip(params, self.grads, strict=True):
            if param.grad is None or param.grad.data_ptr() != grad.data_ptr():
                msg = "replaced the gradients"
                raise BrokenError(msg)
        sums = checksum(self.grads)
        if sums != self.sums:
            self.sums = sums  # the others go on with them: it is as much work
            msg = "changed the gradients"
            raise BrokenError(msg)


class Entrant(Protocol):
    """A contender that is ready, or a stream."""

    name: str
    facts: dict[str, Any]
    peer: bool
    """May be stopped early."""

    def turn(self) -> Sample:
        """Times a step and checks it."""

    def finish(self) -> None:
        """Checks what all steps together did."""

    def close(self) -> None:
        """Gives its memory back."""


class Local:
    """An optimizer in this process."""

    def __init__(self, name: str, contender: Contender, arena: Field) -> None:
        self.name, self.peer = name, contender.package is not None
        self._arena, self._threads = arena, contender.threads
        self._params = arena.params()
        start = time.perf_counter()
        self._optimizer = contender.make(self._params, arena.dtype)
        self._checked_step(self._optimizer.step)
        seconds = time.perf_counter() - start
        self._checked_step(self._optimizer.step)
        peak = self._checked_step(lambda: peak_of(self._optimizer.step))
        state = state_bytes(self._optimizer) / arena.elements
        size = arena.dtype.itemsize
        self.facts: dict[str, Any] = {
            "first_step_seconds": seconds,
            "peak_bytes_per_param": None if peak is None else peak / arena.elements,
            "state_bytes_per_param": state,
            "step_bytes_per_param": step_bytes(size, size, state),
        }

    def _checked_step(self, step: Callable[[], Any]) -> Any:  # noqa: ANN401 - what the step returns
        before = self._arena.probe(self._params)
        with use_threads(self._threads):
            result = step()
        self._arena.check_step(self._params, before)
        return result

    def turn(self) -> Sample:  # noqa: D102 - as in Entrant
        sample: Sample = self._checked_step(lambda: timed(self._optimizer.step))
        return sample

    def finish(self) -> None:  # noqa: D102 - as in Entrant
        share = moved(self._params, self._arena.start)
        self.facts["moved"] = share
        if share < 0.98:
            msg = f"moved only {share:.4f} of the elements, or made them infinite"
            raise BrokenError(msg)

    def close(self) -> None:  # noqa: D102 - as in Entrant
        del self._optimizer, self._params


class Remote:
    """qadam in a process of its own, on the back end that ``QADAM_CPU`` names there.

    It takes its turns as the others do: while it steps, this process waits, and while others step,
    it waits.
    """

    def __init__(self, name: str, settings: Settings) -> None:
        self.name, self.peer = name, False
        backend = CONTENDERS[name].backend
        assert backend is not None  # noqa: S101 - for mypy
        command = [sys.executable, __file__, json.dumps(asdict(settings)), name]
        self._process = subprocess.Popen(  # noqa: S603 - the command is made here
            command,
            text=True,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env={**os.environ, "QADAM_CPU": backend},
        )
        try:
            self.facts = self._answer()
            if self.facts["backend"] != backend:
                msg = f"uses {self.facts['backend']} where {backend} was asked for"
                raise RuntimeError(msg)
        except BaseException:
            self.close()
            raise

    def _ask(self, what: str) -> dict[str, Any]:
        assert self._process.stdin is not None  # noqa: S101 - for mypy, as this is a pipe
        self._process.stdin.write(f"{what}\n")
        self._process.stdin.flush()
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None  # noqa: S101 - for mypy
        assert self._process.stderr is not None  # noqa: S101
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(last_lines(self._process.stderr.read()) or "ended")
        answer: dict[str, Any] = json.loads(line)
        if "broken" in answer:
            raise BrokenError(answer["broken"])
        return answer

    def turn(self) -> Sample:  # noqa: D102 - as in Entrant
        return Sample(**self._ask("turn"))

    def finish(self) -> None:  # noqa: D102 - as in Entrant
        self.facts.update(self._ask("finish"))

    def close(self) -> None:  # noqa: D102 - as in Entrant
        self._process.kill()
        self._process.communicate()


def serve(name: str, settings: Settings) -> None:
    """The other side of a Remote: answers each line of stdin by one of JSON."""

    def answer(what: Callable[[], dict[str, Any]]) -> None:
        try:
            found = what()
        except BrokenError as error:
            found = {"broken": str(error)}
        print(json.dumps(found), flush=True)

    case = CASES[settings.case]
    entrant = Local(name, CONTENDERS[name], Field(case.shapes(settings.elements), case.dtype))
    entrant.facts["backend"] = qadam.cpu_backend()

    def finish() -> dict[str, Any]:
        entrant.finish()
        return entrant.facts

    answer(lambda: entrant.facts)
    for line in sys.stdin:
        answer(finish if line.strip() == "finish" else lambda: asdict(entrant.turn()))


class Stream:
    """Memory that is read and written as fast as it goes, by torch."""

    peer = False

    def __init__(self, name: str, bytes_per_param: float, step: Callable[[], object]) -> None:
        self.name, self._step = name, step
        self.facts: dict[str, Any] = {"step_bytes_per_param": bytes_per_param}
        step()

    def turn(self) -> Sample:  # noqa: D102 - as in Entrant
        return timed(self._step)

    def finish(self) -> None:  # noqa: D102 - as in Entrant
        pass

    def close(self) -> None:  # noqa: D102 - as in Entrant
        del self._step


def in_place_stream(stage: Tensor, elements: int, param: int, moment: int) -> Stream:
    """Reads four arrays and writes three of them, of the sizes of p, g, m and v.

    Three operations of torch, as it fuses none: ``p += g``, ``m *= 1``, ``v *= 1``. Lines that are
    written have been read, so the bytes that are counted are those that travel.
    """
    sizes = [elements * width // 4 for width in (param, param, moment, moment)]
    ends = list(itertools.accumulate(sizes))
    p, g, m, v = (stage[end - size : end] for size, end in zip(sizes, ends, strict=True))

    def step() -> None:
        p.add_(g)
        m.mul_(1.0)
        v.mul_(1.0)

    moved_bytes = step_bytes(param, param, 2 * moment)
    return Stream(f"stream in place, {moved_bytes:g} B", moved_bytes, step)


def copy_stream(stage: Tensor, elements: int, moved_bytes: float) -> Stream:
    """Copies half as many bytes as it is to move: they are read, and written elsewhere.

    What the processor reads of the lines that it is about to overwrite is not counted.
    """
    half = stage.numel() // 2
    source, target = stage[:half], stage[half : 2 * half]

    def step() -> None:
        rest = int(elements * moved_bytes) // 8
        while rest > 0:
            count = min(rest, half)
            target[:count].copy_(source[:count])
            rest -= count

    return Stream(f"stream copy, {moved_bytes:g} B", moved_bytes, step)


def streams(elements: int, dtype: torch.dtype) -> list[Entrant]:
    """The roofline: streams of the bytes that steps must move."""
    size = dtype.itemsize
    stage = torch.ones(elements * (2 * size + 8) // 4)
    in_place = [in_place_stream(stage, elements, size, item) for item in STATE_ITEMS.values()]
    return [copy_stream(stage, elements, step_bytes(size, size, 8)), *in_place]


# Rounds.


@dataclass
class Record:
    """The steps of one entrant."""

    group: int
    """In which it took turns with the others."""
    rounds: list[int] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    cpu_seconds: list[float] = field(default_factory=list)
    baseline_seconds: list[float] = field(default_factory=list)
    """Those of torch's fused step in the same rounds."""


def last_lines(text: str, count: int = 8) -> str:
    """The end of an error."""
    return "\n".join([line for line in text.splitlines() if line.strip()][-count:])[-1500:]


@dataclass
class Outcome:
    """What came of a case."""

    records: dict[str, Record] = field(default_factory=dict)
    facts: dict[str, dict[str, Any]] = field(default_factory=dict)
    absent: dict[str, str] = field(default_factory=dict)
    """Peers that could not be had, and why."""
    broken: dict[str, str] = field(default_factory=dict)
    """Contenders whose steps failed a check, and torch's and qadam's if they failed at all."""

    def exclude(self, name: str, error: Exception) -> None:
        """Notes why nothing else is told of a contender.

        Raises:
            RuntimeError: if it is torch's fused AdamW, without which there are no ratios.
        """
        reason = last_lines("".join(traceback.format_exception_only(error)))
        if name == BASELINE:
            raise RuntimeError(reason) from error
        contender = CONTENDERS.get(name)
        optional = contender is not None and (contender.package or contender.backend)
        broken = isinstance(error, BrokenError) or not optional
        (self.broken if broken else self.absent)[name] = reason

    def excludes(self, name: str) -> bool:
        """Whether there is nothing to tell of it."""
        return name in self.broken or name in self.absent


def race(entrants: list[Entrant], rounds: int, budget: float, group: int, out: Outcome) -> None:
    """Interleaved rounds, and the checks at their end. Who fails is out.

    Raises:
        RuntimeError: if that is torch's fused AdamW.
    """
    records = {entrant.name: Record(group) for entrant in entrants}
    active = list(entrants)

    def attempt(entrant: Entrant, what: Callable[[], object]) -> Any:  # noqa: ANN401 - its result
        try:
            return what()
        except Exception as error:  # noqa: BLE001, RUF100 - packages fail as they like
            out.exclude(entrant.name, error)
            return None

    for number in range(rounds):
        order = list(active)
        random.Random(1000 * group + number).shuffle(order)
        samples: dict[str, Sample] = {}
        for entrant in order:
            sample = attempt(entrant, entrant.turn)
            if sample is not None:
                samples[entrant.name] = sample
        for name, sample in samples.items():
            records[name].rounds.append(number)
            records[name].seconds.append(sample.seconds)
            records[name].cpu_seconds.append(sample.cpu_seconds)
            records[name].baseline_seconds.append(samples[BASELINE].seconds)
        active = [
            entrant
            for entrant in active
            if entrant.name in samples
            and not (entrant.peer and spent(records[entrant.name], budget))
        ]
    for entrant in entrants:
        if not out.excludes(entrant.name):
            attempt(entrant, entrant.finish)
        if not out.excludes(entrant.name):
            out.records.setdefault(entrant.name, records[entrant.name])
            out.facts.setdefault(entrant.name, entrant.facts)


def spent(record: Record, budget: float) -> bool:
    """Whether it has had its time."""
    return len(record.seconds) >= MIN_ROUNDS and sum(record.seconds) >= budget


def build(name: str, arena: Field, settings: Settings, out: Outcome) -> Entrant | None:
    """A contender that has taken its first steps, or None and a note why not."""
    contender = CONTENDERS[name]
    try:
        with time_limit(settings.limit) if contender.package else nullcontext():
            if contender.backend is not None:
                return Remote(name, settings)
            return Local(name, contender, arena)
    except Exception as error:  # noqa: BLE001, RUF100 - packages fail as they like
        out.exclude(name, error)
    finally:
        torch.set_num_threads(settings.threads)  # whatever a package thinks of it
    gc.collect()
    return None


def plan(names: list[str], first: float, base: float, room: float) -> list[list[str]]:
    """Groups of contenders that fit in ``room`` bytes a parameter together with ``base`` of them.

    ``first`` is what is in the first group besides. The back ends of one optimizer stay together,
    as they are compared with each other.
    """
    units: dict[str, list[str]] = {}
    for name in names:
        units.setdefault(name.partition(", ")[0], []).append(name)
    groups: list[list[str]] = [[]]
    used = [base + first]
    for unit in units.values():
        need = sum(CONTENDERS[name].needs for name in unit)
        place = next((i for i, taken in enumerate(used) if taken + need <= room), None)
        if place is None:
            groups.append([])
            used.append(base)
            place = len(groups) - 1
        groups[place] += unit
        used[place] += need
    return groups


def available_memory() -> int:
    """Bytes that can be taken without swapping."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable:"))


def measure(settings: Settings) -> dict[str, Any]:
    """Everything about one case."""
    torch.set_num_threads(settings.threads)
    case = CASES[settings.case]
    shapes = case.shapes(settings.elements)
    elements = sum(math.prod(shape) for shape in shapes)
    out = Outcome()
    names = []
    for name in settings.names:
        reason = LEFT_OUT.get((settings.case, name))
        if reason is not None:
            out.absent[name] = reason
        elif CONTENDERS[name].threads != settings.threads:
            names.append(name)
    room = MEMORY_SHARE * available_memory() / elements
    groups = plan(names, STREAM_NEEDS, FIELD_NEEDS + CONTENDERS[BASELINE].needs, room)
    arena = Field(shapes, case.dtype)
    for number, group in enumerate(groups):
        entrants: list[Entrant] = streams(elements, case.dtype) if number == 0 else []
        try:
            for name in (BASELINE, *group):
                entrant = build(name, arena, settings, out)
                if entrant is not None:
                    entrants.append(entrant)
            race(entrants, settings.rounds, settings.budget, number, out)
        finally:
            for entrant in entrants:
                entrant.close()
            gc.collect()
    order = {name: place for place, name in enumerate(CONTENDERS)}
    found = sorted(out.records, key=lambda name: order.get(name, -1))
    return {
        "case": settings.case,
        "title": case.title.format(settings.elements / 1e6),
        "threads": settings.threads,
        "elements": elements,
        "tensors": len(shapes),
        "backend": qadam.cpu_backend(),
        "groups": len(groups),
        "optimizers": {name: {**out.facts[name], **asdict(out.records[name])} for name in found},
        "absent": out.absent,
        "broken": out.broken,
    }


def main() -> None:
    """Measures a case, or serves as the other process of one."""
    settings = Settings(**json.loads(sys.argv[1]))
    if len(sys.argv) > 2:
        torch.set_num_threads(settings.threads)
        serve(sys.argv[2], settings)
        return
    Path(settings.out).write_text(json.dumps(measure(settings)))


if __name__ == "__main__":
    main()
