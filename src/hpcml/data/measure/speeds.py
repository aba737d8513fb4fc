"""How fast small files, a large file and reads all over it go in a folder, by one reader and by 16 at once."""

import errno
import os
import random
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from io import FileIO
from pathlib import Path

from ..listing import READERS, Listing

_SMALL, _MOST_SMALL = 880, 4000  # bytes of an MNIST digit as PNG; files
_CHUNK, _MOST_LARGE = 4 * 2**20, 512 * 2**20
_MOST_READS = 20_000


@dataclass(frozen=True)
class Speeds:
    """What was measured; None where it could not be.

    Attributes:
        created: small files made per second, by one writer.
        opened, opened_many: small files opened, read and closed per second, by one reader and by 16 at once.
        written, read: bytes per second of one large file from front to back; written includes the way to the disk.
        random, random_many: reads per second of ``piece`` bytes anywhere in the large file, by one reader and by 16.
        piece: the size of one such read, bytes: the set's mean file.
        cold: whether what was read came from the disk or server and not from this node's memory; None: can't be told.
    """

    created: float | None
    opened: float | None
    opened_many: float | None
    written: float | None
    read: float | None
    random: float | None
    random_many: float | None
    piece: int
    cold: bool | None


def own_rate(source: Listing, seconds: float, progress: Callable[[str], object]) -> tuple[float, float | None]:
    """Open and read some of a set's own files, by 16 readers, each file once.

    Returns:
        How many a second, and which share of them came from this node's memory (None where that can't be told): a first
        epoch is slower than that.
    """
    progress("opening the set's own files")
    dice = random.Random(source.digest)
    paths = [source.root / file.name for file in dice.sample(source.files, min(_MOST_SMALL, len(source.files)))]
    warm: list[bool | None] = []

    def one(path: Path) -> None:
        with path.open("rb", buffering=0) as file:
            warm.append(_is_in_memory(file.fileno()))
            while file.read(2**20):
                pass

    rate = _rate(one, paths, seconds, READERS)
    known = [value for value in warm if value is not None]
    return rate, sum(known) / len(known) if known else None


def speeds_of(where: Path | None, piece: int, seconds: float, progress: Callable[[str], object]) -> Speeds:
    """Write small files and a large one into a folder, read them, and remove them.

    Args:
        where: the folder; None where there is none to write to.
        piece: bytes of one random read.
        seconds: about how long it may take.
        progress: called with what is measured now.
    """
    if where is None:
        return Speeds(None, None, None, None, None, None, None, piece, None)
    part = seconds / 7
    with tempfile.TemporaryDirectory(prefix=".hpcml-bench-", dir=where) as made:
        progress("making small files")
        paths, created = _small(Path(made), part)
        progress("opening small files")
        opened = _rate(_open_and_read, paths, part / 2, 1)
        many = _rate(_open_and_read, paths, part / 2, READERS)
        progress("writing a large file")
        with (Path(made) / "large").open("w+b", buffering=0) as file:
            os.unlink(file.name)  # however this process ends, hundreds of MB go with it
            written = _write(file, part * 2)
            if written is None:
                return Speeds(created, opened, many, None, None, None, None, piece, None)
            progress("reading it")
            fd = file.fileno()
            _let_go(fd)
            in_memory = _is_in_memory(fd)
            read = _read(file, part)
            _let_go(fd)
            single = _rate(lambda offset: os.pread(fd, piece, offset), _offsets(fd, piece, 1), part, 1)
            _let_go(fd)
            threads = _rate(lambda offset: os.pread(fd, piece, offset), _offsets(fd, piece, 2), part, READERS)
    cold = None if in_memory is None else not in_memory
    return Speeds(created, opened, many, written, read, single, threads, piece, cold)


def _small(folder: Path, seconds: float) -> tuple[list[Path], float]:
    """Make small files; returns them and how many a second."""
    content = os.urandom(_SMALL)
    paths: list[Path] = []
    start = time.perf_counter()
    with _until_full():
        while len(paths) < _MOST_SMALL and (len(paths) < READERS or time.perf_counter() - start < seconds / 2):
            path = folder / f"{len(paths):05}"
            path.write_bytes(content)
            paths.append(path)
    rate = len(paths) / (time.perf_counter() - start)
    start = time.perf_counter()
    for path in paths:
        if time.perf_counter() - start > seconds / 2:
            break
        with path.open("rb", buffering=0) as file:
            os.fsync(file.fileno())  # what isn't on the disk yet can't be let go of
            _let_go(file.fileno())
    return paths, rate


def _open_and_read(path: Path) -> None:
    with path.open("rb", buffering=0) as file:
        while file.read(2**20):
            pass


def _write(file: FileIO, seconds: float) -> float | None:
    """Write a large file; returns bytes a second with fsync, None where the disk has no room for it."""
    free = os.fstatvfs(file.fileno())
    most = min(_MOST_LARGE, free.f_bavail * free.f_frsize // 20)
    chunk = os.urandom(_CHUNK)  # what a file system that compresses can't make smaller
    start, size = time.perf_counter(), 0
    with _until_full():
        while size + _CHUNK <= most and time.perf_counter() - start < seconds:
            size += file.write(chunk)
            if size % (64 * 2**20) == 0:
                os.fsync(file.fileno())  # else the time runs while memory fills, and the disk comes after it
        os.fsync(file.fileno())
    return size / (time.perf_counter() - start) if size else None


@contextmanager
def _until_full() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise


def _read(file: FileIO, seconds: float) -> float:
    file.seek(0)
    start, size = time.perf_counter(), 0
    buffer = bytearray(_CHUNK)
    while count := file.readinto(buffer):
        size += count
        if time.perf_counter() - start > seconds:
            break
    return size / (time.perf_counter() - start)


def _offsets(fd: int, piece: int, seed: int) -> list[int]:
    dice = random.Random(seed)
    most = max(os.fstat(fd).st_size - piece, 1)
    return [dice.randrange(most) for _ in range(_MOST_READS)]


def _rate(work: Callable[..., object], items: Sequence[object], seconds: float, readers: int) -> float:
    """Return how many items a second some readers get through; they stop when the time is over."""
    start = time.perf_counter()
    end = start + seconds

    def some(part: Sequence[object]) -> int:
        for number, item in enumerate(part, 1):
            work(item)
            if time.perf_counter() > end:
                return number
        return len(part)

    if readers == 1:
        return some(items) / (time.perf_counter() - start)
    with ThreadPoolExecutor(readers) as pool:
        count = sum(pool.map(some, [items[first::readers] for first in range(readers)]))
    return count / (time.perf_counter() - start)


def _let_go(fd: int) -> None:
    """Let this node's memory forget a file's contents.

    Nobody but root can make it forget names and inodes, and nobody here what a server keeps in its memory.
    """
    with suppress(OSError):
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)


def _is_in_memory(fd: int) -> bool | None:
    """Whether the middle of a file is in this node's memory; None where the file system doesn't tell."""
    try:
        os.preadv(fd, [bytearray(1)], os.fstat(fd).st_size // 2, os.RWF_NOWAIT)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True
