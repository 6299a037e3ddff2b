"""The optimizers that ``accuracy.py`` compares, and FlashOptim's formulas without a GPU."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from contest import find
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer
from torch.optim.optimizer import ParamsT

Make = Callable[[list[dict[str, Any]], dict[str, Any]], Optimizer]
"""Takes groups of parameters and the hyperparameters that all contenders share."""

TORCH = "torch, 32-bit"
DYNAMIC = "qadam, dynamic"
RATIO = "qadam, ratio"


@dataclass(frozen=True)
class Contender:
    """An optimizer to measure."""

    make: Make
    package: str | None = None
    """The distribution, where it is a peer's: one that fails is absent."""
    note: str = ""


def from_package(module: str, cls: str, **options: object) -> Make:
    """Makes an optimizer of a class that is looked up when it is wanted."""
    return lambda groups, hyper: find([module], cls)(groups, **hyper, **options)


class FlashFormulas(Optimizer):
    """Adam with FlashOptim's 8-bit state, from its paper (arXiv 2602.23349, algorithms 2 and 3).

    For each 32 elements an f16 scale, the largest magnitude; the first moment companded by the soft
    sign 2x / (1 + |x|), the second stored as its root; both rounded to nearest. Scales are at least
    1e-12 before they are rounded, as in the package, whose own kernels need CUDA. Parameters are
    float32; there is no weight decay.
    """

    group = 32

    def __init__(self, params: ParamsT, lr: float, betas: tuple[float, float], eps: float) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]  # noqa: ANN401
        """Updates every parameter."""
        del closure
        for group in self.param_groups:
            for param in group["params"]:
                self.update(param, self.state[param], group)

    def update(self, param: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        """One step of one parameter, whose size 32 must divide."""
        beta1, beta2 = group["betas"]
        grad = param.grad.view(-1, self.group)  # type: ignore[union-attr]
        if not state:
            scales = torch.zeros(len(grad), 1, dtype=torch.float16)
            state.update(step=0, m=(torch.zeros_like(grad, dtype=torch.int8), scales))
            state.update(v=(torch.zeros_like(grad, dtype=torch.uint8), scales))
        state["step"] += 1

        m_code, m_scale = state["m"]
        y = m_code.float().div_(127)
        m = y.div_(2 - y.abs()).mul_(m_scale.float())
        v_code, v_scale = state["v"]
        v = v_code.float().div_(255).mul_(v_scale.float()).square_()

        m.mul_(beta1).add_(grad, alpha=1 - beta1)
        v.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
        c1, c2 = 1 - beta1 ** state["step"], 1 - beta2 ** state["step"]
        denominator = (v / c2).sqrt_().add_(group["eps"])
        param.view(-1, self.group).addcdiv_(m, denominator, value=-group["lr"] / c1)

        scale = m.abs().amax(1, keepdim=True).clamp_(min=1e-12)
        x = m.div_(scale)
        code = (2 * x / (1 + x.abs())).mul_(127).round_().to(torch.int8)
        state["m"] = code, scale.to(torch.float16)
        root = v.sqrt_()
        scale = root.amax(1, keepdim=True).clamp_(min=1e-12)
        code = root.div_(scale).mul_(255).round_().to(torch.uint8)
        state["v"] = code, scale.to(torch.float16)


CONTENDERS: dict[str, Contender] = {
    TORCH: Contender(lambda groups, hyper: torch.optim.Adam(groups, fused=True, **hyper)),
    DYNAMIC: Contender(from_package("qadam", "Adam8bit", min_8bit_size=0, state_code="dynamic")),
    RATIO: Contender(from_package("qadam", "Adam8bit", min_8bit_size=0, state_code="ratio")),
    "bitsandbytes": Contender(
        from_package("bitsandbytes.optim", "Adam8bit", min_8bit_size=0), "bitsandbytes"
    ),
    "torchao": Contender(from_package("torchao.optim", "Adam8bit"), "torchao"),
    "FlashOptim, formulas": Contender(
        lambda groups, hyper: FlashFormulas(groups, **hyper),
        note="its published formulas in torch: the package quantizes on CUDA only",
    ),
}


def parameters(values: Tensor, gradients: Tensor) -> list[Parameter]:
    """A parameter for each row of ``values``, which it is, with that of ``gradients``."""
    made = []
    for value, gradient in zip(values, gradients, strict=True):
        param = Parameter(value.view(-1))
        param.grad = gradient.view(-1)
        made.append(param)
    return made


def set_rate(optimizer: Optimizer, rates: list[float]) -> None:
    """The learning rate of each group; torchao has tensors of it."""
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate
