"""Options of the state and of clipping, wherever they come from: checked in one place."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

from qadam.codes import CODES

DEFAULTS: dict[str, Any] = {
    "optim_bits": 32,
    "min_8bit_size": 4096,
    "percentile_clipping": 100,
    "block_wise": True,
    "state_code": "dynamic",
    "max_unorm": 0.0,
    "skip_zeros": False,
}
"""What a group or ``args`` may hold besides hyperparameters, and what holds without it."""


def check_options(options: Mapping[str, Any]) -> None:
    """Checks those of an optimizer's own options that ``options`` has.

    Raises:
        ValueError: for a value out of range, naming the option.
    """
    given = {**DEFAULTS, **options}
    if given["optim_bits"] not in (8, 32):
        msg = f"optim_bits must be 32 or 8, got {given['optim_bits']!r}"
        raise ValueError(msg)
    _whole("min_8bit_size", given["min_8bit_size"], 0, None)
    _whole("percentile_clipping", given["percentile_clipping"], 1, 100)
    for name in ("block_wise", "skip_zeros"):
        if not isinstance(given[name], int) or given[name] not in (0, 1):
            msg = f"{name} must be True or False, got {given[name]!r}"
            raise ValueError(msg)
    if given["state_code"] not in list(CODES):  # which also takes what has no hash
        accepted = " or ".join(f'"{name}"' for name in CODES)
        msg = f"state_code must be {accepted}, got {given['state_code']!r}"
        raise ValueError(msg)
    limit = given["max_unorm"]
    is_number = isinstance(limit, (int, float)) and not isinstance(limit, bool)
    if not is_number or not 0 <= limit <= sys.float_info.max:
        msg = f"max_unorm must be a finite number of at least 0, got {limit!r}"
        raise ValueError(msg)


def _whole(name: str, value: int, low: int, high: int | None) -> None:
    """Raises unless ``value`` is a whole number in range."""
    top = "" if high is None else f" and at most {high}"
    if isinstance(value, bool) or not isinstance(value, int) or value < low:
        pass
    elif high is None or value <= high:
        return
    msg = f"{name} must be a whole number of at least {low}{top}, got {value!r}"
    raise ValueError(msg)
