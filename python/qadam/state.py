"""What ``optimizer.state[p]`` holds, at 32 and at 8 bits, and how one becomes the other.

32 bits, under torch's names, each of the parameter's shape: ``exp_avg`` and ``exp_avg_sq``
(float32).

8 bits: ``exp_avg_code`` and ``exp_avg_sq_code`` (uint8, the parameter's shape), ``exp_avg_scale``
and ``exp_avg_sq_scale`` (float32, one for each block of 256 elements), and ``memory_order`` (int64,
on the CPU), the dimensions of more than one element from the outermost to the innermost in memory:
blocks are consecutive in that order. It is written down because strides do not survive every
serializer.

Both: ``step`` (float32, no dimensions), how many updates the parameter has had; on CUDA the device
counts it, so that a captured graph goes on counting.
"""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import torch
from torch import Tensor

from qadam import _core

BLOCK = 256
"""Elements that share a scale."""

MOMENTS = (("exp_avg", True), ("exp_avg_sq", False))
"""The moments' names, and whether they have a sign."""

Entry = dict[str, Any]
"""One parameter's state."""

Pages = dict[str, Tensor]
"""Paged memory for one parameter's state: a uint8 vector for each moment's tensor, by name."""


def memory_order(param: Tensor) -> tuple[int, ...]:
    """Dimensions of more than one element, by descending stride."""
    dims = [d for d in range(param.dim()) if param.shape[d] > 1]
    return tuple(sorted(dims, key=lambda d: param.stride(d), reverse=True))


def zeros(param: Tensor, bits: int, pages: Pages | None = None) -> Entry:
    """State before the first step, 32 or 8 ``bits`` wide; in fresh ``pages``, if given."""
    entry: Entry = {"step": torch.zeros((), dtype=torch.float32, device=param.device)}
    if bits == 32:
        for name, _ in MOMENTS:
            entry[name] = _initial(param, name, torch.float32, 0, pages)
        return entry
    entry["memory_order"] = torch.tensor(memory_order(param), dtype=torch.int64, device="cpu")
    for name, signed in MOMENTS:
        code_of_zero = 127 if signed else 0
        entry[f"{name}_code"] = _initial(param, f"{name}_code", torch.uint8, code_of_zero, pages)
        entry[f"{name}_scale"] = _initial(param, f"{name}_scale", torch.float32, 0, pages)
    return entry


def _initial(
    param: Tensor, name: str, dtype: torch.dtype, value: int, pages: Pages | None
) -> Tensor:
    """A tensor of the state, each of its bytes ``value``."""
    tensor = _empty(param, name, dtype, pages)
    if pages is None:
        return tensor.fill_(value)
    _core.initialise_pages(pages[name], value)
    return tensor


def bits(entry: Entry) -> int:
    """How wide the moments of ``entry`` are."""
    return 8 if "exp_avg_code" in entry else 32


def fit(entry: Entry, param: Tensor, bits: int, where: str, pages: Pages | None = None) -> Entry:
    """A copy of ``entry`` for ``param``, ``bits`` wide and in its memory order.

    The copy is exact wherever width and order are those of ``entry`` already.

    Args:
        entry: state of a parameter of the same shape, of any width and memory order.
        param: the parameter that the state is for.
        bits: 32 or 8.
        where: what messages call the parameter.
        pages: memory for the copy, if it is to be paged.

    Raises:
        ValueError: if a key is missing, or a tensor has another shape or dtype, or a scale is
            negative or not finite; the message names the key.
        NotImplementedError: for state of AMSGrad.
    """
    if not isinstance(entry, dict):
        msg = f"{where}: the state is {type(entry).__name__}; a dict is accepted"
        raise ValueError(msg)
    if "max_exp_avg_sq" in entry:
        msg = f"{where} has state of AMSGrad (max_exp_avg_sq), which qadam does not support yet"
        raise NotImplementedError(msg)
    is_coded = any(f"{name}_{part}" in entry for name, _ in MOMENTS for part in ("code", "scale"))
    order = _read_order(entry, param, where) if is_coded else ()
    fitted: Entry = {k: deepcopy(v) for k, v in entry.items() if k not in _KEYS}
    fitted["step"] = _read_step(entry, where).to(param.device)
    if bits == 8:
        order_now = torch.tensor(memory_order(param), dtype=torch.int64, device="cpu")
        fitted["memory_order"] = order_now
    for name, signed in MOMENTS:
        if is_coded:
            codes, scales = _read_codes(entry, name, param, where)
            if bits == 8 and order == memory_order(param):
                _store(fitted, f"{name}_code", codes, param, pages)
                _store(fitted, f"{name}_scale", scales, param, pages)
                continue
            values = _decode(codes, scales, order, signed)
        else:
            values = _read_values(entry, name, param, where)
        if bits == 32:
            _store(fitted, name, values, param, pages)
        else:
            codes, scales = _encode(values, param, signed)
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


_KEYS = {"step", "memory_order"} | {
    name + part for name, _ in MOMENTS for part in ("", "_code", "_scale")
}


