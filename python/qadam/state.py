"""What ``optimizer.state[p]`` holds, at 32 and at 8 bits, and how one becomes the other.

32 bits, under torch's names, each of the parameter's shape: ``exp_avg`` and ``exp_avg_sq``
(float32).

8 bits: ``exp_avg_code`` and ``exp_avg_sq_code`` (uint8, the parameter's shape), ``exp_avg_scale``
(float32, one for each block of 256 elements, or with ``block_wise=False`` one for all),
``exp_avg_sq_scale`` likewise in the dynamic code, or in the ratio code ``exp_avg_sq_range``, twice
as many, and ``memory_order`` (int64, on the CPU), the dimensions of more than one element from the
outermost to the innermost in memory: blocks are consecutive in that order. It is written down
because strides do not survive every serializer.

With AMSGrad there is a third moment, ``max_exp_avg_sq``, stored as the second is.

With percentile clipping: ``gnorm_vec`` (float32, of shape (100,)), the squared norms of the last
100 gradients, that of step t at t % 100; on the parameter's device, never paged.

All: ``step`` (float32, no dimensions), how many updates the parameter has had; on CUDA the device
counts it, so that a captured graph goes on counting.
"""

from __future__ import annotations

from copy import deepcopy
from typing import Any, NamedTuple

import torch
from torch import Tensor

from qadam import _core, layout
from qadam.codes import CODES, DYNAMIC, LARGEST, SECOND, Code, Coded, Order
from qadam.interop import to_bitsandbytes, to_torch
from qadam.layout import AMSGRAD, HISTORY, KEYS, MOMENTS, NORMS, Entry

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
    block_wise: bool = True
    """Whether 8-bit codes have a scale a block, rather than one for the whole tensor."""
    history: bool = False
    """Whether there are the norms of the last gradients, for percentile clipping."""
    code: str = DYNAMIC.name
    """The name of the 8-bit code; of no account at 32 bits, where it is this."""

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
    if stored.history:
        entry[HISTORY] = _no_norms(param)
    for name, _ in stored.moments:
        entry |= _zero(param, name, stored, pages)
    return entry


def _no_norms(param: Tensor) -> Tensor:
    """The history of a parameter that has had no gradient."""
    return torch.zeros(NORMS, dtype=torch.float32, device=param.device)


def _zero(param: Tensor, name: str, stored: Format, pages: Pages | None) -> Entry:
    """A moment that is 0 everywhere."""
    if stored.bits == 32:
        return {name: _initial(param, name, torch.float32, 0, stored, pages)}
    of = CODES[stored.code]
    code, scale = f"{name}_code", of.scale_key(name)
    return {
        code: _initial(param, code, torch.uint8, of.zero(name), stored, pages),
        scale: _initial(param, scale, torch.float32, 0, stored, pages),
    }


def _initial(
    param: Tensor,
    name: str,
    dtype: torch.dtype,
    value: int,
    stored: Format,
    pages: Pages | None,
) -> Tensor:
    """A tensor of the state, each of its bytes ``value``."""
    tensor = _empty(param, name, dtype, stored, pages)
    if pages is None:
        return tensor.fill_(value)
    _core.initialise_pages(pages[name], value)
    return tensor


def format_of(entry: Entry) -> Format:
    """How ``entry`` is stored. A single block of codes counts as block-wise."""
    code = layout.code_of(entry) if "exp_avg_code" in entry else None
    amsgrad = AMSGRAD in layout.moments(entry)
    history, block_wise = HISTORY in entry, layout.is_block_wise(entry)
    return Format(32 if code is None else 8, amsgrad, block_wise, history, (code or DYNAMIC).name)


