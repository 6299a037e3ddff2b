"""Draws what ``cpu.py`` measured: a panel a case and number of threads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # a file is written and no window opened, so no display is needed
from matplotlib import pyplot as plt


def color(name: str) -> str:
    """By whose it is."""
    families = {"stream": "0.7", "torch.optim": "C0", "qadam": "C1"}
    return next((c for family, c in families.items() if name.startswith(family)), "C2")


def panel(axes: Any, race: dict[str, Any]) -> None:  # noqa: ANN401 - matplotlib has no types
    """Medians of the ratios as bars, from the least to the most as whiskers."""
    rows = race["optimizers"]
    names = list(rows)
    ratios = [rows[name]["ratio"] for name in names]
    medians = [ratio["median"] for ratio in ratios]
    below = [ratio["median"] - ratio["min"] for ratio in ratios]
    above = [ratio["max"] - ratio["median"] for ratio in ratios]
    axes.barh(names, medians, color=[color(name) for name in names], xerr=(below, above), capsize=2)
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter("{x:g}")
    axes.axvline(1, color="black", linewidth=0.8)
    for place, ratio in enumerate(ratios):
        label = f" {ratio['median']:.2f}"
        axes.text(ratio["max"], place, label, va="center", fontsize="small")
    axes.invert_yaxis()
    axes.margins(x=0.15)
    axes.set_xlabel("time of a step, by torch's fused AdamW in the same round")
    axes.set_title(
        f"{race['case']}: {race['title']}, threads: {race['threads']}", fontsize="medium"
    )
    axes.grid(axis="x", alpha=0.3)


def draw(races: list[dict[str, Any]], path: Path) -> None:
    """Writes the chart, as a PNG."""
    cases = list(dict.fromkeys(race["case"] for race in races))
    threads = list(dict.fromkeys(race["threads"] for race in races))
    size = (8 * len(threads), 4.2 * len(cases))
    figure, grid = plt.subplots(
        len(cases), len(threads), figsize=size, squeeze=False, layout="constrained"
    )
    for axes in grid.flat:
        axes.set_visible(False)
    for race in races:
        axes = grid[cases.index(race["case"])][threads.index(race["threads"])]
        axes.set_visible(True)
        panel(axes, race)
    figure.suptitle("Bars: medians; whiskers: the least and the most of all rounds")
    figure.savefig(path, dpi=120)
    plt.close(figure)
