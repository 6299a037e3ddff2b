"""Train a small GPT on Python's standard library, with any optimizer.

    python examples/train_gpt.py --optimizer qadam.AdamW8bit
    python examples/train_gpt.py --optimizer "torch.optim.AdamW(fused=True)" --steps 200

An optimizer is named as in Python: the class, with its extra keywords if it needs any.
Nothing else in this file depends on which one it is: parameter groups, a learning-rate
schedule and gradient clipping are torch's own.

The same seed gives the same initial weights and the same batches, so two runs differ by
their optimizer alone.
"""

from __future__ import annotations

import argparse
import ast
import importlib
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from gpt import GPT, GPTConfig
from stdlib_text import Text, load
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from tqdm import tqdm


class Diverged(RuntimeError):
    """The loss is no longer a finite number."""


@dataclass(frozen=True)
class TrainConfig:
    """Everything that two runs to be compared must share."""

    steps: int = 600
    batch: int = 8
    lr: float = 2e-3
    warmup: int = 60
    final_lr_fraction: float = 0.05
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 0.1
    clip: float = 1.0
    seed: int = 1
    evaluations: int = 14
    evaluation_windows: int = 1024
    corpus_bytes: int = 4_000_000
    # A model this small meets hundreds of short parallel regions a step. Two threads on two
    # free cores halve the time, but as soon as anything else wants a core, each region waits
    # for the thread that lost its own, and training takes ten times as long.
    threads: int = 1
    model: GPTConfig = field(default_factory=GPTConfig)


@dataclass(frozen=True)
class Run:
    """What one training run measured."""

    optimizer: str
    parameters: int
    final_val_loss: float
    state_bytes_per_param: float
    step_ms: float
    seconds: float
    val_loss: list[tuple[int, float]]


