"""Archives unpacked safely: tar (also .gz, .bz2, .xz) and zip.

The whole archive is looked through before anything is written: a name that leads out of the folder, a device, a broken
archive, or more in it than the disk holds, and nothing of it comes into being.
"""

import contextlib
import os
import shutil
import stat
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO

from ...errors import HpcmlError
from .kinds import BROKEN, plain

_CHUNK = 2**20
# What unpacking leaves free at least, of the bytes and of the files that the disk can hold.
_SPARE_BYTES, _SPARE_FILES = 64 * 2**20, 100
_JUNK = "__MACOSX"  # what the Finder adds to a zip: not part of the data


class NoRoom(HpcmlError):
    """The archive is good, and the disk too small for it."""


@dataclass(frozen=True)
class Contents:
    """What an archive holds.

    Attributes:
        files: how many files.
        bytes: their size together, unpacked.
        top: the one folder that holds everything, to be left out; empty where there is none.
    """

    files: int
    bytes: int
    top: str


@dataclass(frozen=True)
class _Member:
    name: PurePosixPath
    kind: str  # file, folder, symlink, hardlink
    size: int
    executable: bool
    target: str
    open: Callable[[], IO[bytes] | None]


def look(archive: Path, origin: str, into: Path) -> Contents:
    """Read a whole archive and say what it holds.

    Args:
        archive: the file.
        origin: what the person calls it, for errors.
        into: an existing folder on the disk that would hold its files.

    Raises:
        HpcmlError: it is broken or encrypted, holds nothing, holds what doesn't belong into a data set, or more than
            there is room for.
    """
    count, files, total, tops, flat = 0, 0, 0, set(), False
    usage = os.statvfs(into)
    room = usage.f_bavail * usage.f_frsize - _SPARE_BYTES
    slots = usage.f_favail - _SPARE_FILES if usage.f_files else None  # some file systems count no inodes
    with _told(origin, only_reads=True):
        for member in _members(archive, origin):
            count += 1
            files += member.kind != "folder"
            total += member.size
            if total > room:
                what = f"unpacked it takes more than the {max(room, 0):,} bytes that are free in {into}"
                raise NoRoom(what, origin=origin, fix="make room there, or set HPCML_DATA to another folder")
            if slots is not None and count > slots:
                what = f"it holds more files than the {max(slots, 0):,} that {into} has room for"
                raise NoRoom(what, origin=origin, fix="remove files there, or set HPCML_DATA to another folder")
            tops.add(member.name.parts[0])
            flat = flat or (len(member.name.parts) == 1 and member.kind != "folder")
            if member.kind == "file":
                _drain(member, origin)
    if not files:
        raise HpcmlError("an archive without files", origin=origin)
    return Contents(files, total, tops.pop() if len(tops) == 1 and not flat else "")


def unpack(archive: Path, origin: str, into: Path, contents: Contents, progress: Callable[[int], object]) -> None:
    """Write an archive's files into a folder, owned by who calls it, without the archive's special rights.

    Links are made last, so that nothing is ever written through one, and only where they lead to inside the folder.

    Args:
        archive: the file that ``look`` has read.
        origin: what the person calls it, for errors.
        into: an existing, empty folder.
        contents: what ``look`` returned.
        progress: called with the bytes written so far.

    Raises:
        HpcmlError: as by ``look``; two things of one name; a link that leads out.
        OSError: the disk.
    """
    links, done = [], 0
    with _told(origin):
        for member in _members(archive, origin):
            parts = member.name.parts[1:] if contents.top else member.name.parts
            if not parts:
                continue
            path = into.joinpath(*parts)
            if member.kind == "folder":
                path.mkdir(parents=True, exist_ok=True)
            elif member.kind == "file":
                path.parent.mkdir(parents=True, exist_ok=True)
                done += _write(member, path)
                progress(done)
            else:
                links.append((member, path))
        for member, path in links:
            _link(member, path, into, contents.top, origin)
    for member, path in links:
        if member.kind == "symlink" and not Path(os.path.realpath(path)).is_relative_to(os.path.realpath(into)):
            raise _refused(f"the link {member.name} leads out of the archive's folder", origin)


@contextlib.contextmanager
def _told(origin: str, *, only_reads: bool = False) -> Iterator[None]:
    """Say in one form what the readers of three formats raise in many."""
    try:
        yield
    except BROKEN as error:
        raise _broken(origin, error) from None
    except (FileExistsError, NotADirectoryError, IsADirectoryError) as error:
        raise _refused(f"two things in it have one name: {Path(error.filename).name!r}", origin) from None
    except OSError as error:
        # Nothing is written while it is looked through: what bz2 raises, or a place outside of the file.
        if only_reads or error.errno is None:
            raise _broken(origin, error) from None
        raise


