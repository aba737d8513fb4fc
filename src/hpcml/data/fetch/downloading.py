"""A file over HTTP: gone on with where it stopped, tried again with growing pauses, whole or an error."""

import base64
import contextlib
import errno
import hashlib
import http.client
import os
import random
import re
import shutil
import socket
import ssl
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Any

from ... import __version__, rundir
from ...errors import HpcmlError, ServiceSilent
from .. import lustre

Progress = Callable[[str, int, int | None], object]  # of what, bytes done, bytes in all where known

TIMEOUT_S = 30.0  # without a byte
PAUSES_S = (1.0, 2.0, 4.0, 8.0, 16.0, 30.0)
_LONGEST_PAUSE_S = 120.0  # however long a server asks to be left alone
_CHUNK = 2**20
_AGAIN = (408, 425, 429, 500, 502, 503, 504)


class _Interrupted(Exception):
    """The server or the network has stopped; ``pause_s`` is how long the server wants to be left alone."""

    def __init__(self, what: str, pause_s: float = 0.0) -> None:
        super().__init__(what)
        self.pause_s = pause_s


@dataclass(frozen=True)
class _Part:
    """What is on disk of a download, and what the server said of the file when that was received."""

    path: Path

    @property
    def notes(self) -> Path:
        return self.path.with_name(self.path.name + ".json")

    @property
    def bytes(self) -> int:
        try:
            return self.path.stat().st_size
        except FileNotFoundError:
            return 0

    def remove(self) -> None:
        self.path.unlink(missing_ok=True)
        self.notes.unlink(missing_ok=True)


def shown(url: str) -> str:
    """Return an address as it may be printed and kept: without a password and without a query, which may be a key."""
    parts = urllib.parse.urlsplit(url)
    host = parts.netloc.rpartition("@")[2]
    return urllib.parse.urlunsplit((parts.scheme, host, parts.path, "…" if parts.query else "", ""))


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a file in hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def download(url: str, to: Path, *, has_digest: bool, say: Callable[[str], object], progress: Progress) -> None:
    """Download a file; what an earlier call left of it is gone on with where the server can tell that it is the same.

    Args:
        url: http or https; ``user:password@`` is sent to that host alone. Proxies come from the environment.
        to: where it goes; beside it lie ``.part`` files while it is under way. They stay where it can't be finished.
        has_digest: whether the caller compares a digest with one it knew before; then a part is gone on with
            also where the server says nothing that tells one version of the file from another.
        say: called with each sentence for the person.
        progress: called with each piece that has come.

    Raises:
        HpcmlError: the server refuses, or the disk is full.
        ServiceSilent: no whole answer in seven tries that brought nothing new.
    """
    part = _Part(to.with_name(to.name + ".part"))
    furthest, failures = part.bytes, 0
    while True:
        try:
            _receive(url, part, has_digest, say, progress)
            break
        except _Interrupted as error:
            failures = 1 if part.bytes > furthest else failures + 1
            furthest = max(furthest, part.bytes)
            if failures > len(PAUSES_S):
                raise ServiceSilent(f"{error}", origin=shown(url), fix=_fix(part)) from None
            # Many jobs that lost the same server should not all come back at the same moment.
            pause = max(PAUSES_S[failures - 1] * random.uniform(0.75, 1.25), error.pause_s)
            say(f"{error}; trying again in {pause:.0f} s ({failures} of {len(PAUSES_S)})")
            time.sleep(pause)
    with part.path.open("rb") as file:
        os.fsync(file.fileno())
    os.replace(part.path, to)
    part.notes.unlink(missing_ok=True)


def _fix(part: _Part) -> str:
    proxies = [name for name in ("https_proxy", "http_proxy") if os.environ.get(name) or os.environ.get(name.upper())]
    way = f"; {' and '.join(proxies)} set the way" if proxies else "; behind a proxy set https_proxy"
    later = f"again later: the {part.bytes:,} bytes that have come are kept" if part.bytes else "again later"
    return f"{later}{way}; or bring the file here yourself: hpcml data fetch FILE"


def _receive(url: str, part: _Part, has_digest: bool, say: Callable[[str], object], progress: Progress) -> None:
    known = rundir.read_json(part.notes)
    same = known.get("url") == hashlib.sha256(url.encode()).hexdigest() and (known.get("validator") or has_digest)
    have = part.bytes if same else 0
    if have and have == known.get("total"):
        return
    with _open(url, have, str(known.get("validator", "")), part) as answer:
        start, total = _span(answer, have, part)
        if have and start == have and _validator(answer) not in ("", known.get("validator", "")):
            part.remove()
            raise _Interrupted("the file has changed on the server: from its start")
        if have:
            say(f"going on at {have:,} bytes" if start else "from its start: the server doesn't go on with this part")
        _check_space(url, part, None if total is None else total - start)
        if not start:
            part.path.unlink(missing_ok=True)  # before the notes change: they speak of the bytes that are there
            if total is not None and total > lustre.GIB:
                lustre.stripe(part.path.parent, total, say=say)
        notes = {"url": hashlib.sha256(url.encode()).hexdigest(), "validator": _validator(answer), "total": total}
        rundir.write_json(part.notes, notes)
        try:
            file = part.path.open("r+b" if start else "wb", buffering=0)
        except OSError as error:
            raise _on_disk(part, error) from None
        with file:
            file.seek(start)
            done = _copy(url, answer, file, start, total, part, progress)
    if total is not None and done != total:
        raise _Interrupted(f"the server ended after {done:,} of {total:,} bytes")


