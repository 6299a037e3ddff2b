"""Steps of the paged optimizers: beside the unpaged ones, and beside the disk.

    python benches/paging.py               # everything, 2 threads
    python benches/paging.py --quick       # small and short: does it all still run?
    python benches/paging.py --parts over-committed --bits 8

resident: paged and unpaged steps take turns in one process, all state in memory; reported is the
median of the ratio of neighbours, on the CPU and, where there is one, on a GPU, within a quarter of
its free memory.

over-committed (CPU): state of 4 times the memory that a process may use. Its parameters and
gradients are bfloat16 and lie in shared memory outside of the limit, which is that of a memory
control group; where none can be made, ``QADAM_PAGE_MEMORY`` takes its place for the paged
optimizer, and ``RLIMIT_DATA`` for the unpaged one. Steps take turns with ``disk.py``'s streams in
the same directory, and are compared with the time that the disk needs for the bytes that the step
read from it and changed in memory for it, by ``/proc/self/io``: of the state once each way, at
most. What the arithmetic alone takes is measured beside it, on as many elements of unpaged state in
parts. Afterwards each parameter must be bit for bit what unpaged steps make of it.

Writes ``target/bench/paging.json`` with every sample.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from contest import commit, gpt2_shapes
from disk import BLOCK, Disk, Streams
from paging_worker import ELEMENTS, tensors
from torch import Tensor
from torch.optim import Optimizer

import qadam

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT / "examples"))

PARTS = ("resident", "over-committed")
NAMES = {32: ("AdamW", "PagedAdamW"), 8: ("AdamW8bit", "PagedAdamW8bit")}
"""The unpaged optimizer and the paged one, by bits."""
STATE_BYTES = {32: 8.0, 8: 2 + 2 * 4 / 256}
"""Bytes of state an element."""
RESIDENT: dict[str, Callable[[], list[tuple[int, ...]]]] = {
    "100 K": lambda: [(100_000,)],
    "1 M": lambda: [(1_000_000,)],
    "64 M": lambda: [(64_000_000,)],
    "GPT-2 124M": gpt2_shapes,
}
OVER = 4
"""How many times its memory the state takes."""
TILE = 1 << 20
"""Elements after which gradients repeat themselves: so do parameters, then."""


@dataclass(frozen=True)
class Settings:
    """How much is measured."""

    rounds: int
    """Pairs of resident steps, and over-committed steps are a quarter of that."""
    memory: dict[int, int]
    """Bytes of memory for the over-committed steps, by bits: torch takes 400 MB of them."""
    elements: int
    """A sample of small parameters has as many steps as updates so many elements."""


FULL = Settings(rounds=31, memory={32: 1 << 30, 8: 768 << 20}, elements=8_000_000)
QUICK = Settings(rounds=4, memory={32: 448 << 20, 8: 448 << 20}, elements=1_000_000)


def middle(samples: Sequence[float]) -> str:
    """The median and how far samples spread."""
    return f"{statistics.median(samples):.3f} ({min(samples):.3f} to {max(samples):.3f})"


# Resident.


def resident(
    shapes: list[tuple[int, ...]], bits: int, device: str, settings: Settings
) -> dict[str, list[float]]:
    """Seconds of a step in every round, by optimizer."""
    generator = torch.Generator(device).manual_seed(0)
    grads = [torch.randn(s, generator=generator, device=device).mul_(0.01) for s in shapes]
    optimizers: dict[str, Optimizer] = {}
    for name in NAMES[bits]:
        params = [torch.full_like(g, 0.5).requires_grad_() for g in grads]
        for param, grad in zip(params, grads, strict=True):
            param.grad = grad
        optimizers[name] = getattr(qadam, name)(params)
    repeats = max(1, settings.elements // sum(g.numel() for g in grads))
    clock = device_seconds if device == "cuda" else host_seconds
    seconds: dict[str, list[float]] = {name: [] for name in optimizers}
    for number in range(settings.rounds + 2):  # two to warm up
        for name in NAMES[bits][:: 1 if number % 2 else -1]:
            elapsed = clock(optimizers[name], repeats) / repeats
            if number >= 2:
                seconds[name].append(elapsed)
    unpaged, paged = (o.param_groups[0]["params"] for o in optimizers.values())
    check(all(torch.equal(a, b) for a, b in zip(unpaged, paged, strict=True)))
    return seconds


def check(same: bool) -> None:
    """Raises if paging changed a bit."""
    if not same:
        msg = "paged steps and unpaged ones made different parameters"
        raise RuntimeError(msg)


def host_seconds(optimizer: Optimizer, steps: int) -> float:
    """What ``steps`` take."""
    start = time.perf_counter()
    for _ in range(steps):
        optimizer.step()
    return time.perf_counter() - start


def device_seconds(optimizer: Optimizer, steps: int) -> float:
    """What ``steps`` take on the GPU."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    start.record()
    for _ in range(steps):
        optimizer.step()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) / 1000


