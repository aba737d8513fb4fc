"""The snapshot of a project that a run works in: the code as it was submitted, uncommitted edits included.

In a git checkout it holds the files that git tracks and the untracked ones that it does not ignore; what git ignores
(data, environments) is linked, so that relative paths go on working. Elsewhere it holds the folder without hidden
folders and environments. Files over ``LARGEST_BYTES`` are linked, not copied.
"""

import itertools
import os
import re
import stat
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path

from .errors import HpcmlError
from .facts import PARAMETERS_TAG
from .job import Scalar

LARGEST_BYTES = 10 * 2**20
# Beyond this a folder is hardly a project: somebody submits from $HOME.
MOST_FILES = 20_000
_BLOCK = 2**20
_SKIPPED = frozenset(["__pycache__", "node_modules", "mlartifacts", "mlruns"])


def take(project: Path, target: Path, *, skip: Path | None = None, work: str | None = None) -> int:
    """Copy a project's files to ``target`` and return how many there were.

    Args:
        target: made here, 0700; what is there already is left alone.
        skip: a folder inside the project that is no part of it: the runs folder.
        work: the notebook or script to run, relative to the project; it is a copy even where git ignores it or it is
            large, so that neither edits reach the run nor the run the original.

    Raises:
        HpcmlError: the folder holds more than ``MOST_FILES`` files, or one can't be read.
    """
    target.mkdir(mode=0o700, exist_ok=True)
    if skip:  # as a path below the project, whichever symbolic links either was named by
        skip = project / os.path.relpath(os.path.realpath(skip), os.path.realpath(project))
    made: set[str] = set()
    listing = _git(project, "--cached", "--others", "--exclude-standard")
    other = _git(project, "--others", "--ignored", "--exclude-standard", "--directory", "--no-empty-directory")
    listed, ignored = _names(listing), _names(other)
    # A checkout inside another that ignores it: git lists nothing of it.
    names = _walk(project, skip) if not listed else _with_checkouts(project, listed, skip)
    if work:
        _copy(project, work, target, made, largest=float("inf"))
    below = f"{os.path.relpath(skip, project)}/" if skip else "/"
    wanted = list(itertools.islice((n for n in names if not f"{n}/".startswith(below)), MOST_FILES + 1))
    if len(wanted) > MOST_FILES:
        raise HpcmlError(
            f"{project} holds more than {MOST_FILES} files; a snapshot of it is no use",
            fix="work in a project folder of its own (git init), or set HPCML_PROJECT to it",
        )
    for name in wanted:
        _copy(project, name, target, made)
    if listed:
        _link_ignored(project, target, skip, ignored or [])
    return len(wanted)


def inject(script: Path, params: Mapping[str, Scalar]) -> None:
    """Put a cell with the parameters after the cell tagged ``parameters`` of a percent script, as papermill does."""
    # surrogateescape keeps bytes that aren't UTF-8; only \n ends a line, as for Python.
    lines = re.findall(r"[^\n]*\n|[^\n]+", script.read_text(encoding="utf-8", errors="surrogateescape"))
    marks = [i for i, line in enumerate(lines) if line.startswith("# %%")]
    tagged = next(i for i in marks if PARAMETERS_TAG.search(lines[i]))
    end = next((i for i in marks if i > tagged), len(lines))
    cell = ['# %% tags=["injected-parameters"]\n', *(f"{k} = {python_literal(v)}\n" for k, v in params.items()), "\n"]
    before = lines[:end] if lines[end - 1].endswith("\n") else [*lines[: end - 1], lines[end - 1] + "\n"]
    script.write_text("".join([*before, *cell, *lines[end:]]), encoding="utf-8", errors="surrogateescape")


def python_literal(value: Scalar) -> str:
    """Return a value as Python source; NaN and infinities too."""
    if isinstance(value, float) and (value != value or value in (float("inf"), float("-inf"))):
        return f'float("{value}")'
    return repr(value)


def _git(project: Path, *options: str) -> "subprocess.Popen[bytes] | None":
    """Start ``git ls-files``; two of them run side by side. None without git."""
    words = ["git", "-C", str(project), "ls-files", "-z", *options]
    try:
        return subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    except OSError:
        return None


