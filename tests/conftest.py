"""Helpers for all tests: identical parameters, seeded gradients, comparison bit by bit."""

import os

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

import qadam
from qadam import _core

if "QADAM_TEST_NO_EXCHANGE" in os.environ:
    # as if torch had none: its tensors are then read by their attributes
    del torch.Tensor.__dlpack_c_exchange_api__

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


def state_values(entry, name):
    """The moment ``name`` of a contiguous parameter's state as float32, whatever its width."""
    if name in entry:
        return entry[name]
    code, scale = entry[f"{name}_code"], entry[f"{name}_scale"]
    table = torch.tensor(_core.dynamic_map(name == "exp_avg"))
    scales = scale.repeat_interleave(BLOCK)[: code.numel()]
    return (table[code.long()].flatten() * scales).reshape(code.shape)


def code_step(entry, name):
    """The distance from each code to its farther neighbour, times its scale: one code step."""
    code, scale = entry[f"{name}_code"].long().flatten(), entry[f"{name}_scale"]
    table = torch.tensor(_core.dynamic_map(name == "exp_avg"))
    up = table[(code + 1).clamp(max=255)] - table[code]
    down = table[code] - table[(code - 1).clamp(min=0)]
    return torch.maximum(up, down) * scale.repeat_interleave(BLOCK)[: code.numel()]
