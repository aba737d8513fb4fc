"""Writing a journal: one line a record, one system call a line, a sync each second."""

import contextlib
import json
import math
import os
import sys
import threading
import time
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .reader import MAX_LINE, TORN

# Node loss costs at most a second: this pause, and a tenth for the disk.
SYNC_S = 0.9
MAX_NAMES = 4096  # names kept in their JSON form; a training has tens
MOST_TOLD = 20  # metrics that a person is told of one by one; what is left out of more is only counted
MAX_INT = 2**63 - 1  # of a step and of a time: MLflow keeps them in a BIGINT

_write, _time_ns = os.write, time.time_ns


class _Names(dict[str, str]):
    """Each metric's name in JSON with its colon, made once."""

    def __missing__(self, name: object) -> str:
        text = json.dumps({name: 0}, ensure_ascii=False, separators=(",", ":"))[1:-2]
        # A lone surrogate (a file name that isn't UTF-8) becomes \udcXX, which JSON reads back as it was.
        text = text.encode("utf-8", "backslashreplace").decode()
        if type(name) is str:  # 1 and True are one key
            if len(self) >= MAX_NAMES:
                self.clear()
            self[name] = text
        return text


_names = _Names()


def _number(value: Any) -> str:
    """Return what isn't a finite float as JSON does: tensors and NumPy's numbers by way of ``float``, NaN, infinities."""
    value = float(value)
    if math.isfinite(value):
        return repr(value)
    return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"


def _place(step: Any, t_ms: Any) -> tuple[int, int]:
    """Return a metric's step and time as whole numbers that MLflow can keep.

    Raises:
        ValueError: one of them is none.
    """
    try:
        if not -MAX_INT - 1 <= (whole := int(step)) <= MAX_INT:
            raise OverflowError
    except Exception as error:
        why = "beyond 64 bits" if isinstance(error, OverflowError) else "no whole number"
        raise ValueError(f"step {_shown(step)} is {why}") from None
    try:
        t = _time_ns() // 1_000_000 if t_ms is None else int(t_ms)
        if not 0 <= t <= MAX_INT:
            raise OverflowError
    except Exception:
        raise ValueError(f"time {_shown(t_ms)} is no milliseconds since 1970") from None
    return whole, t


def _shown(value: object) -> str:
    """Return the start of a value's text, for a message; a foreign object, or a number of 5,000 digits, may have none."""
    try:
        text = repr(value)
    except Exception:
        return f"of type {type(value).__name__}"
    return text if len(text) <= 40 else f"{text[:39]}…"


