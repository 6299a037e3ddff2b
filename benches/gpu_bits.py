"""Are a GPU's steps the CPU's, bit for bit? Used by ``gpu_check.py``.

    python benches/gpu_bits.py [device]    # a few small steps of each kind: what sanitizers watch

The same parameters and gradients go through qadam on a device and on the CPU in one process, and
all that either wrote is compared: parameters, the memory around them, state, counts.
"""

from __future__ import annotations

import itertools
import random
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

import qadam

CUDA: Any = torch.cuda
"""Not all of it is typed."""

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
INTEGERS = {4: torch.int32, 2: torch.int16}
BLOCK = 256

LENGTHS = (0, 1, 2, 3, 255, 256, 257, 1000, 4095, 4097, 9001)
OFFSETS = ((0, 0), (1, 0), (0, 1), (1, 1), (3, 2))
"""Elements by which parameter and gradient are off the alignment of an allocation."""
SMALL_LENGTHS, SMALL_OFFSETS = (0, 1, 255, 257, 4097), ((0, 0), (1, 3))
"""For sanitizers, which are slow."""

STATES = ((32, "dynamic"), (8, "dynamic"), (8, "ratio"))
"""Widths, and codes, which 32 bits do without."""

SETTINGS: dict[str, dict[str, Any]] = {
    "Adam": {},
    "Adam, decay": {"weight_decay": 0.3},
    "AdamW": {"weight_decay": 0.3, "lr": 0.1},
    "Adam, propagate": {"weight_decay": 0.3, "nonfinite": "propagate"},
    "Adam, extreme": {"lr": 1e3, "betas": (0.0, 0.5), "eps": 1e-30},
    "AdamW, raise": {"nonfinite": "raise"},
}


# Values that go wrong where something can.


def any_bits(n: int, dtype: torch.dtype, source: torch.Generator) -> Tensor:
    """Every pattern of bits is as likely: NaNs with payloads, infinities, subnormals."""
    integer = INTEGERS[dtype.itemsize]
    limits = torch.iinfo(integer)
    values = torch.randint(limits.min, limits.max + 1, (n,), generator=source)
    return values.to(integer).view(dtype)


def subnormal(n: int, dtype: torch.dtype, source: torch.Generator) -> Tensor:
    """Subnormals, zeros and the smallest normal numbers, of both signs."""
    mantissa = {torch.float32: 23, torch.bfloat16: 7, torch.float16: 10}[dtype]
    integer = INTEGERS[dtype.itemsize]
    magnitude = torch.randint(0, 2 << mantissa, (n,), generator=source)
    sign = torch.randint(0, 2, (n,), generator=source) * torch.iinfo(integer).min
    return (magnitude + sign).to(integer).view(dtype)


def ordinary(n: int, dtype: torch.dtype, source: torch.Generator) -> Tensor:
    """Numbers over eight decades."""
    scales = torch.pow(10.0, -8 * torch.rand(n, generator=source))
    return (torch.randn(n, generator=source) * scales).to(dtype)


def mixed(n: int, dtype: torch.dtype, source: torch.Generator) -> Tensor:
    """Ordinary numbers with a tenth of trouble among them."""
    special = torch.tensor([0.0, -0.0, torch.inf, -torch.inf, torch.nan]).to(dtype)
    picked = special[torch.randint(0, len(special), (n,), generator=source)]
    dice = torch.rand(n, generator=source)
    values = torch.where(dice < 0.05, picked, ordinary(n, dtype, source))
    return torch.where(dice > 0.95, any_bits(n, dtype, source), values)


KINDS: dict[str, Callable[[int, torch.dtype, torch.Generator], Tensor]] = {
    "ordinary": ordinary,
    "mixed": mixed,
    "subnormal": subnormal,
    "any bits": any_bits,
}


CHUNK = 1 << 26


def chunks(tensor: Tensor) -> list[Tensor]:
    """A contiguous tensor in flat parts, so that what is made of one needs little memory."""
    flat = tensor.view(-1)
    return [flat[start : start + CHUNK] for start in range(0, flat.numel(), CHUNK)]


# Comparison.


def raw(tensor: Tensor) -> Tensor:
    """The bytes of a tensor's elements, in logical order, on the CPU."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors have the same dtype, shape and bits, wherever they are."""
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(raw(a), raw(b))


def accept_any_gradient(param: Tensor) -> None:
    """Lets a gradient have another dtype than its parameter (torch 2.10 and later)."""
    param.grad_dtype = None


def state_differences(a: dict[str, Any], b: dict[str, Any]) -> Iterator[str]:
    """The keys under which two entries of ``optimizer.state`` differ."""
    if a.keys() != b.keys():
        yield f"keys {sorted(a)} and {sorted(b)}"
        return
    for key, value in a.items():
        other = b[key]
        is_same = same_bits(value, other) if torch.is_tensor(value) else value == other
        if not is_same:
            yield key


