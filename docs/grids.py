"""Draws docs/grids.png: the values of both 8-bit codes, and how far apart they are.

python docs/grids.py
"""

from pathlib import Path

import matplotlib as mpl
import numpy as np

from qadam import _core

mpl.use("Agg")
import matplotlib.pyplot as plt

HERE = Path(__file__).parent


def roots(octaves: float) -> np.ndarray:
    """The ratio code's values of v below a largest of 1, roots spanning so many octaves."""
    bits = np.float32(1.0).view(np.int32) - np.arange(511) / 510 * octaves * 2.0**23
    return bits.astype(np.int32).view(np.float32)[::-1].astype(float) ** 2


def errors_of_m(largest: np.ndarray) -> np.ndarray:
    """The dynamic code's largest error for first moments up to ``largest``, by that."""
    grid = np.array(_core.dynamic_map(True))
    grid = grid[grid >= 0]
    gaps = np.diff(grid) / 2
    below = np.searchsorted(grid, largest) - 1
    within = np.maximum.accumulate(gaps)
    # in the cell that it is in, as far as the cell's middle at most
    last = np.minimum(largest - grid[below], gaps[np.minimum(below, len(gaps) - 1)])
    return np.maximum(last, np.where(below > 0, within[np.maximum(below, 1) - 1], 0)) / largest


def main() -> None:
    """Writes the picture."""
    dynamic = np.array(_core.dynamic_map(False))[1:]
    grids = {"dynamic": dynamic, "ratio, 5 decades of gradients": roots(16.6)}
    grids["ratio, 2 octaves of gradients"] = roots(2.0)
    figure, (values, steps, first) = plt.subplots(1, 3, figsize=(15, 4), layout="constrained")
    for row, (name, grid) in enumerate(grids.items()):
        values.plot(grid, np.full(len(grid), -row), "|", markersize=14, label=name)
        middle = np.sqrt(grid[1:] * grid[:-1])
        steps.plot(middle, 50 * np.diff(grid) / middle, ".", markersize=3, label=name)
    values.set(
        xscale="log", yticks=[], title="values of v, the block's largest is 1", ylim=(-2.6, 1)
    )
    steps.set(xscale="log", yscale="log", title="largest error of the nearest value, % of v")
    values.legend(loc="upper left", ncols=1, fontsize=8)
    size = np.logspace(-10, 0, 400)
    first.plot(size, 100 * errors_of_m(size), label="dynamic")
    first.plot(
        size, np.full(len(size), 100 / 126), label="ratio, before the parameter makes up for it"
    )
    first.set(xscale="log", yscale="log", title="largest error of m, % of the element's largest m")
    first.set_xlabel("the element's gradients, by the block's largest")
    first.legend(loc="lower left", fontsize=8)
    for plot in (steps, first):
        plot.grid(alpha=0.3)
    figure.savefig(HERE / "grids.png", dpi=80)


if __name__ == "__main__":
    main()
