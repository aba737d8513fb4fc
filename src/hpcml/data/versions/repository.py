"""The repository that versions lie in: Git's tags, DVC's pointers, its cache and its remote."""

import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from ...errors import HpcmlError
from . import dvc, git, pointers, remote, s3
from .dvc import Progress, Say
from .git import Git
from .pointers import Pointer


@dataclass(frozen=True)
class Repository:
    """A checkout with data sets in it.

    Attributes:
        root: the folder with ``.dvc`` in it; the top of the checkout, or a folder below.
    """

    git: Git
    root: Path

    @property
    def cache(self) -> Path:
        """DVC's cache."""
        return remote.cache_of(self.root)

    @property
    def own_files(self) -> list[str]:
        """DVC's own files that Git is to have, relative to the top."""
        names = (self.root / name for name in (".dvc/config", ".dvc/.gitignore", ".dvcignore"))
        return [os.path.relpath(name, self.git.top) for name in names if name.exists()]

    def object(self, digest: str) -> Path:
        """Return the place of a content in the cache (dvc.org, "Structure of the cache directory")."""
        return self.cache / "files" / "md5" / digest[:2] / digest[2:]

    def contents(self, pointer: Pointer) -> dict[str, str] | None:
        """Return the MD5 of each file of a version by its name, None where the cache has no listing of it."""
        try:
            listed = json.loads(self.object(f"{pointer.digest}.dir").read_bytes())
            return {entry["relpath"]: entry["md5"] for entry in listed}
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def is_cached(self, pointer: Pointer) -> bool:
        """Whether the cache holds all of a version."""
        contents = self.contents(pointer)
        return contents is not None and all(os.path.exists(self.object(digest)) for digest in set(contents.values()))


def find(folder: Path) -> Repository | None:
    """Return the repository that holds a folder, None where DVC is not in use there.

    Raises:
        HpcmlError: the folder is in no git repository.
    """
    found = git.find(folder)
    here = found.top / found.prefix
    root = next((place for place in (here, *here.parents) if (place / ".dvc" / "config").is_file()), None)
    if root is None or not (root == found.top or found.top in root.parents):
        return None
    remote.tighten(root)
    return Repository(found, root)


def need(folder: Path) -> Repository:
    """Return the repository that holds a folder.

    Raises:
        HpcmlError: no version of data was ever made there.
    """
    found = find(folder)
    if found is None:
        fix = "hpcml data version add FOLDER --tag v1.0 makes the first"
        raise HpcmlError(f"{folder} is in no repository with versions of data", fix=fix)
    return found


def ready(folder: Path) -> Repository:
    """Return the repository that holds a folder; DVC is put to use at its top where it isn't yet."""
    found = find(folder)
    if found:
        return found
    here = git.find(folder)
    dvc.run(here.top, "init", "--quiet", doing="begin in this repository")
    with (here.top / ".dvc" / "config").open("a", encoding="utf-8") as file:  # empty as yet
        file.write("[core]\n    analytics = false\n    check_update = false\n")
    return Repository(here, here.top)


def set_remote(found: Repository, url: str, endpoint: str, read_s: int, say: Say) -> bool:
    """Set the remote and commit DVC's configuration alone; return whether anything changed. See ``remote.set_url``."""
    file = os.path.relpath(found.root / ".dvc" / "config", found.git.top)
    tracked = not found.git.ask("cat-file", "-e", f"HEAD:{file}").code
    edited = tracked and bool(found.git.ask("diff", "--quiet", "HEAD", "--", file).code)
    changed = remote.set_url(found.root, url, endpoint, read_s)
    if edited:
        say(f"{file} has edits of yours, so it is yours to commit: git commit {file}")
    else:
        commit(found, found.own_files, f"Data remote {url}")
    return changed


def commit(found: Repository, names: Sequence[str], message: str) -> str:
    """Commit some files and nothing else, whatever else is staged; return the commit that has them."""
    here = found.git
    here.need("add", "--force", "--", *names, doing="stage the pointer")
    if here.ask("diff", "--cached", "--quiet", "HEAD", "--", *names).code:
        here.need("commit", "--quiet", "--message", message, "--only", "--", *names, doing="commit the pointer")
    return here.need("rev-parse", "HEAD", doing="name its commit").strip()


