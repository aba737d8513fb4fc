"""The snapshot of a project that a run works in: the code as it was submitted, uncommitted edits included.

In a git checkout it holds the files that git tracks and the untracked ones that it does not ignore; what git ignores
(data, environments) is linked, so that relative paths go on working. Elsewhere it holds the folder without hidden
folders and environments. Files over ``LARGEST_BYTES`` are linked, not copied.
"""

import contextlib
import os
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path

from .errors import HpcmlError
from .job import Scalar

LARGEST_BYTES = 10 * 2**20
# Beyond this a folder is hardly a project: somebody submits from $HOME.
MOST_FILES = 20_000
_SKIPPED = frozenset(["__pycache__", "node_modules", "runs", "mlartifacts", "mlruns"])


def take(project: Path, target: Path, *, skip: Path | None = None) -> int:
    """Copy a project's files to ``target`` and return how many there were.

    Args:
        target: made here, 0700; what is there already is left alone.
        skip: a folder inside the project that is no part of it: the runs folder.

    Raises:
        HpcmlError: the folder holds more than ``MOST_FILES`` files, or one can't be read.
    """
    target.mkdir(mode=0o700, exist_ok=True)
    listed = _git_files(project)
    names = _walk(project, skip) if listed is None else iter(listed)
    count = 0
    for name in names:
        source = project / name
        if skip and (source == skip or skip in source.parents):
            continue
        count += 1
        if count > MOST_FILES:
            raise HpcmlError(
                f"{project} holds more than {MOST_FILES} files; a snapshot of it is no use",
                fix="work in a project folder of its own (git init), or set HPCML_PROJECT to it",
            )
        _copy(source, target / name)
    if listed is not None:
        _link_ignored(project, target, skip)
    return count


def inject(script: Path, params: Mapping[str, Scalar]) -> None:
    """Put a cell with the parameters after the cell tagged ``parameters`` of a percent script, as papermill does."""
    lines = script.read_text(encoding="utf-8").splitlines(keepends=True)
    marks = [i for i, line in enumerate(lines) if line.startswith("# %%")]
    tagged = next(i for i in marks if "parameters" in lines[i] and "tags" in lines[i])
    end = next((i for i in marks if i > tagged), len(lines))
    cell = ['# %% tags=["injected-parameters"]\n', *(f"{k} = {python_literal(v)}\n" for k, v in params.items()), "\n"]
    before = lines[:end] if lines[end - 1].endswith("\n") else [*lines[: end - 1], lines[end - 1] + "\n"]
    script.write_text("".join([*before, *cell, *lines[end:]]), encoding="utf-8")


def python_literal(value: Scalar) -> str:
    """Return a value as Python source; NaN and infinities too."""
    if isinstance(value, float) and (value != value or value in (float("inf"), float("-inf"))):
        return f'float("{value}")'
    return repr(value)


def _git_files(project: Path) -> list[str] | None:
    return _git(project, "--cached", "--others", "--exclude-standard", "--deduplicate")


def _git(project: Path, *options: str) -> list[str] | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(project), "ls-files", "-z", *options], capture_output=True, timeout=60, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    if done.returncode:
        return None
    return [os.fsdecode(name) for name in done.stdout.split(b"\0") if name]


def _walk(project: Path, skip: Path | None) -> Iterator[str]:
    for folder, subfolders, files in os.walk(project):
        here = Path(folder)
        subfolders[:] = [
            name
            for name in subfolders
            if not name.startswith(".")
            and name not in _SKIPPED
            and here / name != skip
            and not (here / name / "pyvenv.cfg").exists()
        ]
        for name in files:
            yield os.path.relpath(here / name, project)


def _copy(source: Path, target: Path) -> None:
    try:
        size = source.lstat().st_size
    except FileNotFoundError:
        return  # tracked by git, deleted in the work tree
    if not target.parent.is_dir():
        target.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    with contextlib.suppress(FileExistsError):
        if source.is_symlink() and not os.path.isabs(link := os.readlink(source)):
            os.symlink(link, target)
        elif source.is_dir() or size > LARGEST_BYTES:
            os.symlink(source.absolute(), target)
        elif source.is_file():
            shutil.copy2(source, target)


def _link_ignored(project: Path, target: Path, skip: Path | None) -> None:
    """Link what git ignores at its place, whole folders where nothing in them is tracked."""
    names = _git(project, "--others", "--ignored", "--exclude-standard", "--directory", "--no-empty-directory")
    for name in names or ():
        source, link = project / name, target / name.rstrip("/")
        if source.name in _SKIPPED or (skip and (source == skip or source in skip.parents)):
            continue
        if link.parent.is_dir() and not os.path.lexists(link):
            os.symlink(source.absolute(), link)
