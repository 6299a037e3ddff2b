"""How fast a disk takes and gives long runs of bytes: the floor under anything that pages to it.

Used by ``paging.py``. ``O_DIRECT`` on a file without a name, several requests of 512 KiB in flight,
so that no page cache helps or hinders. All of the file is written once before, as reading what was
only reserved does not touch the disk; the time of writes is up when ``fdatasync`` has returned.
"""

from __future__ import annotations

import mmap
import os
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

BLOCK = 512 << 10
"""Bytes of a request."""
IN_FLIGHT = 4
"""Requests in each direction at a time."""


@dataclass(frozen=True)
class Streams:
    """Seconds that a disk took for ``size`` bytes in each pattern."""

    size: int
    read: float
    """Reading them."""
    write: float
    """Writing them."""
    both: float
    """Reading them while as many are written elsewhere in the file."""

    @classmethod
    def mean(cls, a: Streams, b: Streams) -> Streams:
        """What two passes over as many bytes took on average."""
        return cls(a.size, (a.read + b.read) / 2, (a.write + b.write) / 2, (a.both + b.both) / 2)

    def floor(self, read: int, written: int) -> float:
        """Seconds that the disk needs at least for so many bytes, one way or the other."""
        apart = (read * self.read + written * self.write) / self.size
        common = min(read, written)
        rest = (read - common) * self.read + (written - common) * self.write
        return min(apart, (common * self.both + rest) / self.size)

    def rates(self) -> dict[str, float]:
        """Bytes a second in each pattern; in the third, of both directions together."""
        seconds = asdict(self)
        moved = {"read": self.size, "write": self.size, "both": 2 * self.size}
        return {name: count / seconds[name] for name, count in moved.items()}


class Disk:
    """A file of ``size`` bytes, a multiple of :data:`BLOCK`, in ``directory``."""

    def __init__(self, directory: Path, size: int) -> None:
        self._blocks = size // BLOCK
        descriptor, name = tempfile.mkstemp(dir=directory)
        os.close(descriptor)
        self._file = os.open(name, os.O_RDWR | os.O_DIRECT)
        Path(name).unlink()
        os.posix_fallocate(self._file, 0, size)
        self._buffers = [mmap.mmap(-1, BLOCK) for _ in range(2 * IN_FLIGHT)]  # page-aligned
        for buffer in self._buffers:
            buffer.madvise(mmap.MADV_HUGEPAGE)
            buffer.write(os.urandom(BLOCK))  # nothing that a disk could compress or leave out
        self._timed(write=True)

    def close(self) -> None:
        """Frees the file's space."""
        os.close(self._file)

    def measure(self) -> Streams:
        """One pass of each pattern."""
        size = self._blocks * BLOCK
        read, write = self._timed(read=True), self._timed(write=True)
        return Streams(size, read, write, self._timed(read=True, write=True))

    def _timed(self, *, read: bool = False, write: bool = False) -> float:
        start = time.perf_counter()
        with ThreadPoolExecutor(2 * IN_FLIGHT) as pool:
            jobs: list[Future[None]] = []
            for wanted, move, first, buffers in (
                (read, self._read, 0, self._buffers[:IN_FLIGHT]),
                (write, self._write, self._blocks // 2, self._buffers[IN_FLIGHT:]),
            ):
                if wanted:
                    blocks = iter([(first + n) % self._blocks for n in range(self._blocks)])
                    jobs += [pool.submit(move, blocks, buffer) for buffer in buffers]
            for job in jobs:
                job.result()
        if write:
            os.fdatasync(self._file)
        return time.perf_counter() - start

    def _read(self, blocks: Iterator[int], buffer: mmap.mmap) -> None:
        for block in blocks:
            self._whole(os.preadv(self._file, [buffer], block * BLOCK))

    def _write(self, blocks: Iterator[int], buffer: mmap.mmap) -> None:
        for block in blocks:
            self._whole(os.pwrite(self._file, buffer, block * BLOCK))

    @staticmethod
    def _whole(count: int) -> None:
        if count != BLOCK:
            msg = f"the disk moved {count} bytes of {BLOCK}"
            raise OSError(msg)