def _names(git: "subprocess.Popen[bytes] | None") -> list[str] | None:
    """Return the files that it listed, None outside a checkout."""
    if git is None:
        return None
    listed, _ = git.communicate()
    return None if git.returncode else [os.fsdecode(name) for name in dict.fromkeys(listed.split(b"\0")) if name]


def _with_checkouts(project: Path, names: list[str], skip: Path | None) -> Iterator[str]:
    """Yield the files that git lists, and for a checkout inside this one (a submodule, a clone) the files in it."""
    for name in names:
        inner = project / name
        if name.endswith("/") or (inner.is_dir() and not inner.is_symlink()):
            yield from (os.path.join(name, found) for found in _walk(inner, skip))
        else:
            yield name


def _walk(project: Path, skip: Path | None) -> Iterator[str]:
    for folder, subfolders, files in os.walk(project):
        here = Path(folder)
        # os.walk does not enter linked folders: they are linked again, like a file.
        files += [name for name in subfolders if (here / name).is_symlink()]
        subfolders[:] = [
            name
            for name in subfolders
            if not name.startswith(".")
            and name not in _SKIPPED
            and not (name == "runs" and here == project)
            and here / name != skip
            and not (here / name / "pyvenv.cfg").exists()
        ]
        for name in files:
            yield os.path.relpath(here / name, project)


def _copy(project: Path, name: str, folder: Path, made: set[str], largest: float = LARGEST_BYTES) -> None:
    """Copy one file with its mode and time; plain system calls, because a submit waits for hundreds of these."""
    source, target = f"{project}/{name}", f"{folder}/{name}"
    try:
        info = os.lstat(source)
    except FileNotFoundError:
        return  # tracked by git and deleted in the work tree
    try:
        if (parent := os.path.dirname(target)) not in made:
            os.makedirs(parent, mode=0o700, exist_ok=True)
            made.add(parent)
        if stat.S_ISLNK(info.st_mode) and _stays_inside(project, Path(source)):
            os.symlink(os.readlink(source), target)
            return
        if stat.S_ISLNK(info.st_mode) and os.path.exists(source):
            info = os.stat(source)
        if stat.S_ISREG(info.st_mode) and info.st_size <= largest:
            _copy_content(source, target, info)
        elif stat.S_ISREG(info.st_mode) or stat.S_ISDIR(info.st_mode):
            os.symlink(os.path.abspath(source), target)
    except OSError as error:
        if isinstance(error, FileExistsError) and os.path.lexists(target):
            return  # here already
        fix = "make it readable, free space, or let git ignore it"
        raise HpcmlError(f"{source} can't be copied to {target}: {error.strerror}", fix=fix) from None


def _copy_content(source: str, target: str, info: os.stat_result) -> None:
    reading = os.open(source, os.O_RDONLY | os.O_CLOEXEC)
    try:
        writing = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, info.st_mode & 0o700)
        try:
            while content := os.read(reading, _BLOCK):
                while content:
                    content = content[os.write(writing, content) :]
            os.utime(writing, ns=(info.st_atime_ns, info.st_mtime_ns))
        finally:
            os.close(writing)
    finally:
        os.close(reading)


def _stays_inside(project: Path, source: Path) -> bool:
    """Whether it is a relative link to something in the project: such a link is right in the copy too."""
    if not source.is_symlink() or os.path.isabs(link := os.readlink(source)):
        return False
    end = os.path.normpath(source.parent / link)
    return end == str(project) or end.startswith(f"{project}{os.sep}")


def _link_ignored(project: Path, target: Path, skip: Path | None, names: list[str]) -> None:
    """Link what git ignores at its place, whole folders where nothing in them is tracked."""
    for name in names:
        source, link = project / name, target / name.rstrip("/")
        if source.name in _SKIPPED or (skip and (source == skip or source in skip.parents)):
            continue
        if link.parent.is_dir():
            _link(source.absolute(), link)


def _link(source: Path, link: Path) -> None:
    """Link a path; where a folder is there already (it holds the work's copy), what else is in it."""
    if not os.path.lexists(link):
        os.symlink(source, link)
    elif link.is_dir() and not link.is_symlink():
        for entry in source.iterdir():
            _link(entry, link / entry.name)
