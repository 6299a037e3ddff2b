"""bitsandbytes' Adam and AdamW, 32 and 8 bits, paged or not. The package itself is not needed.

Its state has numbers where ours has names: ``state1`` is ``exp_avg``, ``state2`` is ``exp_avg_sq``.
8-bit state has ``qmap1`` (what the codes mean) and ``absmax1`` (a scale for each block of 256, or
in old versions 2048, elements in row-major order), or with ``block_wise=False`` a single ``max1``.
Older versions have ``gnorm_vec`` with percentile clipping: what it holds, ours holds.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from qadam import _core, layout
from qadam.codes import BLOCK, DYNAMIC, Coded, blocks
from qadam.interop import torch_optim
from qadam.layout import HISTORY, KEYS, MOMENTS, Entry

WRAPPED = "__bnb_optimizer_quant_state__"
"""Where newer versions put all of an entry but ``step`` when they save."""

OLD_BLOCK = 2048

NUMBERED = dict(zip("12", MOMENTS[:2], strict=True))
"""The moments, by number."""

SCALES = [key + i for i in NUMBERED for key in ("qmap", "absmax", "max", "new_max")]
"""Keys that only 8-bit state has."""

OWN = {WRAPPED, *SCALES, *(f"state{i}" for i in NUMBERED)}
"""Keys by which an entry is recognised."""

DROPPED = {"unorm_vec"}
"""What steps leave and do not read: the norm of the last update, with ``max_unorm``."""

GROUP = {"alpha": 0.0, "t_alpha": None, "t_beta3": None}
"""What its groups have besides: AdEMAMix's options, which its Adam ignores."""


def wrote_entry(entry: object) -> bool:
    """Whether an entry of a state dict is of this format."""
    return isinstance(entry, dict) and not OWN.isdisjoint(entry)


def wrote_group(group: dict[str, Any]) -> bool:
    """Whether a parameter group is of this format. Old versions' groups look like anybody's."""
    return "t_alpha" in group or "t_beta3" in group


# Reading.


def read_group(group: dict[str, Any]) -> dict[str, Any]:
    """A group as torch would have written it."""
    kept = {key: value for key, value in group.items() if key not in GROUP}
    return {**kept, "decoupled_weight_decay": True}  # of Adam as of AdamW


def read(entry: Entry, shape: torch.Size | None, where: str) -> Entry:
    """The state of one parameter with qadam's keys, sharing its memory where it can.

    Codes stay as they are, whatever the size of their blocks, unless they mean something else than
    ours (another ``qmap``): then the result is 32 bits wide.

    Raises:
        ValueError: if it is damaged; the message names the key. The history of norms is not looked
            at: it may not be wanted, and one gradient that is not finite spoils bitsandbytes'.
    """
    flat = _unwrapped(entry, where)
    if strange := sorted(KEYS & flat.keys() - {"step", HISTORY}):
        msg = f"{where}: the state has {strange[0]!r} beside keys of bitsandbytes ({_names(flat)})"
        raise ValueError(msg)
    first = layout.get(flat, "state1", where)
    if not isinstance(first, Tensor):
        msg = f"{where}: 'state1' is {type(first).__name__}; a tensor is accepted"
        raise ValueError(msg)
    shape = first.shape if shape is None else shape
    has_codes = any(key in flat for key in SCALES)
    if first.dtype == torch.uint8:
        has_codes = True

    result = layout.rest(flat, {"step", HISTORY} | OWN | DROPPED, where)
    result["step"] = layout.get(flat, "step", where)
    if HISTORY in flat:
        result[HISTORY] = flat[HISTORY]
    if not has_codes:
        for i, (name, signed) in NUMBERED.items():
            result[name] = layout.read_values(flat, f"state{i}", shape, signed, where)
            _check_order(flat, f"state{i}", where)
        return result
    block_wise = not all(_has_one_scale(flat, i) for i in NUMBERED)
    coded = {i: _read_codes(flat, i, shape, block_wise, where) for i in NUMBERED}
    if all(meaning is None for _, _, meaning in coded.values()):
        order = layout.row_major(shape)
        result["memory_order"] = torch.tensor(order, dtype=torch.int64, device="cpu")
        for i, (codes, scales, _) in coded.items():
            name, _ = NUMBERED[i]
            result[f"{name}_code"], result[f"{name}_scale"] = codes, scales
        return result
    for i, (codes, scales, meaning) in coded.items():
        name, signed = NUMBERED[i]
        result[name] = _decode(codes, scales, meaning, signed)
    return result


def _has_one_scale(flat: Entry, i: str) -> bool:
    return f"max{i}" in flat and f"absmax{i}" not in flat


def _unwrapped(entry: Entry, where: str) -> Entry:
    wrapped = entry.get(WRAPPED, {})
    if not isinstance(wrapped, dict):
        msg = f"{where}: {WRAPPED!r} is {type(wrapped).__name__}; a dict is accepted"
        raise ValueError(msg)
    rest = {key: value for key, value in entry.items() if key != WRAPPED}
    if twice := sorted(OWN & wrapped.keys() & rest.keys()):
        msg = f"{where}: the state has {twice[0]!r} both in {WRAPPED!r} and beside it"
        raise ValueError(msg)
    return {**rest, **wrapped}


def _names(flat: Entry) -> str:
    return ", ".join(sorted(OWN & flat.keys()))