def state_name(bits: int, code: str) -> str:
    """What a report calls a state."""
    return f"{bits} bits" if code == "dynamic" else f"{bits} bits ({code})"


@dataclass(frozen=True)
class Config:
    """One optimizer to compare."""

    param_dtype: torch.dtype
    grad_dtype: torch.dtype
    bits: int
    setting: str
    kind: str
    lengths: tuple[int, ...] = LENGTHS
    offsets: tuple[tuple[int, int], ...] = OFFSETS
    steps: int = 4
    code: str = "dynamic"

    def __str__(self) -> str:
        dtypes = f"{self.param_dtype} parameters, {self.grad_dtype} gradients"
        return f"{self.setting}, {state_name(self.bits, self.code)}, {dtypes}, {self.kind}"


@dataclass
class Inputs:
    """A config's parameters, and the gradients of each step, on the CPU."""

    params: list[Tensor]
    grads: list[list[Tensor]]
    offsets: list[tuple[int, int]]


def inputs(config: Config) -> Inputs:
    """Random inputs, the same for the same config: flat at every offset, and a transposed pair."""
    source = torch.Generator().manual_seed(random.Random(str(config)).randrange(2**31))
    make = KINDS[config.kind]
    places = list(itertools.product(config.lengths, config.offsets))
    params = [make(n, config.param_dtype, source) for n, _ in places]
    params.append(make(60 * 70, config.param_dtype, source).view(60, 70).t())
    grads = [
        [make(n, config.grad_dtype, source) for n, _ in places]
        + [make(60 * 70, config.grad_dtype, source).view(70, 60)]
        for _ in range(config.steps - 1)
    ]
    grads.append(grads[-1])  # twice the same: a step whose tables need no upload
    return Inputs(params, grads, [offset for _, offset in places])


GUARD = 5
"""Elements after a tensor which nobody may write."""


def place(values: Tensor, offset: int, device: str) -> tuple[Tensor, Tensor]:
    """``values`` on a device, ``offset`` elements into memory of their own; that memory first."""
    memory = torch.full((offset + values.numel() + GUARD,), 7.0, dtype=values.dtype)
    memory[offset : offset + values.numel()] = values
    memory = memory.to(device, copy=True)
    return memory, memory[offset : offset + values.numel()]


@dataclass
class Side:
    """An optimizer on one device, and all memory that it may and may not write."""

    config: Config
    given: Inputs
    device: str
    lr: float | Tensor | None = None
    memories: list[Tensor] = field(default_factory=list)
    params: list[Parameter] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    grads: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    held: int = -1

    def __post_init__(self) -> None:
        for values, (offset, _) in zip(self.given.params[:-1], self.given.offsets, strict=True):
            memory, view = place(values, offset, self.device)
            self.memories.append(memory)
            self.params.append(Parameter(view))
        # strides are kept
        strided = self.given.params[-1].to(self.device, copy=True)
        self.memories.append(strided)
        self.params.append(Parameter(strided))
        for param in self.params:
            accept_any_gradient(param)
        options = dict(SETTINGS[self.config.setting])
        if self.lr is not None:
            options["lr"] = self.lr
        rule = qadam.AdamW if self.config.setting.startswith("AdamW") else qadam.Adam
        options |= {"optim_bits": self.config.bits, "state_code": self.config.code}
        self.optimizer = rule(self.params, min_8bit_size=0, **options)

    def give(self, step: int) -> None:
        """Places the gradients of a step, unless those of the last one are the same."""
        of_step = self.given.grads[step]
        if self.held >= 0 and of_step is self.given.grads[self.held]:
            return
        offsets = [offset for _, offset in self.given.offsets]
        pairs = zip(of_step[:-1], offsets, strict=True)
        self.grads = [place(values, offset, self.device) for values, offset in pairs]
        strided = of_step[-1].to(self.device, copy=True)
        self.grads.append((strided, strided))
        for param, (_, view) in zip(self.params, self.grads, strict=True):
            param.grad = view
        self.held = step

    def step(self, step: int) -> tuple[str, str]:
        """Steps, and says what became of it: in a word, and with its message."""
        self.give(step)
        try:
            self.optimizer.step()
        except RuntimeError as error:
            return type(error).__name__, str(error)
        return "stepped", ""

    def gradients_kept(self) -> bool:
        """Whether the last gradients are as they were given."""
        views = [view for _, view in self.grads]
        return all(map(same_bits, views, self.given.grads[self.held]))


