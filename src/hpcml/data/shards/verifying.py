"""Every byte of a packed data set compared with what it must be; what differs is told with shard, sample and place.

Headers and padding follow from the index and are made again. Of a content only the digest is known: a single flipped bit
in it is found by flipping each one back, as long as that takes no time; else the content's place is told. The index
follows from the shards, and ``dataset.json`` carries its own digest.
"""

import hashlib
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import index as indices
from . import layout, tar
from .progress import Meter, Report, Ticker
from .scanning import Window, pieces, read_at, windows
from .workers import Message, Say, default_count, run

if TYPE_CHECKING:
    from .index import Index

# 8 digests for each byte, of half the bytes on average: 0.3 s for 8 KiB.
_SEARCHED, _SEARCHED_DESCRIPTION = 8192, 65_536


@dataclass(frozen=True)
class Damage:
    """Something that is not as it was packed.

    Attributes:
        file: name of the shard, the index or ``dataset.json``.
        sample: name of the sample that it belongs to; None where it belongs to none.
        begin, end: it lies in these bytes of the file, the last one not included; one byte where that can be told.
        what: in words.
    """

    file: str
    sample: str | None
    begin: int
    end: int
    what: str

    def __str__(self) -> str:
        place = f"byte {self.begin}" if self.end - self.begin == 1 else f"bytes {self.begin} to {self.end - 1}"
        return f"{self.file}: {place}: {self.what}{f' of {self.sample!r}' if self.sample is not None else ''}"


def verify(path: Path | str, *, workers: int | None = None, progress: Report | None = None) -> list[Damage]:
    """Return all damage of a packed data set, in the order of files and bytes; nothing where it is whole.

    Args:
        path: the folder.
        workers: processes; by default one for each core, and 16 at least on a network file system.
        progress: called with how far it is.

    Raises:
        HpcmlError: no packed data set, or of a later format; or it can't be read.
    """
    path = Path(path)
    damage, described = _description(path)
    index, found = _index(path, described)
    damage += found
    if index is None:
        return damage
    numbers = int(index.shards.max()) + 1 if described is None else len(described["shards"])
    _, totals = indices.placed(index.names, index.sizes, index.modes, index.digests, index.shards, numbers)
    meter, in_shards = Meter(progress, len(index.names), int(index.sizes.sum())), list[Damage]()

    def hear(message: Message) -> None:
        meter.hear(message)
        if "file" in message:
            in_shards.append(Damage(**message))

    def one(number: int, say: Say) -> None:
        ticker = Ticker(say)
        for damage in _shard(path / layout.shard_name(number), index, number, totals[number], ticker):
            say(asdict(damage))
        ticker.flush()

    run(one, range(numbers), workers or default_count(path), hear)
    return damage + sorted(in_shards, key=lambda one: (one.file, one.begin))


def _description(path: Path) -> tuple[list[Damage], dict[str, Any] | None]:
    """What is wrong with ``dataset.json``, and what it says; None where that is not to be known."""
    content = indices.description(path)
    body = indices.sealed_body(content)
    sealed = indices.seal(body)
    if sealed == content:
        return [], indices.parsed(content, path)
    differ = [at for at, (one, other) in enumerate(zip(content, sealed, strict=False)) if one != other]
    if (
        len(content) == len(sealed) and len(differ) == 1
    ):  # in the seal itself: another body has another digest throughout
        return [Damage(layout.DATASET, None, differ[0], differ[0] + 1, "not what was packed")], indices.parsed(
            sealed, path
        )
    try:
        wanted = bytes.fromhex(content[len(body) :].split(b'"')[3].decode())
    except (ValueError, IndexError):
        wanted = b""
    flipped = flipped_bit(body, wanted, _SEARCHED_DESCRIPTION)
    if flipped is None:
        return [Damage(layout.DATASET, None, 0, len(content), "not what was packed")], None
    at, bit = flipped
    mended = indices.seal(body[:at] + bytes([body[at] ^ bit]) + body[at + 1 :])
    return [Damage(layout.DATASET, None, at, at + 1, "not what was packed")], indices.parsed(mended, path)


def flipped_bit(content: bytes, digest: bytes, most: int = _SEARCHED) -> tuple[int, int] | None:
    """Return the byte and the bit whose flip makes the content match its SHA-256; None where none does.

    Args:
        most: bytes; longer contents are not searched.
    """
    if len(content) > most:
        return None
    before = hashlib.sha256()
    for at, byte in enumerate(content):
        rest = content[at + 1 :]
        for bit in (1, 2, 4, 8, 16, 32, 64, 128):
            tried = before.copy()
            tried.update(bytes([byte ^ bit]))
            tried.update(rest)
            if tried.digest() == digest:
                return at, bit
        before.update(content[at : at + 1])
    return None


