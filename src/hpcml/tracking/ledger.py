"""What MLflow has of a run: ``delivered.json``, and the journal's lines that lie behind it.

The ledger notes for each of the journal's files how far it was sent, in bytes and lines, and what the journal said so
far besides metrics: no delivery reads again what an earlier one has read.
"""

import dataclasses
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from ..errors import HpcmlError
from ..rundir import RunDir, read_json, write_json
from .journal import Unreadable, reader
from .translate import Said

# More lines that are no record are counted and not quoted.
MAX_QUOTED = 20


class Line(NamedTuple):
    """One whole line of the journal.

    Attributes:
        file: name of the journal's file; ``number``: of the line in it, from 1.
        end: the file's bytes up to and with this line.
        found: its record; None for a line that was torn, or holds nothing.
    """

    file: str
    number: int
    end: int
    found: dict[str, Any] | Unreadable | None


@dataclass
class Ledger:
    """What MLflow has of one run.

    Attributes:
        place: MLflow's address without credentials (``uri``), ``experiment`` and ``run_id``; empty before the first.
        state: the run's state as delivered.
        lines, offsets: of each file of the journal, what was sent, in lines and bytes.
        firsts: of each file, the time of its first ``sample`` (milliseconds since the epoch).
        said: what the sent part of the journal says besides metrics.
        unreadable: the first lines that are no record, as ``[file, line, text]``; ``skipped``: how many there are.
        artifacts: of each file sent, its time (ns) and size.
        last_ms: the newest time of a record that was sent, in milliseconds since the epoch.
        gone: whether MLflow said that the run was deleted there.
    """

    place: dict[str, str] = field(default_factory=dict)
    state: str = ""
    lines: dict[str, int] = field(default_factory=dict)
    offsets: dict[str, int] = field(default_factory=dict)
    firsts: dict[str, int] = field(default_factory=dict)
    said: Said = field(default_factory=Said)
    unreadable: list[tuple[str, int, str]] = field(default_factory=list)
    skipped: int = 0
    artifacts: dict[str, list[int]] = field(default_factory=dict)
    last_ms: int = 0
    gone: bool = False

    def save(self, run: RunDir) -> None:
        """Write it, atomically.

        Raises:
            HpcmlError: the run directory takes no file.
        """
        noted = {**self.place, **{name: getattr(self, name) for name in _PLAIN}, "said": vars(self.said)}
        try:
            write_json(run.delivered, noted)
        except OSError as error:
            raise unwritable(run.path, error) from None

    def note_unreadable(self, line: Unreadable) -> None:
        """Note a line that is no record."""
        self.skipped += 1
        if len(self.unreadable) < MAX_QUOTED:
            self.unreadable.append((line.file, line.line, line.text))


_PLAIN = ("state", "lines", "offsets", "firsts", "unreadable", "skipped", "artifacts", "last_ms", "gone")
_PLACE = ("uri", "experiment", "run_id")


def unwritable(folder: Path, error: OSError) -> HpcmlError:
    """Return what to say of a folder of the runs that takes no file: MLflow has no part in it."""
    what = f"what was delivered can't be noted in {folder}: {error.strerror or error}"
    return HpcmlError(what, fix="free space there, or make it writable; then hpcml sync")


def load(run: RunDir) -> Ledger:
    """Return a run's ledger; an empty one where there is none, or one that can't be read: sending twice is harmless."""
    data = read_json(run.delivered)
    ledger = Ledger({key: data[key] for key in _PLACE if isinstance(data.get(key), str)})
    if "offsets" not in data or not isinstance(data.get("said"), dict):
        return ledger
    known = {f.name for f in dataclasses.fields(Said)}
    values = {name: data[name] for name in _PLAIN if name in data}
    values["unreadable"] = [tuple(entry) for entry in data.get("unreadable") or ()]
    return Ledger(ledger.place, **values, said=Said(**{k: v for k, v in data["said"].items() if k in known}))


def new_lines(run: RunDir, ledger: Ledger) -> Iterator[Line]:
    """Yield the whole lines behind what was sent, file by file; the records with ``rank``, ``restart`` and ``writer``."""
    for path, place in reader.event_files(run.events):
        offset, number = ledger.offsets.get(path.name, 0), ledger.lines.get(path.name, 0)
        with path.open("rb") as file:
            if file.seek(0, os.SEEK_END) < offset:
                offset = number = 0  # cut, by whomever: what is sent again is stored once
            file.seek(offset)
            for found, length in reader.records_of(file, place, None, number):
                offset, number = offset + length, number + 1
                yield Line(path.name, number, offset, found)


def has_news(run: RunDir, ledger: Ledger) -> bool:
    """Whether the journal holds a whole line that was not sent."""
    for path, _ in reader.event_files(run.events):
        offset = ledger.offsets.get(path.name, 0)
        if (size := path.stat().st_size) == offset:
            continue
        with path.open("rb") as file:
            file.seek(offset if size > offset else 0)
            if next(reader.whole_lines(file), None):
                return True
    return False
