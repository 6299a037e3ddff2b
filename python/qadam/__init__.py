"""Adam for PyTorch with 8-bit or 32-bit state, from a memory-safe Rust core.

Replace ``torch.optim.AdamW`` by :class:`qadam.AdamW8bit` and train as before, with a quarter of the
optimizer's memory. The classes have the names and signatures of ``bitsandbytes.optim``.
"""

from qadam import cuda, optim
from qadam._core import CudaError, cpu_backend
from qadam._core import version as _version
from qadam.optim import (
    Adam,
    Adam8bit,
    Adam32bit,
    AdamW,
    AdamW8bit,
    AdamW32bit,
    GlobalOptimManager,
    PagedAdam,
    PagedAdam8bit,
    PagedAdam32bit,
    PagedAdamW,
    PagedAdamW8bit,
    PagedAdamW32bit,
)

__version__ = _version()

__all__ = [
    "Adam",
    "Adam8bit",
    "Adam32bit",
    "AdamW",
    "AdamW8bit",
    "AdamW32bit",
    "CudaError",
    "GlobalOptimManager",
    "PagedAdam",
    "PagedAdam8bit",
    "PagedAdam32bit",
    "PagedAdamW",
    "PagedAdamW8bit",
    "PagedAdamW32bit",
    "__version__",
    "cpu_backend",
    "cuda",
    "optim",
]
