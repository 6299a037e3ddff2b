"""A parameter's state as it is written down: its keys, read and checked.

docs/state-format.md is the specification. Nothing here knows a parameter or an optimizer.
"""

from __future__ import annotations

from collections.abc import Sequence, Set
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor

from qadam import _core
from qadam.codes import BLOCK, DYNAMIC, RATIO, Code, Coded, Order

FORMAT = 1
"""The version of the format, which each parameter group of a state dict has as FORMAT_KEY."""

FORMAT_KEY = "qadam_format"

MOST_STEPS = 2.0**63
"""From here on the core's integers overflow; no training gets there."""

MOMENTS = (("exp_avg", True), ("exp_avg_sq", False))
"""The moments' names, and whether they have a sign."""

AMSGRAD = ("max_exp_avg_sq", False)
"""The third moment, which state of AMSGrad has: the largest second moment so far."""

HISTORY = "gnorm_vec"
"""The key of the squared norms of a parameter's last gradients, which percentile clipping has."""

NORMS = torch.Size([100])
"""The shape of the history: that of step t is at t % 100."""

KEYS = {"step", "memory_order", HISTORY}
KEYS |= {name for name, _ in (*MOMENTS, AMSGRAD)}
KEYS |= {f"{name}_{part}" for name, _ in (*MOMENTS, AMSGRAD) for part in ("code", "scale", "range")}
"""What an entry may hold that means something to qadam."""

Entry = dict[str, Any]
"""One parameter's state."""


def moments(entry: Entry) -> tuple[tuple[str, bool], ...]:
    """Names of the moments that ``entry`` has, and whether they have a sign."""
    parts = ("", "_code", "_scale", "_range")
    has_third = any(f"{AMSGRAD[0]}{part}" in entry for part in parts)
    return (*MOMENTS, AMSGRAD) if has_third else MOMENTS


def code_of(entry: Entry) -> Code | None:
    """The code that ``entry`` is in: codes or scales show it, and ranges the ratio code."""
    if any(f"{name}_range" in entry for name, _ in (*MOMENTS, AMSGRAD)):
        return RATIO
    parts = [f"{name}_{part}" for name, _ in MOMENTS for part in ("code", "scale")]
    return DYNAMIC if any(part in entry for part in parts) else None


def is_block_wise(entry: Entry) -> bool:
    """Whether codes have a scale a block, rather than one for the whole tensor.

    Where they are at most one block there is no difference, and without codes neither: True.
    """
    codes, scales = (entry.get(f"{MOMENTS[0][0]}_{part}") for part in ("code", "scale"))
    if not isinstance(codes, Tensor) or not isinstance(scales, Tensor):
        return True
    return codes.numel() <= BLOCK or scales.numel() != 1


def row_major(shape: Sequence[int]) -> Order:
    """The memory order of a contiguous tensor."""
    return tuple(d for d, size in enumerate(shape) if size > 1)


# Reading and checking. ``where`` is what messages call the parameter.


def get(entry: Entry, key: str, where: str) -> Any:  # noqa: ANN401 - any kind of value
    """``entry[key]``, or an error that says what there is instead."""
    try:
        return entry[key]
    except KeyError:
        msg = f"{where}: the state has no {key!r}, only {sorted(map(str, entry))}"
        raise ValueError(msg) from None


def rest(entry: Entry, known: Set[str], where: str) -> Entry:
    """A copy of what ``entry`` holds besides the ``known`` keys: users may keep things there."""
    copy: Entry = {}
    for key, value in entry.items():
        if key not in known:
            try:
                copy[key] = deepcopy(value)
            except RuntimeError as error:  # a tensor whose memory has been freed, or with a graph
                msg = f"{where}: {key!r} cannot be copied: {error}"
                raise ValueError(msg) from error
    return copy


def read_step(entry: Entry, where: str) -> Tensor:
    """How many updates the parameter has had: float32, no dimensions, on the CPU."""
    step = get(entry, "step", where)
    if isinstance(step, Tensor):
        step = step.detach()
        is_number = step.numel() == 1 and not step.is_complex() and lacks(step) is None
    else:
        is_number = isinstance(step, (int, float)) and not isinstance(step, bool)
    if is_number:
        try:
            tensor = torch.tensor(float(step), dtype=torch.float32, device="cpu")
        except OverflowError:  # a whole number beyond all floats
            tensor = torch.tensor(float("inf"), device="cpu")
        if 0 <= tensor < MOST_STEPS:
            return tensor
    accepted = f"one number of at least 0 and less than {MOST_STEPS:.3g} is accepted"
    msg = f"{where}: 'step' is {show(step)}; {accepted}"
    raise ValueError(msg)