def _copy(url: str, answer: Any, file: FileIO, done: int, total: int | None, part: _Part, progress: Progress) -> int:
    what = Path(urllib.parse.urlsplit(url).path).name or "download"
    while True:
        try:
            chunk = answer.read1(_CHUNK)
        except (OSError, http.client.HTTPException) as error:
            raise _Interrupted(f"the connection broke after {done:,} bytes: {_reason(error)}") from None
        if not chunk:
            return done
        rest = memoryview(chunk)
        try:
            while rest:
                rest = rest[file.write(rest) :]
        except OSError as error:
            raise _on_disk(part, error) from None
        done += len(chunk)
        progress(what, done, total)


def _open(url: str, have: int, validator: str, part: _Part) -> Any:
    parts = urllib.parse.urlsplit(url)
    user, _, host = parts.netloc.rpartition("@")
    headers = {"User-Agent": f"hpcml/{__version__}", "Accept-Encoding": "identity"}
    if have:
        headers["Range"] = f"bytes={have}-"
        headers |= {"If-Range": validator} if validator else {}
    address = urllib.parse.urlunsplit(
        (parts.scheme, host, urllib.parse.quote(parts.path, "/%~:@!$&'()*+,;="), parts.query, "")
    )
    request = urllib.request.Request(address, headers=headers)
    if user:  # unredirected: it is for this host and no other
        token = base64.b64encode(urllib.parse.unquote(user).encode()).decode()
        request.add_unredirected_header("Authorization", f"Basic {token}")
    try:
        return urllib.request.build_opener(_Redirects).open(request, timeout=TIMEOUT_S)
    except urllib.error.HTTPError as error:
        error.close()
        raise _refused(url, error, have, part) from None
    except (OSError, http.client.HTTPException) as error:
        raise _unreached(url, getattr(error, "reason", error), part) from None
    except ValueError as error:
        raise HpcmlError(f"no address: {error}", origin=shown(url)) from None


def _refused(url: str, error: urllib.error.HTTPError, have: int, part: _Part) -> Exception:
    if error.code == 416 and have:  # the file is shorter now than what is here
        part.remove()
        return _Interrupted("the file has changed on the server: from its start")
    answer = f"the server answers {error.code} {error.reason}"
    if error.code in _AGAIN:
        return _Interrupted(answer, _asked_pause(error))
    return HpcmlError(answer, origin=shown(url), fix=_FIXES.get(error.code, "look at the address"))


def _unreached(url: str, reason: object, part: _Part) -> Exception:
    if isinstance(reason, ssl.SSLCertVerificationError):
        what = f"its certificate isn't trusted: {reason.verify_message}"
        fix = "set SSL_CERT_FILE to the certificates of your site, or look at the address"
        return HpcmlError(what, origin=shown(url), fix=fix)
    if isinstance(reason, socket.gaierror) and reason.errno != socket.EAI_AGAIN:
        what = f"no host {urllib.parse.urlsplit(url).hostname!r} is known here: {reason.strerror}"
        return ServiceSilent(what, origin=shown(url), fix=_fix(part))
    return _Interrupted(f"no answer: {_reason(reason)}")


_FIXES = {
    401: "it wants a user and a password: https://USER:PASSWORD@HOST/…",
    403: "it doesn't give the file to you: look at the address, or at whether its key has run out",
    404: "look at the address: there is no such file",
    407: "the proxy wants a user and a password: https_proxy=http://USER:PASSWORD@HOST:PORT",
}


class _Redirects(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, req: Any, fp: Any, code: int, msg: str, headers: Any, newurl: str) -> Any:
        if urllib.parse.urlsplit(newurl).scheme not in {"https", urllib.parse.urlsplit(req.full_url).scheme}:
            fix = "nobody vouches for what comes over http: fetch that address itself if you trust it"
            what = f"the server sends on from https to {shown(newurl)}"
            raise HpcmlError(what, origin=shown(req.full_url), fix=fix)
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _span(answer: Any, have: int, part: _Part) -> tuple[int, int | None]:
    """Return where in the file the answer begins, and the file's length where the server told it."""
    if answer.status == 206:
        match = re.fullmatch(r"bytes (\d+)-\d+/(\d+|\*)", answer.headers.get("Content-Range", "").strip())
        if not match or int(match[1]) != have:
            part.remove()
            raise _Interrupted("the server sent another part than asked for: from the start")
        return have, None if match[2] == "*" else int(match[2])
    length = answer.headers.get("Content-Length", "")
    return 0, int(length) if length.isdigit() else None


def _validator(answer: Any) -> str:
    """Return what tells this version of the file from another; weak ETags can't (RFC 9110, 13.1.5)."""
    tag = str(answer.headers.get("ETag") or "").strip()
    return tag if tag and not tag.startswith("W/") else str(answer.headers.get("Last-Modified") or "").strip()


def _asked_pause(error: urllib.error.HTTPError) -> float:
    with contextlib.suppress(ValueError, TypeError):
        return min(float(error.headers.get("Retry-After", "0")), _LONGEST_PAUSE_S)
    return 0.0


def _check_space(url: str, part: _Part, wanted: int | None) -> None:
    free = shutil.disk_usage(part.path.parent).free
    if wanted is not None and wanted > free:
        what = f"{wanted:,} bytes to come, {free:,} free in {part.path.parent}"
        raise HpcmlError(what, origin=shown(url), fix="make room there, or set HPCML_DATA to another folder")


def _on_disk(part: _Part, error: OSError) -> HpcmlError:
    room = error.errno in (errno.ENOSPC, errno.EDQUOT)
    fix = "make room and call it again: it goes on from there" if room else "look at the folder and its permissions"
    return HpcmlError(f"can't be written: {error.strerror}", origin=str(part.path), fix=fix)


def _reason(error: object) -> str:
    if isinstance(error, TimeoutError):
        return f"nothing came for {TIMEOUT_S:g} s"
    return str(getattr(error, "strerror", None) or error) or type(error).__name__