class Journal:
    """One writer's file. ``write`` never raises and never waits for anything but the file system.

    Attributes:
        lost: records that could not be kept; what a metric leaves out since it is no number isn't among them.
        untold: those of them that no ``lost`` record in the file tells of.
    """

    untold: int
    _syncing: threading.Thread | None
    _settled: bool  # nothing to do after a write: a sync is on its way, no loss is untold

    def __init__(self, path: Path) -> None:
        """Open the file for appending; one that can't be opened loses records, said once."""
        self.path = path
        self.lost = 0
        self._torn = self._said = False
        self._told: set[str] = set()  # what a person was told of as left out
        self._descriptor = -1
        self._start_afresh()
        try:
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
            _open.add(self)
            self._torn = self._ends_torn()
        except OSError as error:
            self._said = _say(f"records are lost, {self.path}: {error}")

    def write(self, kind: str, **fields: Any) -> bool:
        """Append a record; returns False where it could not be kept."""
        record = {"t": _time_ns() // 1_000_000, "kind": kind, **fields}
        try:
            text = json.dumps(record, ensure_ascii=False, separators=(",", ":"), default=str)
        except Exception as error:  # a foreign object's __str__ may raise anything
            return self._lose(error)
        return self._append(text.encode("utf-8", "backslashreplace") + b"\n")

    def metric(self, step: int, values: Mapping[str, float], t_ms: int | None = None) -> bool:
        """Append metrics of one step; what can't be kept is left out, said once for each name, counted, and gives False.

        Args:
            step: of 64 bits, as MLflow has it; with another all values are left out.
            values: what ``float`` takes, such as a tensor, or text that is a number.
            t_ms: when they were measured, in milliseconds since the epoch; by default now.
        """
        names = _names
        try:  # by hand, since json.dumps takes longer than all the rest: this is called at every step
            body = ",".join(
                [
                    names[name] + (repr(value) if type(value) is float and value - value == 0.0 else _number(value))
                    for name, value in values.items()
                ]
            )
            if type(step) is not int:
                step = int(step)
            if t_ms is not None or not -MAX_INT <= step <= MAX_INT:
                step, t_ms = _place(step, t_ms)
            t = _time_ns() // 1_000_000 if t_ms is None else t_ms
            line = f'{{"t":{t},"kind":"metric","step":{step},"values":{{{body}}}}}\n'.encode()
        except Exception:  # a metric must not end a training
            return self._metric_in_part(step, values, t_ms)
        return self._append(line)

    def message(self, level: str, text: str) -> bool:
        """Append a message for a person."""
        return self.write("message", level=level, text=text)

    def close(self) -> None:
        """Hand everything to the disk and close the file; closing twice is fine."""
        if self._closing.is_set():
            return
        if self.untold and self._descriptor >= 0:
            self._tell_loss()
        if self.untold:
            _say(f"records lost: {self.untold:,}, {self.path}")
        self._closing.set()
        self._wake.set()
        if self._syncing is not None:
            self._syncing.join()
        descriptor, self._descriptor = self._descriptor, -1
        _open.discard(self)
        if descriptor >= 0:
            with contextlib.suppress(OSError):
                os.fdatasync(descriptor)
            with contextlib.suppress(OSError):
                os.close(descriptor)

    def _append(self, line: bytes) -> bool:
        try:
            if self._torn:
                line = TORN + line
            if len(line) > MAX_LINE:
                raise OSError(f"a record of {len(line):,} bytes")
            if _write(self._descriptor, line) != len(line):
                self._torn = True
                raise OSError("no space left")
        except OSError as error:
            return self._lose(error)
        if not self._settled:
            self._settle()
        return True

    def _settle(self) -> None:
        """After the first write since a sync or a loss: have it synced, and tell of the loss."""
        if not self._settling.acquire(blocking=False):
            return  # another thread does, or the very thread that a signal handler interrupted
        try:
            self._torn, self._settled = False, True
            if self.untold:
                self._tell_loss()
            if self._syncing is None:
                thread = threading.Thread(target=self._sync, name="hpcml-journal", daemon=True)
                with contextlib.suppress(RuntimeError):  # no more threads: close() syncs
                    thread.start()
                    self._syncing = thread
            self._wake.set()
        finally:
            self._settling.release()

    def _sync(self) -> None:
        said = False
        while True:
            self._wake.wait()  # without a time: an idle process is not woken
            self._wake.clear()
            if self._closing.is_set():
                return
            self._settled = False  # before the sync: a write during it asks for another
            try:
                os.fdatasync(self._descriptor)
            except OSError as error:  # network file systems tell of a full disk or a quota here
                if not said and not self._closing.is_set():
                    said = _say(f"records may be lost, {self.path}: {error}")
            self._closing.wait(SYNC_S)

    def _metric_in_part(self, step: int, values: Mapping[str, float], t_ms: int | None) -> bool:
        """Keep the numbers of a metric that holds something else too, and tell of the rest."""
        pairs: list[str] = []
        refused: dict[str, str] = {}  # what is left out, and why
        try:
            step, t = _place(step, t_ms)
            for name, value in values.items():
                try:
                    pairs.append(_names[name] + _number(value))
                except Exception:
                    refused[_text(name)] = f"metric {_shown(name)} is left out: {_shown(value)} is no number"
            if pairs:
                self._append(f'{{"t":{t},"kind":"metric","step":{step},"values":{{{",".join(pairs)}}}}}\n'.encode())
        except Exception as error:
            told = f"metrics are left out: {error}"
            refused = dict.fromkeys(map(_text, values), told) if isinstance(values, Mapping) else {"": told}
        for name, text in refused.items():
            about = name if text.startswith("metric ") else ""  # a step is told of once, whatever the metrics
            if about not in self._told and len(self._told) < MOST_TOLD:
                self._told.add(about)
                _say(text)
                self.message("warning", text)
        self.write("left_out", names=list(refused))
        return False

    def _ends_torn(self) -> bool:
        """Whether the file ends without a newline, after a kill in mid-write: the next record must not join that line."""
        with self.path.open("rb") as file:
            return file.seek(0, os.SEEK_END) > 0 and file.seek(-1, os.SEEK_END) >= 0 and file.read(1) != b"\n"

    def _tell_loss(self) -> None:
        told = self.untold
        line = b'{"t":%d,"kind":"lost","count":%d}\n' % (_time_ns() // 1_000_000, told)
        line = TORN + line if self._torn else line
        written = 0
        with contextlib.suppress(OSError):
            written = _write(self._descriptor, line)
            self._torn = 0 < written < len(line) or (self._torn and not written)
        if written == len(line):
            self.untold -= told
        else:
            self._settled = False  # the next write tries again

    def _lose(self, error: Exception) -> bool:
        self._settled = False
        self.untold += 1
        self.lost += 1
        if not self._said:
            why = "it is closed" if self._descriptor < 0 and self._closing.is_set() else error
            self._said = _say(f"records are lost, {self.path}: {why}")
        return False

    def _start_afresh(self) -> None:
        """Forget the thread: at first there is none, and a forked child has not got its parent's."""
        self._wake, self._closing, self._settling = threading.Event(), threading.Event(), threading.Lock()
        self._syncing, self._settled = None, False
        self.untold = 0  # the parent's it tells itself


def _text(name: object) -> str:
    return name if isinstance(name, str) else _shown(name)


_open: "weakref.WeakSet[Journal]" = weakref.WeakSet()


def _after_fork() -> None:
    for journal in list(_open):
        journal._start_afresh()


os.register_at_fork(after_in_child=_after_fork)


def _say(text: str) -> bool:
    with contextlib.suppress(Exception):  # stderr may be closed
        print(f"hpcml: warning: {text}", file=sys.stderr, flush=True)
    return True