def read_order(entry: Entry, shape: torch.Size, where: str) -> Order:
    """The recorded memory order, without dimensions of one element."""
    order = get(entry, "memory_order", where)
    if isinstance(order, Tensor) and order.dim() == 1 and lacks(order) is None:
        order = tuple(order.tolist())
    matter = set(row_major(shape))
    if isinstance(order, (tuple, list)) and all(type(d) is int for d in order):
        known = len(set(order)) == len(order) and set(order) <= set(range(len(shape)))
        if known and matter <= set(order):
            return tuple(d for d in order if d in matter)
    accepted = f"an order of the dimensions {sorted(matter)}"
    msg = f"{where}: 'memory_order' is {show(order)}; {accepted} is accepted"
    raise ValueError(msg)


def read_values(entry: Entry, key: str, shape: torch.Size, signed: bool, where: str) -> Tensor:
    """The values of a moment, on the CPU, as float32."""
    values = get(entry, key, where)
    if not isinstance(values, Tensor) or not values.is_floating_point():
        msg = f"{where}: {key!r} is {_kind(values)}; a floating-point tensor is accepted"
        raise ValueError(msg)
    values = _on_cpu(values, (shape,), key, where).to(torch.float32)
    check_numbers(values, signed, key, where)
    return values


def read_codes(entry: Entry, key: str, shape: torch.Size, where: str) -> Tensor:
    """The codes of a moment, on the CPU."""
    codes = get(entry, key, where)
    if not isinstance(codes, Tensor) or codes.dtype != torch.uint8:
        msg = f"{where}: {key!r} is {_kind(codes)}; a tensor of {torch.uint8} is accepted"
        raise ValueError(msg)
    return _on_cpu(codes, (shape,), key, where)


def read_scales(entry: Entry, key: str, lengths: Sequence[int], where: str) -> Tensor:
    """The scales of a moment, on the CPU: a vector of one of these ``lengths``."""
    scales = get(entry, key, where)
    if not isinstance(scales, Tensor) or scales.dtype != torch.float32:
        msg = f"{where}: {key!r} is {_kind(scales)}; a tensor of {torch.float32} is accepted"
        raise ValueError(msg)
    shapes = [torch.Size([length]) for length in lengths]
    scales = _on_cpu(scales, shapes, key, where)
    check_numbers(scales, False, key, where)
    return scales


def read_coded(entry: Entry, name: str, shape: torch.Size, where: str) -> Coded:
    """Codes and scales of the moment ``name``, on the CPU: scales a block, or those for all.

    Within an entry all moments must have the one or the other.
    """
    code = code_of(entry) or DYNAMIC
    codes = read_codes(entry, f"{name}_code", shape, where)
    key, first = code.scale_key(name), f"{MOMENTS[0][0]}_scale"
    for other in (f"{name}_scale", f"{name}_range"):
        if other != key and other in entry:
            msg = f"{where}: the state has {other!r} beside {key!r}, which is another code's"
            raise ValueError(msg)
    lengths = [code.scale_count(name, shape, block_wise) for block_wise in (True, False)]
    scales = read_scales(entry, key, lengths, where)
    others = get(entry, first, where)
    # in the same place among what may be
    counts = [code.scale_count(MOMENTS[0][0], shape, block_wise) for block_wise in (True, False)]
    fitting = [o for n, o in zip(lengths, counts, strict=True) if n == len(scales)]
    if isinstance(others, Tensor) and others.shape not in [torch.Size([n]) for n in fitting]:
        got = f"{key!r} has shape {tuple(scales.shape)}, {first!r} {tuple(others.shape)}"
        accepted = "a scale a block everywhere, or one scale everywhere, is accepted"
        msg = f"{where}: {got}; {accepted}"
        raise ValueError(msg)
    if name in code.ranged and (scales[::2] > scales[1::2]).any():
        at = int((scales[::2] > scales[1::2]).nonzero()[0])
        got = f"{scales[2 * at].item()} to {scales[2 * at + 1].item()}"
        msg = f"{where}: {key!r} holds {got}; ranges from a low to a high number are accepted"
        raise ValueError(msg)
    return Coded(codes, scales)


def read_history(entry: Entry, where: str) -> Tensor:
    """The squared norms of the last gradients: float32, on the CPU."""
    return read_values(entry, HISTORY, NORMS, False, where)


def shape(entry: Entry, where: str) -> torch.Size:
    """The shape that an entry of any width has: that of its first moment."""
    key = MOMENTS[0][0] + ("" if code_of(entry) is None else "_code")
    tensor = get(entry, key, where)
    if not isinstance(tensor, Tensor):
        msg = f"{where}: {key!r} is {_kind(tensor)}; a tensor is accepted"
        raise ValueError(msg)
    return tensor.shape


