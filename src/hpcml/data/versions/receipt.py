"""What a version's folder must hold, written beside its files, and whether it does. Standard library only: nodes read it."""

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from ...errors import HpcmlError
from ...rundir import write_bytes
from ..listing import READERS, listing

NAME = ".hpcml-version.json"
_FORMAT = 1
_BLOCK = 2**20
_SHOWN = 5


@dataclass(frozen=True)
class Receipt:
    """One version of a data set.

    Attributes:
        source: the folder's path in its repository.
        digest: DVC's hash of the listing.
        files: of each name relative to the folder the MD5 of the content, and its size in bytes.
    """

    source: str
    tag: str
    digest: str
    files: Mapping[str, tuple[str, int]]

    @property
    def bytes(self) -> int:
        """The size of all files together."""
        return sum(size for _, size in self.files.values())

    @property
    def label(self) -> str:
        """The version as people say it."""
        return f"{self.source} {self.tag} ({self.digest[:12]})"


def write(folder: Path, receipt: Receipt) -> None:
    """Write a receipt into its folder, atomically; it is readable by whoever can read the data."""
    files = [[name, *entry] for name, entry in sorted(receipt.files.items())]
    told = {"format": _FORMAT, "source": receipt.source, "tag": receipt.tag, "md5": receipt.digest, "files": files}
    path = folder / NAME
    write_bytes(path, (json.dumps(told, separators=(",", ":")) + "\n").encode())
    umask = os.umask(0)
    os.umask(umask)
    path.chmod(0o644 & ~umask)


def read(folder: Path) -> Receipt | None:
    """Return a folder's receipt, None where there is none: the folder is no version, or is not complete."""
    try:
        told = json.loads((folder / NAME).read_bytes())
        files = {name: (md5, size) for name, md5, size in told["files"]}
        return Receipt(told["source"], told["tag"], told["md5"], files) if told["format"] == _FORMAT else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def differences(folder: Path, receipt: Receipt, *, contents: bool = False) -> list[str]:
    """Return in what a folder is not what its receipt says, a line for each file.

    Args:
        contents: also read all files and compare their MD5; else names and sizes are compared.
    """
    found = {file.name: file.bytes for file in listing(folder).files if file.name != NAME}
    wrong = [f"{name} is missing" for name in receipt.files if name not in found]
    wrong += [f"{name} is not part of it" for name in found if name not in receipt.files]
    both = [(name, *receipt.files[name]) for name in receipt.files if name in found]
    wrong += [f"{name} has {found[name]} bytes instead of {size}" for name, _, size in both if found[name] != size]
    if contents:
        same = {name: md5 for name, md5, size in both if found[name] == size}
        wrong += [f"{name} has other content" for name in damaged(folder, same)]
    return wrong


def damaged(folder: Path, contents: Mapping[str, str]) -> list[str]:
    """Return the files of a folder whose content does not have its MD5, or that can't be read."""
    with ThreadPoolExecutor(min(READERS, 2 * (os.cpu_count() or 1))) as pool:
        hashed = pool.map(md5_of, (folder / name for name in contents))
        return [name for (name, md5), now in zip(contents.items(), hashed, strict=True) if now != md5]


def need(folder: Path, receipt: Receipt, fix: str, *, contents: bool = False) -> None:
    """Refuse a folder that is not what its receipt says; arguments as for ``differences``.

    Raises:
        HpcmlError: the first few files that differ, and how many more there are.
    """
    try:
        wrong = differences(folder, receipt, contents=contents)
    except OSError as error:
        wrong = [f"{error.filename} can't be read: {error.strerror}"]
    if wrong:
        more = f"; and {len(wrong) - _SHOWN} more" if len(wrong) > _SHOWN else ""
        what = f"{folder} is not {receipt.label}: {'; '.join(wrong[:_SHOWN])}{more}"
        raise HpcmlError(what, origin="[data] version", fix=fix)


def md5_of(path: Path) -> str:
    """Return the MD5 of a file's content as DVC has it, empty where it can't be read."""
    digest = hashlib.md5(usedforsecurity=False)
    try:
        with path.open("rb", buffering=0) as file:
            while block := file.read(_BLOCK):
                digest.update(block)
    except OSError:
        return ""
    return digest.hexdigest()


def classes(names: Iterable[str]) -> dict[str, int]:
    """Return how many files each class of an image folder has; empty where not all files lie in ``CLASS/FILE``."""
    counts: dict[str, int] = {}
    for name in names:
        label, mark, rest = name.partition("/")
        if not mark or "/" in rest:
            return {}
        counts[label] = counts.get(label, 0) + 1
    return dict(sorted(counts.items()))