def side_differences(a: Side, b: Side) -> list[str]:
    """What two sides differ in."""
    found = []
    pairs = zip(a.memories, b.memories, strict=True)
    found += [
        f"parameter {i} or beside it" for i, (x, y) in enumerate(pairs) if not same_bits(x, y)
    ]
    for i, (p, q) in enumerate(zip(a.params, b.params, strict=True)):
        keys = state_differences(a.optimizer.state.get(p, {}), b.optimizer.state.get(q, {}))
        found += [f"state of parameter {i}: {key}" for key in keys]
    counts = a.optimizer.nonfinite_count, b.optimizer.nonfinite_count
    if counts[0] != counts[1]:
        found.append(f"nonfinite_count {counts[0]} and {counts[1]}")
    found += [f"gradients changed on {x.device}" for x in (a, b) if not x.gradients_kept()]
    return found


def synchronize(device: str) -> None:
    """Waits for a GPU; the CPU is never behind."""
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def check_config(config: Config, device: str, lr: float | None = None) -> list[str]:
    """Differences between ``device`` and the CPU over all steps of a config.

    With ``lr``, the device reads it from a tensor of its own: it must be a float32's value.
    """
    given = inputs(config)
    there = Side(config, given, device, None if lr is None else torch.tensor(lr, device=device))
    here = Side(config, given, "cpu", lr)
    for step in range(config.steps):
        outcomes = there.step(step), here.step(step)
        if outcomes[0][0] != outcomes[1][0]:
            what = " on the device, on the CPU ".join(" ".join(o).strip() for o in outcomes)
            return [f"{config}, step {step + 1}: {what}"]
    synchronize(device)
    return [f"{config}: {what}" for what in side_differences(there, here)]


def all_configs() -> list[Config]:
    """Every dtype pairing, state, setting and kind of value."""
    axes = itertools.product(DTYPES, DTYPES, STATES, SETTINGS, KINDS)
    return [Config(p, g, bits, s, kind, code=code) for p, g, (bits, code), s, kind in axes]


LR = torch.tensor(3e-3, dtype=torch.float32).item()
"""A learning rate that float32 holds exactly: on the device it is a float32 tensor."""


def check_equality(device: str, deadline: float, most: int | None = None) -> dict[str, Any]:
    """All configs, as far as time allows; in random order, so that a part says something of all."""
    configs = all_configs()
    random.Random(0).shuffle(configs)
    total = len(configs[:most])
    failures: list[str] = []
    done = 0
    for config in configs[:most]:
        if time.monotonic() > deadline or len(failures) > 50:
            break
        failures += check_config(config, device)
        done += 1
    for bits, code in STATES:
        config = Config(torch.float32, torch.bfloat16, bits, "AdamW", "mixed", code=code)
        failures += [f"lr on the device: {what}" for what in check_config(config, device, LR)]
    return {"configs": total, "checked": done, "failures": failures}


# One tensor of more than 2^32 elements: 64-bit indices.


