"""How far 8-bit states lead Adam astray: a closed loop beside Adam in float64.

    python benches/accuracy.py                      # all rows, contenders and seeds, 3,000 steps
    python benches/accuracy.py --quick              # 2 seeds, 400 steps
    python benches/accuracy.py --only qadam --rows Zipf "2%" --beta2 0.999 --seeds 0 1 2

All contenders get the same f32 gradients (``accuracy_rows.py``) step by step, and each builds on
the state that it kept; so does a reference in float64. Reported are, for each row and seed, after
some numbers of steps:

- the error: the mean distance of a parameter from the reference's, in units of the reference's mean
  update (over elements and steps);
- the worst move: the largest that a parameter made in a step, in units of the learning rate, beside
  the reference's. With float64 it is near 1.

Writes ``target/accuracy/report.json`` with every figure, and ``target/accuracy/accuracy.png``.
Exits with status 1 if qadam's ratio code misses a bound (``MAX_ERROR``, ``MAX_WORST``). A peer that
cannot be had is absent, with the reason.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from accuracy_chart import draw
from accuracy_contenders import CONTENDERS, DYNAMIC, RATIO, parameters, set_rate
from accuracy_rows import BLOCK, ROWS, Row
from contest import ROOT, commit, time_limit, versions
from torch import Tensor

sys.path.append(str(ROOT / "examples"))

OUT = ROOT / "target" / "accuracy"
LR, BETA1, EPS = 1e-3, 0.9, 1e-8
MAX_ERROR = 0.6
"""Of the dynamic code's error is what the ratio code may have in a bounded row."""
MAX_WORST = 1.5
"""Of the reference's worst move."""
BOUNDED_BETA2 = 0.999
PATIENCE = 300.0
"""Seconds for a peer's first step: torchao compiles."""


@dataclass(frozen=True)
class Settings:
    """What one run measures."""

    steps: tuple[int, ...] = (400, 3000)
    """When to report; the last one ends the run."""
    beta2: tuple[float, ...] = (0.999, 0.95)
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    elements: int = 8192
    """Of a row, for each seed."""


QUICK = Settings(steps=(400,), seeds=(0, 1))


class Reference:
    """Adam in float64, for all rows and seeds at once; and the mean and the largest updates."""

    def __init__(self, shape: Sequence[int], betas: tuple[float, float]) -> None:
        self.betas = betas
        self.steps = 0
        self.values, self.m, self.v = (torch.zeros(*shape, dtype=torch.float64) for _ in range(3))
        self.total = torch.zeros(*shape[:-1], dtype=torch.float64)
        """Of the updates' magnitudes, by row and seed: a step's mean over the elements."""
        self.worst = torch.zeros(*shape[:-1], dtype=torch.float64)
        """In units of the learning rate."""

    def step(self, gradients: Tensor, rates: Tensor) -> None:
        """An update; ``rates`` has a learning rate for each row."""
        (beta1, beta2), g = self.betas, gradients.double()
        self.steps += 1
        self.m.mul_(beta1).add_(g, alpha=1 - beta1)
        self.v.mul_(beta2).addcmul_(g, g, value=1 - beta2)
        c1, c2 = 1 - beta1**self.steps, 1 - beta2**self.steps
        update = (self.m / c1).div_((self.v / c2).sqrt_().add_(EPS))
        self.values.sub_(update * rates[:, None, None])
        size = update.abs_()
        self.total.add_(size.mean(-1) * rates[:, None])
        self.worst.copy_(self.worst.maximum(size.amax(-1)))

    def mean_update(self) -> Tensor:
        """By row and seed."""
        return self.total / self.steps


class Racer:
    """A contender with its parameters, one for each row with all seeds in it."""

    def __init__(self, name: str, gradients: Tensor, betas: tuple[float, float]) -> None:
        self.name = name
        self.peer = CONTENDERS[name].package is not None
        self.values = torch.zeros_like(gradients)
        self.worst = torch.zeros(gradients.shape[:-1])
        self.seconds = 0.0
        self._before = torch.zeros_like(gradients)
        groups = [{"params": [param]} for param in parameters(self.values, gradients)]
        hyper = {"lr": LR, "betas": betas, "eps": EPS}
        self._optimizer = CONTENDERS[name].make(groups, hyper)

    def step(self, rates: Tensor) -> None:
        """An update of all rows, which is looked at."""
        self._before.copy_(self.values)
        set_rate(self._optimizer, rates.tolist())
        started = time.perf_counter()
        self._optimizer.step()
        self.seconds += time.perf_counter() - started
        moves = self._before.sub_(self.values).abs_().amax(-1) / rates[:, None].float()
        self.worst = self.worst.maximum(moves)  # NaN stays NaN

    def error(self, reference: Reference) -> Tensor:
        """By row and seed, in mean updates."""
        distance = (self.values.double() - reference.values).abs_().mean(-1)
        return distance / reference.mean_update()


