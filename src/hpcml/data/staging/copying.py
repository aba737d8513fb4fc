"""A folder's copy on another disk: several files at once, hashed on the way, gone on with, compared at the end."""

import hashlib
import json
import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TextIO

from ..listing import READERS, File, Listing

_CHUNK = 4 * 2**20


class Changed(Exception):
    """A file of the source is not as long as it was when it was listed."""


def copy(source: Listing, into: Path, journal: Path, progress: Callable[[int], object]) -> dict[str, str]:
    """Copy all files, with times and rights; those that an earlier call has finished are kept.

    Args:
        source: what to copy.
        into: an existing folder; what is in it and not in the journal is written anew.
        journal: a file beside it that names what is whole, a line each.
        progress: called with the bytes copied, from several threads, one at a time.

    Returns:
        The SHA-256 of each file, as it was read from the source.

    Raises:
        OSError: a file can't be read, or the disk is full.
        Changed: the source changes meanwhile.
    """
    for half in journal.parent.glob(f"{journal.name}.*"):  # of a copier that was killed
        half.unlink()
    whole = _whole(source, into, journal)
    for folder in source.folders:
        (into / folder).mkdir(parents=True, exist_ok=True)
    done = sum(file.bytes for file in source.files if file.name in whole)
    with journal.open("a") as notes:
        copier = _Copier(source.root, into, journal, notes, whole, progress, done)
        copier.run([file for file in source.files if file.name not in whole])
    return whole


class _Copier:
    """Threads that copy files, and what they share."""

    def __init__(
        self, root: Path, into: Path, journal: Path, notes: TextIO, whole: dict[str, str],
        progress: Callable[[int], object], done: int,
    ) -> None:  # fmt: skip
        self._root, self._into, self._journal, self._notes = root, into, journal, notes
        self._whole, self._progress, self._done = whole, progress, done
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._failed: list[Exception] = []

    def run(self, files: list[File]) -> None:
        with ThreadPoolExecutor(READERS) as pool:
            try:
                list(pool.map(self._one, files))
            except BaseException:  # an interrupt from the keyboard
                self._stop.set()
                raise
        if self._failed:
            raise self._failed[0]

    def _one(self, file: File) -> None:
        if self._stop.is_set():
            return
        # Under its own name when it is whole.
        half = self._journal.with_name(f"{self._journal.name}.{threading.get_ident()}")
        try:
            digest = self._copy(file, half)
            os.replace(half, self._into / file.name)
            with self._lock:
                self._whole[file.name] = digest
                self._notes.write(json.dumps([file.name, file.bytes, file.mtime_ns, digest]) + "\n")
                self._notes.flush()
        except InterruptedError:
            return
        except Exception as error:
            with self._lock:
                self._failed.append(error)
            self._stop.set()  # a full disk is full for the other files too

    def _copy(self, file: File, half: Path) -> str:
        digest, size = hashlib.sha256(), 0
        with (self._root / file.name).open("rb", buffering=0) as read, half.open("wb", buffering=0) as write:
            while chunk := read.read(_CHUNK):
                digest.update(chunk)
                size += len(chunk)
                rest = memoryview(chunk)
                while rest:
                    rest = rest[write.write(rest) :]
                with self._lock:
                    self._done += len(chunk)
                    self._progress(self._done)
                if self._stop.is_set():
                    raise InterruptedError
            os.fchmod(write.fileno(), os.fstat(read.fileno()).st_mode & 0o777 | 0o600)
        if size != file.bytes:
            raise Changed(file.name)
        os.utime(half, ns=(file.mtime_ns, file.mtime_ns))
        return digest.hexdigest()


def differing(copy: Path, source: Listing, digests: dict[str, str], alive: Callable[[], object]) -> str:
    """Return the name of a file of a copy that is not what was read from the source; empty where all are.

    Args:
        copy: the folder.
        source: what was copied.
        digests: what ``copy`` returned.
        alive: called after each file.
    """

    def is_same(file: File) -> bool:
        with (copy / file.name).open("rb") as opened:
            same = hashlib.file_digest(opened, "sha256").hexdigest() == digests[file.name]
        alive()
        return same

    with ThreadPoolExecutor(READERS) as pool:
        found = pool.map(is_same, source.files)
        return next((file.name for file, same in zip(source.files, found, strict=True) if not same), "")


def _whole(source: Listing, into: Path, journal: Path) -> dict[str, str]:
    """Return the files that an earlier copier has finished and that the source still has like that."""
    noted: dict[str, tuple[int, int, str]] = {}
    try:
        lines = journal.read_text().splitlines()
    except FileNotFoundError:
        return {}
    for line in lines:
        try:
            name, *rest = json.loads(line)
        except ValueError:  # the last one, where its writer was killed
            continue
        noted[name] = tuple(rest)
    kept = {}
    for file in source.files:
        size, mtime_ns, digest = noted.get(file.name, (-1, 0, ""))
        if (size, mtime_ns) != (file.bytes, file.mtime_ns):
            continue
        try:
            found = (into / file.name).stat()
        except OSError:
            continue
        if (found.st_size, found.st_mtime_ns) == (size, mtime_ns):
            kept[file.name] = digest
    return kept
