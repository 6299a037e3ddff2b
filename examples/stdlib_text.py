"""The demo's corpus: Python's own standard library, as bytes.

It is real text, every machine that can run the demo already has it, and nothing has to be
downloaded. Files come in an order that depends on their names alone, and each file is
wholly in the training part or wholly in the validation part, whatever size is asked for,
so the model is never judged on a file that it was trained on.

    text = load(4_000_000)
    text.train, text.validation       # uint8 tensors

Another Python version has other sources, so losses compare between runs on one
interpreter and only roughly between interpreters; ``text.digest`` tells corpora apart.
"""

from __future__ import annotations

import hashlib
import sysconfig
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import torch
from torch import Tensor

# Not the library's own code (installed packages), or not always installed (tests), or
# tables rather than text (codecs, topic lists), or a second copy of a module that is
# elsewhere too and so could be on both sides of the split (lib2to3).
_SKIPPED_FOLDERS = {
    "__pycache__",
    "dist-packages",
    "encodings",
    "idle_test",
    "lib-dynload",
    "lib2to3",
    "pydoc_data",
    "site-packages",
    "test",
    "tests",
}
# One file in this many is for validation.
_VALIDATION_SHARE = 10


@dataclass(frozen=True)
class Text:
    """The two parts of the corpus and the SHA-256 of both."""

    train: Tensor
    validation: Tensor
    digest: str


def _name_hash(name: PurePosixPath) -> bytes:
    return hashlib.sha256(str(name).encode()).digest()


def is_validation(name: PurePosixPath) -> bool:
    """Whether a file, named relative to the library's root, is kept for validation."""
    # The last byte: the first ones decide the order, and the two must not be related.
    return _name_hash(name)[-1] % _VALIDATION_SHARE == 0


def source_names(root: Path) -> list[PurePosixPath]:
    """Every source file used, relative to ``root``, in the corpus' order.

    The order is that of a hash of the name: the same everywhere, and a short prefix of it
    already draws on the whole library instead of on the modules that begin with "a".
    """
    names = (PurePosixPath(path.relative_to(root).as_posix()) for path in root.rglob("*.py"))
    kept = (
        name
        for name in names
        if not _SKIPPED_FOLDERS.intersection(name.parts[:-1])
        # Written when Python was built: it differs from machine to machine.
        and not name.name.startswith("_sysconfigdata")
    )
    return sorted(kept, key=_name_hash)


def _read(root: Path, names: Iterable[PurePosixPath], size: int) -> bytes:
    """The first ``size`` bytes of the files in order, a zero byte after each file."""
    content = bytearray()
    for name in names:
        if len(content) >= size:
            break
        content += (root / name).read_bytes() + b"\0"
    if len(content) < size:
        raise ValueError(
            f"{root} holds {len(content)} bytes of sources for a part of {size}: "
            "ask for a smaller corpus"
        )
    return bytes(content[:size])


def load(size: int, root: Path | None = None) -> Text:
    """``size`` bytes for training and a tenth of that for validation.

    ``root`` is the folder to read, by default the running Python's standard library.
    """
    root = root or Path(sysconfig.get_path("stdlib"))
    names = source_names(root)
    train = _read(root, (name for name in names if not is_validation(name)), size)
    validation = _read(root, filter(is_validation, names), size // _VALIDATION_SHARE)
    return Text(
        train=torch.frombuffer(bytearray(train), dtype=torch.uint8),
        validation=torch.frombuffer(bytearray(validation), dtype=torch.uint8),
        digest=hashlib.sha256(train + validation).hexdigest(),
    )
