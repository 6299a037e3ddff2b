"""What ``optimizer.state[p]`` holds, at 32 and at 8 bits, and how one becomes the other.

32 bits, under torch's names, each of the parameter's shape: ``exp_avg`` and ``exp_avg_sq``
(float32).

8 bits: ``exp_avg_code`` and ``exp_avg_sq_code`` (uint8, the parameter's shape), ``exp_avg_scale``
and ``exp_avg_sq_scale`` (float32, one for each block of 256 elements), and ``memory_order`` (int64,
on the CPU), the dimensions of more than one element from the outermost to the innermost in memory:
blocks are consecutive in that order. It is written down because strides do not survive every
serializer.

With AMSGrad there is a third moment, ``max_exp_avg_sq``, stored as the second is.

All: ``step`` (float32, no dimensions), how many updates the parameter has had; on CUDA the device
counts it, so that a captured graph goes on counting.
"""

from __future__ import annotations

from copy import deepcopy
from typing import Any, NamedTuple

import torch
from torch import Tensor

from qadam import _core, layout
from qadam.interop import to_bitsandbytes, to_torch
from qadam.layout import AMSGRAD, KEYS, MOMENTS, Entry, Order

__all__ = [
    "MOMENTS",
    "Entry",
    "Format",
    "Pages",
    "copy_into",
    "fit",
    "format_of",
    "memory_order",
    "to_bitsandbytes",
    "to_torch",
    "zeros",
]

Pages = dict[str, Tensor]
"""Paged memory for one parameter's state: a uint8 vector for each moment's tensor, by name."""


class Format(NamedTuple):
    """How the state of a parameter is stored."""

    bits: int
    """32 or 8."""
    amsgrad: bool = False
    """Whether there is AMSGrad's moment."""

    @property
    def moments(self) -> tuple[tuple[str, bool], ...]:
        """The moments' names, and whether they have a sign."""
        return (*MOMENTS, AMSGRAD) if self.amsgrad else MOMENTS


def memory_order(param: Tensor) -> Order:
    """Dimensions of more than one element, by descending stride."""
    dims = [d for d in range(param.dim()) if param.shape[d] > 1]
    return tuple(sorted(dims, key=lambda d: param.stride(d), reverse=True))


def zeros(param: Tensor, stored: Format, pages: Pages | None = None) -> Entry:
    """State before the first step; in fresh ``pages``, if given."""
    entry: Entry = {"step": torch.zeros((), dtype=torch.float32, device=param.device)}
    if stored.bits == 8:
        order = torch.tensor(memory_order(param), dtype=torch.int64, device="cpu")
        entry["memory_order"] = order
    for name, signed in stored.moments:
        entry |= _zero(param, name, signed, stored.bits, pages)
    return entry


def _zero(param: Tensor, name: str, signed: bool, bits: int, pages: Pages | None) -> Entry:
    """A moment that is 0 everywhere."""
    if bits == 32:
        return {name: _initial(param, name, torch.float32, 0, pages)}
    code, scale = f"{name}_code", f"{name}_scale"
    code_of_zero = 127 if signed else 0
    return {
        code: _initial(param, code, torch.uint8, code_of_zero, pages),
        scale: _initial(param, scale, torch.float32, 0, pages),
    }


def _initial(
    param: Tensor, name: str, dtype: torch.dtype, value: int, pages: Pages | None
) -> Tensor:
    """A tensor of the state, each of its bytes ``value``."""
    tensor = _empty(param, name, dtype, pages)
    if pages is None:
        return tensor.fill_(value)
    _core.initialise_pages(pages[name], value)
    return tensor


def format_of(entry: Entry) -> Format:
    """How ``entry`` is stored."""
    bits = 8 if "exp_avg_code" in entry else 32
    return Format(bits, AMSGRAD in layout.moments(entry))


def fit(
    entry: Entry, param: Tensor, stored: Format, where: str, pages: Pages | None = None
) -> Entry:
    """A copy of ``entry`` for ``param``, ``stored`` so and in its memory order.

    The copy is exact wherever width and order are those of ``entry`` already. AMSGrad's moment
    begins at 0 where ``entry`` has none, and is left out where it is not wanted.

    Args:
        entry: state of a parameter of the same shape, of any width and memory order.
        param: the parameter that the state is for.
        stored: how the copy is stored.
        where: what messages call the parameter.
        pages: memory for the copy, if it is to be paged.

    Raises:
        ValueError: if a key is missing, or a tensor has another shape or dtype, or a scale is
            negative or not finite; the message names the key.
    """
    if not isinstance(entry, dict):
        msg = f"{where}: the state is {type(entry).__name__}; a dict is accepted"
        raise ValueError(msg)
    is_coded, bits = layout.is_coded(entry), stored.bits
    old = layout.read_order(entry, param.shape, where) if is_coded else ()
    new = memory_order(param)
    fitted = layout.rest(entry, KEYS, where)
    fitted["step"] = layout.read_step(entry, where).to(param.device)
    if bits == 8:
        fitted["memory_order"] = torch.tensor(new, dtype=torch.int64, device="cpu")
    for name, signed in stored.moments:
        if (name, signed) not in layout.moments(entry):
            fitted |= _zero(param, name, signed, bits, pages)
            continue
        if is_coded:
            codes = layout.read_codes(entry, f"{name}_code", param.shape, where)
            scales = layout.read_scales(entry, f"{name}_scale", [layout.blocks(param.shape)], where)
            if bits == 8 and old == new:
                _store(fitted, f"{name}_code", codes, param, pages)
                _store(fitted, f"{name}_scale", scales, param, pages)
                continue
            values = layout.decode(codes, scales, old, signed)
        else:
            values = layout.read_values(entry, name, param.shape, signed, where)
        if bits == 32:
            _store(fitted, name, values, param, pages)
        else:
            codes, scales = layout.encode(values, new, signed)
            _store(fitted, f"{name}_code", codes, param, pages)
            _store(fitted, f"{name}_scale", scales, param, pages)
    return fitted


def copy_into(
    pages: Pages, entry: Entry, param: Tensor, memo: dict[int, Any] | None = None
) -> Entry:
    """An entry like ``entry`` whose moments are copies in ``pages``.

    The other values are those of ``entry``, or with ``memo`` copies of them, as for ``deepcopy``.
    """
    copied: Entry = {}
    for name, value in entry.items():
        if name not in pages:
            copied[name] = value if memo is None else deepcopy(value, memo)
            continue
        _store(copied, name, value, param, pages)
        if memo is not None:
            memo[id(value)] = copied[name]
    return copied


def _store(entry: Entry, name: str, values: Tensor, param: Tensor, pages: Pages | None) -> None:
    """Puts a copy of ``values`` into ``entry``, in the parameter's memory order."""
    entry[name] = _empty(param, name, values.dtype, pages).copy_(values)
    if pages is not None:
        _core.settle_pages(pages[name])


def _empty(param: Tensor, name: str, dtype: torch.dtype, pages: Pages | None) -> Tensor:
    """Uninitialised: scales as a vector, anything else without gaps in the parameter's order."""
    device = param.device if pages is None else "meta"
    if name.endswith("_scale"):
        tensor = torch.empty(layout.blocks(param.shape), dtype=dtype, device=device)
    else:
        tensor = torch.empty_like(
            param, dtype=dtype, device=device, memory_format=torch.preserve_format
        )
    if pages is None:
        return tensor
    return pages[name].view(dtype).as_strided(tensor.shape, tensor.stride())
