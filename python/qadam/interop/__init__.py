"""State dicts of other packages: recognised, read as qadam's, and written.

A module a format: :mod:`~qadam.interop.bitsandbytes` and :mod:`~qadam.interop.torch_optim`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch

from qadam.interop import bitsandbytes, torch_optim
from qadam.layout import FORMAT, FORMAT_KEY, Entry, check_group, code_of, show

Group = dict[str, Any]

__all__ = ["Saved", "read", "read_entry", "to_bitsandbytes", "to_torch"]


@dataclass(frozen=True)
class Saved:
    """A state dict taken apart; nothing is converted yet."""

    groups: list[Group]
    """Copies, as qadam has them; ``"params"`` is a list of keys."""
    entries: dict[Any, tuple[int, Any]]
    """By key: a parameter's number and its state, of any format. Only parameters with state."""
    others: dict[Any, Any]
    """What the state holds besides, which is no parameter's."""


def read(state_dict: Mapping[str, Any], sizes: Sequence[int] | None = None) -> Saved:
    """Takes apart a state dict of qadam, ``torch.optim`` or bitsandbytes.

    Args:
        state_dict: the dict; it is not changed.
        sizes: how many parameters each group must have; None for any groups.

    Raises:
        KeyError: if ``"state"`` or ``"param_groups"`` is missing.
        TypeError: if these are of another type than they have in a state dict.
        ValueError: for other groups than ``sizes``, a key given twice, state that belongs to no
            parameter, or if a newer qadam wrote it.
    """
    if not isinstance(state_dict, Mapping):
        msg = f"the state dict is {type(state_dict).__name__}; a dict is accepted"
        raise TypeError(msg)
    groups, state = state_dict["param_groups"], state_dict["state"]
    if not isinstance(groups, (list, tuple)):
        msg = f"'param_groups' is {type(groups).__name__}; a list of dicts is accepted"
        raise TypeError(msg)
    if not isinstance(state, Mapping):
        msg = f"'state' is {type(state).__name__}; a dict is accepted"
        raise TypeError(msg)
    copies = [_read_group(group, f"group {number}") for number, group in enumerate(groups)]
    if sizes is not None:
        _check_sizes(copies, sizes)
    if any(bitsandbytes.wrote_group(g) for g in copies) or any(
        bitsandbytes.wrote_entry(e) for e in state.values()
    ):
        copies = [bitsandbytes.read_group(group) for group in copies]

    numbers: dict[Any, int] = {}
    for number, group in enumerate(copies):
        for key in group["params"]:
            if key in numbers:
                msg = f"group {number}: 'params' has {key!r}, which is there before"
                raise ValueError(msg)
            numbers[key] = len(numbers)
    entries, others = {}, {}
    for key, entry in state.items():
        if key not in numbers:
            # a number might be taken for a parameter's when this is saved again
            if isinstance(key, int) or _is_state(entry):
                msg = f"'state' has an entry {key!r}, which is in no group's 'params'"
                raise ValueError(msg)
            others[key] = entry
        elif entry is not None and not (isinstance(entry, dict) and not entry):
            entries[key] = numbers[key], entry
    return Saved(copies, entries, others)


def _read_group(group: Any, where: str) -> Group:  # noqa: ANN401 - any kind of value
    if not isinstance(group, Mapping):
        msg = f"{where} of 'param_groups' is {type(group).__name__}; a dict is accepted"
        raise TypeError(msg)
    for key in group:
        if not isinstance(key, str):
            msg = f"{where} has a key {key!r}; strings are accepted"
            raise TypeError(msg)
    params = group["params"]
    if not isinstance(params, (list, tuple)):
        msg = f"{where}: 'params' is {type(params).__name__}; a list of keys is accepted"
        raise TypeError(msg)
    copy = deepcopy({**group, "params": list(params)})
    version = copy.pop(FORMAT_KEY, FORMAT)
    if type(version) is not int or version < 1:
        accepted = f"whole numbers of 1 to {FORMAT} are accepted"
        msg = f"{where}: {FORMAT_KEY!r} is {show(version)}; {accepted}"
        raise ValueError(msg)
    if version > FORMAT:
        msg = (
            f"{where}: {FORMAT_KEY!r} is {show(version)}: a newer qadam wrote this state dict; "
            f"this one reads {FORMAT_KEY!r} up to {FORMAT}"
        )
        raise ValueError(msg)
    return copy


