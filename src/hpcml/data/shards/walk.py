"""What a folder holds, to the last name: the listing that decides a packed data set's order and shards.

Names are bytes, as the file system has them, and sorted as bytes: no locale changes the order. A symbolic link inside
the folder is followed, as a copy would; one that leads out of it, nowhere, or back to a folder above itself is told.
"""

import hashlib
import mmap
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from errno import ELOOP
from pathlib import Path
from stat import S_ISDIR, S_ISREG
from typing import TYPE_CHECKING, Any

from ...errors import Problem
from . import layout, workers

if TYPE_CHECKING:
    from numpy.typing import NDArray

_AT_ONCE = 2048  # files that one task looks at
_GONE = -1


@dataclass(frozen=True)
class Listing:
    """The regular files below a folder, n of them, in the order of their names' bytes.

    Attributes:
        root: the folder, without links.
        names: relative, as bytes.
        sizes, mtimes_ns, modes: int64 (n,); of a link those of what it leads to.
        problems: what can't be packed, each with its name as origin.
        empty: names of folders that hold nothing.
    """

    root: Path
    names: list[bytes]
    sizes: "NDArray[Any]"
    mtimes_ns: "NDArray[Any]"
    modes: "NDArray[Any]"
    problems: tuple[Problem, ...]
    empty: tuple[bytes, ...]

    @property
    def digest(self) -> str:
        """Hexadecimal digits that change when a file comes, goes or changes."""
        digest = hashlib.sha256(b"\0".join(self.names))
        for numbers in (self.sizes, self.mtimes_ns, self.modes):
            digest.update(numbers.tobytes())
        return digest.hexdigest()


def walk(root: Path, count: int) -> Listing:
    """Return what lies in a folder; only names are kept in memory, no content.

    Args:
        count: processes that ask for sizes.

    Raises:
        OSError: the folder itself can't be read.
    """
    np = layout.numpy()
    real = root.resolve()
    names: list[bytes] = []
    problems: list[Problem] = []
    empty: list[bytes] = []
    _collect(os.fsencode(real), names, problems, empty)
    names.sort()
    table = _look(real, names, count)
    kept = table[:, 2] != _GONE
    if not kept.all():
        problems += [_why(real, names[row]) for row in (~kept).nonzero()[0].tolist()]
        names, table = [name for name, keep in zip(names, kept, strict=True) if keep], table[kept]
    sizes, mtimes, modes = (np.ascontiguousarray(table[:, column]) for column in range(3))
    problems.sort(key=lambda problem: problem.origin)
    return Listing(real, names, sizes, mtimes, modes, tuple(problems), tuple(sorted(empty)))


def _collect(root: bytes, names: list[bytes], problems: list[Problem], empty: list[bytes]) -> None:
    """Go through all folders; ``names`` and the others are filled in no particular order."""
    # With each folder the inodes of those above it, and its own: a link back to one of them would never end.
    waiting: list[tuple[bytes, tuple[tuple[int, int], ...]]] = [(b"", (_inode(root),))]
    while waiting:
        folder, above = waiting.pop()
        held = False
        try:
            entries = os.scandir(os.path.join(root, folder))
        except OSError as error:
            if not folder:
                raise
            problems.append(Problem(f"can't be read: {error.strerror}", layout.shown(folder)))
            continue
        with entries:
            for entry in entries:
                held = True
                name = folder + entry.name
                if entry.is_file(follow_symlinks=False):
                    names.append(name)
                    continue
                what = _other(root, entry, above)
                if isinstance(what, str):
                    problems.append(Problem(what, layout.shown(name)))
                elif what is None:
                    names.append(name)
                else:
                    waiting.append((name + b"/", (*above, what)))
        if not held and folder:
            empty.append(folder)


def _why(root: Path, name: bytes) -> Problem:
    """Why a file that was listed has no facts."""
    try:
        os.stat(os.path.join(os.fsencode(root), name))
    except OSError as error:
        return Problem(f"can't be read: {error.strerror}", layout.shown(name))
    return Problem("neither a file nor a folder", layout.shown(name))


def _inode(path: bytes) -> tuple[int, int]:
    info = os.stat(path)
    return info.st_dev, info.st_ino


def _other(root: bytes, entry: "os.DirEntry[bytes]", above: Sequence[tuple[int, int]]) -> str | tuple[int, int] | None:
    """What to do with what is no plain file: None: take it as one; an inode: go into it; else what is wrong with it."""
    try:
        if entry.is_dir(follow_symlinks=False):
            return _inode(entry.path)
        if not entry.is_symlink():
            return "neither a file nor a folder"
        target = os.path.realpath(entry.path, strict=True)
        if target != root and not target.startswith(root.rstrip(b"/") + b"/"):
            return f"a symbolic link that leads out of the folder, to {layout.shown(target)}"
        info = os.stat(target)
    except OSError as error:
        if error.errno == ELOOP:
            return "a symbolic link that leads round in a circle"
        return f"{'a symbolic link: ' * entry.is_symlink()}{error.strerror}"
    if S_ISREG(info.st_mode):
        return None
    if not S_ISDIR(info.st_mode):
        return "neither a file nor a folder"
    inode = info.st_dev, info.st_ino
    return "a symbolic link that leads back to a folder above it" if inode in above else inode


def _look(root: Path, names: Sequence[bytes], count: int) -> "NDArray[Any]":
    """Sizes, times in ns and modes, int64 (n, 3); a mode of -1 is no regular file any more.

    Processes fill one piece of shared memory.
    """
    np = layout.numpy()
    if not names:
        return np.empty((0, 3), dtype=np.int64)
    shared = mmap.mmap(-1, 24 * len(names))
    table: NDArray[Any] = np.frombuffer(shared, dtype=np.int64).reshape(-1, 3)
    top = os.open(root, os.O_RDONLY | os.O_DIRECTORY)

    def look(first: int, say: workers.Say) -> None:
        part = names[first : first + _AT_ONCE]
        table[first : first + len(part)] = list(_facts(part, top))

    try:
        workers.run(look, range(0, len(names), _AT_ONCE), count, lambda _: None)
    finally:
        os.close(top)
    return table


def _facts(names: Sequence[bytes], top: int) -> Iterator[tuple[int, int, int]]:
    stat = os.stat
    for name in names:
        try:
            info = stat(name, dir_fd=top)
        except OSError:
            yield 0, 0, _GONE
            continue
        yield info.st_size, info.st_mtime_ns, info.st_mode if S_ISREG(info.st_mode) else _GONE


def clashes(names: Sequence[bytes]) -> list[tuple[str, str]]:
    """Return pairs of names, of files or folders, that differ in case only: on some file systems they are one.

    Args:
        names: in any order.
    """
    folders = {name[:cut] for name in {n[: n.rfind(b"/") + 1] for n in names} for cut in _cuts(name)}
    everything = b"\0".join([*folders, *names])
    if len(set(os.fsdecode(everything).casefold().split("\0"))) == len(folders) + len(names):
        return []
    found: dict[str, bytes] = {}
    pairs = []
    for name in [*sorted(folders), *names]:
        other = found.setdefault(os.fsdecode(name).casefold(), name)
        # Files in folders that clash are told by their folders.
        if other != name and other.rpartition(b"/")[0] == name.rpartition(b"/")[0]:
            pairs.append((layout.shown(other), layout.shown(name)))
    return pairs


def _cuts(name: bytes) -> Iterator[int]:
    at = name.find(b"/")
    while at >= 0:
        yield at
        at = name.find(b"/", at + 1)
