"""What differs between two versions: files and bytes added, removed and changed, and images by class."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from ...errors import HpcmlError
from . import material, receipt
from .pointers import Pointer
from .repository import Repository

Files = Mapping[str, tuple[str, int]]  # name → MD5, bytes


@dataclass(frozen=True)
class Part:
    """Some files: how many, and their bytes."""

    files: int = 0
    bytes: int = 0


@dataclass(frozen=True)
class Changes:
    """The difference between two versions of a data set.

    Attributes:
        before, after: all of each.
        changed: files of one name and two contents; ``grown`` is by how many bytes.
        moved: of those added, files whose very content was there under another name.
        classes: for image folders the number of files of each class before and after.
    """

    before: Part
    after: Part
    added: Part
    removed: Part
    changed: Part
    grown: int
    moved: int
    classes: Mapping[str, tuple[int, int]]
    names: Mapping[str, tuple[str, ...]]


def files_of(found: Repository, tag: str, pointer: Pointer, data_root: Path | None) -> Files:
    """Return the files of a version, from where it is laid out, else from DVC's cache.

    Raises:
        HpcmlError: it is in neither.
    """
    told = material.held(data_root, tag, pointer) if data_root else None
    if told:
        return told.files
    contents = found.contents(pointer) or {}
    try:
        sizes = {digest: found.object(digest).stat().st_size for digest in set(contents.values())}
    except OSError:
        contents = {}
    if not contents:
        raise HpcmlError(f"{pointer.path} {tag} is not here", fix=f"hpcml data version pull {tag}")
    return {name: (digest, sizes[digest]) for name, digest in contents.items()}


def between(before: Files, after: Files) -> Changes:
    """Return what has changed from one version to another."""
    added = [name for name in after if name not in before]
    removed = [name for name in before if name not in after]
    changed = [name for name in after if name in before and after[name][0] != before[name][0]]
    old = {digest for digest, _ in before.values()}
    counts = [receipt.classes(files) for files in (before, after)]
    labels = sorted({*counts[0], *counts[1]}) if all(counts) else []
    return Changes(
        before=_part(before, before),
        after=_part(after, after),
        added=_part(after, added),
        removed=_part(before, removed),
        changed=_part(after, changed),
        grown=sum(after[name][1] - before[name][1] for name in changed),
        moved=sum(after[name][0] in old for name in added),
        classes={label: (counts[0].get(label, 0), counts[1].get(label, 0)) for label in labels},
        names={"added": tuple(added), "removed": tuple(removed), "changed": tuple(changed)},
    )


def _part(files: Files, names: Mapping[str, object] | list[str]) -> Part:
    return Part(len(names), sum(files[name][1] for name in names))
