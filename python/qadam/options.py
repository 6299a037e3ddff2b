"""Options of the state and of clipping, wherever they come from: checked in one place."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def check_options(options: Mapping[str, Any]) -> None:
    """Checks those of an optimizer's own options that ``options`` has.

    Raises:
        ValueError: for a value out of range, naming the option.
        NotImplementedError: for what is not implemented yet.
    """
    if options.get("optim_bits", 32) not in (8, 32):
        msg = f"optim_bits must be 32 or 8, got {options['optim_bits']!r}"
        raise ValueError(msg)
    _whole("min_8bit_size", options.get("min_8bit_size", 0), 0, None)
    clipping = _whole("percentile_clipping", options.get("percentile_clipping", 100), 1, 100)
    block_wise = options.get("block_wise", True)
    max_unorm, skip_zeros = options.get("max_unorm", 0.0), options.get("skip_zeros", False)
    later = (
        ("percentile_clipping", clipping, clipping < 100),
        ("block_wise", block_wise, not block_wise),
        ("max_unorm", max_unorm, max_unorm > 0),
        ("skip_zeros", skip_zeros, bool(skip_zeros)),
    )
    for name, value, asked in later:
        if asked:
            msg = f"{name}={value!r} is not implemented yet"
            raise NotImplementedError(msg)


def _whole(name: str, value: int, low: int, high: int | None) -> int:
    """``value`` if it is a whole number in range."""
    top = "" if high is None else f" and at most {high}"
    if isinstance(value, bool) or not isinstance(value, int) or value < low:
        pass
    elif high is None or value <= high:
        return value
    msg = f"{name} must be a whole number of at least {low}{top}, got {value!r}"
    raise ValueError(msg)
