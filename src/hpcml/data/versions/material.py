"""Versions laid out apart from the work tree, each in a folder of its own below the data folder, for jobs to read."""

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from urllib.parse import quote

from ...errors import HpcmlError
from .. import locks
from ..listing import listing
from . import receipt, repository
from .dvc import Progress, Say
from .pointers import Pointer
from .receipt import Receipt
from .repository import Repository

FOLDER = "versions"


def folder_of(data_root: Path, tag: str, pointer: Pointer) -> Path:
    """Return where a version is laid out: ``versions/<name>/<tag>-<12 digits>`` below the data folder."""
    return data_root / FOLDER / pointer.name / f"{quote(tag, safe='')}-{pointer.short}"


def held(data_root: Path, tag: str, pointer: Pointer) -> Receipt | None:
    """Return the receipt of a version that is laid out, None where it is not there or not whole."""
    found = receipt.read(folder_of(data_root, tag, pointer))
    return found if found and found.digest == pointer.digest else None


def lay_out(
    found: Repository,
    tag: str,
    pointer: Pointer,
    data_root: Path,
    progress: Progress | None = None,
    say: Say | None = None,
    *,
    verify: bool = False,
) -> bool:
    """Have a version's folder there, with the content that its hash promises; return whether it had to be made.

    Two that want the same version do it once. What was interrupted is done again; DVC's cache keeps what was pulled.

    Args:
        verify: read again all files of one that is there, and mend it.

    Raises:
        HpcmlError: the content can't be had, or the data folder can't be written.
    """
    target = folder_of(data_root, tag, pointer)
    if _is_good(target, held(data_root, tag, pointer), verify):
        return False
    word = say or (lambda text: None)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        ignore = data_root / FOLDER / ".gitignore"
        if not ignore.exists():  # a data folder inside a project: neither git nor a run's snapshot is to take it in
            ignore.write_text("*\n")
        lock = target.parent / f".{target.name}.lock"
        with locks.exclusive(
            lock, on_wait=lambda: word(f"waiting for another hpcml that pulls {pointer.name} {tag}")
        ) as whole:
            if _is_good(target, held(data_root, tag, pointer), verify):
                return False
            own = "" if whole else f".{os.uname().nodename}.{os.getpid()}"
            work = target.parent / f".{target.name}.pulling{own}"
            shutil.rmtree(work, ignore_errors=True)
            _make(found, tag, pointer, work, target, progress, say)
    except OSError as error:
        what = f"{error.filename or target} can't be written: {error.strerror}"
        fix = "free space, or set HPCML_DATA to a folder that you can write to"
        raise HpcmlError(what, origin="the data folder", fix=fix) from None
    return True


def _is_good(target: Path, told: Receipt | None, verify: bool) -> bool:
    try:
        return told is not None and not receipt.differences(target, told, contents=verify)
    except OSError:
        return False


def _make(
    found: Repository, tag: str, pointer: Pointer, work: Path, target: Path, progress: Progress | None, say: Say | None
) -> None:
    doing = f"pull {pointer.name} {tag}"
    if not found.is_cached(pointer):
        repository.need_remote(found)
    with repository.scratch(found, [pointer], work) as passing:
        made = work / "0" / pointer.name
        verb = "checkout" if found.is_cached(pointer) else "pull"
        passing.run(verb, doing=doing, progress=progress, say=say)
        wrong, contents = _wrong(found, pointer, made)
        if wrong:  # the cache itself is damaged: what is wrong in it is pulled anew
            if say:
                say(f"{len(wrong)} damaged file{'s' * (len(wrong) > 1)} in DVC's cache: pulled anew")
            for name in wrong:
                found.object(contents[name]).unlink(missing_ok=True)
            shutil.rmtree(made, ignore_errors=True)
            repository.need_remote(found)
            passing.run("pull", "--force", doing=doing, progress=progress, say=say)
            wrong, contents = _wrong(found, pointer, made)
        if wrong:
            fix = f"hpcml data version push {tag}, where the data was added"
            raise HpcmlError(f"{doing}: the remote's content of {wrong[0]} is damaged", fix=fix)
        sizes = {file.name: file.bytes for file in listing(made).files}
        files = {name: (digest, sizes[name]) for name, digest in contents.items()}
        receipt.write(made, Receipt(pointer.path, tag, pointer.digest, files))
        if target.exists():  # damaged, or without its receipt: nobody reads it
            target.rename(work / "damaged")
        made.rename(target)


def _wrong(found: Repository, pointer: Pointer, made: Path) -> tuple[list[str], Mapping[str, str]]:
    """Return the files whose content is not what the listing says, and the listing."""
    contents = found.contents(pointer)
    if contents is None:
        raise HpcmlError(f"DVC has pulled {pointer.name}, but its cache has no listing of it", fix="dvc doctor, there")
    return receipt.damaged(made, contents), contents
