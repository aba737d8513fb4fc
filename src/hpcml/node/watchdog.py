"""A training of several ranks that makes no step any more is ended, with the stacks of all ranks in their logs.

A collective stalls when one rank waits in it and another one never comes. Each worker watches its own rank: they train
as one, so where one stands still all do. The first to notice says so in the run directory; then each has its rank's
stacks written, tells where it stands, and ends its work. Standard library only.

torch's NCCL (10 min by default), Gloo (30 min) and Horovod (300 s here) give up by themselves after a while too; whoever
is first ends the run.
"""

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from .. import rundir
from ..rundir import RunDir
from ..tracking import heartbeat
from ..tracking.heartbeat import BETWEEN, IDLE, STEPPING, Beat
from . import standing

# Before the first step, which may compile, and where validation, saving or the user's own code may take its time.
PATIENCE = 4
# A training whose steps, or whose pauses between them, have taken long before may take this much longer.
LONGER = 4
_LOOK_S = 5.0  # at most this long between two looks at a rank, and at what the others say
_DUMP_S = 5.0  # what faulthandler writes is there within milliseconds, unless the disk makes the process wait
_STEADY_S = 0.3
_POLL_S = 0.1
# A process that waits in a collective answers no TERM.
_KILL_S = 5.0
_GRACE_S = 20.0  # what is around it, such as a notebook's engine, has this long to write its results


