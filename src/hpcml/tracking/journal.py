"""The journal of a run: append-only files of JSON lines, one writer a file, read by everybody.

A record is one line, handed to the kernel by a single ``write`` on an ``O_APPEND`` descriptor: the death of the
process loses nothing that was accepted. Each has ``t`` (milliseconds since the epoch) and ``kind``:

========== ==================================================================================================
kind       fields
========== ==================================================================================================
metric     ``step`` (int), ``values`` (name → float; NaN and infinities as they are)
params     ``values`` (name → value): facts about the run that don't change
tags       ``values`` (name → text)
replicas   ``in_sync``, ``expected`` (int), ``devices`` (names), ``virtual`` (bool: virtual CPU devices)
progress   ``done``, ``total`` (int), ``unit`` (``cell`` or ``epoch``), ``text``
finish     ``state``, ``reason``: how the work says it ended
message    ``level`` (``info``, ``warning`` or ``error``), ``text``
========== ==================================================================================================
"""

import contextlib
import json
import os
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any


class Journal:
    """One writer's file. ``write`` never raises and never waits for anything but the file system."""

    def __init__(self, path: Path) -> None:
        """Open the file for appending; one that can't be opened loses records, said once."""
        self.path = path
        self.lost = 0
        self._torn = False
        self._descriptor: int | None = None
        try:
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
            self._end_torn_line()
        except OSError as error:
            self._warn(error)

    def write(self, kind: str, **fields: Any) -> bool:
        """Append a record; returns False where it could not be kept."""
        record = {"t": time.time_ns() // 1_000_000, "kind": kind, **fields}
        try:
            text = json.dumps(record, ensure_ascii=False, separators=(",", ":"), default=str)
        except Exception as error:  # a foreign object's __str__ may raise anything
            return self._warn(error)
        # A lone surrogate (a file name that isn't UTF-8) becomes \udcXX, which JSON reads back as it was.
        line = text.encode("utf-8", "backslashreplace") + b"\n"
        try:
            if self._descriptor is None:
                raise OSError("the journal is closed")
            start = b"\n" if self._torn else b""
            written = os.write(self._descriptor, start + line)
            if written != len(start + line):
                # The next record must not join this half; on a full disk a newline would not fit either.
                self._torn = True
                raise OSError("no space left")
            self._torn = False
        except OSError as error:
            return self._warn(error)
        return True

    def metric(self, step: int, values: Mapping[str, float]) -> bool:
        """Append metrics of one step; what isn't a number is left out, said once, and gives False."""
        numbers: dict[str, float] = {}
        problem: Exception | None = None
        for name, value in values.items():
            try:
                numbers[name] = float(value)
            except Exception as error:  # a metric must not end a training
                problem = error
        try:
            step = int(step)
        except Exception as error:
            return self._warn(error)
        kept = self.write("metric", step=step, values=numbers)
        return self._warn(problem) if problem else kept

    def message(self, level: str, text: str) -> bool:
        """Append a message for a person."""
        return self.write("message", level=level, text=text)

    def close(self) -> None:
        """Close the file; closing twice is fine."""
        if self._descriptor is not None:
            with contextlib.suppress(OSError):
                os.close(self._descriptor)
            self._descriptor = None

    def _end_torn_line(self) -> None:
        """After a kill in mid-write the file ends without a newline: end that line, or the next record would join it."""
        with self.path.open("rb") as file:
            if file.seek(0, os.SEEK_END) and file.seek(-1, os.SEEK_END) >= 0 and file.read(1) != b"\n":
                assert self._descriptor is not None
                os.write(self._descriptor, b"\n")

    def _warn(self, error: Exception) -> bool:
        self.lost += 1
        if self.lost == 1:
            with contextlib.suppress(Exception):  # stderr may be closed too
                print(f"hpcml: warning: records are lost, {self.path}: {error}", file=sys.stderr, flush=True)
        return False


def read(folder: Path) -> Iterator[dict[str, Any]]:
    """Yield every readable record of a run's events folder, file by file, with ``rank``, ``restart``, ``writer``, ``line``.

    A line that is no record (torn by a kill, or foreign) is skipped.
    """
    for path in sorted(folder.glob("*.*.*.jsonl")):
        rank, restart, writer = path.name.removesuffix(".jsonl").split(".", 2)
        if not (rank.isdecimal() and restart.isdecimal()):
            continue
        with path.open("rb") as file:
            for number, line in enumerate(file, 1):
                record = _record(line)
                if record is not None:
                    yield {**record, "rank": int(rank), "restart": int(restart), "writer": writer, "line": number}


def _record(line: bytes) -> dict[str, Any] | None:
    if not line.endswith(b"\n"):
        return None
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):  # the second: a foreign line of thousands of brackets
        return None
    usable = isinstance(record, dict) and isinstance(record.get("t"), int) and isinstance(record.get("kind"), str)
    return record if usable else None