@dataclass
class Outcome:
    """What became of the contenders."""

    results: list[dict[str, Any]] = field(default_factory=list)
    """One for each beta2, number of steps and row."""
    absent: dict[str, str] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    """Of all steps of a contender."""


def leave(name: str, error: Exception, out: Outcome) -> None:
    """Makes a peer absent; what is wrong with our own is raised."""
    if CONTENDERS[name].package is None:
        raise error
    lines = str(error).strip().splitlines()
    out.absent[name] = f"{type(error).__name__}: {lines[-1] if lines else ''}"


def race(
    rows: Sequence[Row], names: list[str], beta2: float, settings: Settings, out: Outcome
) -> None:
    """Runs all contenders side by side, with one beta2."""
    shape = (len(rows), len(settings.seeds), settings.elements)
    steps = max(settings.steps)
    draws = [[row.draw(seed, settings.elements, steps) for seed in settings.seeds] for row in rows]
    gradients = torch.zeros(shape)
    betas = (BETA1, beta2)
    reference = Reference(shape, betas)
    racers = []
    for name in names:
        if name not in out.absent:
            try:
                racers.append(Racer(name, gradients, betas))
            except Exception as error:  # noqa: BLE001, RUF100 - packages fail as they like
                leave(name, error, out)
    for step in range(1, steps + 1):
        for row_draws, row_gradients in zip(draws, gradients, strict=True):
            for make, gradient in zip(row_draws, row_gradients, strict=True):
                gradient.copy_(make(step))
        rates = torch.tensor([LR * row.rate(step, steps) for row in rows], dtype=torch.float64)
        reference.step(gradients, rates)
        for racer in list(racers):
            try:
                # a peer may compile at its first step
                with time_limit(PATIENCE):
                    racer.step(rates)
            except Exception as error:  # noqa: BLE001, RUF100 - packages fail as they like
                leave(racer.name, error, out)
                racers.remove(racer)
        if step in settings.steps:
            out.results += report(rows, racers, reference, beta2)
            print(table(out.results[-len(rows) :]), flush=True)
    for racer in racers:
        out.seconds[racer.name] = out.seconds.get(racer.name, 0.0) + racer.seconds


def report(
    rows: Sequence[Row], racers: list[Racer], reference: Reference, beta2: float
) -> list[dict[str, Any]]:
    """The figures of each row so far, a number for each seed."""
    errors = {racer.name: racer.error(reference) for racer in racers}
    return [
        {
            "row": row.title,
            "beta2": beta2,
            "steps": reference.steps,
            "mean_update": reference.mean_update()[number].tolist(),
            "worst": reference.worst[number].tolist(),
            "contenders": {
                racer.name: {
                    "error": errors[racer.name][number].tolist(),
                    "worst": racer.worst[number].tolist(),
                }
                for racer in racers
            },
        }
        for number, row in enumerate(rows)
    ]


