"""A small GPT: the model that the demo trains.

A decoder-only transformer over bytes, in the arrangement that has become usual: pre-norm
blocks, learned positions, causal attention, a GELU MLP four times as wide as the model,
and an output head that shares its weights with the token embedding. Nothing in here knows
which optimizer will train it.

    model = GPT(GPTConfig())          # 1.28 M parameters
    logits = model(tokens)            # (batch, context) -> (batch, context, 256)
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F


@dataclass(frozen=True)
class GPTConfig:
    """The size of the model. The vocabulary is the 256 values of a byte."""

    layers: int = 4
    heads: int = 5
    width: int = 160
    context: int = 64
    vocabulary: int = 256


class Attention(nn.Module):
    """Causal multi-head self-attention."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.heads = config.heads
        self.query_key_value = nn.Linear(config.width, 3 * config.width, bias=False)
        self.output = nn.Linear(config.width, config.width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        # (batch, length, 3 * width) -> three of (batch, heads, length, width / heads)
        query, key, value = (
            part.view(batch, length, self.heads, -1).transpose(1, 2)
            for part in self.query_key_value(x).chunk(3, dim=-1)
        )
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        out: Tensor = self.output(mixed.transpose(1, 2).reshape(batch, length, width))
        return out


class MLP(nn.Module):
    """The position-wise half of a block."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.hidden = nn.Linear(config.width, 4 * config.width, bias=False)
        self.output = nn.Linear(4 * config.width, config.width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.output(F.gelu(self.hidden(x)))
        return out


class Block(nn.Module):
    """Attention, then the MLP, each normalised before and added to what came in."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(config.width, bias=False)
        self.attention = Attention(config)
        self.mlp_norm = nn.LayerNorm(config.width, bias=False)
        self.mlp = MLP(config)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.attention_norm(x))
        x = x + self.mlp(self.mlp_norm(x))
        return x


class GPT(nn.Module):
    """Token and position embeddings, the blocks, a last norm, and the shared head."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.config = config
        self.tokens = nn.Embedding(config.vocabulary, config.width)
        self.positions = nn.Embedding(config.context, config.width)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = nn.LayerNorm(config.width, bias=False)
        self._initialise()

    def _initialise(self) -> None:
        for name, parameter in self.named_parameters():
            if parameter.dim() < 2:
                continue  # LayerNorm weights start at 1, where torch puts them
            # The embeddings are larger than the usual 0.02: with few steps to train in, it
            # matters that the model can tell positions apart from the first one.
            std = 0.05 if name in ("tokens.weight", "positions.weight") else 0.02
            if name.endswith("output.weight"):
                # Every block adds two outputs to the residual stream; scaled like this the
                # stream's variance does not grow with the number of blocks.
                std /= math.sqrt(2 * self.config.layers)
            nn.init.normal_(parameter, std=std)

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits of each next byte, for ``tokens`` of shape (batch, length)."""
        length = tokens.shape[1]
        if length > self.config.context:
            raise ValueError(f"{length} tokens do not fit a context of {self.config.context}")
        x = self.tokens(tokens) + self.positions(torch.arange(length, device=tokens.device))
        for block in self.blocks:
            x = block(x)
        return F.linear(self.norm(x), self.tokens.weight)

    def loss(self, window: Tensor) -> Tensor:
        """Mean cross-entropy, in nats a byte, of predicting ``window[:, 1:]``."""
        logits = self(window[:, :-1])
        return F.cross_entropy(logits.flatten(0, 1), window[:, 1:].flatten())
