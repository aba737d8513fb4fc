"""Samples that are single files: many are read at once, because on a parallel file system each open waits."""

import functools
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import HpcmlError
from . import images

if TYPE_CHECKING:
    from numpy.typing import NDArray


@dataclass(frozen=True)
class Files:
    """Single files below a folder, read by ``images.READERS`` at once: on Lustre each open waits for 2 ms."""

    path: Path
    names: Sequence[str]

    def read(self, rows: Sequence[int]) -> list[bytes]:
        """Return the contents of some files."""
        return list(_readers(os.getpid()).map(self._content, rows))

    def gather(self, rows: "NDArray[Any]") -> "NDArray[Any]":
        """Return files of one size as uint8 (n, size)."""
        import numpy as np

        contents = self.read(rows.tolist())
        if len({len(content) for content in contents}) > 1:
            what = "the samples have different sizes"
            raise HpcmlError(what, origin=str(self.path), fix="decode=a function, or image_size=…")
        table: NDArray[Any] = np.frombuffer(bytearray().join(contents), np.uint8).reshape(len(contents), -1)
        return table

    def _content(self, row: int) -> bytes:
        name = self.names[row]
        try:
            return (self.path / name).read_bytes()
        except OSError as error:
            raise HpcmlError(f"can't be read any more: {error.strerror}", origin=str(self.path / name)) from None


@functools.cache
def _readers(pid: int) -> ThreadPoolExecutor:
    """Return the threads of this process: those of a parent are not there after a fork."""
    return ThreadPoolExecutor(images.READERS, "hpcml-read")
