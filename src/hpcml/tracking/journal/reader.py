"""Reading a journal while others write it, whatever became of its writers and their disks."""

import contextlib
import json
import re
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

# A longer line is no record: a hole that a crashed file system left, a foreign file. Read whole, it would fill memory.
MAX_LINE = 16 << 20
# Ends a line that a kill or a full disk cut off, so that it is told from garbage (CAN, "disregard what came before").
TORN = b"\x18\n"
RECORD = b'{"t":'
_KIND = re.compile(rb'\{"t":\d+,"kind":"(\w+)"')


@dataclass(frozen=True)
class Unreadable:
    """A line of a journal that is no record.

    Attributes:
        file: its name in the events folder.
        line: its number, from 1; 0 where the file itself can't be read.
        text: its first 60 characters, or why the file can't be read.
    """

    file: str
    line: int
    text: str


def read(
    folder: Path, after: Mapping[str, int] | None = None, kinds: Collection[str] | None = None
) -> Iterator[dict[str, Any]]:
    """Yield every readable record of a run's events folder, file by file, with ``rank``, ``restart``, ``writer``, ``line``.

    A line that is no record (torn by a kill, or foreign) is skipped.

    Args:
        after: lines of each file, by its name, that are not wanted any more.
        kinds: of the records wanted; by default all.
    """
    return (found for found in scan(folder, after, kinds) if isinstance(found, dict))


def problems(folder: Path) -> Iterator[Unreadable]:
    """Yield the lines that are no records; one that a kill or a full disk has torn is nobody's mistake."""
    return (found for found in scan(folder) if isinstance(found, Unreadable))


def lost(folder: Path, rank: int | None = None, restart: int | None = None) -> int:
    """Return how many records a run's files had no room for, of one rank and restart or of all."""
    told = read(folder, kinds={"lost"})
    mine = (r for r in told if rank in (None, r["rank"]) and restart in (None, r["restart"]))
    return sum(record["count"] for record in mine if isinstance(record.get("count"), int))


def left_out(folder: Path, rank: int | None = None, restart: int | None = None) -> dict[str, int]:
    """Return how many values of each metric were left out, by one rank and restart or by all: they were no numbers."""
    told = read(folder, kinds={"left_out"})
    mine = (r for r in told if rank in (None, r["rank"]) and restart in (None, r["restart"]))
    return dict(Counter(str(name) for record in mine for name in record.get("names") or ()))


def scan(
    folder: Path, after: Mapping[str, int] | None = None, kinds: Collection[str] | None = None
) -> Iterator[dict[str, Any] | Unreadable]:
    """Yield records as :func:`read` does, and each line that is none as ``Unreadable``, in one pass."""
    for path, place in event_files(folder):
        try:
            with path.open("rb") as file:
                for found, _ in records_of(file, place, kinds, 0, (after or {}).get(path.name, 0)):
                    if found is not None:
                        yield found
        except OSError as error:
            yield Unreadable(path.name, 0, error.strerror or str(error))


class Reader:
    """Follows a run's journal: each call reads what came since the last one, and no file twice."""

    def __init__(self, folder: Path, kinds: Collection[str] | None = None) -> None:
        """Begin before the first record.

        Args:
            kinds: of the records wanted; by default all.
        """
        self.folder, self.kinds = folder, kinds
        self._reached: dict[str, tuple[int, int]] = {}  # bytes and lines of each file

    def new(self) -> list[dict[str, Any]]:
        """Return the records, as :func:`read` gives them, of the lines that were completed since the last call."""
        records = []
        for path, place in event_files(self.folder):
            offset, lines = self._reached.get(path.name, (0, 0))
            with contextlib.suppress(OSError):
                size = path.stat().st_size
                if size < offset:  # another file under its name
                    offset = lines = 0
                if size > offset:
                    with path.open("rb") as file:
                        file.seek(offset)
                        for found, length in records_of(file, place, self.kinds, lines):
                            offset, lines = offset + length, lines + 1
                            if isinstance(found, dict):
                                records.append(found)
            self._reached[path.name] = (offset, lines)
        return records


def event_files(folder: Path) -> Iterator[tuple[Path, dict[str, Any]]]:
    """Yield the files of a journal with what their names say."""
    for path in sorted(folder.glob("*.*.*.jsonl")):
        rank, restart, writer = path.name.removesuffix(".jsonl").split(".", 2)
        if rank.isdecimal() and restart.isdecimal():
            yield path, {"rank": int(rank), "restart": int(restart), "writer": writer}


def records_of(
    file: BinaryIO, place: Mapping[str, Any], kinds: Collection[str] | None, number: int, after: int = 0
) -> Iterator[tuple[dict[str, Any] | Unreadable | None, int]]:
    """Yield what each complete line holds, None for one not wanted, with its length in bytes."""
    wanted = None if kinds is None else {kind.encode() for kind in kinds}
    for line, length in whole_lines(file):
        number += 1
        if number <= after or (wanted is not None and (kind := _KIND.match(line)) and kind[1] not in wanted):
            yield None, length
            continue
        record = _record(line)
        if record is not None:
            unwanted = kinds is not None and record["kind"] not in kinds
            yield None if unwanted else {**record, **place, "line": number}, length
        elif line.endswith(TORN) or not line.strip():
            yield None, length
        else:
            text = line[:240].decode("utf-8", "backslashreplace").rstrip("\n")[:60]
            yield Unreadable(Path(file.name).name, number, text), length


def whole_lines(file: BinaryIO) -> Iterator[tuple[bytes, int]]:
    """Yield each complete line with its length; of one that is too long its beginning."""
    while line := file.readline(MAX_LINE):
        length, part = len(line), line
        while not part.endswith(b"\n"):
            part = file.readline(MAX_LINE)
            if not part:
                return
            length += len(part)
        yield line, length


def _record(line: bytes) -> dict[str, Any] | None:
    record = _parsed(line)
    start, tries = 0, 4
    while record is None and tries and (start := line.find(RECORD, start + 1)) > 0:
        # Behind the half that one writer could not finish on a full disk stands the record of another.
        record, tries = _parsed(line[start:]), tries - 1
    return record


def _parsed(line: bytes) -> dict[str, Any] | None:
    if not line.endswith(b"\n"):
        return None
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):  # the second: a foreign line of thousands of brackets
        return None
    usable = isinstance(record, dict) and isinstance(record.get("t"), int) and isinstance(record.get("kind"), str)
    return record if usable else None
