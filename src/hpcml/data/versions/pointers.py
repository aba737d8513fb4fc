"""DVC's pointers, ``FOLDER.dvc``: small files in Git that say which content a folder has (dvc.org, ".dvc files")."""

import os
import re
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from ...errors import HpcmlError, nearest
from .git import Git

_ENTRY = re.compile(r"^(?:- | {2})(\w+): *(.*?) *$", re.MULTILINE)
_LARGEST = 64 * 1024  # bytes; a pointer has about 100


@dataclass(frozen=True)
class Pointer:
    """Which content a folder has.

    Attributes:
        path: the folder, relative to the top of the repository.
        digest: DVC's hash of its listing, 32 hexadecimal digits: equal for equal names and contents.
        bytes, files: of all of it.
    """

    path: str
    digest: str
    bytes: int = 0
    files: int = 0

    @property
    def name(self) -> str:
        """The last component of the path."""
        return PurePosixPath(self.path).name

    @property
    def short(self) -> str:
        """The first 12 digits."""
        return self.digest[:12]


def parse(text: str, path: str) -> Pointer | None:
    """Return what a pointer says, None where it is about a single file or no pointer at all.

    Raises:
        HpcmlError: DVC 2 has written it, whose hash is not that of the content.
    """
    values = dict(_ENTRY.findall(text.partition("outs:")[2]))
    match = re.fullmatch(r"([0-9a-f]{32})\.dir", values.get("md5", ""))
    if not match:
        return None
    if values.get("hash") != "md5":
        what = f"{path}.dvc is in the format of DVC 2"
        raise HpcmlError(what, fix="dvc cache migrate --dvc-files, then commit it and add the version again")
    sizes = (int(values[key]) if values.get(key, "").isdecimal() else 0 for key in ("size", "nfiles"))
    return Pointer(path, match[1], *sizes)


def at(git: Git, tag: str) -> list[Pointer]:
    """Return the pointers of a tag, below the folder that the repository was found for.

    Raises:
        HpcmlError: there is no such tag.
    """
    need_tag(git, tag)
    listed = git.need("ls-tree", "-r", "-z", "--name-only", f"refs/tags/{tag}", doing=f"list {tag}")
    names = [name for name in listed.split("\0") if name.endswith(".dvc") and name.startswith(git.prefix)]
    found = (in_commit(git, f"refs/tags/{tag}", name.removesuffix(".dvc")) for name in names)
    return [pointer for pointer in found if pointer]


def need_tag(git: Git, tag: str) -> str:
    """Return the commit of a tag.

    Raises:
        HpcmlError: there is no such tag; it names those that there are.
    """
    commit = git.commit_of(tag)
    if commit:
        return commit
    tags = git.tags()
    fix = nearest(tag, tags) or "git fetch --tags gets those of the others; hpcml data version add makes one"
    newest = ", ".join(tags[-1:-6:-1])
    raise HpcmlError(f"no tag {tag!r}", origin=str(git.top), allowed=newest or "none is there yet", fix=fix)


def in_commit(git: Git, commit: str, path: str) -> Pointer | None:
    """Return a folder's pointer as a commit has it, None where it has none."""
    answer = git.ask("cat-file", "blob", f"{commit}:{path}.dvc")
    return None if answer.code else parse(answer.out[:_LARGEST], path)


def in_work_tree(git: Git, path: str) -> Pointer | None:
    """Return a folder's pointer as it lies in the work tree, None where there is none."""
    try:
        with (git.top / f"{path}.dvc").open(encoding="utf-8", errors="replace") as file:
            return parse(file.read(_LARGEST), path)
    except OSError:
        return None


def of(git: Git, tag: str, source: str) -> Pointer:
    """Return the pointer of a data set at a tag.

    Args:
        source: a path with a ``/`` in it, relative to the folder that the repository was found for; or the folder's name.

    Raises:
        HpcmlError: no such tag, no such data set in it, or several of that name.
    """
    pointers = at(git, tag)
    if "/" in source:
        path = below_top(git, Path(source))
        found = [pointer for pointer in pointers if pointer.path == path]
    else:
        found = [pointer for pointer in pointers if pointer.name == source]
        found = [pointer for pointer in found if pointer.path == git.prefix + source] or found
    if len(found) == 1:
        return found[0]
    names = ", ".join(shown(git, pointer.path) for pointer in found or pointers) or "none"
    if found:
        what = f"tag {tag!r} has several data sets named {source!r}"
        raise HpcmlError(what, allowed=names, fix="name it by its path, with a / in it")
    fix = nearest(source, [pointer.name for pointer in pointers]) or f"hpcml data version add {source} --tag NEW"
    raise HpcmlError(f"tag {tag!r} has no data set {source!r}", origin=str(git.top), allowed=names, fix=fix)


def below_top(git: Git, folder: Path) -> str:
    """Return a folder's path relative to the top of the repository.

    Raises:
        HpcmlError: it lies elsewhere, or is the top itself.
    """
    whole = os.path.realpath(git.top / git.prefix / folder.expanduser())
    path = os.path.relpath(whole, os.path.realpath(git.top))
    if path == ".." or path.startswith("../"):
        what, fix = f"{folder} lies outside of the repository {git.top}", "version it in the repository that holds it"
        raise HpcmlError(what, fix=fix)
    if path == ".":
        raise HpcmlError(f"{folder} is the repository itself", allowed="a folder in it that holds data alone")
    return path


def shown(git: Git, path: str) -> str:
    """Return a path relative to the folder that the repository was found for, as it would be typed there."""
    return os.path.relpath(git.top / path, git.top / git.prefix)