def check_huge(bits: int) -> dict[str, Any]:
    """Steps a bf16 tensor whose indices need more than 32 bits, and redoes parts on the CPU.

    Blocks of 256 are independent, so a part that starts with one is updated alike by itself; not in
    the ratio code, whose rounding depends on where in the tensor a block is.
    """
    n = 2**32 + 5 * BLOCK + 77
    need = int(n * (2 + 2 + (2 * bits // 8 + 0.05)) * 1.02) + 2**30
    free = torch.cuda.mem_get_info()[0]
    if need > free:
        return {"skipped": f"needs {need} bytes of device memory, {free} are free", "failures": []}
    source = torch.Generator("cuda").manual_seed(7)
    param = Parameter(torch.empty(n, dtype=torch.bfloat16, device="cuda"))
    param.grad = torch.empty_like(param)
    for chunk in [*chunks(param.detach()), *chunks(param.grad)]:
        chunk.normal_(generator=source)
    parts = [slice(k - 512, k + 512) for k in (512, 2**31, 2**32)]
    parts.append(slice((n // BLOCK - 4) * BLOCK, n))
    copies = [Parameter(param.detach()[part].cpu()) for part in parts]
    for copy, part in zip(copies, parts, strict=True):
        copy.grad = param.grad[part].cpu()
    there = qadam.AdamW([param], lr=1e-2, optim_bits=bits)
    here = qadam.AdamW(copies, lr=1e-2, optim_bits=bits, min_8bit_size=0)
    for _ in range(2):
        there.step()
        here.step()
    torch.cuda.synchronize()
    failures = []
    state = there.state[param]
    for copy, part in zip(copies, parts, strict=True):
        pairs = {"parameter": (param.detach()[part], copy.detach())}
        for key, value in here.state[copy].items():
            if torch.is_tensor(value) and value.numel() > 1:
                of = slice(part.start // BLOCK, -(-part.stop // BLOCK))
                pairs[key] = (state[key][of if key.endswith("_scale") else part], value)
        which = f"2^32 elements and more, {bits} bits, {part.start} to {part.stop}"
        failures += [f"{which}: {k}" for k, pair in pairs.items() if not same_bits(*pair)]
    return {"elements": n, "failures": failures}


# CUDA graphs.

REPLAYS = 10


def check_graph(bits: int, code: str, dtype: torch.dtype) -> list[str]:
    """Replays a captured step with another lr and other gradients each time.

    A second optimizer does the same steps uncaptured, with the lr as a number. Halfway the captured
    optimizer takes a step of its own, which must not disturb the replays after it.
    """
    shapes = ((1000, 37), (256,), (1,), (70_001,))
    source = torch.Generator().manual_seed(bits)
    values = [torch.randn(s, generator=source).to(dtype) for s in shapes]
    lists = [[Parameter(v.to("cuda", copy=True)) for v in values] for _ in range(2)]
    for params in lists:
        for param in params:
            param.grad = torch.zeros_like(param)
    lr = torch.tensor(LR, device="cuda")
    options: dict[str, Any] = {"optim_bits": bits, "min_8bit_size": 0, "weight_decay": 0.1}
    options["state_code"] = code
    name = f"{state_name(bits, code)}, {dtype}"
    captured = qadam.AdamW([{"params": lists[0], "lr": lr}], **options)
    plain = qadam.AdamW(lists[1], lr=LR, **options)
    failures: list[str] = []

    def new_gradients() -> None:
        for param, other in zip(*lists, strict=True):
            values = torch.randn(param.shape, generator=source)
            for one in (param, other):
                assert one.grad is not None  # noqa: S101 - given above
                one.grad.copy_(values)

    def compare(when: str) -> None:
        torch.cuda.synchronize()
        for i, (param, other) in enumerate(zip(*lists, strict=True)):
            if not same_bits(param, other):
                failures.append(f"{name}, {when}: parameter {i}")
            keys = state_differences(captured.state[param], plain.state[other])
            failures.extend(f"{name}, {when}: parameter {i}'s {key}" for key in keys)

    # as torch documents it: warm up on a side stream
    side = CUDA.Stream()
    for _ in range(3):
        new_gradients()
        side.wait_stream(torch.cuda.current_stream())
        with CUDA.stream(side):
            captured.step()
        torch.cuda.current_stream().wait_stream(side)
        plain.step()
    compare("after the warm-up")
    graph = CUDA.CUDAGraph()
    with CUDA.graph(graph):
        captured.step()
    compare("after the capture, which must not step")
    for replay in range(REPLAYS):
        rate = torch.tensor(LR * (replay + 1) / REPLAYS, dtype=torch.float32).item()
        lr.fill_(rate)
        plain.param_groups[0]["lr"] = rate
        new_gradients()
        if replay == REPLAYS // 2:
            captured.step()
        else:
            graph.replay()
        plain.step()
        compare(f"replay {replay + 1}")
    want = 3.0 + REPLAYS
    steps = {captured.state[param]["step"].item() for param in lists[0]}
    if steps != {want}:
        failures.append(f"{name}: step counts {sorted(steps)} instead of {want}")
    torch.cuda.synchronize()
    del graph  # before the optimizer, whose memory it refers to
    return failures


def check_graphs() -> dict[str, Any]:
    """Every state, with f32 and bf16."""
    failures: list[str] = []
    for (bits, code), dtype in itertools.product(STATES, (torch.float32, torch.bfloat16)):
        failures += check_graph(bits, code, dtype)
    return {"replays_each": REPLAYS, "failures": failures}


# What the sanitizers watch.


def small_steps(device: str) -> tuple[int, list[str]]:
    """A few small steps of each kind; how many, and differences from the CPU."""
    failures: list[str] = []
    steps = 0
    settings = ("AdamW", "Adam, propagate", "AdamW, raise")
    axes = itertools.product(DTYPES, DTYPES, STATES, settings)
    for param_dtype, grad_dtype, (bits, code), setting in axes:
        places = SMALL_LENGTHS, SMALL_OFFSETS
        config = Config(
            param_dtype, grad_dtype, bits, setting, "mixed", *places, steps=2, code=code
        )
        lr = LR if setting == "AdamW" else None
        failures += check_config(config, device, lr)
        steps += config.steps
    return steps, failures


def main() -> None:
    """Takes the small steps; exit status 1 where they differ from the CPU's."""
    warnings.simplefilter("ignore")  # of gradients that are not finite
    device = sys.argv[1] if len(sys.argv) > 1 else "cuda"
    steps, failures = small_steps(device)
    print("\n".join(failures[:20]))
    print(f"{steps} steps, {len(failures)} differences from the CPU")
    sys.exit(1 if failures else 0)


if __name__ == "__main__":
    main()
