"""Draws what ``accuracy.py`` found: a panel a beta2 and number of steps, and the worst moves."""

from __future__ import annotations

import math
import statistics
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # a file is written and no window opened, so no display is needed
from accuracy_contenders import DYNAMIC, RATIO, TORCH
from matplotlib import pyplot as plt

Results = list[dict[str, Any]]

STYLES = {
    TORCH: ("0.6", "|"),
    DYNAMIC: ("C0", "s"),
    RATIO: ("C1", "D"),
    "bitsandbytes": ("C2", "^"),
    "torchao": ("C4", "v"),
    "FlashOptim, formulas": ("C3", "o"),
}
"""Colour and marker of a contender."""


def panel(axes: Any, results: Results, figure: str) -> None:  # noqa: ANN401 - matplotlib has no types
    """A line of dots for each row: the mean over the seeds, from the least to the most."""
    # the error of 32-bit state is a millionth of the others', which would lie on each other
    names = [name for name in results[0]["contenders"] if figure == "worst" or name != TORCH]
    for number, name in enumerate(names):
        # below each other, as many have the same place
        shift = (number - (len(names) - 1) / 2) * 0.7 / len(names)
        color, marker = STYLES.get(name, ("C5", "x"))
        for place, result in enumerate(results):
            values = result["contenders"][name][figure]
            if not all(math.isfinite(value) and value > 0 for value in values):
                continue
            label = name if place == 0 else None
            y = place + shift
            axes.plot([min(values), max(values)], [y, y], color=color, linewidth=1)
            mean = statistics.mean(values)
            axes.plot(mean, y, marker, color=color, markersize=5, linestyle="", label=label)
    if figure == "worst":
        for place, result in enumerate(results):
            true = max(result["worst"])
            label = "float64" if place == 0 else None
            axes.plot([true, true], [place - 0.4, place + 0.4], color="black", label=label)
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_tick_params(labelbottom=True)  # also where the axis is shared
    axes.set_yticks(range(len(results)), [result["row"] for result in results])
    axes.set_ylim(len(results) - 0.5, -0.5)
    for place in range(len(results) - 1):
        axes.axhline(place + 0.5, color="0.85", linewidth=0.8)
    axes.grid(axis="x", alpha=0.3)


def floor(results: Results) -> str:
    """What is not in the panels of errors."""
    errors = [
        x for r in results if TORCH in r["contenders"] for x in r["contenders"][TORCH]["error"]
    ]
    return f" {TORCH}: errors of at most {max(errors):.1g}, not shown." if errors else ""


def draw(results: Results, path: Path) -> None:
    """Writes the chart, as a PNG."""
    betas = list(dict.fromkeys(result["beta2"] for result in results))
    steps = list(dict.fromkeys(result["steps"] for result in results))
    rows = len({result["row"] for result in results})
    width = len(steps) + 1
    figure, grid = plt.subplots(
        len(betas),
        width,
        figsize=(5.5 * width + 1.5, len(betas) * (0.55 * rows + 1.4)),
        sharex="col",
        sharey=True,
        squeeze=False,
        layout="constrained",
    )
    for line, beta2 in zip(grid, betas, strict=True):
        for number, axes in enumerate(line):
            count = steps[min(number, len(steps) - 1)]
            shown = [r for r in results if r["beta2"] == beta2 and r["steps"] == count]
            figure_of = "error" if number < len(steps) else "worst"
            panel(axes, shown, figure_of)
            axes.set_title(f"$\\beta_2$ = {beta2}, {count:,} steps", fontsize="medium")
            unit = "mean updates" if figure_of == "error" else "learning rates"
            what = "error of a parameter" if figure_of == "error" else "worst move in a step"
            axes.set_xlabel(f"{what}, in {unit}")
    handles, labels = grid[0][-1].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=len(labels))
    figure.supxlabel(
        f"Dots: means over the seeds; lines: from the least to the most.{floor(results)}",
        fontsize="small",
    )
    figure.savefig(path, dpi=120)
    plt.close(figure)
