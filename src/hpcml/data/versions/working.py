"""A data folder of the work tree gets the content of a version; nothing of what is in it is lost without a word."""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ...errors import HpcmlError
from ...rundir import write_bytes
from ..listing import listing
from . import dvc, pointers, receipt
from .dvc import Progress, Say
from .pointers import Pointer
from .repository import Repository, fetch


@dataclass(frozen=True)
class Changed:
    """A folder that ``checkout`` has looked at; ``new`` is False where it held that content already."""

    pointer: Pointer
    new: bool


def checkout(
    found: Repository,
    tag: str,
    wanted: Sequence[Pointer],
    *,
    force: bool = False,
    progress: Progress | None = None,
    say: Say | None = None,
) -> list[Changed]:
    """Give data folders of the work tree the content of a tag, and their pointers; nothing else changes.

    Raises:
        HpcmlError: a folder has changes that no version holds (unless ``force``), or the content can't be had.
    """
    modified = _modified(found, wanted)
    if not force:
        _need_nothing_lost(found, tag, wanted, modified)
    fetch(found, wanted, progress, say)
    done = []
    for pointer in wanted:
        before = pointers.in_work_tree(found.git, pointer.path)
        if before == pointer and pointer.path not in modified:
            done.append(Changed(pointer, False))
            continue
        _place(found, tag, pointer, progress, say)
        done.append(Changed(pointer, True))
    return done


def _place(found: Repository, tag: str, pointer: Pointer, progress: Progress | None, say: Say | None) -> None:
    file = found.git.top / f"{pointer.path}.dvc"
    kept = file.read_bytes() if file.exists() else None
    text = found.git.need("cat-file", "blob", f"refs/tags/{tag}:{pointer.path}.dvc", doing=f"read {tag}")
    write_bytes(file, os.fsencode(text))
    file.chmod(0o644)
    try:
        # What would be lost was looked for; DVC would take what an interrupted checkout left for somebody's change.
        words = ("checkout", "--force", str(file))
        dvc.run(found.root, *words, doing=f"check out {pointer.path}", progress=progress, say=say)
    except BaseException:
        if kept is None:
            file.unlink()
        else:
            write_bytes(file, kept)
            file.chmod(0o644)
        raise


def _modified(found: Repository, wanted: Sequence[Pointer]) -> Mapping[str, str]:
    """Return the folders that are not what their pointers in the work tree say, with DVC's word for it."""
    files = [str(found.git.top / f"{one.path}.dvc") for one in wanted]
    files = [file for file in files if os.path.exists(file)]
    if not files:
        return {one.path: "new" for one in wanted if (found.git.top / one.path).exists()}
    told = json.loads(dvc.run(found.root, "status", "--json", *files, doing="look at the folder") or "{}")
    outs = (one["changed outs"] for entries in told.values() for one in entries if "changed outs" in one)
    at = os.path.relpath(found.root, found.git.top)
    return {os.path.normpath(os.path.join(at, name)): word for out in outs for name, word in out.items()}


def _need_nothing_lost(found: Repository, tag: str, wanted: Sequence[Pointer], modified: Mapping[str, str]) -> None:
    for one in wanted:
        here, folder = found.git, pointers.shown(found.git, one.path)
        word = modified.get(one.path, "")
        if word and (here.top / one.path).exists() and not _is_whole(found, one):
            what = f"{folder} holds changes that no version has"
            fix = f"hpcml data version add {folder} --tag NEW keeps them; checkout {tag} --force discards them"
            raise HpcmlError(what, fix=fix)
        now = pointers.in_work_tree(here, one.path)
        if now is None or now.digest == one.digest:
            continue
        known = (pointers.in_commit(here, f"refs/tags/{name}", one.path) for name in here.tags())
        at_head = pointers.in_commit(here, "HEAD", one.path)
        if not any(other and other.digest == now.digest for other in (at_head, *known)):
            fix = f"hpcml data version add {folder} --tag NEW keeps it; checkout {tag} --force discards it"
            raise HpcmlError(f"{folder} holds content that dvc add has taken and no commit has", fix=fix)


def _is_whole(found: Repository, pointer: Pointer) -> bool:
    """Whether a folder holds the very content that is wanted, whatever its pointer says."""
    contents = found.contents(pointer)
    folder = found.git.top / pointer.path
    if contents is None or not folder.is_dir():
        return False
    names = {file.name for file in listing(folder).files}
    return names == set(contents) and all(receipt.md5_of(folder / name) == digest for name, digest in contents.items())
