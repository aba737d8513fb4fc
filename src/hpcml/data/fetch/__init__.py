"""Data sets brought into the site's data folder: once, checked, whole or not at all.

On the login node: compute nodes have no network, and every rank would do it. What is brought, from where and with
which digest is noted in ``.hpcml/`` of the data folder, apart from the data.
"""

import contextlib
import errno
import hashlib
import json
import os
import shutil
import socket
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from ... import __version__, rundir
from ...errors import HpcmlError
from .. import lustre
from ..locks import exclusive
from . import archives, forms
from .asking import KEPT, Ask, asked
from .downloading import Progress, download, sha256_of, shown
from .published import PUBLISHED, Published

_WAITING = "another process fetches it: waiting for that one"


@dataclass(frozen=True)
class Fetched:
    """What is in the data folder now.

    Attributes:
        name: what it was fetched as.
        path: the folder or file.
        is_new: whether this call brought it.
        kind: ``tar``, ``zip``, ``npz``, ``idx`` or ``file``: what it came as; ``images`` where digits were written out.
        source: where from, without passwords and keys.
        sha256: of what was fetched, in hexadecimal digits; empty for what came without a single file.
        files, bytes: how many files there are now, and their size together.
        note: one sentence more for the person, or empty.
    """

    name: str
    path: Path
    is_new: bool
    kind: str
    source: str
    sha256: str
    files: int
    bytes: int
    note: str = ""


def fetch(
    source: str,
    root: Path,
    *,
    to: str | None = None,
    sha256: str | None = None,
    images: bool = False,
    say: Callable[[str], object] = lambda sentence: None,
    progress: Progress = lambda what, done, total: None,
) -> Fetched:
    """Bring a data set into a folder; called again, or by several processes at once, it is brought once.

    Args:
        source: a name of ``PUBLISHED``; a URL (http, https); or a path to a file, or to a folder with MNIST's four.
        root: the data folder.
        to: the name there; by default the source's own, without the archive's suffix.
        sha256: 64 hexadecimal digits that the file must have; published sets bring their own.
        images: of MNIST's files make a folder of images instead of an ``.npz``.
        say: called with each sentence for the person.
        progress: called with what, bytes done, bytes in all.

    Raises:
        HpcmlError: no such source, a digest that differs, a broken archive, no room; or inside a Slurm job.
        ServiceSilent: the server gives no answer.
    """
    ask = asked(source, root, to, sha256, images, say, progress)
    there = _present(ask)
    if there:
        return there
    job = os.environ.get("SLURM_JOB_ID")
    if job and ask.is_remote:
        what = (
            f"this is Slurm job {job}, and jobs download nothing: compute nodes have no network, and each would do it"
        )
        raise HpcmlError(what, origin=ask.origin, fix=f"on the login node: hpcml {ask.origin}")
    with _working(ask) as work:
        there = _present(ask)  # the process that was waited for has brought it
        return there or _bring(ask, work)


def _present(ask: Ask) -> Fetched | None:
    """Return what is there already and is what was asked for; None where nothing is.

    Raises:
        HpcmlError: something else has its name.
    """
    known = rundir.read_json(ask.receipt)
    path = ask.root / known["path"] if known.get("path") else ask.home / ask.name
    if not os.path.lexists(path):
        return None
    if not known:
        if ask.source in PUBLISHED:
            note = "not fetched by hpcml, so not compared with anything"
            return Fetched(ask.name, path, False, "", "", "", 0, 0, note)
        what = f"{path} is there, and hpcml has not fetched it"
        raise HpcmlError(what, origin=ask.origin, fix="give another name with --to, or move it away")
    if known.get("digest") != ask.digest or (ask.sha256 and known.get("sha256") != ask.sha256):
        what = f"{path} is there, from {known.get('source')} (SHA-256 {known.get('sha256') or 'not known'})"
        raise HpcmlError(what, origin=ask.origin, fix="give another name with --to, or move it away")
    fields = {key: known[key] for key in ("name", "kind", "source", "sha256", "files", "bytes")}
    return Fetched(path=path, is_new=False, note=f"fetched {known.get('fetched')}", **fields)


@contextlib.contextmanager
def _working(ask: Ask) -> Iterator[Path]:
    """Hold the lock of one name and give a folder to work in; an interrupted download stays in it."""
    work = ask.root / KEPT / "fetching" / ask.name
    try:
        work.mkdir(parents=True, exist_ok=True)
        ask.receipt.parent.mkdir(parents=True, exist_ok=True)
        with exclusive(work / "lock", on_wait=lambda: ask.say(_WAITING)) as everywhere:
            # Without a lock that other nodes see, theirs must be another file.
            inner = work / ("work" if everywhere else f"work-{socket.gethostname()}")
            inner.mkdir(exist_ok=True)
            yield inner
            shutil.rmtree(inner, ignore_errors=True)
    except OSError as error:
        room = error.errno in (errno.ENOSPC, errno.EDQUOT)
        fix = "make room there, or set HPCML_DATA to another folder" if room else "set HPCML_DATA to a folder of yours"
        where = error.filename or ask.root
        raise HpcmlError(f"{where} can't be written: {error.strerror}", origin=ask.origin, fix=fix) from None


