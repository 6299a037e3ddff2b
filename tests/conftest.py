"""Helpers for all tests: identical parameters, seeded gradients, comparison bit by bit."""

import os

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

import qadam
from qadam import _core
from qadam.codes import RATIO, Coded
from qadam.layout import code_of, moments, row_major

if "QADAM_TEST_NO_EXCHANGE" in os.environ:
    # as if torch had none: its tensors are then read by their attributes
    del torch.Tensor.__dlpack_c_exchange_api__

if "QADAM_TEST_NO_IMPRESSIONS" in os.environ:
    # as if torch built tensors in another way, and one of their changes could not be seen
    torch._lazy_clone = lambda tensor: tensor.detach()

if "QADAM_SOFTGPU" in os.environ:
    # before anything else asks for CUDA
    from software_device import SoftwareDevice

    SOFTWARE = SoftwareDevice(os.environ["QADAM_SOFTGPU"])
else:
    SOFTWARE = None


@pytest.fixture
def device():
    """The device of the tests marked ``cuda``: a GPU, or CPU tensors that stand in for one."""
    if SOFTWARE is not None:
        return "cpu"
    assert torch.cuda.is_available(), "set QADAM_SOFTGPU to libsoftgpu.so, or run where a GPU is"
    return "cuda"


@pytest.fixture
def software():
    """Control of the software device."""
    yield SOFTWARE
    SOFTWARE.disarm()


BLOCK = 256
INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}

ADAMS = [qadam.Adam, qadam.AdamW]
"""The two rules, which take ``optim_bits``."""


def fingerprint(value):
    """A value that is equal for tensors of the same dtype, shape, strides and bits only."""
    if not isinstance(value, Tensor):
        return value
    bits = value.detach().contiguous().view(INTEGERS[value.element_size()])
    return value.dtype, tuple(value.shape), value.stride(), bits.numpy().tobytes()


def same_bits(a, b):
    """Whether two tensors have the same dtype, shape and bits, whatever their strides."""
    (a_dtype, a_shape, _, a_bits), (b_dtype, b_shape, _, b_bits) = fingerprint(a), fingerprint(b)
    return (a_dtype, a_shape, a_bits) == (b_dtype, b_shape, b_bits)


def frozen(optimizer):
    """All that an optimizer holds and updates, to compare before with after."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    places = {id(p): place for place, p in enumerate(params)}
    state = {
        places.get(id(p), id(p)): {key: fingerprint(value) for key, value in entry.items()}
        for p, entry in optimizer.state.items()
        if isinstance(entry, dict)
    }
    options = [
        {key: value for key, value in group.items() if key != "params"}
        for group in optimizer.param_groups
    ]
    return [(id(p), p.data_ptr(), fingerprint(p)) for p in params], state, options


def twins(*shapes, n=2, dtype=torch.float32, seed=0):
    """``n`` lists of parameters of these shapes, all with the same values."""
    generator = torch.Generator().manual_seed(seed)
    values = [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]
    return tuple([Parameter(value.clone()) for value in values] for _ in range(n))


def give_grads(*lists, seed, scale=0.1):
    """Gives the i-th parameter of every list the same random gradient."""
    generator = torch.Generator().manual_seed(seed)
    for params in zip(*lists, strict=True):
        grad = torch.randn(params[0].shape, generator=generator) * scale
        for param in params:
            param.grad = grad.to(param.grad_dtype or param.dtype, copy=True)


def train(steps, *optimizers, first=0):
    """Steps optimizers of equal parameters with the same gradients, which depend on the step."""
    lists = [[p for g in o.param_groups for p in g["params"]] for o in optimizers]
    for seed in range(first, first + steps):
        give_grads(*lists, seed=seed)
        for optimizer in optimizers:
            optimizer.step()


WIDTHS = {
    "32": {"optim_bits": 32},
    "dynamic": {"optim_bits": 8, "state_code": "dynamic"},
    "ratio": {"optim_bits": 8, "state_code": "ratio"},
}
"""Options for each way that state can be stored: at 32 bits, and at 8 in either code."""

CODES = ["dynamic", "ratio"]
"""The 8-bit codes, by name."""


def in_ratio(entry):
    """Whether a state entry is in the ratio code."""
    return code_of(entry) is RATIO


def scale_key(entry, name):
    """The key of the scales of a moment that is coded."""
    return f"{name}_range" if in_ratio(entry) and name != "exp_avg" else f"{name}_scale"


def _dynamic_scales(entry, name):
    """The scale of each element, flat."""
    scale, count = entry[f"{name}_scale"], entry[f"{name}_code"].numel()
    return scale.expand(count) if len(scale) == 1 else scale.repeat_interleave(BLOCK)[:count]


def _ratio_values(entry):
    """All moments of an entry in the ratio code; test_ratio.py has a decoder of its own."""
    coded = {n: Coded(entry[f"{n}_code"], entry[scale_key(entry, n)]) for n, _ in moments(entry)}
    return RATIO.decode(coded, row_major(entry["exp_avg_code"].shape))


def state_values(entry, name):
    """The moment ``name`` of a contiguous parameter's state as float32, however it is stored."""
    if name in entry:
        return entry[name]
    if in_ratio(entry):
        return _ratio_values(entry)[name]
    code = entry[f"{name}_code"]
    table = torch.tensor(_core.dynamic_map(name == "exp_avg"))
    return (table[code.long()].flatten() * _dynamic_scales(entry, name)).reshape(code.shape)


def code_step(entry, name):
    """The distance from each code to its farther neighbour, in values: one code step, flat."""
    if in_ratio(entry):
        return _ratio_step(entry, name).flatten()
    code = entry[f"{name}_code"].long().flatten()
    table = torch.tensor(_core.dynamic_map(name == "exp_avg"))
    up = table[(code + 1).clamp(max=255)] - table[code]
    down = table[code] - table[(code - 1).clamp(min=0)]
    return torch.maximum(up, down) * _dynamic_scales(entry, name)


def _ratio_step(entry, name):
    values = _ratio_values(entry)
    if name == "exp_avg":  # a cell in units of the root that divides
        scale, shape = entry["exp_avg_scale"], values[name].shape
        count = values[name].numel()
        each = scale.expand(count) if len(scale) == 1 else scale.repeat_interleave(BLOCK)[:count]
        return each.reshape(shape) / 63 * values.get("max_exp_avg_sq", values["exp_avg_sq"]).sqrt()
    first, byte = entry["exp_avg_code"].int(), entry[f"{name}_code"].int()
    is_second = name == "exp_avg_sq"
    code, top = (2 * byte + (first & 1), 511) if is_second else (byte, 255)
    found = []
    for by in (1, -1):
        other = (code + by).clamp(0, top)
        moved = {**entry, f"{name}_code": (other >> is_second).byte()}
        if is_second:
            moved["exp_avg_code"] = ((first & ~1) | (other & 1)).byte()
        found.append((_ratio_values(moved)[name] - values[name]).abs())
    return torch.maximum(*found)
