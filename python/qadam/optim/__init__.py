"""The optimizers: ``torch.optim.Optimizer`` subclasses with bitsandbytes' names and signatures."""

from qadam.optim.adam import (
    Adam,
    Adam8bit,
    Adam32bit,
    PagedAdam,
    PagedAdam8bit,
    PagedAdam32bit,
)
from qadam.optim.adamw import (
    AdamW,
    AdamW8bit,
    AdamW32bit,
    PagedAdamW,
    PagedAdamW8bit,
    PagedAdamW32bit,
)
from qadam.overrides import GlobalOptimManager

__all__ = [
    "Adam",
    "Adam8bit",
    "Adam32bit",
    "AdamW",
    "AdamW8bit",
    "AdamW32bit",
    "GlobalOptimManager",
    "PagedAdam",
    "PagedAdam8bit",
    "PagedAdam32bit",
    "PagedAdamW",
    "PagedAdamW8bit",
    "PagedAdamW32bit",
]
