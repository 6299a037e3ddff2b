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


def main() -> None:
    """Writes the picture."""
    dynamic = np.array(_core.dynamic_map(False))[1:]
    grids = {"dynamic": dynamic, "ratio, 5 decades of gradients": roots(16.6)}
    grids["ratio, 2 octaves of gradients"] = roots(2.0)
    figure, (values, steps) = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    for row, (name, grid) in enumerate(grids.items()):
        values.plot(grid, np.full(len(grid), -row), "|", markersize=14, label=name)
        middle = np.sqrt(grid[1:] * grid[:-1])
        steps.plot(middle, 50 * np.diff(grid) / middle, ".", markersize=3, label=name)
    values.set(
        xscale="log", yticks=[], title="values of v, the block's largest is 1", ylim=(-2.6, 1)
    )
    steps.set(xscale="log", yscale="log", title="largest error of the nearest value, % of v")
    values.legend(loc="upper left", ncols=1, fontsize=8)
    steps.grid(alpha=0.3)
    figure.savefig(HERE / "grids.png", dpi=80)


if __name__ == "__main__":
    main()