def _check_sizes(groups: list[Group], sizes: Sequence[int]) -> None:
    if len(groups) != len(sizes):
        msg = f"the state dict has {len(groups)} parameter groups, the optimizer has {len(sizes)}"
        raise ValueError(msg)
    for number, (group, size) in enumerate(zip(groups, sizes, strict=True)):
        if len(group["params"]) != size:
            got = len(group["params"])
            msg = f"group {number} of the state dict has {got} 'params', the optimizer's has {size}"
            raise ValueError(msg)


def _is_state(entry: object) -> bool:
    """Whether this looks like a parameter's moments, which must not get lost."""
    if not isinstance(entry, dict):
        return False
    return bitsandbytes.wrote_entry(entry) or "exp_avg" in entry or code_of(entry) is not None


def read_entry(entry: Any, shape: torch.Size | None, where: str) -> Entry:  # noqa: ANN401
    """One parameter's state, of any format, with qadam's keys.

    Args:
        entry: the state.
        shape: the parameter's; None if it is to be the state's own.
        where: what messages call the parameter.

    Raises:
        ValueError: if the state is damaged. That of qadam and torch is not checked: writers and
            :func:`qadam.state.fit` do.
    """
    if not isinstance(entry, dict):
        msg = f"{where}: the state is {type(entry).__name__}; a dict is accepted"
        raise ValueError(msg)
    return bitsandbytes.read(entry, shape, where) if bitsandbytes.wrote_entry(entry) else entry


def to_torch(state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """A state dict that ``torch.optim.Adam`` and ``AdamW`` load, at 32 bits.

    Args:
        state_dict: what any optimizer of qadam returned, or anything else that these load. It is
            not changed, and the result shares no memory with it.

    Raises:
        KeyError, TypeError, ValueError: if it is damaged; the message names the key.
    """
    return _write(state_dict, torch_optim.write, torch_optim.write_group)


def to_bitsandbytes(
    state_dict: Mapping[str, Any], optim_bits: int | None = None, min_8bit_size: int = 4096
) -> dict[str, Any]:
    """A state dict that ``bitsandbytes.optim``'s ``Adam``, ``AdamW`` and relatives load.

    bitsandbytes goes on with each parameter at the width that it loads, whatever the class.

    Args:
        state_dict: what any optimizer of qadam returned, or anything else that these load. It is
            not changed, and the result shares no memory with it.
        optim_bits: 32 or 8; None leaves each parameter's state as wide as it is. State that is 8
            bits wide already, in the dynamic code, is taken over code for code where it is in
            row-major order or has one scale, which is repeated for each block.
        min_8bit_size: with ``optim_bits=8``, a parameter of fewer elements gets 32 bits.

    Raises:
        KeyError, TypeError, ValueError: if it is damaged; the message names the key. Also for what
            bitsandbytes' Adam cannot do: AMSGrad, coupled weight decay and ``maximize``.
    """
    if optim_bits not in (None, 8, 32):
        msg = f"optim_bits must be 32, 8 or None, got {optim_bits!r}"
        raise ValueError(msg)

    def write(entry: Entry, where: str) -> Entry:
        return bitsandbytes.write(entry, optim_bits, min_8bit_size, where)

    return _write(state_dict, write, bitsandbytes.write_group)


def _write(
    state_dict: Mapping[str, Any],
    write_entry: Callable[[Entry, str], Entry],
    write_group: Callable[[Group, str], Group],
) -> dict[str, Any]:
    saved = read(state_dict)
    groups = []
    for number, group in enumerate(saved.groups):
        check_group(group)
        groups.append(write_group(group, f"group {number}"))
    state = deepcopy(saved.others)
    for key, (number, entry) in saved.entries.items():
        where = f"parameter {number}"
        state[key] = write_entry(read_entry(entry, None, where), where)
    return {"state": state, "param_groups": groups}
