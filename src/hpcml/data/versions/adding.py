"""A folder's content becomes a version: DVC takes the content, Git its pointer, a tag is its name."""

import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ...errors import HpcmlError
from ..listing import Listing, listing
from . import dvc, git, pointers, repository
from .dvc import Progress, Say
from .git import Git
from .pointers import Pointer
from .repository import Repository

_TAG_FIX = "such as v1.0: letters, digits, '.', '_', '-', '/'"


@dataclass(frozen=True)
class Added:
    """What ``add`` did: ``new`` is False where the tag stood for this very content already."""

    pointer: Pointer
    tag: str
    commit: str
    new: bool


def add(folder: Path, tag: str, message: str = "", progress: Progress | None = None, say: Say | None = None) -> Added:
    """Make what lies in a folder a version: DVC takes the content, Git its pointer, in a commit of its own, and the tag.

    Args:
        message: of commit and tag; else it says what was added.
        say: told of what is no part of a version.

    Raises:
        HpcmlError: no folder, names that DVC can't keep, a tag that stands for other content, edits in the way.
    """
    here = git.find(folder)
    _check_tag(here, tag)
    lies = _look(folder, say)
    path = pointers.below_top(Git(here.top), folder.absolute())
    found = repository.ready(folder)
    if here.commit_of(tag):
        return _again(found, path, tag, lies)
    _need_no_edits(here, path)
    dvc.run(found.root, "add", str(here.top / path), doing=f"add {folder}", progress=progress, say=say)
    pointer = pointers.in_work_tree(here, path)
    assert pointer, "DVC has just written it"
    text = message or f"Data {path} {tag}: {pointer.files:,} files, {pointer.bytes:,} bytes"
    ignore = os.path.join(os.path.dirname(path), ".gitignore")
    names = [name for name in (f"{path}.dvc", ignore) if (here.top / name).exists()]
    commit = repository.commit(found, [*names, *found.own_files], text)
    here.need("tag", "--annotate", "--message", text, tag, doing=f"make the tag {tag}")
    return Added(pointer, tag, commit, True)


def _check_tag(here: Git, tag: str) -> None:
    if not re.fullmatch(r"[\w.][\w./-]*", tag, re.ASCII) or here.ask("check-ref-format", f"refs/tags/{tag}").code:
        raise HpcmlError(f"{tag!r} is no name of a tag", origin="--tag", fix=_TAG_FIX)


def _look(folder: Path, say: Say | None) -> Listing:
    """Look at what is to be added, and tell what can't be or won't."""
    if not folder.is_dir():
        what = f"{folder} is no folder" if folder.exists() else f"no folder at {folder}"
        raise HpcmlError(what, allowed="a folder, such as one with images by class")
    linked = next((os.path.join(top, one) for top, subs, _ in os.walk(folder) for one in subs
                   if os.path.islink(os.path.join(top, one))), "")  # fmt: skip
    if linked:
        fix = "replace the link by the folder that it leads to"
        raise HpcmlError(f"{linked} is a link to a folder, which DVC leaves out", fix=fix)
    try:
        lies = listing(folder)
    except OSError as error:
        what = f"{error.filename} can't be read: {error.strerror}"
        raise HpcmlError(what, fix="make it readable, or remove it") from None
    odd = [file.name for file in lies.files if not _is_text(file.name)]
    if odd:
        shown = os.fsencode(odd[0]).decode(errors="backslashreplace")
        more = f", and {len(odd) - 1} more" if len(odd) > 1 else ""
        raise HpcmlError(f"the name {shown} is not UTF-8{more}", origin=str(folder), fix="rename it")
    if not lies.files:
        raise HpcmlError(f"{folder} holds no files", fix="a version has at least one")
    filled = {parent for file in lies.files for parent in _parents(file.name)}
    empty = [name for name in lies.folders if name not in filled]
    if empty and say:
        say(f"{len(empty)} empty folder{'s are' if len(empty) > 1 else ' is'} no part of a version: {empty[0]}")
    return lies


def _is_text(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def _parents(name: str) -> Iterator[str]:
    while name := os.path.dirname(name):
        yield name


def _again(found: Repository, path: str, tag: str, lies: Listing) -> Added:
    """The tag is there: say so where it stands for what lies in the folder, else refuse."""
    here = found.git
    commit = pointers.need_tag(here, tag)
    held = pointers.in_commit(here, f"refs/tags/{tag}", path)
    fix = f"choose another tag, such as {_next(tag)}; hpcml data version list shows those that there are"
    if held is None:
        raise HpcmlError(f"the tag {tag} is there already, and has no data set {path}", origin="--tag", fix=fix)
    if held.files == len(lies.files) and held.bytes == lies.bytes:
        target = os.path.relpath(here.top / path, found.root)
        words = ("diff", "--json", "--targets", target, "--", f"refs/tags/{tag}")
        told = dvc.run(found.root, *words, doing=f"compare the folder with {tag}")
        if not any(json.loads(told or "{}").get(key) for key in ("added", "deleted", "modified", "renamed")):
            return Added(held, tag, commit, False)
    what = (
        f"the tag {tag} is there already, for other content: {held.files:,} files, {held.bytes:,} bytes; "
        f"the folder has {len(lies.files):,} files, {lies.bytes:,} bytes"
    )
    raise HpcmlError(what, origin="--tag", fix=fix)


def _next(tag: str) -> str:
    """A tag like this one with its first number one larger: v1.0 → v2.0."""
    return re.sub(r"\d+", lambda match: str(int(match[0]) + 1), tag, count=1) if re.search(r"\d", tag) else f"{tag}-2"


def _need_no_edits(here: Git, path: str) -> None:
    """Refuse to commit somebody's own edits of .gitignore together with DVC's line in it."""
    name = os.path.join(os.path.dirname(path), ".gitignore")
    mine = f"/{os.path.basename(path)}"
    old = here.ask("cat-file", "blob", f"HEAD:{name}").out.splitlines()
    try:
        new = (here.top / name).read_text(encoding="utf-8", errors="replace").splitlines()
    except FileNotFoundError:
        return
    if [line for line in old if line != mine] != [line for line in new if line != mine]:
        fix = f"commit it first: git add {name} && git commit {name}"
        raise HpcmlError(f"{name} has edits of yours, which the version's commit would take along", fix=fix)