def values(entry: Entry, where: str) -> dict[str, Tensor]:
    """The moments of an entry of any width: float32 on the CPU, maybe the entry's own."""
    of, code = shape(entry, where), code_of(entry)
    if code is None:
        return {n: read_values(entry, n, of, signed, where) for n, signed in moments(entry)}
    order = read_order(entry, of, where)
    coded = {name: read_coded(entry, name, of, where) for name, _ in moments(entry)}
    return code.decode(coded, order)


def check_numbers(values: Tensor, signed: bool, key: str, where: str) -> None:
    """Raises unless all ``values`` are finite and, if not ``signed``, at least 0."""
    if values.numel() == 0:
        return
    # one pass without temporaries as large as the values; both are NaN if one of them is
    low, high = values.aminmax()
    if low.isfinite() and high.isfinite() and (signed or low >= 0):
        return
    good = values.isfinite() if signed else values.isfinite() & (values >= 0)
    value = values[~good][0].item()
    accepted = "finite numbers" if signed else "finite numbers of at least 0"
    msg = f"{where}: {key!r} holds {value}; {accepted} are accepted"
    raise ValueError(msg)


def check_group(group: dict[str, Any]) -> None:
    """Checks the hyperparameters of a group, and that flags are flags.

    Raises:
        KeyError: if a hyperparameter is missing.
        TypeError, ValueError: for one of another type, or out of range.
    """
    betas = group["betas"]
    if not isinstance(betas, (tuple, list)) or len(betas) != 2:
        msg = f"betas must be two numbers of at least 0 and less than 1, got {show(betas)}"
        raise ValueError(msg)
    numbers = [group["lr"], *betas, group["eps"], group["weight_decay"]]
    names = ["lr", "betas[0]", "betas[1]", "eps", "weight_decay"]
    _core.check_hyper(*map(number, names, numbers))
    for name in ("amsgrad", "maximize", "differentiable", "decoupled_weight_decay"):
        if not isinstance(group.get(name), (bool, int, type(None))):
            msg = f"{name} must be True or False, got {show(group[name])}"
            raise TypeError(msg)


def number(name: str, number: Any) -> float:  # noqa: ANN401 - whatever has __float__
    """``number`` as a float, or an error that names it."""
    if isinstance(number, Tensor) and (number.numel() != 1 or lacks(number) is not None):
        got = lacks(number) or f"a tensor of shape {tuple(number.shape)}"
        msg = f"{name} must be a number, got {got}"
        raise ValueError(msg)
    if not hasattr(number, "__float__"):
        msg = f"{name} must be a number, got {show(number)}"
        raise TypeError(msg)
    try:
        return float(number.detach() if isinstance(number, Tensor) else number)
    except (OverflowError, RuntimeError):  # beyond all floats; a complex tensor
        msg = f"{name} must be a number, got {show(number)}"
        raise ValueError(msg) from None


def lacks(tensor: Tensor) -> str | None:
    """Why the elements of ``tensor`` cannot be read, if so."""
    if tensor.layout != torch.strided:
        return f"{tensor.layout}"
    if tensor.is_meta:
        return "a meta tensor"
    if tensor.numel() > 0 and tensor.untyped_storage().nbytes() == 0:
        return "a tensor whose memory has been freed"
    if tensor.is_neg() and tensor.is_floating_point() and tensor.element_size() == 1:
        return f"a lazily negated view of {tensor.dtype}"  # which torch cannot resolve
    return None


def show(value: object) -> str:
    """``value`` for a message, short; torch's own repr reads even memory that has been freed."""
    if isinstance(value, Tensor):
        if lacks(value) or value.numel() > 16:
            return lacks(value) or f"a tensor of shape {tuple(value.shape)}"
        return repr(value)
    plain = (int, float, str, bytes, type(None))
    parts = value if isinstance(value, (list, tuple)) else [value]
    if not all(isinstance(part, plain) for part in parts):
        return f"a {type(value).__name__}"
    if any(isinstance(part, int) and abs(part) >= 1 << 128 for part in parts):
        return "a huge number"
    text = repr(value)
    return text if len(text) <= 200 else text[:200] + "..."


def _kind(value: object) -> str:
    return str(value.dtype) if isinstance(value, Tensor) else type(value).__name__


def _on_cpu(tensor: Tensor, shapes: Sequence[torch.Size], key: str, where: str) -> Tensor:
    if tensor.shape not in shapes:
        accepted = " or ".join(str(tuple(shape)) for shape in dict.fromkeys(shapes))
        msg = f"{where}: {key!r} has shape {tuple(tensor.shape)}; {accepted} is accepted"
        raise ValueError(msg)
    if (lack := lacks(tensor)) is not None:
        msg = f"{where}: {key!r} is {lack}; a dense tensor that has memory is accepted"
        raise ValueError(msg)
    return tensor.detach().to("cpu").resolve_neg()  # what the core reads holds its values
