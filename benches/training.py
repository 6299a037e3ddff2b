"""Training with 8-bit states beside 32-bit ones: what their errors come to in the end.

    python benches/training.py                       # both models, 3 seeds
    python benches/training.py --quick               # does it all still run?
    python benches/training.py --models words --seeds 1 2 --jobs 1

Two models: the demo's GPT (``examples/gpt.py``), and one that is mostly embedding
(``word_model.py``). All parameters have 8-bit state, embeddings and vectors too
(``min_8bit_size=0``). A seed is a start and an order of batches, the same for all optimizers, so
runs of one seed differ by the optimizer alone; the validation text is the same for all.

Each run has one thread, in a process of its own, ``--jobs`` of them at a time: so the bits do not
depend on what else runs, and small parallel regions do not wait for each other.

Writes ``target/accuracy/training.json``. Exits with status 1 if a run diverges.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import os
import statistics
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, Protocol

import torch
from accuracy_contenders import DYNAMIC, RATIO, TORCH
from contest import BASELINE, ROOT, commit, state_bytes
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

sys.path.append(str(ROOT / "examples"))

from gpt import GPT, GPTConfig
from stdlib_text import load
from train_gpt import (
    TrainConfig,
    learning_rate,
    parameter_groups,
    resolve,
    validation_windows,
    windows,
)
from word_model import WordConfig, WordModel, load_words

OUT = ROOT / "target" / "accuracy"
OPTIMIZERS = {
    TORCH: BASELINE,
    DYNAMIC: "qadam.AdamW8bit(min_8bit_size=0, state_code='dynamic')",
    RATIO: "qadam.AdamW8bit(min_8bit_size=0, state_code='ratio')",
}
EVALUATE_EVERY = 300
"""Steps, on an eighth of the validation windows; in the end on all of them."""


class Model(Protocol):
    """A language model."""

    def loss(self, window: Tensor) -> Tensor:
        """The mean loss of windows of words."""
        ...


@dataclass(frozen=True)
class Task:
    """A model, its text, and how it is trained."""

    title: str
    build: Callable[[], nn.Module]
    """The model, from torch's global generator."""
    text: Callable[[int], Any]
    """Of so many bytes: ``train``, ``validation``, ``digest``."""
    context: int
    train: TrainConfig
    evaluation_batch: int


@dataclass(frozen=True)
class Run:
    """What one training run measured."""

    model: str
    optimizer: str
    seed: int
    val_loss: list[tuple[int, float]]
    """By steps: the last one on all windows, the others on an eighth."""
    embedding_norm: float
    parameters: int
    state_bytes_per_param: float
    corpus_sha256: str
    seconds: float

    @property
    def loss(self) -> float:
        """The final one."""
        return self.val_loss[-1][1]


GPT_CONFIG, WORD_CONFIG = GPTConfig(), WordConfig()
TASKS = {
    "gpt": Task(
        title="the demo's GPT, bytes",
        build=lambda: GPT(GPT_CONFIG),
        text=load,
        context=GPT_CONFIG.context,
        train=TrainConfig(steps=1500, warmup=100),
        evaluation_batch=32,
    ),
    "words": Task(
        title=f"a model of {WORD_CONFIG.vocabulary:,} words, mostly embedding",
        build=lambda: WordModel(WORD_CONFIG),
        text=lambda size: load_words(size, WORD_CONFIG.vocabulary),
        context=WORD_CONFIG.context,
        train=TrainConfig(
            steps=1500,
            warmup=100,
            batch=256,
            weight_decay=0.01,
            evaluation_windows=16_384,
            corpus_bytes=7_000_000,
        ),
        evaluation_batch=256,
    ),
}


@cache
def text_of(model: str) -> Any:  # noqa: ANN401 - there are two kinds
    """A model's text, read once a process."""
    task = TASKS[model]
    return task.text(task.train.corpus_bytes)


@torch.no_grad()
def evaluate(model: Model, data: Tensor, batch: int) -> float:
    """The mean loss over all windows."""
    total = 0.0
    for part in torch.split(data, batch):
        total += model.loss(part).item() * len(part)
    return total / len(data)


