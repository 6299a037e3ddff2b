"""Gradients that are hard on a narrow state: what ``accuracy.py`` feeds its contenders.

A row is drawn afresh from its own generator for each seed, so it is the same whichever other rows,
seeds and contenders take part. ``WORD`` elements stand for a word of an embedding, ``BLOCK`` share
a scale in most 8-bit states.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Generator, Tensor

BLOCK = 256
WORD = 64
SIZE = 1e-2
"""A standard deviation, where a row does not say otherwise."""

Draw = Callable[[int], Tensor]
"""The gradient of a step; steps are counted from 1, and asked for in this order."""


@dataclass(frozen=True)
class Row:
    """One kind of gradients."""

    title: str
    make: Callable[[Generator, int, int], Draw]
    """Takes the number of elements and of all steps."""
    bounded: bool = False
    """Whether the ratio code has bounds to keep here."""
    rate: Callable[[int, int], float] = lambda step, steps: 1.0  # noqa: ARG005
    """The factor on the learning rate at a step, of so many."""

    def draw(self, seed: int, elements: int, steps: int) -> Draw:
        """The gradients for one seed."""
        # not hash(), which differs from process to process
        number = zlib.crc32(f"{self.title}, {seed}".encode())
        return self.make(Generator().manual_seed(number), elements, steps)


def one_scale_a_row(gen: Generator, elements: int, steps: int) -> Draw:
    """A block shares a scale, three decades lie between blocks: as rows of a matrix."""
    del steps
    scale = SIZE * 10 ** (-3 * torch.rand(elements // BLOCK, generator=gen))
    scale = scale.repeat_interleave(BLOCK)
    return lambda _: torch.randn(elements, generator=gen) * scale


def five_decades(gen: Generator, elements: int, steps: int) -> Draw:
    """Each element has a scale of its own, five decades between them, in every block."""
    del steps
    scale = SIZE * 10 ** (-5 * torch.rand(elements, generator=gen))
    return lambda _: torch.randn(elements, generator=gen) * scale


def words(gen: Generator, chance: Tensor) -> Draw:
    """Normal for the words that a batch has, exactly zero for the others; a chance for each."""

    def draw(step: int) -> Tensor:
        del step
        there = torch.rand(len(chance), generator=gen) < chance
        return SIZE * (torch.randn(len(chance), WORD, generator=gen) * there[:, None]).flatten()

    return draw


def rare_words(gen: Generator, elements: int, steps: int) -> Draw:
    """Each word is in 2% of the batches."""
    del steps
    return words(gen, torch.full((elements // WORD,), 0.02))


def zipf_words(gen: Generator, elements: int, steps: int) -> Draw:
    """The first six words are in every batch, the others ever more rarely."""
    del steps
    return words(gen, (6 / torch.arange(1, elements // WORD + 1)).clamp(max=1))


def drift(gen: Generator, elements: int, steps: int) -> Draw:
    """A signal that is constant, and noise that is three times larger."""
    del steps
    return lambda _: SIZE * (0.3 + torch.randn(elements, generator=gen))


def outliers(gen: Generator, elements: int, steps: int) -> Draw:
    """One element of each block is a thousand times larger, always."""
    del steps
    scale = torch.full((elements // BLOCK, BLOCK), SIZE)
    place = torch.randint(BLOCK, (len(scale), 1), generator=gen)
    scale = scale.scatter(1, place, 1000 * SIZE).flatten()
    return lambda _: torch.randn(elements, generator=gen) * scale


def heavy_tails(gen: Generator, elements: int, steps: int) -> Draw:
    """Student's t of two degrees of freedom: its variance is infinite."""
    del steps

    def draw(step: int) -> Tensor:
        del step
        # half of a chi-square with two degrees of freedom is exponential
        half = torch.empty(elements).exponential_(generator=gen)
        return SIZE * torch.randn(elements, generator=gen) / half.clamp(min=1e-12).sqrt()

    return draw


def tiny(gen: Generator, elements: int, steps: int) -> Draw:
    """As of a mean over very many tokens: below what float16 keeps well."""
    del steps
    return lambda _: 1e-6 * torch.randn(elements, generator=gen)


def pauses(gen: Generator, elements: int, steps: int) -> Draw:
    """200 steps of noise, 200 steps of zeros, and so on: as an expert nothing is sent to."""
    del steps

    def draw(step: int) -> Tensor:
        on = (step - 1) // 200 % 2 == 0
        return SIZE * torch.randn(elements, generator=gen) * on

    return draw


def shrinking(gen: Generator, elements: int, steps: int) -> Draw:
    """A scale that falls to a hundredth over the run, as the loss does."""
    return lambda step: SIZE * 100 ** (-step / steps) * torch.randn(elements, generator=gen)


def warmup_and_cosine(step: int, steps: int) -> float:
    """A linear warm-up over a twentieth of the run, then a cosine to a twentieth."""
    warmup = max(1, steps // 20)
    if step < warmup:
        return step / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    return 0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * progress))


ROWS = (
    Row("one scale a row", one_scale_a_row, bounded=True),
    Row("five decades within a block", five_decades, bounded=True),
    Row("2% of rows active", rare_words, bounded=True),
    Row("Zipf rows", zipf_words, bounded=True),
    Row("constant drift plus noise", drift, bounded=True),
    Row("an outlier a block", outliers),
    Row("heavy tails", heavy_tails),
    Row("gradients near 1e-6", tiny),
    Row("200 steps on, 200 off", pauses),
    Row("scale falls to 1/100", shrinking),
    Row("drift, warm-up and cosine", drift, rate=warmup_and_cosine),
)
