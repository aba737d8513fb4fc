"""What a packed data set's folder holds, and how the folder comes about: beside its place, and then renamed.

dataset.json       what it is: counts, classes, shards, checksums; its last line guards the lines before it
index.npz          where each sample lies, and its SHA-256
shard-00000.tar …  the samples
"""

import contextlib
import ctypes
import errno
import os
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

from ...errors import HpcmlError
from .. import locks

FORMAT = 1
MIB = 2**20
DATASET, INDEX = "dataset.json", "index.npz"
_FULL = (errno.ENOSPC, errno.EDQUOT)
# A killed run's processes notice within a second; they hold its lock as long.
_PATIENCE_S = 10


def shard_name(number: int) -> str:
    """Return the name of a shard's file."""
    return f"shard-{number:05d}.tar"


def numpy() -> ModuleType:
    """Import NumPy, which the core of hpcml runs without."""
    try:
        import numpy
    except ImportError as error:
        raise HpcmlError(f"packed data sets need NumPy: {error}", fix="pip install 'hpcml[data]'") from None
    return numpy


def shown(name: bytes | str) -> str:
    """Return a name for a person: on one line, whatever bytes it has."""
    text = os.fsdecode(name)
    return text if text.isprintable() else text.encode("unicode_escape", "surrogateescape").decode("ascii", "replace")


def check_apart(source: Path, dest: Path) -> None:
    """Refuse a source or destination that is in the other's place.

    Raises:
        HpcmlError: the source is no folder, or one lies in the other.
    """
    if not source.is_dir():
        what = "is no folder" if source.exists() else "no such folder"
        raise HpcmlError(f"{source}: {what}", origin="SRC", allowed="a folder")
    given = Path(os.path.abspath(dest))
    real, place = source.resolve(), given.parent.resolve() / given.name
    if place == real or real in place.parents or place in real.parents:
        raise HpcmlError(f"{dest} and {source} lie in each other", origin="DEST", fix="give a place outside of SRC")


def check_free(dest: Path) -> None:
    """Refuse a place that is taken; an empty folder is not.

    Raises:
        HpcmlError: something is there.
    """
    if dest.is_symlink() or dest.exists():
        if dest.is_dir() and not dest.is_symlink() and not any(dest.iterdir()):
            if dest.samefile(os.curdir):  # the shell would stay in the folder that this one takes the place of
                raise HpcmlError(f"{dest} is the folder you are in", origin="DEST", fix="give another place")
            return
        what = f"{dest} is there already"
        packed = (dest / DATASET).exists()
        fix = f"hpcml data verify {dest} tells whether it is whole; else remove it" if packed else "remove it"
        raise HpcmlError(what, origin="DEST", fix=f"{fix}, or give another place")


@contextlib.contextmanager
def beside(dest: Path, suffix: str) -> Iterator[Path]:
    """Hold the folder that becomes ``dest``, against other processes; made where it is not there, kept at the end.

    Yields:
        ``.NAME.<suffix>`` beside ``dest``.

    Raises:
        HpcmlError: another process holds it, or it can't be written.
    """
    given = Path(os.path.abspath(dest))  # which also has a name where dest is "."
    folder = given.with_name(f".{given.name}.{suffix}")
    lock = folder.with_name(f"{folder.name}.lock")
    deadline = time.monotonic() + _PATIENCE_S
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with locks.exclusive(lock, on_wait=lambda: None, give_up=lambda: time.monotonic() > deadline):
            try:
                folder.mkdir(exist_ok=True)
                yield folder
            finally:
                with contextlib.suppress(OSError):
                    folder.rmdir()  # where nothing came of it
                with contextlib.suppress(OSError):
                    lock.unlink()  # while it is held: who waits for it looks whether it is still there
    except locks.NotWaited:
        what = f"another process is {suffix} into {dest}"
        raise HpcmlError(what, origin="DEST", fix="wait for it, or give another place") from None


def told(error: OSError, dest: Path, fix: str) -> HpcmlError:
    """Return an error of the system as one for a person.

    Args:
        fix: what to do where space has run out.
    """
    where = shown(error.filename) if error.filename else str(dest)
    if error.errno in _FULL:
        what = "the quota is used up" if error.errno == errno.EDQUOT else "no space left"
        return HpcmlError(f"{where}: {what}", origin="DEST", fix=fix)
    return HpcmlError(f"{where}: {error.strerror or error}", fix="see that it can be read or written, and try again")


def write(path: Path, content: bytes) -> None:
    """Write a file and wait until it is on the disk."""
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def sync_folder(path: Path) -> None:
    """Wait until a folder's entries are on the disk."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def sync_file_system(path: Path) -> None:
    """Wait until all that was written to a path's file system is on the disk: one request for any number of files."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.syncfs(fd):
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number), str(path))
    finally:
        os.close(fd)
