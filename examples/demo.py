"""The demo: one model, one seed, three optimizers.

Trains the GPT of `gpt.py` with each optimizer in `OPTIMIZERS`, one after the other, then
prints what each cost and what it reached, and writes `report.json` and `loss.png`.

    make demo                              # or:
    python examples/demo.py                # two to four minutes
    python examples/demo.py --quick        # a few seconds: does it all still run?
    python examples/demo.py --optimizers "torch.optim.AdamW(fused=True)" qadam.AdamW8bit

Exits with status 1 if a run diverges, after naming it.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import matplotlib
from machine import machine
from stdlib_text import Text, load
from train_gpt import Diverged, Run, TrainConfig, resolve, train

matplotlib.use("Agg")  # a file is written and no window opened, so no display is needed
from matplotlib import pyplot as plt

# The first one is what the others are compared with.
OPTIMIZERS = (
    "torch.optim.AdamW(fused=True)",
    "qadam.AdamW",
    "qadam.AdamW8bit",
    "qadam.PagedAdamW8bit",
)
DEFAULT_OUT = Path(__file__).resolve().parent.parent / "target" / "demo"


def quick(config: TrainConfig) -> TrainConfig:
    """The same path in a few seconds: same model, hardly any training."""
    return replace(
        config, steps=20, warmup=5, evaluations=2, evaluation_windows=64, corpus_bytes=400_000
    )


def difference_percent(run: Run, baseline: Run) -> float:
    """How much higher the final validation loss of ``run`` is."""
    return 100 * (run.final_val_loss / baseline.final_val_loss - 1)


def table(runs: list[Run]) -> str:
    """The runs as aligned text, one a line."""
    header = ("optimizer", "validation loss", "difference", "state bytes/param", "step ms")
    rows: list[tuple[str, ...]] = [header]
    rows += [
        (
            run.optimizer,
            f"{run.final_val_loss:.4f}",
            f"{difference_percent(run, runs[0]):+.2f} %" if number else "",
            f"{run.state_bytes_per_param:.2f}",
            f"{run.step_ms:.2f}",
        )
        for number, run in enumerate(runs)
    ]
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    rows.insert(1, tuple("-" * width for width in widths))
    return "\n".join(
        "  ".join(
            # Names to the left, numbers to the right.
            cell.rjust(width) if column else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    )


def report(runs: list[Run], config: TrainConfig, text: Text) -> dict[str, Any]:
    """The content of report.json."""
    return {
        "machine": machine(),
        "config": {**asdict(config), "corpus_sha256": text.digest},
        "runs": [
            {**asdict(run), "difference_percent": difference_percent(run, runs[0])} for run in runs
        ],
    }


def plot(runs: list[Run], path: Path) -> None:
    """Validation loss over the steps, and under it each run's distance to the first.

    The curves of optimizers that agree lie on each other, so the upper plot alone would
    show one line.
    """
    figure, (top, bottom) = plt.subplots(
        2, 1, sharex=True, figsize=(8, 6.5), height_ratios=(2, 1), layout="constrained"
    )
    baseline = [loss for _, loss in runs[0].val_loss]
    styles = ("-", "--", ":", "-.")
    for number, run in enumerate(runs):
        steps = [step for step, _ in run.val_loss]
        losses = [loss for _, loss in run.val_loss]
        differences = [100 * (x / y - 1) for x, y in zip(losses, baseline, strict=True)]
        # Later lines are thinner and broken, so that an earlier one shows through.
        style: dict[str, Any] = {
            "color": f"C{number}",
            "linestyle": styles[number % len(styles)],
            "linewidth": max(1.5, 4.0 - number),
        }
        label = f"{run.optimizer} ({run.state_bytes_per_param:.2f} state bytes a parameter)"
        top.plot(steps, losses, label=label, **style)
        bottom.plot(steps, differences, **style)
    top.set_title(
        f"GPT with {runs[0].parameters / 1e6:.2f} M parameters on Python's standard library"
    )
    top.set_ylabel("validation loss (nats a byte)")
    top.legend()
    bottom.set_ylabel("difference to the first (%)")
    bottom.set_xlabel("step")
    for axes in (top, bottom):
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main(argv: list[str] | None = None) -> int:
    """Trains with each optimizer, then prints, writes and plots what came of it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="a few steps only")
    parser.add_argument("--out", type=Path, default=DEFAULT_OUT, metavar="DIR")
    parser.add_argument("--optimizers", nargs="+", default=list(OPTIMIZERS), metavar="SPEC")
    parser.add_argument("--threads", type=int, default=TrainConfig.threads)
    args = parser.parse_args(argv)

    # A misspelt third optimizer should not cost two training runs to find.
    for spec in args.optimizers:
        try:
            resolve(spec)
        except (AttributeError, ImportError, SyntaxError, ValueError) as error:
            parser.error(f"{spec!r} is not an optimizer that can be used here: {error}")
    args.out.mkdir(parents=True, exist_ok=True)

    config = TrainConfig(threads=args.threads)
    if args.quick:
        config = quick(config)
    text = load(config.corpus_bytes)
    runs = []
    for spec in args.optimizers:
        try:
            runs.append(train(spec, config, text))
        except Diverged as error:
            print(f"diverged: {error}", file=sys.stderr)
            return 1

    (args.out / "report.json").write_text(json.dumps(report(runs, config, text), indent=2) + "\n")
    plot(runs, args.out / "loss.png")

    print(f"\n{table(runs)}\n")
    print(f"difference: of the validation loss, to {runs[0].optimizer}")
    print(
        f"{runs[0].parameters:,} parameters, {config.steps} steps, "
        f"{sum(run.seconds for run in runs):.0f} s in all, threads: {config.threads}"
    )
    print(f"written: {args.out / 'report.json'}, {args.out / 'loss.png'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