def _index(path: Path, described: dict[str, Any] | None) -> "tuple[Index | None, list[Damage]]":
    """The index, from the shards where its file is damaged; None where that is not to be had."""
    try:
        raw = (path / layout.INDEX).read_bytes()
    except OSError as error:
        raw, what = b"", f"can't be read: {error.strerror}"
    else:
        what = "not what was packed"
    wanted = described and described["index"]["sha256"]
    if raw and wanted in (None, hashlib.sha256(raw).hexdigest()):
        try:
            return indices.from_bytes(raw), []
        except ValueError as error:
            what = str(error)
    count = len(described["shards"]) if described else len(list(path.glob("shard-*.tar")))
    again = _from_shards(path, count)
    right = again.to_bytes() if again else b""
    if again is None or hashlib.sha256(right).hexdigest() != wanted:
        lost = f"{what}, and it does not follow from the shards: they may be damaged too, and can't be checked"
        return None, [Damage(layout.INDEX, None, 0, len(raw), lost)]
    begin, end = _difference(raw, right)
    return again, [Damage(layout.INDEX, None, begin, end, what)]


def _from_shards(path: Path, count: int) -> "Index | None":
    """The index as the shards tell it; None where they can't be read."""
    import tarfile

    np = layout.numpy()
    names: list[bytes] = []
    rows: list[tuple[int, int, int]] = []  # shard, size, mode
    digests: list[bytes] = []
    try:
        for number in range(count):
            file = path / layout.shard_name(number)
            with (
                tarfile.open(file, "r:", encoding="utf-8", errors="surrogateescape") as archive,
                file.open("rb") as raw,
            ):
                for member in archive:
                    names.append(member.name.encode("utf-8", "surrogateescape"))
                    rows.append((number, member.size, member.mode))
                    digest = hashlib.sha256()
                    for piece in pieces(raw.fileno(), member.offset_data, member.offset_data + member.size):
                        digest.update(piece)
                    digests.append(digest.digest())
    except (OSError, tarfile.TarError, ValueError):
        return None
    if not rows:
        return None
    shards, sizes, modes = np.array(rows, dtype=np.int64).T
    columns = np.frombuffer(b"".join(digests), dtype=np.uint8).reshape(-1, 32)
    made, _ = indices.placed(names, np.ascontiguousarray(sizes), modes, columns, shards.astype(np.int32), count)
    return made


def _difference(content: bytes, right: bytes) -> tuple[int, int]:
    """The first byte that differs, and the one after the last."""
    if len(content) != len(right):
        return min(len(content), len(right)), max(len(content), len(right))
    differ = [at for at, (one, other) in enumerate(zip(content, right, strict=True)) if one != other]
    return differ[0], differ[-1] + 1


def _shard(path: Path, index: "Index", number: int, total: int, ticker: Ticker) -> Iterator[Damage]:
    """What is wrong with one shard."""
    try:
        fd = os.open(path, os.O_RDONLY)
    except OSError as error:
        yield Damage(path.name, None, 0, total, f"can't be read: {error.strerror}")
        return
    try:
        there = os.fstat(fd).st_size
        if there > total:
            yield Damage(path.name, None, total, there, "more than was packed")
        for window in windows(index, number, fd):
            if window.end > there:
                break
            yield from _members(path.name, index, window, fd, ticker)
            ticker.add(len(window.rows), 0 if window.content is None else int(index.sizes[window.rows].sum()))
        if there < total:
            yield Damage(path.name, None, there, total, "cut off; all samples from here on are lost, with the last one")
        elif any(end := read_at(fd, total - len(tar.END), len(tar.END))):
            first, last = _difference(end, tar.END)
            begin = total - len(tar.END)
            yield Damage(path.name, None, begin + first, begin + last, "not what was packed: the end of the archive")
    finally:
        os.close(fd)


def _members(file: str, index: "Index", window: Window, fd: int, ticker: Ticker) -> Iterator[Damage]:
    rows = window.rows
    names, sizes = [index.names[row] for row in rows], index.sizes[rows]
    headers = tar.headers(names, sizes, index.modes[rows])
    digests = index.digests[rows].tobytes()
    members = zip(names, sizes.tolist(), headers, window.headers, index.offsets[rows].tolist(), strict=True)
    for place, (name, size, header, begin, offset) in enumerate(members):
        end = offset + size
        digest, zeros = digests[32 * place : 32 * place + 32], tar.padding(size)
        if window.content is None:
            head, tail = read_at(fd, begin, len(header)), read_at(fd, end, len(zeros))
            found = hashlib.sha256()
            for piece in pieces(fd, offset, end, ticker):
                found.update(piece)
            got, content = found.digest(), b""
        else:
            base = window.begin
            head, tail = (
                window.content[begin - base : offset - base],
                window.content[end - base : end - base + len(zeros)],
            )
            content = window.content[offset - base : end - base]
            got = hashlib.sha256(content).digest()
        sample = layout.shown(name)
        if head != header:
            first, last = _difference(head, header)
            yield Damage(file, sample, begin + first, begin + last, "not what was packed: the header")
        if got != digest:
            at = flipped_bit(content, digest) if content else None
            first, last = (at[0], at[0] + 1) if at else (0, size)
            yield Damage(file, sample, offset + first, offset + last, "not what was packed: the content")
        if tail != zeros:
            first, last = _difference(tail, zeros)
            yield Damage(file, sample, end + first, end + last, "not what was packed: the padding")