def train(name: str, optimizer_name: str, seed: int, steps: int) -> Run:
    """Trains from scratch, with one thread."""
    torch.set_num_threads(1)
    started = time.perf_counter()
    task, text = TASKS[name], text_of(name)
    config = replace(task.train, steps=steps, warmup=min(task.train.warmup, steps // 5))
    torch.manual_seed(seed)
    model: Any = task.build()
    batches = torch.Generator().manual_seed(seed)
    validation = validation_windows(text.validation, config.evaluation_windows, task.context)

    groups = parameter_groups(model, config.weight_decay)
    optimizer = resolve(OPTIMIZERS[optimizer_name])(groups, lr=config.lr, betas=config.betas)
    scheduler = LambdaLR(optimizer, learning_rate(config))
    losses = []
    for step in range(1, steps + 1):
        starts = torch.randint(len(text.train) - task.context, (config.batch,), generator=batches)
        loss = model.loss(windows(text.train, starts, task.context))
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        nn.utils.clip_grad_norm_(model.parameters(), config.clip)
        optimizer.step()
        scheduler.step()
        if step == steps or step % EVALUATE_EVERY == 0:
            part = validation if step == steps else validation[::8]
            losses.append((step, evaluate(model, part, task.evaluation_batch)))

    parameters = sum(p.numel() for p in model.parameters())
    return Run(
        model=name,
        optimizer=optimizer_name,
        seed=seed,
        val_loss=losses,
        embedding_norm=model.tokens.weight.double().norm().item(),
        parameters=parameters,
        state_bytes_per_param=state_bytes(optimizer) / parameters,
        corpus_sha256=text.digest,
        seconds=time.perf_counter() - started,
    )


def summarize(runs: list[Run]) -> list[dict[str, Any]]:
    """For each optimizer of one model: its runs, beside 32-bit ones with the same seeds."""
    base = {run.seed: run for run in runs if run.optimizer == TORCH}
    losses = [run.loss for run in base.values()]
    spread = max(losses) - min(losses)
    rows = []
    for optimizer in OPTIMIZERS:
        own = [run for run in runs if run.optimizer == optimizer]
        differences = [run.loss - base[run.seed].loss for run in own]
        rows.append(
            {
                "optimizer": optimizer,
                "spec": OPTIMIZERS[optimizer],
                "state_bytes_per_param": own[0].state_bytes_per_param,
                "seeds": [run.seed for run in own],
                "loss": [run.loss for run in own],
                "difference": differences,
                "spread_of_32_bit": spread,
                "within_spread": [abs(difference) <= spread for difference in differences],
                "embedding_norm_ratio": [
                    run.embedding_norm / base[run.seed].embedding_norm for run in own
                ],
            }
        )
    return rows


def table(name: str, runs: list[Run], rows: list[dict[str, Any]]) -> str:
    """The runs of one model as aligned text."""
    seeds = rows[0]["seeds"]
    seconds = statistics.median(run.seconds for run in runs)
    lines = [
        f"\n{TASKS[name].title}: {runs[0].parameters:,} parameters, {runs[0].val_loss[-1][0]:,}"
        f" steps, {seconds:.0f} s a run; seeds {', '.join(map(str, seeds))}",
        f"32-bit spreads by {rows[0]['spread_of_32_bit']:.4f} from seed to seed;"
        " * is farther than that from 32-bit; norm: the embedding's, by 32-bit's",
        f"  {'':16}{'loss':^{9 * len(seeds)}}{'to 32-bit':^{10 * len(seeds)}}"
        f"{'norm':^{8 * len(seeds)}}{'state B':>8}",
    ]
    for row in rows:
        losses = "".join(f"{loss:9.4f}" for loss in row["loss"])
        differences = "".join(
            f"{difference:+9.4f}{' ' if within else '*'}"
            for difference, within in zip(row["difference"], row["within_spread"], strict=True)
        )
        norms = "".join(f"{ratio:8.3f}" for ratio in row["embedding_norm_ratio"])
        state = f"{row['state_bytes_per_param']:8.2f}"
        lines.append(f"  {row['optimizer']:16}{losses}{differences}{norms}{state}")
    return "\n".join(lines)


def parser() -> argparse.ArgumentParser:
    """What the command line takes."""
    made = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    made.add_argument("--quick", action="store_true", help="20 steps, one seed")
    made.add_argument("--models", nargs="+", choices=TASKS, default=list(TASKS))
    made.add_argument("--seeds", nargs="+", type=int)
    made.add_argument("--steps", type=int)
    made.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="runs at a time")
    made.add_argument("--out", type=Path, default=OUT, help="the directory of the report")
    return made


def main(argv: list[str] | None = None) -> int:
    """Trains everything, prints the tables and writes the figures."""
    from machine import machine  # of the examples

    options = parser().parse_args(argv)
    seeds = options.seeds or ([1] if options.quick else [1, 2, 3])
    report: dict[str, Any] = {
        "machine": machine(),
        "load": os.getloadavg(),
        "commit": commit(),
        "arguments": sys.argv[1:] if argv is None else argv,
        "models": {},
    }
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / "training.json"
    # not forked: a copy of a process whose libraries have threads may hang
    context = multiprocessing.get_context("spawn")
    diverged = False
    with ProcessPoolExecutor(options.jobs, mp_context=context) as pool:
        for name in options.models:
            steps = options.steps or (20 if options.quick else TASKS[name].train.steps)
            jobs = [
                pool.submit(train, name, optimizer, seed, steps)
                for seed in seeds
                for optimizer in OPTIMIZERS
            ]
            runs = [job.result() for job in jobs]
            for run in runs:
                if not math.isfinite(run.loss):
                    print(f"diverged: {name}, {run.optimizer}, seed {run.seed}", file=sys.stderr)
                    diverged = True
            if diverged:
                return 1
            rows = summarize(runs)
            report["models"][name] = {
                "title": TASKS[name].title,
                "config": asdict(replace(TASKS[name].train, steps=steps)),
                "optimizers": rows,
                "runs": [asdict(run) for run in runs],
            }
            path.write_text(json.dumps(report, indent=1) + "\n")
            print(table(name, runs, rows), flush=True)
    print(f"\nwrote {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