def _read_codes(
    flat: Entry, i: str, shape: torch.Size, block_wise: bool, where: str
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Codes, scales for blocks of 256 or for all, and what the codes mean if not qadam's map."""
    codes = layout.read_codes(flat, f"state{i}", shape, where)
    _check_order(flat, f"state{i}", where)
    count = blocks(shape, block_wise)
    if _has_one_scale(flat, i):
        scales = layout.read_scales(flat, f"max{i}", [1], where)
        repeats = count
    else:
        old = -(-shape.numel() // OLD_BLOCK)
        scales = layout.read_scales(flat, f"absmax{i}", [count, old], where)
        repeats = 1 if len(scales) == count else OLD_BLOCK // BLOCK
    scales = scales if repeats == 1 else scales.repeat_interleave(repeats)[:count]

    if f"qmap{i}" not in flat:
        return codes, scales, None
    signed = NUMBERED[i][1]
    size = torch.Size([256])
    meaning = layout.read_values(flat, f"qmap{i}", size, signed, where)
    own = _own_map(signed)
    # versions of torch and bitsandbytes compute the map with other roundings
    is_own = ((meaning - own).abs() <= 1e-6 * own.abs()).all()
    return codes, scales, None if is_own else meaning


def _own_map(signed: bool) -> Tensor:
    return torch.tensor(_core.dynamic_map(signed), dtype=torch.float32, device="cpu")


def _check_order(flat: Entry, key: str, where: str) -> None:
    if not flat[key].is_contiguous():
        msg = (
            f"{where}: {key!r} has strides {flat[key].stride()}, and bitsandbytes' CUDA and CPU "
            "code disagree on what its elements then belong to; a contiguous tensor is accepted "
            "(see docs/state-format.md)"
        )
        raise ValueError(msg)


def _decode(codes: Tensor, scales: Tensor, meaning: Tensor | None, signed: bool) -> Tensor:
    if meaning is None:
        name = MOMENTS[0][0] if signed else MOMENTS[1][0]
        coded = {name: Coded(codes, scales)}
        return DYNAMIC.decode(coded, layout.row_major(codes.shape))[name]
    numbers = meaning.index_select(0, codes.reshape(-1).int())
    block = BLOCK if len(scales) == blocks(codes.shape, True) else len(numbers)
    numbers *= scales.repeat_interleave(block)[: len(numbers)]
    return numbers.reshape(codes.shape)


# Writing.


def write(entry: Entry, bits: int | None, min_8bit_size: int, where: str) -> Entry:
    """The state of one parameter, checked, on the CPU; ``bits`` None leaves its width.

    bitsandbytes has given up single scales: one is repeated for each block.
    """
    if "max_exp_avg_sq" in {name for name, _ in layout.moments(entry)}:
        msg = f"{where} has state of AMSGrad (max_exp_avg_sq), which bitsandbytes does not know"
        raise ValueError(msg)
    shape = layout.shape(entry, where)
    order = layout.row_major(shape)
    code = layout.code_of(entry)
    narrow = code is not None
    if bits is not None:
        narrow = bits == 8 and shape.numel() >= min_8bit_size
    written = layout.rest(entry, KEYS, where)
    written["step"] = int(layout.read_step(entry, where))
    if HISTORY in entry:
        written[HISTORY] = layout.read_history(entry, where).clone(
            memory_format=torch.contiguous_format
        )
    if not narrow:
        values = layout.values(entry, where)
        for i, (name, _) in NUMBERED.items():
            written[f"state{i}"] = values[name].clone(memory_format=torch.contiguous_format)
        return written
    if code is DYNAMIC:
        coded = {name: layout.read_coded(entry, name, shape, where) for name, _ in MOMENTS}
        own_order = layout.read_order(entry, shape, where)
        coded = DYNAMIC.recode(coded, own_order, order, block_wise=True)
    else:
        coded = DYNAMIC.encode(layout.values(entry, where), order, block_wise=True)
    for i, (name, signed) in NUMBERED.items():
        codes, scales = coded[name]
        written[f"state{i}"] = codes.clone(memory_format=torch.contiguous_format)
        written[f"qmap{i}"] = _own_map(signed)
        written[f"absmax{i}"] = scales.clone(memory_format=torch.contiguous_format)
    return written


def write_group(group: dict[str, Any], where: str) -> dict[str, Any]:
    """A group as bitsandbytes has it; refused if its Adam would compute something else."""
    if group.get("amsgrad") or group.get("maximize"):
        option = "amsgrad" if group.get("amsgrad") else "maximize"
        msg = f"{where} has {option}=True, which bitsandbytes does not know"
        raise ValueError(msg)
    decay = _number(group["weight_decay"])
    if decay and not group.get("decoupled_weight_decay", True):
        msg = (
            f"{where} has weight_decay={layout.show(decay)}, coupled as Adam has it; "
            "bitsandbytes decouples it in its Adam as in its AdamW"
        )
        raise ValueError(msg)
    torchs = torch_optim.OPTIONS
    kept = {key: _number(value) for key, value in group.items() if key not in torchs}
    betas = tuple(_number(beta) for beta in group["betas"])
    return {**kept, "betas": betas, **GROUP}


def _number(value: Any) -> Any:  # noqa: ANN401 - any kind of value
    """A tensor of one element as the number that bitsandbytes' kernels take."""
    return value.item() if isinstance(value, Tensor) and value.numel() == 1 else value
