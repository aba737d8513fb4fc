"""From a packed data set back to a folder of files: in parallel, each content checked, beside the destination first."""

import hashlib
import os
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from ...errors import HpcmlError
from . import layout, tar
from .progress import Meter, Report, Ticker
from .reader import Shards
from .scanning import pieces, windows
from .workers import Say, default_count, run

_FILES = "files"


@dataclass(frozen=True)
class Unpacked:
    """What ``unpack`` made: a folder with so many files and bytes."""

    path: Path
    samples: int
    bytes: int


def unpack(
    source: Path | str, dest: Path | str, *, workers: int | None = None, progress: Report | None = None
) -> Unpacked:
    """Write the files of a packed data set as they were: names, contents, executable or not.

    They come into a folder beside ``dest``, which gets its name when all are whole and on the disk. Owner and time are
    those of now, and permissions follow the umask.

    Args:
        source: the packed data set.
        dest: the folder to make; its parents are made too.
        workers: processes; by default one for each core, and 16 at least on a network file system.
        progress: called with how far it is.

    Raises:
        HpcmlError: ``source`` is none, or damaged, or has names that lead out of a folder; ``dest`` is taken or can't be
            written; the disk or the quota is full. Nothing is then at ``dest``, nor beside it.
    """
    source, dest = Path(source), Path(dest)
    shards = Shards(source)
    layout.check_apart(source, dest)
    count = workers or default_count(source, dest.absolute().parent)
    try:
        with layout.beside(dest, "unpacking") as folder:
            try:
                layout.check_free(dest)
                shutil.rmtree(folder / _FILES, ignore_errors=True)  # of a killed run
                made = folder / _FILES
                _write(shards, made, count, progress)
                made.rename(dest)
                layout.sync_folder(dest.absolute().parent)
            finally:
                shutil.rmtree(folder / _FILES, ignore_errors=True)
    except OSError as error:
        raise layout.told(error, dest, "make room, or choose another place; nothing of it is left") from None
    return Unpacked(dest, len(shards), shards.described["bytes"])


def _write(shards: Shards, folder: Path, count: int, progress: Report | None) -> None:
    names = shards.index.names
    folder.mkdir()
    for parent in sorted({name[: name.rfind(b"/")] for name in names if b"/" in name}):
        os.makedirs(os.path.join(os.fsencode(folder), parent), exist_ok=True)
    meter = Meter(progress, len(shards), shards.described["bytes"])
    top = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        run(lambda number, say: _Shard(shards, number, top).unpack(say), range(shards.count), count, meter.hear)
        layout.sync_file_system(folder)
    finally:
        os.close(top)


class _Shard:
    """One shard on its way into an open folder."""

    def __init__(self, shards: Shards, number: int, top: int) -> None:
        self.shards, self.index, self.number, self.top = shards, shards.index, number, top

    def unpack(self, say: Say) -> None:
        """Write its files."""
        fd, ticker, index = self.shards.fd(self.number), Ticker(say), self.index
        for window in windows(index, self.number, fd):
            rows = window.rows
            digests = index.digests[rows].tobytes()
            columns = (column[rows].tolist() for column in (index.offsets, index.sizes, index.modes))
            for place, (row, begin, size, mode) in enumerate(zip(rows, *columns, strict=True)):
                at, whole = begin - window.begin, window.content
                content = pieces(fd, begin, begin + size, ticker) if whole is None else (whole[at : at + size],)
                if self._write(index.names[row], mode, content) != digests[32 * place : 32 * place + 32]:
                    raise self._damaged(index.names[row], begin)
                ticker.add(1, 0 if whole is None else size)
        ticker.flush()

    def _write(self, name: bytes, mode: int, content: Iterable[bytes]) -> bytes:
        """Write a new file and return the digest of what was written."""
        digest = hashlib.sha256()
        bits = tar.EXECUTABLE if mode & 0o100 else tar.PLAIN
        fd = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, bits, dir_fd=self.top)
        try:
            for piece in content:
                digest.update(piece)
                written = os.write(fd, piece)
                while written < len(piece):  # 2 GiB is the most that one call writes, and a full disk takes less
                    written += os.write(fd, piece[written:])
        finally:
            os.close(fd)
        return digest.digest()

    def _damaged(self, name: bytes, begin: int) -> HpcmlError:
        path = self.shards.path / layout.shard_name(self.number)
        what = f"{path}: byte {begin} and on, {layout.shown(name)!r}: the content is not what was packed"
        return HpcmlError(what, fix=f"hpcml data verify {self.shards.path} tells all that is damaged")
