"""Samples of a packed data set by number: one open file for each shard, one read for each sample, no lock."""

import os
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from ...errors import HpcmlError, nearest
from . import index, layout, mapping

if TYPE_CHECKING:
    from numpy.typing import NDArray

_PIECE = 4 * 2**20


class Shards:
    """A packed data set of n samples, numbered in the order in which they lie in the shards: mixed, not by class.

    Threads may read at once, and a process may fork after some reading: reads name their place (pread) and share no
    position. A copy by pickle opens its own files. Files are opened when a sample in them is first read.

    Attributes:
        path: of the folder.
        described: what ``dataset.json`` says.
        sizes: int64 (n,) bytes of each sample; ``digests``: uint8 (n, 32), their SHA-256.
        fingerprint: 12 hexadecimal digits for names and contents.

    Raises:
        HpcmlError: no packed data set, or one whose index or description is damaged.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        self.described, self.index = index.load(self.path)
        self.sizes, self.digests = self.index.sizes, self.index.digests
        self.fingerprint: str = self.described["fingerprint"]
        # Plain lists: to take a number out of an array takes four times as long.
        self._places = list(
            zip(*(c.tolist() for c in (self.index.shards, self.sizes, self.index.offsets)), strict=True)
        )
        self._bytes = [shard["bytes"] for shard in self.described["shards"]]
        self._open: dict[int, _File] = {}

    def __len__(self) -> int:
        return len(self._places)

    @property
    def count(self) -> int:
        """How many shards."""
        return len(self._bytes)

    def __reduce__(self) -> tuple[type["Shards"], tuple[Path]]:
        return Shards, (self.path.absolute(),)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @cached_property
    def names(self) -> list[str]:
        """Relative names, n of them; bytes that are no UTF-8 as ``os.fsdecode`` gives them."""
        return [os.fsdecode(name) for name in self.index.names]

    @cached_property
    def classes(self) -> list[str]:
        """Names of the folders of samples that lie in CLASS/FILE, in alphabetical order."""
        return sorted(os.fsdecode(name) for name in set(self.index.class_names) if name)

    @cached_property
    def labels(self) -> "NDArray[Any]":
        """int64 (n,): a position in ``classes``, -1 where a sample lies elsewhere."""
        np = layout.numpy()
        numbers = {os.fsencode(name): number for number, name in enumerate(self.classes)} | {b"": -1}
        return np.array([numbers[name] for name in self.index.class_names], dtype=np.int64)

    def row(self, name: str) -> int:
        """Return the number of a sample.

        Raises:
            HpcmlError: there is none of that name.
        """
        found = self._rows.get(os.fsencode(name))
        if found is None:
            fix = nearest(name, self.names) or f"hpcml data ls {self.path}"
            raise HpcmlError(f"no sample {layout.shown(name)!r} in {self.path}", fix=fix)
        return found

    @cached_property
    def _rows(self) -> dict[bytes, int]:
        return {name: row for row, name in enumerate(self.index.names)}

    def read(self, rows: Sequence[int]) -> list[bytes]:
        """Return the contents of some samples, in the order of ``rows``.

        Raises:
            HpcmlError: a shard is missing or cut off.
        """
        places, files = self._places, self._open
        contents = []
        for row in rows:
            shard, size, offset = places[row]
            fd = (files.get(shard) or self._file(shard)).fd
            content = os.pread(fd, size, offset)
            contents.append(content if len(content) == size else self._rest(shard, fd, content, size, offset))
        return contents

    def pieces(self, row: int) -> Iterator[bytes]:
        """Yield a sample's content in pieces of at most 4 MiB."""
        shard, size, offset = self._places[row]
        fd = self._file(shard).fd
        for at in range(0, size, _PIECE):
            count = min(_PIECE, size - at)
            yield self._rest(shard, fd, b"", count, offset + at)

    def gather(self, rows: "NDArray[Any] | Sequence[int]") -> "NDArray[Any]":
        """Return samples of one size as an array, for data that needs no decoding.

        Args:
            rows: m numbers.

        Returns:
            uint8 (m, size)

        Raises:
            HpcmlError: the samples differ in size; a shard is missing or cut off.
        """
        np = layout.numpy()
        rows = np.asarray(rows, dtype=np.int64)
        if not len(rows):
            return np.empty((0, 0), dtype=np.uint8)
        size = int(self.sizes[rows[0]])
        if (self.sizes[rows] != size).any():
            first = self.names[int(rows[(self.sizes[rows] != size).argmax()])]
            what = f"samples differ in size: {self.names[int(rows[0])]!r} and {first!r}"
            raise HpcmlError(what, fix="read() gives each by itself")
        content = self._content
        if content is None or not size:
            return np.frombuffer(b"".join(self.read(rows.tolist())), dtype=np.uint8).reshape(len(rows), size)
        # Whole rows as one item each: NumPy then copies 784 bytes at once, and not one by one.
        items = np.ndarray((len(content) - size + 1,), dtype=f"V{size}", buffer=content, strides=(1,))
        found: NDArray[Any] = items[self._begins[rows]].view(np.uint8).reshape(len(rows), size)
        return found

    @cached_property
    def _begins(self) -> "NDArray[Any]":
        """Where each sample begins in ``_content``, int64 (n,)."""
        return mapping.begins(self._bytes)[self.index.shards] + self.index.offsets

    @cached_property
    def _content(self) -> "NDArray[Any] | None":
        """All shards one behind the other, mapped; None where there aren't as many addresses."""
        files = [self._file(shard) for shard in range(self.count)]
        try:
            return mapping.mapped([file.fd for file in files], self._bytes)
        except OSError:
            return None

    def advise(self) -> None:
        """Ask the kernel to read all shards into the file cache, in the background, as far as there is room."""
        for shard in range(self.count):
            os.posix_fadvise(self.fd(shard), 0, 0, os.POSIX_FADV_WILLNEED)

    def fd(self, shard: int) -> int:
        """Return the descriptor of a shard's file, open for reading; it stays this object's."""
        return self._file(shard).fd

    def close(self) -> None:
        """Close the files; the next read opens them again."""
        self._open.clear()
        self.__dict__.pop("_content", None)

    def _file(self, shard: int) -> "_File":
        found = self._open.get(shard)
        if found is None:
            path = self.path / layout.shard_name(shard)
            try:
                found = _File(path)
            except OSError as error:
                raise HpcmlError(f"{path}: {error.strerror}", fix="copy the data set, or pack it, again") from None
            if found.size != self._bytes[shard]:
                raise self._cut_off(shard, f"{found.size} bytes instead of {self._bytes[shard]}")
            # Of two threads that open it at once one comes first; the other's closes with it.
            found = self._open.setdefault(shard, found)
        return found

    def _rest(self, shard: int, fd: int, content: bytes, size: int, offset: int) -> bytes:
        """Read on after a short read: 2 GiB is the most that one gives (read(2))."""
        while len(content) < size:
            more = os.pread(fd, size - len(content), offset + len(content))
            if not more:
                raise self._cut_off(shard, f"it ends at byte {offset + len(content)}")
            content += more
        return content

    def _cut_off(self, shard: int, what: str) -> HpcmlError:
        fix = f"hpcml data verify {self.path}; then copy the data set, or pack it, again"
        return HpcmlError(f"{self.path / layout.shard_name(shard)} is not what was packed: {what}", fix=fix)


class _File:
    """An open shard; it closes when nothing refers to it any more."""

    def __init__(self, path: Path) -> None:
        self.fd = os.open(path, os.O_RDONLY)
        self.size = os.fstat(self.fd).st_size

    def __del__(self) -> None:
        if hasattr(self, "fd"):
            os.close(self.fd)
