"""What a file is, by its first bytes rather than by its name alone."""

import bz2
import contextlib
import gzip
import lzma
import re
import tarfile
import zipfile
import zlib
from pathlib import Path
from typing import IO, Any

ARCHIVE = re.compile(r"\.(tar(\.(gz|bz2|xz|zst))?|tgz|tbz2|txz|tzst|zip)$")
# What the readers of archives raise over a broken one, beside OSError.
BROKEN = (
    tarfile.TarError,
    zipfile.BadZipFile,
    gzip.BadGzipFile,
    lzma.LZMAError,
    zlib.error,
    EOFError,
    UnicodeError,
    NotImplementedError,
    RuntimeError,
)


def kind_of(path: Path, name: str) -> str:
    """Return what a file is by its first bytes: ``tar``, ``zip``, ``npz``, ``idx``, ``page`` (HTML), ``zstd``, else ``file``.

    Args:
        path: where it lies.
        name: what it was called where it comes from: an ``.npz`` is a zip too.
    """
    with path.open("rb") as file:
        head = file.read(512)
    if head.startswith((b"PK\3\4", b"PK\5\6")):
        # Many formats are zips inside, such as .keras and .docx: a zip is what is called one, or nothing else.
        return "npz" if name.endswith(".npz") else "zip" if ARCHIVE.search(name) or not Path(name).suffix else "file"
    if head.lstrip().lower().startswith((b"<!doctype html", b"<html")) and not name.endswith((".html", ".htm")):
        return "page"
    if head.startswith(b"\x28\xb5\x2f\xfd"):
        return "zstd"
    # What only calls itself an archive is given to a reader that says what is wrong with it.
    if ARCHIVE.search(name) or _is_tar(path, head):
        return "tar"
    inner = head[:4]
    if head.startswith((b"\x1f\x8b", b"BZh", b"\xfd7zXZ\0")):
        with contextlib.suppress(*BROKEN, OSError), plain(path, head) as packed:
            inner = packed.read(4)
    is_idx = len(inner) == 4 and inner[:2] == b"\0\0" and inner[2] in (8, 9, 11, 12, 13, 14) and 1 <= inner[3] <= 4
    return "idx" if is_idx and "idx" in name else "npz" if name.endswith(".npz") else "file"


def _is_tar(path: Path, head: bytes) -> bool:
    try:
        with plain(path, head) as content, tarfile.open(fileobj=content, mode="r|"):
            return True
    except (*BROKEN, OSError):
        return False


def plain(path: Path, head: bytes) -> IO[bytes]:
    """Open a file that may be compressed, to read what is in it."""
    opener: Any = {b"\x1f\x8b": gzip.open, b"BZ": bz2.open, b"\xfd7": lzma.open}.get(head[:2], open)
    opened: IO[bytes] = opener(path, "rb")
    return opened