def fit(
    entry: Entry, param: Tensor, stored: Format, where: str, pages: Pages | None = None
) -> Entry:
    """A copy of ``entry`` for ``param``, ``stored`` so and in its memory order.

    The copy is exact wherever width, code, order and the number of scales are those of ``entry``
    already. Codes of a single scale, or of equal ones, stay as they are in any order and whatever
    the number of scales is to be. AMSGrad's moment begins at 0 where ``entry`` has none (in the
    ratio code, whose first moments are relative to it, as the second moment), and is left out where
    it is not wanted; so does and is the history of norms.

    Args:
        entry: state of a parameter of the same shape, of any width, memory order and number of
            scales.
        param: the parameter that the state is for.
        stored: how the copy is stored.
        where: what messages call the parameter.
        pages: memory for the copy, if it is to be paged.

    Raises:
        ValueError: if a key is missing, or a tensor has another shape or dtype, or a scale or a
            norm is negative or not finite; the message names the key.
    """
    if not isinstance(entry, dict):
        msg = f"{where}: the state is {type(entry).__name__}; a dict is accepted"
        raise ValueError(msg)
    fitted = layout.rest(entry, KEYS, where)
    fitted["step"] = layout.read_step(entry, where).to(param.device)
    if stored.bits == 8:
        order = torch.tensor(memory_order(param), dtype=torch.int64, device="cpu")
        fitted["memory_order"] = order
    if stored.history:
        fitted[HISTORY] = _no_norms(param)
        if HISTORY in entry:
            fitted[HISTORY].copy_(layout.read_history(entry, where))
    if stored.bits == 8:
        code = CODES[stored.code]
        for name, of in _in_code(entry, param, stored, code, where).items():
            _store(fitted, f"{name}_code", of.codes, param, stored, pages)
            _store(fitted, code.scale_key(name), of.scales, param, stored, pages)
    else:
        for name, values in _values(entry, param, stored, where).items():
            _store(fitted, name, values, param, stored, pages)
    for name, _ in stored.moments:
        if name not in fitted and f"{name}_code" not in fitted:
            fitted |= _zero(param, name, stored, pages)
    return fitted


def _values(entry: Entry, param: Tensor, stored: Format, where: str) -> dict[str, Tensor]:
    """The moments that are wanted and there."""
    old = layout.code_of(entry)
    present = [moment for moment in layout.moments(entry) if moment in stored.moments]
    if old is None:
        return {n: layout.read_values(entry, n, param.shape, s, where) for n, s in present}
    names = [name for name, _ in (present if old.independent else layout.moments(entry))]
    coded = {name: layout.read_coded(entry, name, param.shape, where) for name in names}
    values = old.decode(coded, layout.read_order(entry, param.shape, where))
    return {name: values[name] for name, _ in present}


def _in_code(
    entry: Entry, param: Tensor, stored: Format, code: Code, where: str
) -> dict[str, Coded]:
    """The moments that are wanted and there in ``code``, and AMSGrad's where others need it."""
    new, present = memory_order(param), layout.moments(entry)
    names = [name for name, _ in present if (code.independent or present == stored.moments)]
    names = [name for name in names if name in dict(stored.moments)]
    if layout.code_of(entry) is code and names:
        coded = {name: layout.read_coded(entry, name, param.shape, where) for name in names}
        old = layout.read_order(entry, param.shape, where)
        return code.recode(coded, old, new, stored.block_wise)
    values = _values(entry, param, stored, where)
    if stored.amsgrad and not code.independent:
        values.setdefault(LARGEST, values[SECOND])
    return code.encode(values, new, stored.block_wise)


def copy_into(
    pages: Pages, entry: Entry, param: Tensor, memo: dict[int, Any] | None = None
) -> Entry:
    """An entry like ``entry`` whose moments are copies in ``pages``.

    The other values are those of ``entry``, or with ``memo`` copies of them, as for ``deepcopy``.
    """
    stored = format_of(entry)
    copied: Entry = {}
    for name, value in entry.items():
        if name not in pages:
            copied[name] = value if memo is None else deepcopy(value, memo)
            continue
        _store(copied, name, value, param, stored, pages)
        if memo is not None:
            memo[id(value)] = copied[name]
    return copied


def _store(
    entry: Entry, name: str, values: Tensor, param: Tensor, stored: Format, pages: Pages | None
) -> None:
    """Puts a copy of ``values`` into ``entry``, in the parameter's memory order."""
    entry[name] = _empty(param, name, values.dtype, stored, pages).copy_(values)
    if pages is not None:
        _core.settle_pages(pages[name])


def _empty(
    param: Tensor, name: str, dtype: torch.dtype, stored: Format, pages: Pages | None
) -> Tensor:
    """Uninitialised: scales as a vector, anything else without gaps in the parameter's order."""
    device = param.device if pages is None else "meta"
    moment, _, part = name.rpartition("_")
    if part in ("scale", "range"):
        count = CODES[stored.code].scale_count(moment, param.shape, stored.block_wise)
        tensor = torch.empty(count, dtype=dtype, device=device)
    else:
        tensor = torch.empty_like(
            param, dtype=dtype, device=device, memory_format=torch.preserve_format
        )
    if pages is None:
        if tensor.device.type == "cpu":
            _core.advise_huge_pages(tensor)
        return tensor
    return pages[name].view(dtype).as_strided(tensor.shape, tensor.stride())