def bounds(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The ratio code beside its bounds, in every result that has some and both codes."""
    bounded = {row.title for row in ROWS if row.bounded}
    found = []
    for result in results:
        rows = result["contenders"]
        if result["row"] not in bounded or result["beta2"] != BOUNDED_BETA2:
            continue
        if DYNAMIC not in rows or RATIO not in rows:
            continue
        own, dynamic = rows[RATIO], rows[DYNAMIC]
        error = statistics.mean(own["error"]) / statistics.mean(dynamic["error"])
        true = max(result["worst"])
        # each by itself: max() overlooks a NaN
        kept = error <= MAX_ERROR and all(worst <= MAX_WORST * true for worst in own["worst"])
        found.append(
            {
                "row": result["row"],
                "steps": result["steps"],
                "error_by_dynamic": error,
                "worst_by_true": max(own["worst"]) / true,
                "kept": kept,
            }
        )
    return found


def table(results: list[dict[str, Any]]) -> str:
    """The results of one beta2 and number of steps, as aligned text."""
    first = results[0]
    names = list(first["contenders"])
    lines = [
        f"\nbeta2 {first['beta2']}, {first['steps']:,} steps: mean error in mean updates"
        " (worst move in learning rates)",
        " ".join([f"{'':28}", f"{'float64':>9}", *(f"{name:>20}" for name in names)]),
    ]
    for result in results:
        cells = [f"{result['row']:28}", f"{'(' + short(max(result['worst'])) + ')':>9}"]
        for own in result["contenders"].values():
            error, worst = statistics.mean(own["error"]), max(own["worst"])
            cells.append(f"{short(error)} ({short(worst)})".rjust(20))
        lines.append(" ".join(cells))
    return "\n".join(lines)


def short(value: float) -> str:
    """Three digits, more or less."""
    if not math.isfinite(value) or value >= 100:
        return f"{value:.0f}"
    return f"{value:.2g}" if value < 0.1 else f"{value:.2f}"


def verdict(kept: list[dict[str, Any]]) -> str:
    """The bounds as text."""
    if not kept:
        return f"\nno bounds: they need {DYNAMIC} and {RATIO} at beta2 {BOUNDED_BETA2}"
    lines = [
        f"\n{RATIO}: error by the dynamic code's (at most {MAX_ERROR}),"
        f" worst move by float64's (at most {MAX_WORST})"
    ]
    lines += [
        f"  {'kept ' if bound['kept'] else 'WRONG'} {bound['row']}, {bound['steps']:,} steps:"
        f" {bound['error_by_dynamic']:.2f}, {bound['worst_by_true']:.2f}"
        for bound in kept
    ]
    return "\n".join(lines)


def finite(value: Any) -> Any:  # noqa: ANN401
    """The same with null for what JSON has no number for."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def chosen(parts: list[str] | None, names: list[str]) -> list[str]:
    """The names that have one of the parts in them."""
    return [name for name in names if parts is None or any(part in name for part in parts)]


def parser() -> argparse.ArgumentParser:
    """What the command line takes."""
    made = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    made.add_argument("--quick", action="store_true", help="2 seeds, 400 steps")
    made.add_argument("--steps", nargs="+", type=int, help="when to report; the last ends the run")
    made.add_argument("--beta2", nargs="+", type=float)
    made.add_argument("--seeds", nargs="+", type=int)
    made.add_argument("--elements", type=int, help=f"of a row and seed; {BLOCK} divides it")
    made.add_argument("--rows", nargs="+", metavar="PART", help="rows by part of their name")
    made.add_argument("--only", nargs="+", metavar="PART", help="contenders by part of their name")
    made.add_argument("--threads", type=int, default=1)
    made.add_argument("--out", type=Path, default=OUT, help="the directory of the report")
    return made


def main(argv: list[str] | None = None) -> int:
    """Races all, prints the tables, writes the figures and the chart."""
    from machine import machine  # of the examples

    options = parser().parse_args(argv)
    base = QUICK if options.quick else Settings()
    given = {key: getattr(options, key) for key in asdict(base)}
    settings = Settings(**{**asdict(base), **{k: v for k, v in given.items() if v is not None}})
    if settings.elements % BLOCK != 0:
        parser().error(f"--elements {settings.elements}: must be a multiple of {BLOCK}")
    titles = chosen(options.rows, [row.title for row in ROWS])
    rows = [row for row in ROWS if row.title in titles]
    names = chosen(options.only, list(CONTENDERS))
    if not rows or not names:
        parser().error("no row, or no contender, has such a name")
    torch.set_num_threads(options.threads)
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(OUT / "inductor"))
    facts = {
        "machine": machine(),
        "load": os.getloadavg(),
        "commit": commit(),
        "versions": versions(c.package for c in CONTENDERS.values()),
        "arguments": sys.argv[1:] if argv is None else argv,
        "settings": asdict(settings),
        "hyper": {"lr": LR, "beta1": BETA1, "eps": EPS, "weight_decay": 0.0},
    }
    print("\n".join(f"{key}: {value}" for key, value in facts.items()))

    out = Outcome()
    started = time.perf_counter()
    for beta2 in settings.beta2:
        race(rows, names, beta2, settings, out)
    kept = bounds(out.results)
    print(verdict(kept))
    for name, reason in out.absent.items():
        print(f"absent: {name}: {reason}")

    options.out.mkdir(parents=True, exist_ok=True)
    notes = {name: CONTENDERS[name].note for name in names if CONTENDERS[name].note}
    content = {
        **facts,
        "seconds": time.perf_counter() - started,
        "step_seconds": out.seconds,
        "notes": notes,
        "absent": out.absent,
        "bounds": kept,
        "results": out.results,
    }
    path = options.out / "report.json"
    path.write_text(json.dumps(finite(content), indent=1, allow_nan=False) + "\n")
    draw(out.results, options.out / "accuracy.png")
    print(f"{content['seconds']:.0f} s; wrote {path} and accuracy.png")
    return 0 if all(bound["kept"] for bound in kept) else 1


if __name__ == "__main__":
    sys.exit(main())
