"""The snapshot of a project that a run works in: the code as it was submitted, uncommitted edits included.

In a git checkout it holds the files that git tracks and the untracked ones that it does not ignore; what git ignores
(data, environments) is linked, so that relative paths go on working. Elsewhere it holds the folder without hidden
folders and environments. Files over ``LARGEST_BYTES`` are linked, not copied.

For a queue the files go into one archive, which the job unpacks: a file system of a cluster takes one file at once and
hundreds of small ones slowly, and nobody is to wait for these at the prompt.
"""

import contextlib
import itertools
import os
import re
import shutil
import stat
import subprocess
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from .errors import HpcmlError
from .facts import PARAMETERS_TAG
from .job import Scalar

LARGEST_BYTES = 10 * 2**20
# Beyond this a folder is hardly a project: somebody submits from $HOME.
MOST_FILES = 20_000
_BLOCK = 2**20
_SKIPPED = frozenset(["__pycache__", "node_modules", "mlartifacts", "mlruns"])


def take(
    project: Path, target: Path, *, skip: Path | None = None, work: str | None = None, archive: Path | None = None
) -> int:
    """Copy a project's files to ``target`` and return how many there were; see ``begin``."""
    return begin(project, target, skip=skip, work=work, archive=archive)()


def begin(
    project: Path, target: Path, *, skip: Path | None = None, work: str | None = None, archive: Path | None = None
) -> Callable[[], int]:
    """Begin to copy a project's files; the function that this returns waits for the end and says how many there were.

    Args:
        target: made here, 0700; what is there already is left alone.
        archive: a tar file for the small files, to be unpacked in ``target``; without it, or without tar, they are
            copied. Links and ``work`` are in ``target`` in any case.
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
    packed: list[str] | None = [] if archive and shutil.which("tar") else None
    for name in wanted:
        _copy(project, name, target, made, packed=packed)
    packing = _pack(project, packed, archive) if packed and archive else None
    if listed:
        _link_ignored(project, target, skip, ignored or [], packed or ())

    def finish() -> int:
        if packing and archive:
            _end_packing(packing, archive)
        return len(wanted)

    return finish


def _pack(project: Path, names: Sequence[str], archive: Path) -> "subprocess.Popen[bytes]":
    """Start tar on files of the project, by their names on its input."""
    words = ["tar", "--create", "--file", str(archive), "--directory", str(project)]
    words += ["--no-recursion", "--null", "--files-from", "-"]
    pipe, umask = subprocess.PIPE, 0o077
    try:
        tar = subprocess.Popen(words, stdin=pipe, stdout=subprocess.DEVNULL, stderr=pipe, umask=umask)
    except OSError as error:
        raise HpcmlError(f"tar can't be started: {error.strerror}", fix="check the tar on PATH") from None
    assert tar.stdin is not None
    with contextlib.suppress(BrokenPipeError), tar.stdin as names_in:  # it has ended: finish() tells why
        names_in.write(b"".join(os.fsencode(f"./{name}") + b"\0" for name in names))
    return tar


def _end_packing(tar: "subprocess.Popen[bytes]", archive: Path) -> None:
    assert tar.stderr is not None
    with tar.stderr as said:
        told = said.read().decode(errors="replace").strip().splitlines()
    if tar.wait() > 1:  # 1: a file changed while it was read (tar(1), RETURN VALUE)
        fix = "make it readable, free space, or let git ignore it"
        raise HpcmlError(f"the project can't be packed into {archive}: {told[0] if told else 'tar failed'}", fix=fix)


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


def _copy(
    project: Path,
    name: str,
    folder: Path,
    made: set[str],
    largest: float = LARGEST_BYTES,
    packed: list[str] | None = None,
) -> None:
    """Copy one file with its mode and time, or note that it is to be packed; plain system calls: there are hundreds."""
    source, target = f"{project}/{name}", f"{folder}/{name}"
    try:
        info = os.lstat(source)
    except FileNotFoundError:
        return  # tracked by git and deleted in the work tree
    if packed is not None and stat.S_ISREG(info.st_mode) and info.st_size <= largest:
        if not os.path.lexists(target):
            packed.append(name)
        return
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


def _link_ignored(project: Path, target: Path, skip: Path | None, names: list[str], packed: Sequence[str]) -> None:
    """Link what git ignores at its place, whole folders where nothing in them is tracked.

    Args:
        packed: files whose folders are there when the archive is unpacked.
    """
    coming = {parent for name in packed for parent in _parents(name)}
    for name in names:
        source, link = project / name, target / name.rstrip("/")
        if source.name in _SKIPPED or (skip and (source == skip or source in skip.parents)):
            continue
        if os.path.dirname(name.rstrip("/")) in coming:
            link.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        if link.parent.is_dir():
            _link(source.absolute(), link)


def _parents(name: str) -> Iterator[str]:
    while name := os.path.dirname(name):
        yield name


def _link(source: Path, link: Path) -> None:
    """Link a path; where a folder is there already (it holds the work's copy), what else is in it."""
    if not os.path.lexists(link):
        os.symlink(source, link)
    elif link.is_dir() and not link.is_symlink():
        for entry in source.iterdir():
            _link(entry, link / entry.name)