class Watchdog:
    """One worker's: ``prepare`` before the work is started, ``begin`` when it runs, ``end`` and ``verdict`` when it has ended."""

    def __init__(
        self, run: RunDir, rank: int, world: int, restart: int, timeout_s: int, keep: Callable[[str], None]
    ) -> None:
        """Args:
        timeout_s: how long a training may be without a step; 0 for no watch. A single rank waits for nobody.
        keep: writes text to the rank's log.
        """
        self.reason = ""
        self._behind = False
        self._run, self._rank, self._world, self._restart = run, rank, world, restart
        self._timeout_s, self._keep = timeout_s, keep
        self._over = threading.Event()
        self._file: Path | None = None
        self._thread: threading.Thread | None = None
        self._found: Mapping[str, Any] = {}

    def prepare(self) -> dict[str, str]:
        """Make the file that the work's heartbeat goes to, where there is to be one; return the variable that names it."""
        if self._file is None and self._timeout_s and self._world > 1:
            with contextlib.suppress(OSError):  # what has no room for it trains without a watchdog
                # In memory only: a worker that is killed leaves nothing behind. Processes of the same user open it by
                # this name (proc(5)), also a kernel that inherits no descriptors.
                handle = os.memfd_create("hpcml-heartbeat")
                self._file = Path(f"/proc/{os.getpid()}/fd/{handle}")
                heartbeat.make(self._file)
        return {heartbeat.VARIABLE: str(self._file or "")}

    def begin(self, send: Callable[[int], None]) -> None:
        """Watch from now on.

        Args:
            send: sends a signal to all processes of the work.
        """
        if self._file is not None:
            self._thread = threading.Thread(target=self._watch, args=(self._file, send), daemon=True)
            self._thread.start()

    def end(self) -> None:
        """Watch no longer; where a stall was found this waits until its reason is known."""
        self._over.set()
        if self._thread and self._found:
            self._thread.join(2 * _DUMP_S)
        if self._file is not None:
            os.close(int(self._file.name))
            self._file = None

    def verdict(self, code: int, reason: str, ended: float) -> tuple[int, str, float]:
        """Return the exit code, reason and time of the work's end: where it had stalled, these of the stall.

        Of the ranks one that others waited for counts as the first.
        """
        if not code or not self.reason:
            return code, reason, ended
        return 1, self.reason, min(ended, self._found["time"]) if self._behind else ended

    def _watch(self, file: Path, send: Callable[[int], None]) -> None:
        try:
            self._found = self._stall(file)
            if self._found:
                self._end_work(file, send)
        except OSError as error:  # the run directory is gone or full: the training may go on all the same
            self._keep(f"hpcml: warning: no watchdog any more: {error}\n")

    def _stall(self, file: Path) -> Mapping[str, Any]:
        """Return what the first rank to notice a stall says; nothing where the work ends before any does."""
        look_s = min(_LOOK_S, self._timeout_s / 10)
        seen, still_s, longest_s = Beat(), 0.0, {IDLE: 0.0, BETWEEN: 0.0, STEPPING: 0.0}
        before = time.monotonic()
        while not self._over.wait(look_s):
            now, beat = time.monotonic(), heartbeat.read(file)
            # Counted in looks: where this process was suspended, or its disk hung, so was the work.
            still_s, before = still_s + min(now - before, 2 * look_s), now
            if beat != seen:
                longest_s[seen.phase] = max(longest_s[seen.phase], still_s)
                seen, still_s = beat, 0.0
            told = rundir.read_json(self._run.stalled)
            if told.get("restart") == self._restart:
                return told
            if seen.phase != IDLE and still_s > limit_s(self._timeout_s, seen.phase, longest_s[seen.phase]):
                told = {"restart": self._restart, "rank": self._rank, "still_s": still_s, "time": time.time()}
                rundir.write_json(self._run.stalled, told)
                return told
        return {}

    def _end_work(self, file: Path, send: Callable[[int], None]) -> None:
        beat = heartbeat.read(file)
        still_s = self._found["still_s"]
        stacks = self._dump(file, beat.pid)
        said = stacks or f"none to be had of it{_state_of(beat.pid)}\n"
        self._keep(f"hpcml: no step for {standing.span(still_s)}; the stacks of rank {self._rank}:\n{said}")
        own: dict[str, Any] = {"restart": self._restart, "step": beat.step, "phase": beat.phase, "begun": beat.pid > 0}
        own |= {"place": standing.place_of(stacks), "stacks": bool(stacks)}
        rundir.write_json(self._run.stalled_of(self._rank), own)
        ranks = self._others()
        self._behind = self._rank in standing.behind(ranks)
        self.reason = standing.reason(still_s, ranks, self._world, self._run.id)
        send(signal.SIGTERM)
        if not self._over.wait(_KILL_S) and is_ours(beat.pid, file):
            with contextlib.suppress(ProcessLookupError):
                os.kill(beat.pid, signal.SIGKILL)
        if not self._over.wait(_GRACE_S):
            send(signal.SIGKILL)

    def _dump(self, file: Path, pid: int) -> str:
        """Have the process that trains write its stacks, and return them; nothing where it doesn't."""
        if not is_ours(pid, file):
            return ""
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, heartbeat.DUMP)
        deadline = time.monotonic() + _DUMP_S
        written, since = "", time.monotonic()
        while (now := time.monotonic()) < deadline and not (written and now > since + _STEADY_S):
            time.sleep(_POLL_S)
            if (more := heartbeat.stacks(file)) != written:
                written, since = more, now
        return written

    def _others(self) -> dict[int, Mapping[str, Any]]:
        """Wait until all ranks have told where they stand, and return that; those that have ended tell by their markers."""
        deadline = time.monotonic() + min(_LOOK_S, self._timeout_s / 10) + _DUMP_S
        while True:
            told = {rank: one for rank in range(self._world) if (one := self._told_by(rank))}
            if len(told) == self._world or time.monotonic() > deadline or self._over.is_set():
                return told
            time.sleep(_POLL_S)

    def _told_by(self, rank: int) -> Mapping[str, Any]:
        for path in (self._run.stalled_of(rank), self._run.status_of(rank)):
            if (told := rundir.read_json(path)).get("restart") == self._restart:
                return told
        return {}


def limit_s(timeout_s: float, phase: int, longest_s: float) -> float:
    """Return how long a rank may be without a sign of its training before that has stalled, in seconds.

    Args:
        timeout_s: the job's, for steps.
        phase: what the rank does.
        longest_s: it has been without a sign, in this phase, and went on.
    """
    return max(timeout_s * (1 if phase == STEPPING else PATIENCE), LONGER * longest_s)


def is_ours(pid: int, file: Path) -> bool:
    """Whether a process is the one that trains: its environment names the heartbeat's file. Its number may be another's by now."""
    named = f"{heartbeat.VARIABLE}={file}".encode()
    try:
        return pid > 0 and named in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    except OSError:
        return False


def _state_of(pid: int) -> str:
    """Say what the kernel knows of a process that doesn't answer: in state D it waits for a disk or a driver (proc(5))."""
    lines: Iterable[str] = ()
    with contextlib.suppress(OSError):
        lines = Path(f"/proc/{pid}/status").read_text().splitlines() if pid else ()
    state = next((line.split(None, 1)[1] for line in lines if line.startswith("State:")), "")
    return f": its process {pid} is in state {state}" if state else ""