def resolve(spec: str) -> Callable[..., torch.optim.Optimizer]:
    """The optimizer that ``"package.Class"`` or ``"package.Class(key=value)"`` names."""
    node = ast.parse(spec, mode="eval").body
    keywords: dict[str, Any] = {}
    if isinstance(node, ast.Call):
        keywords = {word.arg: ast.literal_eval(word.value) for word in node.keywords if word.arg}
        node = node.func
    module, _, name = ast.unparse(node).rpartition(".")
    if not module:
        raise ValueError(f"optimizer {spec!r} names no package: write e.g. torch.optim.AdamW")
    cls = getattr(importlib.import_module(module), name)

    def build(params: Any, **shared: Any) -> torch.optim.Optimizer:
        optimizer: torch.optim.Optimizer = cls(params, **{**shared, **keywords})
        return optimizer

    return build


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Matrices are decayed; vectors (the norms' weights) are not."""
    parameters = list(model.parameters())
    return [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]


def learning_rate(config: TrainConfig) -> Callable[[int], float]:
    """The factor on ``lr`` at each step: a linear warm-up, then a cosine."""

    def factor(step: int) -> float:
        if step < config.warmup:
            return (step + 1) / config.warmup
        progress = (step - config.warmup) / max(1, config.steps - config.warmup)
        cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
        return config.final_lr_fraction + (1 - config.final_lr_fraction) * cosine

    return factor


def windows(data: Tensor, starts: Tensor, context: int) -> Tensor:
    """The ``context + 1`` bytes from each start: the inputs and, one later, the targets."""
    return data[starts[:, None] + torch.arange(context + 1)].long()


def validation_windows(data: Tensor, count: int, context: int) -> Tensor:
    """``count`` windows evenly spread over ``data``: the same ones at every evaluation."""
    last = len(data) - context - 1
    return windows(data, torch.linspace(0, last, count, dtype=torch.float64).long(), context)


@torch.no_grad()
def evaluate(model: GPT, data: Tensor) -> float:
    """The mean loss over all windows in ``data``."""
    total = 0.0
    for part in torch.split(data, 32):
        total += model.loss(part).item() * len(part)
    return total / len(data)


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """The size of every tensor that the optimizer keeps, scales and step counts included."""
    return sum(
        value.numel() * value.element_size()
        for state in optimizer.state.values()
        for value in state.values()
        if isinstance(value, Tensor)
    )


def train(spec: str, config: TrainConfig, text: Text) -> Run:
    """Train from scratch with the optimizer ``spec``; raises `Diverged`."""
    torch.set_num_threads(config.threads)
    context = config.model.context
    torch.manual_seed(config.seed)
    model = GPT(config.model)
    # A generator of their own keeps the batches the same even if an optimizer or a change
    # to the model draws random numbers.
    batches = torch.Generator().manual_seed(config.seed)
    validation = validation_windows(text.validation, config.evaluation_windows, context)
    # While training, an eighth of the windows is enough to draw a curve.
    validation_sample = validation[::8]

    optimizer = resolve(spec)(
        parameter_groups(model, config.weight_decay), lr=config.lr, betas=config.betas
    )
    scheduler = LambdaLR(optimizer, learning_rate(config))

    val_loss = [(0, evaluate(model, validation_sample))]
    step_seconds: list[float] = []
    started = time.perf_counter()
    evaluate_every = max(1, config.steps // config.evaluations)
    with tqdm(total=config.steps, desc=spec, unit="step", mininterval=0.5) as bar:
        for step in range(1, config.steps + 1):
            starts = torch.randint(len(text.train) - context, (config.batch,), generator=batches)
            loss = model.loss(windows(text.train, starts, context))
            if not math.isfinite(loss.item()):
                raise Diverged(f"{spec}: the training loss is {loss.item()} at step {step}")

            optimizer.zero_grad()
            torch.autograd.backward(loss)
            nn.utils.clip_grad_norm_(model.parameters(), config.clip)
            before = time.perf_counter()
            optimizer.step()
            step_seconds.append(time.perf_counter() - before)
            scheduler.step()

            if step % evaluate_every == 0 or step == config.steps:
                val_loss.append((step, evaluate(model, validation_sample)))
                bar.set_postfix_str(f"validation loss {val_loss[-1][1]:.3f}", refresh=False)
            bar.update()

    final = evaluate(model, validation)
    if not math.isfinite(final):
        raise Diverged(f"{spec}: the validation loss is {final} after {config.steps} steps")
    parameters = sum(p.numel() for p in model.parameters())
    return Run(
        optimizer=spec,
        parameters=parameters,
        final_val_loss=final,
        state_bytes_per_param=state_bytes(optimizer) / parameters,
        step_ms=1e3 * statistics.median(step_seconds),
        seconds=time.perf_counter() - started,
        val_loss=val_loss,
    )


def main(argv: list[str] | None = None) -> None:
    """Trains once and prints the outcome."""
    defaults = TrainConfig()
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--optimizer", default="qadam.AdamW8bit")
    parser.add_argument("--steps", type=int, default=defaults.steps)
    parser.add_argument("--batch", type=int, default=defaults.batch, help="windows a step")
    parser.add_argument("--lr", type=float, default=defaults.lr)
    parser.add_argument("--weight-decay", type=float, default=defaults.weight_decay)
    parser.add_argument("--seed", type=int, default=defaults.seed)
    parser.add_argument("--threads", type=int, default=defaults.threads)
    args = parser.parse_args(argv)

    config = TrainConfig(
        steps=args.steps,
        batch=args.batch,
        lr=args.lr,
        warmup=min(defaults.warmup, args.steps // 10),
        weight_decay=args.weight_decay,
        seed=args.seed,
        threads=args.threads,
    )
    run = train(args.optimizer, config, load(config.corpus_bytes))
    print(
        f"{run.optimizer}: validation loss {run.final_val_loss:.4f} nats a byte, "
        f"{run.state_bytes_per_param:.2f} state bytes a parameter, "
        f"{run.step_ms:.2f} ms an optimizer step, {run.seconds:.0f} s in all"
    )


if __name__ == "__main__":
    main()