def all_resident(widths: list[int], settings: Settings) -> list[dict[str, Any]]:
    """Runs and prints the resident cases."""
    cases = [("cpu", name, shapes()) for name, shapes in RESIDENT.items()]
    if torch.cuda.is_available():
        # two parameters, a gradient and the state of both optimizers, all f32
        elements = torch.cuda.mem_get_info()[0] // 4 // (3 * 4 + 2 * 8)
        cases += [("cuda", f"{n / 1e6:.0f} M", [(n,)]) for n in (1_000_000, elements)]
    results = []
    print("\nresident: paged step by unpaged step")
    for device, name, shapes in cases:
        for bits in widths:
            seconds = resident(shapes, bits, device, settings)
            unpaged, paged = seconds.values()
            ratios = [p / u for p, u in zip(paged, unpaged, strict=True)]
            milliseconds = statistics.median(paged) * 1e3
            print(f"  {device} {name:10} {bits:2} bits  {middle(ratios)}  {milliseconds:.3f} ms")
            results.append({"device": device, "case": name, "bits": bits, "seconds": seconds})
    return results


# Over-committed.


class Group:
    """A memory control group of a process that has yet to start, version 1 or 2."""

    def __init__(self, limit: int) -> None:
        root = Path("/sys/fs/cgroup")
        self._version_1 = (root / "memory").is_dir()
        self._path = (root / "memory" if self._version_1 else root) / f"qadam-bench-{os.getpid()}"
        self._path.mkdir()
        try:
            if self._version_1:
                self._write("memory.limit_in_bytes", limit)
                self._write("memory.memsw.limit_in_bytes", limit, optional=True)
            else:
                self._write("memory.max", limit)
                self._write("memory.swap.max", 0, optional=True)
        except OSError:
            self.close()
            raise

    def _write(self, name: str, value: int, optional: bool = False) -> None:
        if (self._path / name).exists() or not optional:
            (self._path / name).write_text(str(value))

    def enter(self, command: list[str]) -> list[str]:
        """A command that does ``command`` in the group, from its first page on."""
        join = 'echo $$ > "$0" && exec "$@"'
        return ["sh", "-c", join, str(self._path / "cgroup.procs"), *command]

    def kills(self) -> int:
        """How many processes of the group the kernel has killed for their memory."""
        name = "memory.oom_control" if self._version_1 else "memory.events"
        lines = (self._path / name).read_text().splitlines()
        return int(next(line.split()[1] for line in lines if line.startswith("oom_kill ")))

    def peak(self) -> int:
        """The most that the group has taken, in bytes."""
        name = "memory.max_usage_in_bytes" if self._version_1 else "memory.peak"
        return int((self._path / name).read_text())

    def close(self) -> None:
        """Removes the group, which nothing is in any more."""
        self._path.rmdir()


class Ended(Exception):  # noqa: N818 - an event
    """The worker is no more; says how it ended."""


