"""A shard from front to back, some hundred members with one read; a large one in pieces."""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from . import layout, tar
from .progress import Ticker

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from .index import Index

_WINDOW = 2**20
PIECE = 4 * 2**20


@dataclass(frozen=True)
class Window:
    """Members that lie one behind the other in a shard.

    Attributes:
        rows: their numbers in the index.
        headers: int64, where each one's header begins; ``begin`` and ``end`` of the whole.
        content: the bytes, fewer where the file ends before; None of a single large member, which ``pieces`` reads.
    """

    rows: list[int]
    headers: list[int]
    begin: int
    end: int
    content: bytes | None


def rows_of(index: "Index", number: int) -> "NDArray[Any]":
    """Return the samples of a shard in the order of their places, int64 (k,)."""
    np = layout.numpy()
    rows = np.flatnonzero(index.shards == number)
    return rows[np.argsort(index.offsets[rows], kind="stable")]


def windows(index: "Index", number: int, fd: int) -> Iterator[Window]:
    """Yield all members of a shard.

    Args:
        fd: of the shard's file.
    """
    rows = rows_of(index, number)
    begins = index.offsets[rows] - tar.header_lengths([index.names[row] for row in rows.tolist()], index.sizes[rows])
    ends = index.offsets[rows] + tar.padded(index.sizes[rows])
    some: list[int] = []
    heads: list[int] = []
    last = 0
    for row, begin, end in zip(rows.tolist(), begins.tolist(), ends.tolist(), strict=True):
        if some and (end - heads[0] > _WINDOW or begin != last):
            yield _read(fd, some, heads, last)
            some, heads = [], []
        some.append(row)
        heads.append(begin)
        last = end
    if some:
        yield _read(fd, some, heads, last)


def _read(fd: int, rows: list[int], headers: list[int], end: int) -> Window:
    begin = headers[0]
    content = read_at(fd, begin, end - begin) if end - begin <= PIECE else None
    return Window(rows, headers, begin, end, content)


def read_at(fd: int, begin: int, count: int) -> bytes:
    """Return ``count`` bytes of a file, or as many as there are."""
    content = os.pread(fd, count, begin)
    while len(content) < count and (more := os.pread(fd, count - len(content), begin + len(content))):
        content += more
    return content


def pieces(fd: int, begin: int, end: int, ticker: Ticker | None = None) -> Iterator[bytes]:
    """Yield a part of a file, at most 4 MiB at once, as far as it is there.

    Args:
        ticker: told how much has been taken.
    """
    while begin < end and (piece := os.pread(fd, min(PIECE, end - begin), begin)):
        yield piece
        begin += len(piece)
        if ticker:
            ticker.add(0, len(piece))