def _bring(ask: Ask, work: Path) -> Fetched:
    into = work / "made"
    shutil.rmtree(into, ignore_errors=True)  # what a killed process left half unpacked
    into.mkdir()
    lustre.stripe(into, 0, say=lambda sentence: None)  # a large download beside it may be striped, its small files not
    try:
        made, digest = _made(ask, work, into)
        return _keep(ask, made, digest)
    finally:
        shutil.rmtree(into, ignore_errors=True)


def _made(ask: Ask, work: Path, into: Path) -> tuple[forms.Made, str]:
    """Return the data set in its form, and the SHA-256 of the one file that it was made of."""
    published = PUBLISHED.get(ask.source)
    if published and not published.files:
        return forms.make_digits(ask.name, into, ask.progress), ""
    if published:
        files = {name: _published_file(ask, published, name, work) for name in published.files}
        if published.is_mnist:
            return forms.make_mnist(files, ask.name, into, ask.origin, ask.progress, images=ask.images), ""
        ((called, file),) = files.items()
    elif ask.is_remote:
        called = unquote(urlsplit(ask.source).path).rpartition("/")[2]
        file = work / ask.digest[:16]  # another source of the same name gets another file
        if not file.exists():
            download(ask.source, file, has_digest=bool(ask.sha256), say=ask.say, progress=ask.progress)
    else:
        file = Path(ask.source)
        called = file.name
        if file.is_dir():
            files = forms.mnist_files(file, ask.origin)
            return forms.make_mnist(files, ask.name, into, ask.origin, ask.progress, images=ask.images), ""
    try:
        digest = _checked(ask, file)
        return forms.make(file, called, ask.name, into, ask.origin, ask.progress, take=ask.is_remote), digest
    except archives.NoRoom:
        raise  # the file is good: it is unpacked when there is room
    except HpcmlError:
        if ask.is_remote:
            file.unlink(missing_ok=True)
        raise


def _checked(ask: Ask, file: Path) -> str:
    try:
        got = sha256_of(file)
    except OSError as error:
        what = f"{file} can't be read: {error.strerror}"
        raise HpcmlError(what, origin=ask.origin, fix="make it readable") from None
    if ask.sha256 and got != ask.sha256:
        fix = "it is not kept; ask its publisher which is right"
        raise HpcmlError(f"the file's SHA-256 is {got}", origin=ask.origin, allowed=ask.sha256, fix=fix)
    if not ask.sha256 and ask.source not in PUBLISHED:
        ask.say(f"SHA-256 {got}: with --sha256 it is compared with one that you trust")
    return got


def _published_file(ask: Ask, published: Published, name: str, work: Path) -> Path:
    size, wanted = published.files[name]
    to = work / name
    if to.exists() and _digest(to, wanted) == wanted:
        return to
    for number, mirror in enumerate(published.mirrors, 1):
        try:
            download(mirror + name, to, has_digest=True, say=ask.say, progress=ask.progress)
            got = _digest(to, wanted)
            if got == wanted:
                break
            found = f"{to.stat().st_size:,} bytes" + (f" of {size:,}" if size else "")
            to.unlink()
            what = f"{name} is not the published file: {found}, digest {got}"
            raise HpcmlError(
                what, origin=shown(mirror), allowed=wanted, fix="a proxy may have changed it; or look there"
            )
        except HpcmlError as error:
            if number == len(published.mirrors):
                raise
            ask.say(f"{error}")
            ask.say(f"going to the next place: {published.mirrors[number]}")
    return to


def _digest(path: Path, like: str) -> str:
    """Return a file's digest by the function that one of this length comes from: Keras publishes MD5."""
    if len(like) == 64:
        return sha256_of(path)
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()


def _keep(ask: Ask, made: forms.Made, digest: str) -> Fetched:
    """Let what is whole now appear under its name."""
    path = ask.home / made.path.name
    path.parent.mkdir(parents=True, exist_ok=True)
    if os.path.lexists(path):
        raise HpcmlError(f"{path} is there", origin=ask.origin, fix="give another name with --to, or move it away")
    files = [one for one in made.path.rglob("*") if one.is_file()] if made.path.is_dir() else [made.path]
    size = sum(one.stat().st_size for one in files)
    fetched = Fetched(ask.name, path, True, made.kind, ask.shown, digest, len(files), size, made.note)
    receipt: dict[str, Any] = {**asdict(fetched), "path": str(path.relative_to(ask.root)), "digest": ask.digest}
    receipt |= {"fetched": time.strftime("%Y-%m-%dT%H:%M:%S%z"), "hpcml": __version__}
    del receipt["is_new"], receipt["note"]
    # First the note: a process killed between the two leaves one of a thing that isn't there, which is fetched again.
    new = ask.receipt.with_name(f"{ask.receipt.name}.new")
    new.write_text(json.dumps(receipt, indent=1) + "\n")  # readable by who may read the data
    os.replace(new, ask.receipt)
    os.rename(made.path, path)
    return fetched