class Worker:
    """A process with an optimizer, whose memory is limited in ``group`` or, without one, itself."""

    def __init__(self, optimizer: str, limit: int, group: Group | None, **options: int) -> None:
        command = [sys.executable, str(ROOT / "benches" / "paging_worker.py")]
        command += ["--optimizer", optimizer]
        command += [word for key, value in options.items() for word in (f"--{key}", str(value))]
        environment = dict(os.environ)
        if group is not None:
            command = group.enter(command)
        elif optimizer.startswith("Paged"):
            environment["QADAM_PAGE_MEMORY"] = str(limit)
        else:
            command += ["--data-limit", str(limit)]
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(  # noqa: S603 - the command is made here
            command,
            text=True,
            stdin=pipe,
            stdout=pipe,
            stderr=pipe,
            env=environment,
            pass_fds=(options["file"],),
        )

    def ask(self, what: str) -> dict[str, Any]:
        """Has it do ``what``.

        Raises:
            Ended: if the process did not live to answer.
        """
        process = self._process
        assert process.stdin is not None  # noqa: S101 - for mypy, as these are pipes
        assert process.stdout is not None  # noqa: S101
        assert process.stderr is not None  # noqa: S101
        try:
            process.stdin.write(f"{what}\n")
            process.stdin.flush()
        except BrokenPipeError:
            pass  # it has ended: so has its output
        answer = process.stdout.readline()
        if answer:
            return dict(json.loads(answer))
        lines = process.stderr.read().strip().splitlines()
        code = process.wait()
        how = f"killed ({signal.Signals(-code).name})" if code < 0 else f"ended with status {code}"
        raise Ended(f"{how} in '{what}'" + (f": {lines[-1]}" if lines else ""))

    def close(self) -> None:
        """Ends the process, if it has not ended."""
        self._process.kill()
        self._process.communicate()


@contextmanager
def limited(optimizer: str, limit: int, **options: int) -> Iterator[tuple[Worker, Group | None]]:
    """A worker under a limit, in a control group if one can be made."""
    try:
        group = Group(limit)
    except OSError:
        group = None
    try:
        with closing(Worker(optimizer, limit, group, **options)) as worker:
            yield worker, group
    finally:
        if group is not None:
            group.close()