@dataclass(frozen=True)
class Scratch:
    """A passing repository of DVC that knows some contents only.

    Attributes:
        work: its folder; each data set is ``<number>/<its name>``.
        targets: the pointers in it.
        state: DVC's databases about it, on this machine's own disk: they are SQLite's (treeverse/dvc#8176).
    """

    work: Path
    targets: tuple[str, ...]
    state: Path

    def run(self, verb: str, *options: str, doing: str, progress: Progress | None, say: Say | None) -> str:
        """Run DVC on all that it knows; see ``dvc.run``."""
        words = (verb, *options, *self.targets)
        return dvc.run(self.work, *words, doing=doing, progress=progress, say=say, state=self.state)


@contextmanager
def scratch(found: Repository, wanted: Sequence[Pointer], folder: Path | None = None) -> Iterator[Scratch]:
    """Yield a passing repository for the given contents, with the cache and remote of the real one.

    Neither the work tree nor DVC's lock of the real one is touched.

    Args:
        folder: where it is made; else a temporary one. It is removed at the end.
    """
    state = Path(tempfile.mkdtemp(prefix="hpcml-dvc-"))
    work = folder or state / "work"
    try:
        work.mkdir(mode=0o700, exist_ok=True)
        remote.scratch(work, found.root)
        targets = []
        for number, pointer in enumerate(wanted):
            (work / str(number)).mkdir()
            targets.append(f"{number}/{pointer.name}.dvc")
            text = (
                f"outs:\n- md5: {pointer.digest}.dir\n  size: {pointer.bytes}\n  nfiles: {pointer.files}\n  hash: md5\n"
                f"  path: {json.dumps(pointer.name)}\n"
            )
            (work / targets[-1]).write_text(text, encoding="utf-8")
        yield Scratch(work, tuple(targets), state)
    finally:
        for path in (work, state):
            shutil.rmtree(path, ignore_errors=True)


def push(found: Repository, tags: Sequence[str], progress: Progress | None = None, say: Say | None = None) -> int:
    """Push the data of tags to the remote; return how many files it did not have yet.

    Raises:
        HpcmlError: no such tag, no remote, or it refuses; ServiceSilent where it gives no answer.
    """
    wanted = {one.digest: one for tag in tags for one in pointers.at(found.git, tag)}
    if not wanted:
        raise HpcmlError(
            "no versions of data to push", origin=", ".join(tags), fix="hpcml data version add FOLDER --tag v1.0"
        )
    need_remote(found)
    gone = [one for one in wanted.values() if not found.is_cached(one)]
    with scratch(found, list(wanted.values())) as passing:
        said = passing.run("push", doing="push", progress=progress, say=say)
    if gone and "up to date" not in said:
        names = ", ".join(f"{one.path} ({one.short})" for one in gone)
        raise HpcmlError(f"not all of it lies here: {names}", fix="push it from where it was added")
    match = re.search(r"(\d+) files? pushed", said)
    return int(match[1]) if match else 0


def need_remote(found: Repository) -> remote.Remote:
    """Return the remote, once it has answered.

    Raises:
        HpcmlError: there is none, it refuses the key or lacks the bucket; ServiceSilent where it gives no answer.
    """
    where = remote.read(found.root)
    if where is None:
        fix = "hpcml data version remote URL, a folder or s3://BUCKET/PATH"
        raise HpcmlError("no remote is set", origin=str(found.root / ".dvc" / "config"), fix=fix)
    if "://" not in where.url and not Path(where.url).parent.is_dir():
        raise HpcmlError(f"no folder at {Path(where.url).parent}", origin="the remote", fix="is its disk mounted?")
    s3.look(where)
    return where


def fetch(
    found: Repository, wanted: Sequence[Pointer], progress: Progress | None = None, say: Say | None = None
) -> None:
    """Get contents from the remote into the cache, where they are not there."""
    missing = [one for one in wanted if not found.is_cached(one)]
    if not missing:
        return
    need_remote(found)
    names = ", ".join(one.name for one in missing)
    with scratch(found, missing) as passing:
        passing.run("fetch", doing=f"pull {names}", progress=progress, say=say)