def _empty(param: Tensor, name: str, dtype: torch.dtype, pages: Pages | None) -> Tensor:
    """Uninitialised: scales as a vector, anything else without gaps in the parameter's order."""
    device = param.device if pages is None else "meta"
    if name.endswith("_scale"):
        tensor = torch.empty(-(-param.numel() // BLOCK), dtype=dtype, device=device)
    else:
        tensor = torch.empty_like(
            param, dtype=dtype, device=device, memory_format=torch.preserve_format
        )
    if pages is None:
        return tensor
    return pages[name].view(dtype).as_strided(tensor.shape, tensor.stride())


def _get(entry: Entry, key: str, where: str) -> Any:  # noqa: ANN401 - any kind of value
    try:
        return entry[key]
    except KeyError:
        msg = f"{where}: the state has no {key!r}, only {sorted(entry)}"
        raise ValueError(msg) from None


def _read_step(entry: Entry, where: str) -> Tensor:
    step = _get(entry, "step", where)
    if isinstance(step, (int, float, Tensor)) and not isinstance(step, bool):
        tensor = torch.as_tensor(step, dtype=torch.float32, device="cpu").detach()
        if tensor.numel() == 1 and tensor.isfinite().all() and tensor.item() >= 0:
            return tensor.reshape(()).clone()
    msg = f"{where}: 'step' is {step!r}; one finite number of at least 0 is accepted"
    raise ValueError(msg)


def _read_order(entry: Entry, param: Tensor, where: str) -> tuple[int, ...]:
    """The recorded memory order, without dimensions of one element."""
    order = _get(entry, "memory_order", where)
    if isinstance(order, Tensor) and order.dim() == 1 and not order.is_floating_point():
        order = tuple(order.tolist())
    matter = {d for d in range(param.dim()) if param.shape[d] > 1}
    if isinstance(order, (tuple, list)) and all(type(d) is int for d in order):
        known = len(set(order)) == len(order) and set(order) <= set(range(param.dim()))
        if known and matter <= set(order):
            return tuple(d for d in order if d in matter)
    accepted = f"an order of the dimensions {sorted(matter)}"
    msg = f"{where}: 'memory_order' is {order!r}; {accepted} is accepted"
    raise ValueError(msg)


def _read_values(entry: Entry, name: str, param: Tensor, where: str) -> Tensor:
    values = _get(entry, name, where)
    if not isinstance(values, Tensor) or not values.is_floating_point():
        got = values.dtype if isinstance(values, Tensor) else type(values).__name__
        msg = f"{where}: {name!r} is {got}; a floating-point tensor is accepted"
        raise ValueError(msg)
    values = _of_shape(values, param.shape, name, where).to(torch.float32)
    signed = dict(MOMENTS)[name]
    good = values.isfinite() if signed else values.isfinite() & (values >= 0)
    if not good.all():
        value = values[~good][0].item()
        accepted = "finite numbers" if signed else "finite numbers of at least 0"
        msg = f"{where}: {name!r} holds {value}; {accepted} are accepted"
        raise ValueError(msg)
    return values


def _read_codes(entry: Entry, name: str, param: Tensor, where: str) -> tuple[Tensor, Tensor]:
    codes, scales = _get(entry, f"{name}_code", where), _get(entry, f"{name}_scale", where)
    for key, value, dtype in (("code", codes, torch.uint8), ("scale", scales, torch.float32)):
        if not isinstance(value, Tensor) or value.dtype != dtype:
            got = value.dtype if isinstance(value, Tensor) else type(value).__name__
            msg = f"{where}: '{name}_{key}' is {got}; a tensor of {dtype} is accepted"
            raise ValueError(msg)
    codes = _of_shape(codes, param.shape, f"{name}_code", where)
    blocks = torch.Size([-(-param.numel() // BLOCK)])
    scales = _of_shape(scales, blocks, f"{name}_scale", where)
    bad = ~(scales.isfinite() & (scales >= 0))
    if bad.any():
        value = scales[bad][0].item()
        msg = f"{where}: '{name}_scale' holds {value}; finite numbers of at least 0 are accepted"
        raise ValueError(msg)
    return codes, scales


def _of_shape(tensor: Tensor, shape: torch.Size, key: str, where: str) -> Tensor:
    if tensor.shape != shape:
        msg = f"{where}: {key!r} has shape {tuple(tensor.shape)}; {tuple(shape)} is accepted"
        raise ValueError(msg)
    if tensor.numel() > 0 and tensor.untyped_storage().nbytes() == 0:
        msg = f"{where}: the memory of {key!r} has been freed; a tensor that has memory is accepted"
        raise ValueError(msg)
    return tensor.detach().to("cpu")


def _decode(codes: Tensor, scales: Tensor, order: tuple[int, ...], signed: bool) -> Tensor:
    """Values of the codes' shape, whose blocks are consecutive in ``order``."""
    # dimensions of one element do not matter; they go last
    permutation = [*order, *(d for d in range(codes.dim()) if d not in order)]
    ordered = codes.permute(permutation).contiguous()
    values = torch.empty(ordered.shape, dtype=torch.float32, device="cpu")
    _core.decode_blocks(ordered.view(-1), scales.contiguous(), values.view(-1), signed)
    inverse = [permutation.index(d) for d in range(codes.dim())]
    return values.permute(inverse)


def _encode(values: Tensor, param: Tensor, signed: bool) -> tuple[Tensor, Tensor]:
    """Codes and scales, in the parameter's memory order, of values of its shape."""
    codes = torch.empty_like(param, dtype=torch.uint8, device="cpu")
    ordered = torch.empty_like(param, dtype=torch.float32, device="cpu").copy_(values)
    scales = torch.empty(-(-param.numel() // BLOCK), dtype=torch.float32, device="cpu")
    _core.encode_blocks(_in_memory(ordered), _in_memory(codes), scales, signed)
    return codes, scales


def _in_memory(dense: Tensor) -> Tensor:
    """The elements of a tensor without gaps, as they follow each other in memory."""
    return dense.as_strided((dense.numel(),), (1,))
