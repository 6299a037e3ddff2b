"""Paged state: which parameters have it, its memory, and how much memory an optimizer takes."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from qadam import _core, layout
from qadam.state import Entry, Format, Pages

LEAST = 100_000
"""Elements that a parameter must have for its state to be paged: moving less is not worth it."""

Memory = dict[str, dict[str, int]]
"""Bytes by tier ("device", "managed", "host", "mapped") and use ("state", "scales", "work")."""


def allocate(wanted: Sequence[tuple[Tensor, Format]]) -> list[Pages | None]:
    """Paged memory, one arena a device, for parameters whose state is stored so.

    Parameters of fewer than :data:`LEAST` elements get None: their state is not paged.

    Raises:
        OSError: if the files of CPU parameters cannot be made, or the disk has no room.
        RuntimeError: if a device has no managed memory, or not enough.
    """
    pages: list[Pages | None] = [None] * len(wanted)
    devices: dict[torch.device, list[int]] = defaultdict(list)
    for position, (param, _) in enumerate(wanted):
        if param.numel() >= LEAST:
            devices[param.device].append(position)
    for positions in devices.values():
        sizes = [
            (
                param.numel(),
                stored.code if stored.bits == 8 else None,
                stored.amsgrad,
                stored.block_wise,
            )
            for param, stored in map(wanted.__getitem__, positions)
        ]
        made = _core.page_state(wanted[positions[0]][0], sizes)
        for position, of_param in zip(positions, made, strict=True):
            pages[position] = of_param
    return pages


def check(params: Iterable[Tensor]) -> None:
    """Raises unless the state of ``params`` can be paged, as :func:`allocate` would."""
    for param in {p.device: p for p in params if p.numel() >= LEAST}.values():
        _core.check_paging(param)


def is_paged(entry: Entry) -> bool:
    """Whether a parameter's state is paged."""
    tensors = (value for key, value in entry.items() if str(key).startswith("exp_avg"))
    tensors = (t for t in tensors if isinstance(t, Tensor) and layout.lacks(t) is None)
    return any(_core.memory_tier(t)[1] is not None for t in tensors)


def memory(entries: Iterable[Entry], device_work: int, host_work: int) -> Memory:
    """Where the bytes of ``entries`` are; the work space of launches is given."""
    taken: Memory = {
        tier: dict.fromkeys(("state", "scales", "work"), 0)
        for tier in ("device", "managed", "host", "mapped")
    }
    arenas: dict[int, tuple[str, int]] = {}
    for entry in entries:
        for key, value in entry.items():
            if isinstance(value, Tensor) and layout.lacks(value) is None:
                tier, arena = _core.memory_tier(value)
                is_scale = str(key).endswith(("_scale", "_range"))
                taken[tier]["scales" if is_scale else "state"] += value.nbytes
                if arena is not None:
                    arenas[arena[0]] = (tier, arena[1])
    for tier in ("managed", "mapped"):  # what the arenas have besides
        size = sum(size for of, size in arenas.values() if of == tier)
        taken[tier]["work"] = size - taken[tier]["state"] - taken[tier]["scales"]
    taken["device"]["work"] = device_work
    taken["host"]["work"] = host_work
    return taken


def describe(memory: Memory) -> str:
    """Bytes by tier in words."""
    parts = []
    for tier, uses in memory.items():
        if any(uses.values()):
            sizes = ", ".join(f"{use} {_size(count)}" for use, count in uses.items() if count)
            parts.append(f"{tier} ({sizes})")
    return "; ".join(parts) or "no state yet"


def _size(count: int) -> str:
    power = min((count.bit_length() - 1) // 10, 3)
    return f"{count / 1024**power:.{min(power, 1)}f} {('B', 'KiB', 'MiB', 'GiB')[power]}"
