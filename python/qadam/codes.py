"""The 8-bit codes: what a moment's scales are called, and how moments and codes become each other.

A further code is a class here and its name in :data:`CODES`. The arithmetic is the core's.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from qadam import _core

BLOCK = 256
"""Elements that share a scale."""

Order = tuple[int, ...]
"""Dimensions of more than one element, from the outermost to the innermost in memory."""

FIRST, SECOND, LARGEST = "exp_avg", "exp_avg_sq", "max_exp_avg_sq"
"""The moments, the third of which AMSGrad has."""


class Coded(NamedTuple):
    """A moment in an 8-bit code."""

    codes: Tensor
    """uint8, of the parameter's shape."""
    scales: Tensor
    """float32, a vector: so many for each block, consecutive in memory order, or for all."""


Moments = Mapping[str, Tensor]
"""Values by moment: float32, on the CPU."""


def blocks(shape: torch.Size, block_wise: bool) -> int:
    """How many blocks have scales of their own."""
    return -(-shape.numel() // BLOCK) if block_wise else min(shape.numel(), 1)


class Code(ABC):
    """An 8-bit code."""

    name: ClassVar[str]
    """What ``state_code`` calls it."""
    ranged: ClassVar[frozenset[str]]
    """Moments whose scales are ranges: two numbers each."""
    independent: ClassVar[bool]
    """Whether the codes of a moment mean something without the others'."""

    def scale_key(self, moment: str) -> str:
        """The key of a moment's scales."""
        return f"{moment}_range" if moment in self.ranged else f"{moment}_scale"

    def scale_count(self, moment: str, shape: torch.Size, block_wise: bool) -> int:
        """How many floats the scales of a moment are."""
        return blocks(shape, block_wise) * (2 if moment in self.ranged else 1)

    @abstractmethod
    def zero(self, moment: str) -> int:
        """The code of zero."""

    @abstractmethod
    def decode(self, coded: Mapping[str, Coded], order: Order) -> dict[str, Tensor]:
        """Values of the codes' shape; blocks are consecutive in ``order``."""

    @abstractmethod
    def encode(self, values: Moments, order: Order, block_wise: bool) -> dict[str, Coded]:
        """Codes of the shape of the values, to the nearest, and their scales."""

    def recode(
        self, coded: Mapping[str, Coded], old: Order, new: Order, block_wise: bool
    ) -> dict[str, Coded]:
        """``coded`` of the memory order ``old`` in ``new``, maybe the same tensors.

        With scales a block if ``block_wise``, else with those for all. Codes stay as they are where
        no value changes its scale: where neither the order nor the number of scales does, and where
        there is but one scale, or all are equal.
        """
        kept = {name: self._rescaled(name, c, old == new, block_wise) for name, c in coded.items()}
        done = {name: moment for name, moment in kept.items() if moment is not None}
        if len(done) == len(coded):
            return done
        if not self.independent:
            return self.encode(self.decode(coded, old), new, block_wise)
        rest = {name: moment for name, moment in coded.items() if name not in done}
        done |= self.encode(self.decode(rest, old), new, block_wise)
        return {name: done[name] for name in coded}

    def _rescaled(
        self, moment: str, coded: Coded, same_order: bool, block_wise: bool
    ) -> Coded | None:
        """The same codes with another number of scales, if they can mean the same."""
        codes, scales = coded
        count = self.scale_count(moment, codes.shape, block_wise)
        if (same_order and len(scales) == count) or len(scales) == 0:
            return coded
        rows = scales.view(-1, 2 if moment in self.ranged else 1)
        bits = rows.view(torch.int32)  # a thread that flushes subnormals takes them for equal
        if not (bits == bits[0]).all():
            return None
        return Coded(codes, rows[:1].expand(blocks(codes.shape, block_wise), -1).reshape(-1))

    def _spread(self, moment: str, coded: Coded) -> Tensor:
        """The scales of each block."""
        codes, scales = coded
        width = 2 if moment in self.ranged else 1
        if len(scales) == width:
            scales = scales.view(1, -1).expand(blocks(codes.shape, True), -1).reshape(-1)
        return scales.contiguous()


class Dynamic(Code):
    """bitsandbytes' dynamic map, scaled by the largest magnitude of a block."""

    name = "dynamic"
    ranged = frozenset()
    independent = True

    def zero(self, moment: str) -> int:
        """The code of zero."""
        return 127 if moment == FIRST else 0

    def decode(self, coded: Mapping[str, Coded], order: Order) -> dict[str, Tensor]:
        """As :meth:`Code.decode`; of any moments."""
        decoded = {}
        for moment, of in coded.items():
            codes = _permuted(of.codes, order)
            values = torch.empty(codes.shape, dtype=torch.float32, device="cpu")
            scales = self._spread(moment, of)
            _core.decode_blocks(codes.view(-1), scales, values.view(-1), moment == FIRST)
            decoded[moment] = _permuted_back(values, order)
        return decoded

    def encode(self, values: Moments, order: Order, block_wise: bool) -> dict[str, Coded]:
        """As :meth:`Code.encode`; of any moments."""
        encode_flat = _core.encode_blocks if block_wise else _core.encode_tensor
        encoded = {}
        for moment, of in values.items():
            ordered = _permuted(of, order)
            codes, scales = _room(ordered, self.scale_count(moment, of.shape, block_wise))
            encode_flat(ordered.view(-1), codes.view(-1), scales, moment == FIRST)
            encoded[moment] = Coded(_permuted_back(codes, order), scales)
        return encoded


class Ratio(Code):
    """Roots of second moments on a logarithmic grid, and first moments as ratios to them."""

    name = "ratio"
    ranged = frozenset((SECOND, LARGEST))
    independent = False

    def zero(self, moment: str) -> int:
        """The code of zero."""
        return 128 if moment == FIRST else 0

    def decode(self, coded: Mapping[str, Coded], order: Order) -> dict[str, Tensor]:
        """As :meth:`Code.decode`; of all moments that there are."""
        codes = [_permuted(of.codes, order) for of in coded.values()]
        scales = [self._spread(moment, of) for moment, of in coded.items()]
        values = [torch.empty(c.shape, dtype=torch.float32, device="cpu") for c in codes]
        _core.decode_ratio([c.view(-1) for c in codes], scales, [v.view(-1) for v in values])
        return {name: _permuted_back(v, order) for name, v in zip(coded, values, strict=True)}

    def encode(self, values: Moments, order: Order, block_wise: bool) -> dict[str, Coded]:
        """As :meth:`Code.encode`; of all moments that there are."""
        ordered = [_permuted(of, order) for of in values.values()]
        counts = [self.scale_count(name, of.shape, block_wise) for name, of in values.items()]
        rooms = [_room(of, count) for of, count in zip(ordered, counts, strict=True)]
        codes, scales = [room[0].view(-1) for room in rooms], [room[1] for room in rooms]
        _core.encode_ratio([of.view(-1) for of in ordered], codes, scales, block_wise)
        return {
            name: Coded(_permuted_back(codes, order), scales)
            for name, (codes, scales) in zip(values, rooms, strict=True)
        }


DYNAMIC, RATIO = Dynamic(), Ratio()

CODES: dict[str, Code] = {code.name: code for code in (DYNAMIC, RATIO)}
"""By name."""


def _room(values: Tensor, scales: int) -> tuple[Tensor, Tensor]:
    """Memory for the codes of ``values`` and for so many scales."""
    codes = torch.empty(values.shape, dtype=torch.uint8, device="cpu")
    return codes, torch.empty(scales, dtype=torch.float32, device="cpu")


def _permutation(dims: int, order: Order) -> list[int]:
    """Of all dimensions: those of one element do not matter; they go last."""
    return [*order, *(d for d in range(dims) if d not in order)]


def _permuted(tensor: Tensor, order: Order) -> Tensor:
    return tensor.permute(_permutation(tensor.dim(), order)).contiguous()


def _permuted_back(tensor: Tensor, order: Order) -> Tensor:
    permutation = _permutation(tensor.dim(), order)
    return tensor.permute([permutation.index(d) for d in range(tensor.dim())])
