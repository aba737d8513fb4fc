"""A profile of some steps inside a training, with a framework's own profiler; no framework is imported here.

The window and its record are the same for all frameworks. What differs is a ``Profiler``: how to start, stop, mark a
step, and wait for a device. Steps in the window are left out of the measured speed.
"""

import contextlib
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..tracking.journal import Journal


@dataclass(frozen=True)
class Profiler:
    """A framework's profiler.

    Attributes:
        start: begins to record.
        stop: ends it and writes the profile; returns the folder that holds it, relative to the run's.
        mark: encloses a call that trains, given its first step; readers of the profile find the steps by it. It is left
            with an exception's type where the call came to nothing.
        wait: returns when a device has computed a step's result.
    """

    start: Callable[[], None]
    stop: Callable[[], Path | None]
    mark: Callable[[int], AbstractContextManager[Any]]
    wait: Callable[[Any], None]


def only_clock(wait: Callable[[Any], None]) -> Profiler:
    """Return a profiler that records nothing: for ranks that only leave the steps of rank 0's profile out of their speed."""
    return Profiler(lambda: None, lambda: None, lambda step: contextlib.nullcontext(), wait)


def clamp(
    asked: tuple[int, int], steps: int | None, epochs: int | None, a_call: int = 1
) -> tuple[tuple[int, int], str]:
    """Move a window into the training, and into one epoch: between two lies the validation, which is no step.

    A window that is moved keeps off the first call, which builds the graph.

    Args:
        asked: first and last step, from 1 over the whole training.
        steps: of an epoch; None where the data doesn't tell.
        epochs: of the training.
        a_call: steps that one call trains; the window then holds whole calls.

    Returns:
        The window, and a line for a person where it is another than asked.
    """
    first, last = asked
    if not steps or not epochs:
        return asked, ""
    epoch = min((first - 1) // steps, epochs - 1)
    before = epoch * steps  # steps of the epochs before
    length = min(last - first + 1, steps)
    start = max(0, min(first - before, steps - length + 1) - 1)  # within the epoch, from 0
    end = min(steps, -(-(start + length) // a_call) * a_call)
    start -= start % a_call
    if before + start == 0 and first > a_call:
        if epochs > 1:
            before = steps
        elif end > a_call:
            start = a_call
    window = (before + start + 1, before + end)
    if window == asked:
        return asked, ""
    total = steps * epochs
    reason = f"a call trains {a_call}"
    if last > total or last - first >= steps or (first - 1) // steps != (last - 1) // steps:
        reason = f"the training has {total}" if last > total else f"a profile lies within one epoch of {steps}"
    return window, f"profile of steps {window[0]} to {window[1]} instead of {first} to {last}: {reason}"


class ProfiledSteps:
    """The window of one training. Call ``begin_epoch``, ``watched`` around each call that trains, ``end_epoch``.

    A loop that is no function calls ``begin_call`` and ``end_call`` instead of ``watched``.

    A profiler that fails costs the profile, never the training.
    """

    def __init__(self, journal: Journal, asked: tuple[int, int], profiler: Profiler, *, rank: int = 0, **facts: Any):
        """Args: rank: of this task; 0 speaks for all. facts: further fields of the journal's record."""
        self._journal = journal
        self._asked = asked
        self._profiler = profiler
        self._rank = rank
        self._facts = facts
        self._window: tuple[int, int] | None = None
        self._done = 0  # steps of the whole training
        self._a_call = 1
        self._epoch_end: int | None = None
        self._first: int | None = None  # while the profiler runs
        self._mark: AbstractContextManager[Any] | None = None  # while a call is in the profile
        self._calls = 0
        self._began = 0.0
        self.over = False
        self.left_out_steps = 0  # of this epoch
        self.left_out_s = 0.0

    def begin_epoch(self, steps: int | None, epochs: int | None, a_call: int = 1) -> bool:
        """Note that an epoch begins; returns whether its steps must be watched.

        Args:
            steps: of this epoch; None where nobody knows.
            epochs: this one and those to come.
            a_call: steps that one call trains.
        """
        self.end_epoch()  # of one that was interrupted
        self.left_out_steps, self.left_out_s = 0, 0.0
        if self.over:
            return False
        if self._window is None:
            self._window, note = clamp(self._asked, steps, epochs, max(1, a_call))
            if note and self._rank == 0:
                self._say("info", note)
        self._epoch_end = self._done + steps if steps else None
        if self._epoch_end is not None and self._epoch_end < self._window[0]:
            self._done = self._epoch_end
            return False
        self._a_call = max(1, a_call)
        self._start_if_next()
        return True

    def watched(self, train: Callable[[], Any]) -> Any:
        """Call a function that trains a step (or several) and return what it returns."""
        self.begin_call()
        try:
            result = train()
        except BaseException:
            self.drop_call()
            raise
        self.end_call(result)
        return result

    def begin_call(self) -> None:
        """Note that a call that trains begins; ``end_call`` must follow, or ``drop_call`` where it broke off."""
        if self._first is not None and self._done >= self._last:
            self._stop()
        if self._first is not None:
            self._mark = self._profiler.mark(self._done + 1)
            self._mark.__enter__()

    def end_call(self, result: Any) -> None:
        """Note that a call has trained its steps, with what it returned; None where nothing needs waiting for."""
        if self._mark is not None:
            mark, self._mark = self._mark, None
            mark.__exit__(None, None, None)
            self._calls += 1
        self._done += self._a_call
        if self._epoch_end is not None:
            self._done = min(self._done, self._epoch_end)
        if self._first is not None and self._done >= self._last:
            self._profiler.wait(result)  # what a device has not done yet would be missing
        elif not self.over:
            self._start_if_next(result)

    def drop_call(self) -> None:
        """Note that a call came to nothing: its steps don't count."""
        if self._mark is not None:
            mark, self._mark = self._mark, None
            mark.__exit__(StopIteration, None, None)

    @property
    def running(self) -> bool:
        """Whether the profiler runs, or on other ranks than 0 would."""
        return self._first is not None

    @property
    def _last(self) -> int:
        """The last step that is left out."""
        assert self._window is not None
        # On other ranks the next call waits for rank 0, which writes its profile meanwhile.
        return self._window[1] + (self._a_call if self._rank else 0)

    def end_epoch(self) -> None:
        """Note that the training part of an epoch is over, and with it the profile where one runs."""
        self.drop_call()
        if self._first is not None:
            self._stop()

    def _start_if_next(self, result: Any = None) -> None:
        """Start before the next call's own marks: Keras 2 opens them before anything of ours is called."""
        assert self._window is not None
        if self._first is not None or self._done + self._a_call < self._window[0]:
            return
        if result is not None:
            self._profiler.wait(result)
        self._began = time.perf_counter()
        try:
            self._profiler.start()
        except Exception as error:
            self.over = True
            self._failed(error)
            return
        self._first, self._calls = self._done + 1, 0

    def _stop(self) -> None:
        first, self._first = self._first, None
        self.over = self._calls > 0  # else the epoch ended, or broke off, before the window's first step: once more
        try:
            folder = self._profiler.stop()
        except Exception as error:
            self._failed(error)
        else:
            if folder is not None and self._calls:
                self._journal.write(
                    "profiled", first=first, last=self._done, calls=self._calls, folder=str(folder), **self._facts
                )
        assert first is not None
        self.left_out_steps = self._done - first + 1
        self.left_out_s = time.perf_counter() - self._began

    def _failed(self, error: Exception) -> None:
        text = f"no profile, the training goes on: {type(error).__name__}: {error}".splitlines()[0]
        self._say("warning", text)

    def _say(self, level: str, text: str) -> None:
        self._journal.message(level, text)
        print(f"hpcml: {text}", file=sys.stderr if level == "warning" else sys.stdout, flush=True)
