"""One shard, from files to a tar archive: the inner loop of packing.

For each file open, read, close and a digest, and one write for some thousand of them. A file's size is known from the
listing, so none is asked for again: a read of one byte more tells whether the file has grown meanwhile.
"""

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from ...errors import HpcmlError, Problem
from ..images import SUFFIXES, digest_of, is_sample
from . import layout, tar
from .progress import Ticker
from .workers import Say

if TYPE_CHECKING:
    from numpy.typing import NDArray

_AT_ONCE, _WRITE = 1024, 2**20  # files and bytes that are gathered before they are written
# Larger files pass through in pieces, so that no process holds more; of images the judgement takes the whole file.
_PIECE, _LARGEST_IMAGE = 4 * 2**20, 64 * 2**20
_SUFFIXES = tuple(suffix.encode() for suffix in SUFFIXES)


@dataclass(frozen=True)
class Part:
    """What one shard came to; kept beside it until all are done.

    Attributes:
        kept: bool (m,) which of the shard's planned files are in it.
        digests: uint8 (k, 32) of those that are.
        problems: why the others are not.
    """

    kept: "NDArray[Any]"
    digests: "NDArray[Any]"
    problems: tuple[Problem, ...]

    def save(self, path: Path) -> None:
        """Write it in one step; a torn file, after a loss of power, does not load."""
        head = json.dumps([[problem.what, problem.origin] for problem in self.problems]).encode() + b"\n"
        content = head + self.kept.tobytes() + self.digests.tobytes()
        temporary = path.with_suffix(".new")
        temporary.write_bytes(content + hashlib.sha256(content).digest())
        temporary.replace(path)


def load_part(path: Path, count: int) -> Part | None:
    """Return what a shard of ``count`` planned files came to; None where it isn't done."""
    np = layout.numpy()
    try:
        raw = path.read_bytes()
    except FileNotFoundError:
        return None
    content, digest = raw[:-32], raw[-32:]
    if hashlib.sha256(content).digest() != digest:
        return None
    head, _, rest = content.partition(b"\n")
    kept = np.frombuffer(rest[:count], dtype=bool)
    digests = np.frombuffer(rest[count:], dtype=np.uint8).reshape(-1, 32)
    if len(kept) != count or len(digests) != kept.sum():
        return None
    return Part(kept, digests, tuple(Problem(what, origin) for what, origin in json.loads(head)))


@dataclass(frozen=True)
class Source:
    """Files to pack: n names below an open folder, with what the listing says of them."""

    top: int
    names: Sequence[bytes]
    sizes: "NDArray[Any]"
    modes: "NDArray[Any]"


def write_shard(source: Source, path: Path, say: Say) -> Part:
    """Write a shard and wait until it is on the disk.

    Raises:
        HpcmlError: a file has changed since it was listed.
        OSError: the shard can't be written.
    """
    np = layout.numpy()
    ticker = Ticker(say)
    kept = np.zeros(len(source.names), dtype=bool)
    digests: list[bytes] = []
    problems: list[Problem] = []
    with _Writer(path) as writer:
        for rows in _groups(source.sizes.tolist()):
            names, sizes = source.names[rows], source.sizes[rows]
            members = zip(names, sizes.tolist(), tar.headers(names, sizes, source.modes[rows]), strict=True)
            for row, (name, size, header) in enumerate(members, rows.start):
                found = _add(writer, source.top, name, size, header, ticker)
                if type(found) is bytes:
                    digests.append(found)
                    kept[row] = True
                else:
                    problems.append(Problem(str(found), layout.shown(name)))
            writer.flush()
            ticker.add(len(names), int(sizes[sizes <= _PIECE].sum()))  # larger ones tell their pieces
        writer.pieces.append(tar.END)
    ticker.flush()
    columns = np.frombuffer(b"".join(digests), dtype=np.uint8).reshape(-1, 32)
    return Part(kept, columns, tuple(problems))


def _groups(sizes: Sequence[int]) -> Iterator[slice]:
    """Rows that are written together: some hundred small files, or a single large one."""
    first = total = 0
    for row, size in enumerate(sizes):
        if row > first and (total + size > _WRITE or row - first == _AT_ONCE):
            yield slice(first, row)
            first, total = row, 0
        total += size
    if sizes:
        yield slice(first, len(sizes))


class _Writer:
    """A new file, written many pieces at once; on the disk when it is closed."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
        self.pieces: list[bytes] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None:
                self.flush()
                os.fsync(self.fd)
        finally:
            os.close(self.fd)

    def flush(self) -> None:
        content = b"".join(self.pieces)
        self.pieces.clear()
        try:
            written = os.write(self.fd, content)
            while written < len(content):  # a disk that is full takes a part first
                written += os.write(self.fd, content[written:])
        except OSError as error:
            error.filename = str(self.path)
            raise

    def back_to(self, place: int) -> None:
        """Take back what has been added since."""
        self.pieces.clear()
        os.ftruncate(self.fd, place)
        os.lseek(self.fd, place, os.SEEK_SET)


def _add(writer: _Writer, top: int, name: bytes, size: int, header: bytes, ticker: Ticker) -> bytes | str:
    """Add a file; return its digest, or what is wrong with it.

    Raises:
        HpcmlError: it has changed since it was listed.
    """
    is_image = name[-5:].lower().endswith(_SUFFIXES) and is_sample(os.fsdecode(name[name.rfind(b"/") + 1 :]))
    try:
        fd = os.open(name, os.O_RDONLY, dir_fd=top)
        try:
            if size > _PIECE and not (is_image and size <= _LARGEST_IMAGE):
                return _stream(writer, fd, name, size, header, ticker)
            content = os.read(fd, size + 1)
            while len(content) < size and (more := os.read(fd, size + 1 - len(content))):
                content += more
        finally:
            os.close(fd)
    except OSError as error:
        if error.filename == str(writer.path):
            raise
        if isinstance(error, FileNotFoundError | NotADirectoryError):
            raise _changed(name) from None
        return f"can't be read: {error.strerror}"
    if len(content) != size:
        raise _changed(name)
    if size > _PIECE:
        ticker.add(0, size)
    digest = digest_of(content) if is_image else hashlib.sha256(content).digest()
    if type(digest) is bytes:
        writer.pieces += (header, content, tar.padding(size))
    return digest


def _stream(writer: _Writer, fd: int, name: bytes, size: int, header: bytes, ticker: Ticker) -> bytes:
    """Add a large file piece by piece."""
    writer.flush()
    place = os.lseek(writer.fd, 0, os.SEEK_CUR)
    digest, left = hashlib.sha256(), size
    writer.pieces.append(header)
    try:
        while piece := os.read(fd, min(_PIECE, left + 1)):
            left -= len(piece)
            digest.update(piece)
            writer.pieces.append(piece)
            writer.flush()
            ticker.add(0, len(piece))
    except OSError:
        writer.back_to(place)
        raise
    if left:
        raise _changed(name)
    writer.pieces.append(tar.padding(size))
    return digest.digest()


def _changed(name: bytes) -> HpcmlError:
    fix = "let nothing write there while it is packed, and run it again"
    return HpcmlError("it changed while it was packed", origin=layout.shown(name), fix=fix)
