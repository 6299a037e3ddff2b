"""A language model that is mostly embedding: what narrow optimizer states are hardest on.

A word is predicted from the eight before it (Bengio and others, *A neural probabilistic language
model*, 2003): their embeddings side by side, a hidden layer, and a softmax over all words. The
input embedding is not shared with the output, so a word that is not in a batch has a gradient of
exactly zero there, and most words are rare. The text is Python's standard library: names, numbers
and signs.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass

import torch
from stdlib_text import load
from torch import Tensor, nn
from torch.nn import functional as F

OTHER = 0
"""The word that stands for all that are not among the most frequent."""


@dataclass(frozen=True)
class WordConfig:
    """The size of the model."""

    vocabulary: int = 20_480
    context: int = 8
    width: int = 64
    hidden: int = 256


@dataclass(frozen=True)
class WordText:
    """Numbers of words; the most frequent one in the training part is 1."""

    train: Tensor
    validation: Tensor
    digest: str
    """Of the bytes that the words were found in."""


def words(part: Tensor) -> list[str]:
    """Names and numbers whole, signs one by one."""
    text = part.numpy().tobytes().decode(errors="replace")
    return re.findall(r"\w+|[^\w\s]", text)


def load_words(size: int, vocabulary: int) -> WordText:
    """``size`` bytes of text for training, a tenth of that for validation.

    Raises:
        ValueError: if there are not as many words in it.
    """
    text = load(size)
    train = words(text.train)
    counts = Counter(train)
    if len(counts) < vocabulary - 1:
        msg = f"{size} bytes have {len(counts)} words, not {vocabulary - 1}: ask for more"
        raise ValueError(msg)
    # equal counts in the order of the alphabet, whatever the text's order
    ranked = sorted(counts, key=lambda word: (-counts[word], word))[: vocabulary - 1]
    number = {word: place for place, word in enumerate(ranked, start=OTHER + 1)}
    train_part, validation_part = (
        torch.tensor([number.get(word, OTHER) for word in part])
        for part in (train, words(text.validation))
    )
    return WordText(train_part, validation_part, text.digest)


class WordModel(nn.Module):
    """Embeddings of the words before, a hidden layer, the logits of the next word."""

    def __init__(self, config: WordConfig) -> None:
        super().__init__()
        self.tokens = nn.Embedding(config.vocabulary, config.width)
        self.hidden = nn.Linear(config.context * config.width, config.hidden)
        self.narrow = nn.Linear(config.hidden, config.width)
        self.output = nn.Linear(config.width, config.vocabulary, bias=False)
        for table in (self.tokens, self.output):
            nn.init.normal_(table.weight, std=0.02)

    def loss(self, window: Tensor) -> Tensor:
        """Mean cross-entropy, in nats a word, of predicting each window's last word."""
        x = self.tokens(window[:, :-1]).flatten(1)
        logits = self.output(self.narrow(F.gelu(self.hidden(x))))
        return F.cross_entropy(logits, window[:, -1])