def _members(archive: Path, origin: str) -> Iterator[_Member]:
    with archive.open("rb") as file:
        head = file.read(6)
    for member in _in_zip(archive, origin) if head[:2] == b"PK" else _in_tar(archive, head, origin):
        if member.name.parts and member.name.parts[0] != _JUNK:
            yield member


def _in_tar(archive: Path, head: bytes, origin: str) -> Iterator[_Member]:
    if not hasattr(tarfile, "data_filter"):
        raise HpcmlError("this Python can't unpack a tar safely", origin=origin, fix="use Python 3.11.4 or later")
    # In order and once: going back in a compressed file means reading it from its start. The readers of the modules
    # gzip, bz2 and lzma compare checksums, which tarfile's own for streams doesn't.
    with plain(archive, head) as content, tarfile.open(fileobj=content, mode="r|") as tar:
        for info in tar:
            kind = (
                "file" if info.isreg() else "folder" if info.isdir()
                else "symlink" if info.issym() else "hardlink" if info.islnk() else ""
            )  # fmt: skip
            if not kind:
                raise _refused(f"{info.name} is a device or the like", origin)

            def opened(info: tarfile.TarInfo = info) -> IO[bytes] | None:
                return tar.extractfile(info)

            executable = bool(info.mode & stat.S_IXUSR)
            size = info.size if kind == "file" else 0
            yield _Member(_safe(info.name, origin), kind, size, executable, info.linkname, opened)
        while content.read(_CHUNK):  # to the checksum
            pass


def _in_zip(archive: Path, origin: str) -> Iterator[_Member]:
    with zipfile.ZipFile(archive) as packed:
        for info in packed.infolist():
            if info.flag_bits & 1:
                raise _refused(f"{info.filename} is encrypted", origin)
            mode = info.external_attr >> 16
            if stat.S_IFMT(mode) not in (0, stat.S_IFREG, stat.S_IFDIR):
                raise _refused(f"{info.filename} is a link or a device, which has no place in a zip", origin)

            def opened(info: zipfile.ZipInfo = info) -> IO[bytes]:
                return packed.open(info)

            kind = "folder" if info.is_dir() else "file"
            yield _Member(_safe(info.filename, origin), kind, info.file_size, bool(mode & stat.S_IXUSR), "", opened)


def _safe(name: str, origin: str) -> PurePosixPath:
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or "\0" in name or "\\" in name:
        raise _refused(f"{name!r} leads out of the archive's folder", origin)
    return path


def _drain(member: _Member, origin: str) -> None:
    """Read a file to its end: its checksum, and whether it holds what it announced."""
    with _stream(member) as source:
        size = 0
        while chunk := source.read(_CHUNK):
            size += len(chunk)
            if size > member.size:
                break
    if size != member.size:
        raise _broken(origin, f"{member.name} is {'longer' if size > member.size else 'shorter'} than it says")


def _write(member: _Member, path: Path) -> int:
    with _stream(member) as source, path.open("wb") as file:
        shutil.copyfileobj(source, file, _CHUNK)
    if member.executable:
        mode = path.stat().st_mode
        path.chmod(mode | (mode & 0o444) >> 2)
    return member.size


def _stream(member: _Member) -> IO[bytes]:
    source = member.open()
    assert source is not None, member.name
    return source


def _link(member: _Member, path: Path, into: Path, top: str, origin: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if member.kind == "symlink":
        if os.path.isabs(member.target):
            raise _refused(f"the link {member.name} leads out of the archive's folder", origin)
        path.symlink_to(member.target)
        return
    parts = _safe(member.target, origin).parts
    source = into.joinpath(*(parts[1:] if top else parts))
    if source.is_symlink() or not source.is_file():
        raise _refused(f"{member.name} is a link to {member.target}, which is no file in it", origin)
    os.link(source, path)


def _refused(what: str, origin: str) -> HpcmlError:
    return HpcmlError(
        what, origin=origin, allowed="files, folders and links within the archive", fix="it is not unpacked"
    )


def _broken(origin: str, error: object) -> HpcmlError:
    text = str(error) or type(error).__name__
    return HpcmlError(f"a broken archive: {text}", origin=origin, fix="fetch it again, or ask its publisher")