def over_committed(bits: int, settings: Settings, directory: Path, threads: int) -> dict[str, Any]:
    """Measures the paged optimizer beside the disk, and lets the unpaged one meet its end."""
    limit = settings.memory[bits]
    count = -(-OVER * limit // int(STATE_BYTES[bits] * TILE)) * TILE
    steps = max(2, settings.rounds // 4)
    file = os.memfd_create("qadam-bench")
    os.ftruncate(file, 4 * count)
    params, grads = tensors(file, count)
    pattern = torch.randn(TILE, generator=torch.Generator().manual_seed(0)).mul_(0.01).bfloat16()
    for grad in grads:
        grad.view(-1, TILE).copy_(pattern)  # touched here: counted here
    options = {"file": file, "count": count, "threads": threads}
    result: dict[str, Any] = {"bits": bits, "limit": limit, "elements": count}
    unpaged, paged = NAMES[bits]

    refill(params)
    with limited(unpaged, limit, **options) as (worker, group):
        result["limited_by"] = "memory control group" if group else "QADAM_PAGE_MEMORY, RLIMIT_DATA"
        try:
            for _ in range(3):
                worker.ask("step")
            result["unpaged"] = "lived through 3 steps"
        except Ended as end:
            result["unpaged"] = str(end)
        result["unpaged_out_of_memory_kills"] = group.kills() if group else None

    refill(params)
    size = -(-OVER * limit // BLOCK) * BLOCK
    with (
        limited(paged, limit, **options) as (worker, group),
        closing(Disk(directory, size)) as disk,
    ):
        result["first"] = worker.ask("step")
        result["warm_up"] = [worker.ask("step")]
        part = unpaged_part(unpaged)
        result["disk"], result["arithmetic"], result["steps"] = [], [], []
        for number in range(steps + 1):
            if number > 0:
                result["steps"].append(worker.ask("step"))
            result["disk"].append(asdict(disk.measure()))
            result["arithmetic"].append(host_seconds(part, 5) / 5 * count / ELEMENTS)
        try:
            result["load"] = worker.ask("load")
            result["after_load"] = worker.ask("step")
            result["load_ended"] = None
        except Ended as end:
            result["load_ended"] = str(end)
        result["peak"] = group.peak() if group else None
        result["paged_out_of_memory_kills"] = group.kills() if group else None

    check_tiles(params, pattern, unpaged, steps + 2 + ("after_load" in result))
    os.close(file)
    return result


def unpaged_part(optimizer: str) -> Optimizer:
    """An unpaged optimizer of one parameter, which has stepped."""
    param = torch.full((ELEMENTS,), 0.5, dtype=torch.bfloat16, requires_grad=True)
    param.grad = torch.full_like(param, 0.01)
    made: Optimizer = getattr(qadam, optimizer)([param])
    made.step()
    return made


def refill(params: list[Tensor]) -> None:
    """Puts all parameters where they began."""
    for param in params:
        param.fill_(0.5)


def check_tiles(params: list[Tensor], grad: Tensor, optimizer: str, steps: int) -> None:
    """Raises unless each tile of ``params`` is what ``steps`` of ``optimizer`` make of one."""
    one = torch.full_like(grad, 0.5).requires_grad_()
    one.grad = grad
    alone = getattr(qadam, optimizer)([one])
    for _ in range(steps):
        alone.step()
    check(all(torch.equal(tile, one) for param in params for tile in param.view(-1, TILE)))


def ratios(result: dict[str, Any]) -> list[float]:
    """Of each step: the disk's time for its bytes, before and after it, by the step's."""
    streams = [Streams(**sample) for sample in result["disk"]]
    found = []
    for step, before, after in zip(result["steps"], streams, streams[1:], strict=False):
        read, written = (min(step[name], step["state"]) for name in ("read", "written"))
        found.append(Streams.mean(before, after).floor(read, written) / step["seconds"])
    return found


def print_over_committed(result: dict[str, Any]) -> None:
    """What was found, in words."""
    steps, state = result["steps"], result["first"]["state"]
    print(
        f"\nover-committed, {result['bits']} bits: state {state / 1e9:.2f} GB,"
        f" {state / result['limit']:.2f} times the memory ({result['limited_by']})"
    )
    kills = result["unpaged_out_of_memory_kills"]
    print(f"  unpaged: {result['unpaged']}" + ("" if kills is None else f"; {kills} killed by it"))
    for name in ("first", "load", "after_load"):
        if name in result:
            print(f"  paged, {name.replace('_', ' ')}: {result[name]['seconds']:.2f} s")
    if result["load_ended"]:
        print(f"  paged, load: {result['load_ended']}")
    for name in ("read", "write", "both"):
        rates = [Streams(**sample).rates()[name] / 1e9 for sample in result["disk"]]
        print(f"  disk, {name}: {middle(rates)} GB/s")
    print(f"  paged, steps: {middle([step['seconds'] for step in steps])} s")
    for name in ("read", "written"):
        print(f"  {name} in a step: {middle([step[name] / 1e9 for step in steps])} GB")
    rates = [(step["read"] + step["written"]) / step["seconds"] / 1e9 for step in steps]
    print(f"  rate: {middle(rates)} GB/s")
    print(f"  arithmetic alone: {middle(result['arithmetic'])} s")
    print(f"  disk's time by step's: {middle(ratios(result))}, 0.70 and more is wanted")
    if result["peak"] is not None:
        print(f"  peak {result['peak'] / result['limit']:.2f} of the memory")


def main() -> None:
    """Runs the parts, prints what they found and writes the samples."""
    from machine import machine  # of the examples

    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--bits", nargs="+", type=int, choices=NAMES, default=list(NAMES))
    parser.add_argument("--quick", action="store_true", help="small and short")
    parser.add_argument("--threads", type=int, default=2)
    out = ROOT / "target" / "bench" / "paging.json"
    parser.add_argument("--out", type=Path, default=out)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    settings = QUICK if options.quick else FULL
    directory = Path(os.environ.get("QADAM_PAGE_DIR") or "/var/tmp")  # noqa: S108 - qadam's own

    report: dict[str, Any] = {
        "machine": machine(),
        "load": os.getloadavg(),
        "commit": commit(),
        "backend": qadam.cpu_backend(),
        "directory": str(directory),
        "settings": asdict(settings),
    }
    print("\n".join(f"{key}: {value}" for key, value in report.items()))
    if "resident" in options.parts:
        report["resident"] = all_resident(options.bits, settings)
    if "over-committed" in options.parts:
        report["over_committed"] = []
        for bits in options.bits:
            result = over_committed(bits, settings, directory, options.threads)
            print_over_committed(result)
            report["over_committed"].append({**result, "ratios": ratios(result)})
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(report, indent=1))
    print(f"\nwrote {options.out}")


if __name__ == "__main__":
    main()
