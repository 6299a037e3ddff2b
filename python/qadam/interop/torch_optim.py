"""``torch.optim.Adam`` and ``AdamW``: their state is qadam's own at 32 bits.

Nothing is to be done to read it.
"""

from __future__ import annotations

from typing import Any

from qadam import layout
from qadam.layout import Entry

OPTIONS = {
    "amsgrad": False,
    "maximize": False,
    "foreach": None,
    "capturable": False,
    "differentiable": False,
    "fused": None,
    "decoupled_weight_decay": False,
}
"""What torch's groups have besides numbers, and its defaults."""


def write(entry: Entry, where: str) -> Entry:
    """The state of one parameter at 32 bits, checked, on the CPU, in its memory order.

    Without the history of norms: torch would carry it along unused, and it would be out of date.
    """
    written = layout.rest(entry, layout.KEYS, where)
    written["step"] = layout.read_step(entry, where)
    written |= {name: values.clone() for name, values in layout.values(entry, where).items()}
    return written


def write_group(group: dict[str, Any], where: str) -> dict[str, Any]:
    """A group with every key that torch's have."""
    del where
    return {**OPTIONS, **group}
