"""Two live programs take turns at the machine, so that a pair of speeds is measured in the same seconds.

A machine shared with others changes its speed by half from one tenth of a second to the next, and two measurements of
ten seconds, one after the other, then differ by a tenth. So both programs run at once on the same core, one of them
always stopped (SIGSTOP to all of its processes that run), and change over every 25 ms. The clock of each counts only while
it runs. On one core whatever a program does beside its work is taken from the work. What it waits for without computing
(a disk, a timer) goes on while it is stopped, and is counted by half. They start on all cores, which is quicker.

The program reports its spans of work as lines of a file, ``<samples> <began> <ended>`` in seconds of the monotonic
clock (``time.perf_counter``), and ends its work when it finds the file of ``$BENCH_STOP``. Of a training of several
processes each keeps such a file open, and rank 0's counts: clock.py.
"""

import bisect
import contextlib
import itertools
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import psutil

from bench import processes

CORES = sorted(os.sched_getaffinity(0))
TURN_S = 0.025  # shorter than the machine's changes of speed, longer than what a change-over costs
ORDER = (0, 1, 1, 0)  # a drift of the machine within four turns falls on both
SPANS = 3  # of work at least, however many seconds they take
TIMEOUT_S = 300  # for the start with its first span, for the turns, and for the end
STOP_S = 60  # hpcml ends its workers within 25 s of TERM
LOOK_S = 0.05
# One that is ready waits for the other, but not in one piece: peers that hear nothing of each other for 10 s give up.
BREATH_S, BREATHS_S = 0.02, 1.0


class Program:
    """One side of a pair: a program in a folder, with the turns that it had.

    Args:
        name: of its files in the folder.
        cores: what its turns are on; by default one core.
    """

    def __init__(
        self,
        name: str,
        words: Sequence[str],
        environment: Mapping[str, str],
        folder: Path,
        cores: Sequence[int] = CORES[-1:],
    ) -> None:
        self.words, self._cores = words, cores
        self.spans, self.stop, self.log = (folder / f"{name}.{what}" for what in ("spans", "stop", "log"))
        for path in (self.stop, *folder.glob(f"{name}.spans*")):
            path.unlink(missing_ok=True)
        own = {"BENCH_SPANS": str(self.spans), "BENCH_STOP": str(self.stop)}
        with self.log.open("wb") as file:
            self.child = subprocess.Popen(
                words, cwd=folder, env={**environment, **own},
                stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT,
                # Linux shares a core out by sessions first (sched(7), autogroup), and hpcml's ranks have their own.
                start_new_session=True,
            )  # fmt: skip
        self._deadline = time.monotonic() + TIMEOUT_S
        self.turns: list[tuple[float, float]] = []
        self.seconds = 0.0
        self._ranks, self._others, self._held = list[psutil.Process](), list[psutil.Process](), list[psutil.Process]()

    def works(self) -> bool:
        """Whether it has reported its first span.

        Raises:
            RuntimeError: it ended before, or takes over five minutes; with its last words.
        """
        return self._has_reported(1)

    def hold(self) -> None:
        """Stop it; from now on it runs in its turns only, on its cores."""
        self._look()
        self._held = self._others
        processes.send([*self._held, *self._ranks], signal.SIGSTOP)
        # Of the ranks alone: the other program may still run, and nothing that stands back for it comes to its stop.
        processes.await_stop(self._ranks)
        processes.confine([*self._held, *self._ranks], self._cores)

    def await_spans(self, count: int) -> None:
        """Wait until it has reported so many spans.

        Raises:
            RuntimeError: it ended before, or takes over five minutes; with its last words.
        """
        while not self._has_reported(count):
            time.sleep(LOOK_S)

    def _has_reported(self, count: int) -> bool:
        reported = self.spans.exists() and self.spans.read_text().count("\n") >= count
        if not reported and (self.child.poll() is not None or time.monotonic() > self._deadline):
            raise self._failure()
        return reported

    def breathe(self) -> None:
        """Let it run for a moment that doesn't count."""
        processes.send([*self._ranks, *self._held], signal.SIGCONT)
        time.sleep(BREATH_S)
        processes.send([*self._held, *self._ranks], signal.SIGSTOP)
        processes.await_stop(self._ranks)

    def turn(self, seconds: float) -> None:
        """Let it run for a while, all its processes within the clock."""
        began = time.perf_counter()
        processes.send([*self._ranks, *self._held], signal.SIGCONT)
        time.sleep(seconds)
        # To stop and continue one that sleeps would wake it twice, at a cost of its own in each turn. The ranks are stopped in
        # any case: one that sleeps may have threads that run, or wait for another rank alone.
        self._held = [process for process in self._others if processes.status(process) == psutil.STATUS_RUNNING]
        processes.send([*self._held, *self._ranks], signal.SIGSTOP)
        processes.await_stop(self._ranks)  # those that stand back for them stop after them
        ended = time.perf_counter()
        processes.await_stop(self._held)
        self.turns.append((began, ended))
        self.seconds += ended - began
        if len(self.turns) % 40 == 0:  # it may have started processes meanwhile
            self._look()

    def samples_per_s(self) -> float:
        """Return its samples in a second of its turns.

        Raises:
            RuntimeError: it had finished before the turns had, or no span of work lies in them.
        """
        if self.child.poll() is not None:
            raise self._failure()
        spans = self._spans()
        samples = sum(span[0] for span in spans)
        if not samples:
            raise RuntimeError(f"{' '.join(self.words)}: no work began and ended in {self.seconds:.1f} s of turns")
        return samples / sum(overlap(self.turns, *span[1:]) for span in spans)

    def has_worked(self) -> bool:
        """Whether it can be measured: a few spans of work lie in its turns."""
        return sum(samples > 0 for samples, _, _ in self._spans()) >= SPANS

    def _spans(self) -> list[tuple[int, float, float]]:
        lines = [line.split() for line in self.spans.read_text().splitlines(keepends=True) if line.endswith("\n")]
        spans = [(int(samples), float(began), float(ended)) for samples, began, ended in lines]
        return [span for span in spans if span[1] >= self.turns[0][0]]

    def release(self) -> None:
        """Tell it to end, on all cores: nothing counts any more."""
        self.stop.touch()
        self._look()
        every = [*self._ranks, *self._others]
        processes.confine(every, CORES)
        processes.send(every, signal.SIGCONT)

    def end(self) -> None:
        """Tell it to end and wait for it.

        Raises:
            RuntimeError: it failed; with its last words.
        """
        self.release()
        with contextlib.suppress(subprocess.TimeoutExpired):
            if self.child.wait(TIMEOUT_S) == 0:
                return
        raise self._failure()

    def kill(self, *, at_once: bool = False) -> None:
        """End it if it still runs: TERM, so that hpcml ends its own children, and KILL for what is left.

        Args:
            at_once: KILL alone, for a program whose end nobody waits for.
        """
        if self.child.poll() is not None:
            return
        self._look()
        every = [*self._ranks, *self._others]
        if not at_once:
            self.child.terminate()
            processes.send(every, signal.SIGCONT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.child.wait(STOP_S)
        processes.send(every, signal.SIGKILL)
        self.child.wait(STOP_S)

    def _look(self) -> None:
        """Find its processes: those that do the work, which have a file of spans open, and others."""
        every = list[psutil.Process]()
        with contextlib.suppress(psutil.NoSuchProcess):
            own = psutil.Process(self.child.pid)
            every = [own, *own.children(recursive=True)]
        self._ranks = [process for process in every if self._reports(process)]
        self._others = [process for process in every if process not in self._ranks]

    def _reports(self, process: psutil.Process) -> bool:
        with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied):
            return any(file.path.startswith(str(self.spans)) for file in process.open_files())
        return False

    def _failure(self) -> RuntimeError:
        words = self.log.read_text(errors="replace")[-2000:]
        return RuntimeError(f"{' '.join(self.words)}: exit status {self.child.poll()}\n{words}")


def overlap(turns: Sequence[tuple[float, float]], began: float, ended: float) -> float:
    """Return how many of the seconds between two times lie in turns, which are in order and apart."""
    first = max(0, bisect.bisect(turns, (began,)) - 1)
    until = bisect.bisect(turns, (ended,))
    return sum(max(0.0, min(ended, off) - max(began, on)) for on, off in turns[first:until])


def race(programs: Sequence[Program], seconds: float, *, to_the_end: bool = True) -> list[float]:
    """Let two programs that were started take turns until each had so many seconds; return the samples/s of each.

    Args:
        to_the_end: let them come to their own end, and fail where one ends badly; else kill them, which is quicker.
    """
    with _ended(programs), _elsewhere():
        _hold_all(programs)
        for index in itertools.cycle(ORDER):
            programs[index].turn(TURN_S)
            enough = min(program.seconds for program in programs) >= seconds
            if enough and all(program.has_worked() for program in programs):
                break
            if any(program.child.poll() is not None or program.seconds > TIMEOUT_S for program in programs):
                break  # samples_per_s says why
        speeds = [program.samples_per_s() for program in programs]
        if to_the_end:
            for program in programs:
                program.release()
            for program in programs:
                program.end()
        else:
            for program in programs:
                program.kill(at_once=True)
    return speeds


def _hold_all(programs: Sequence[Program]) -> None:
    """Return when all have started and are held; the one that is ready leaves the machine to the others."""
    waited_for, breath = list(programs), time.monotonic() + BREATHS_S
    while waited_for:
        for program in [program for program in waited_for if program.works()]:
            program.hold()
            waited_for.remove(program)
        time.sleep(LOOK_S)
        if time.monotonic() > breath:
            for program in programs:
                if program not in waited_for:
                    program.breathe()
            breath = time.monotonic() + BREATHS_S


def racing(
    ours: Callable[[], Program], other: Callable[[], Program], seconds: float, *, to_the_end: bool = True
) -> Callable[[bool], tuple[float, float]]:
    """Return what starts two programs and lets them race, for :func:`bench.pairs.measure`."""

    def both(ours_first: bool) -> tuple[float, float]:
        starts = (ours, other) if ours_first else (other, ours)
        first, second = race([start() for start in starts], seconds, to_the_end=to_the_end)
        return (first, second) if ours_first else (second, first)

    return both


@contextlib.contextmanager
def _elsewhere() -> Iterator[None]:
    """Keep this process off the core of the programs, where there is another."""
    os.sched_setaffinity(0, CORES[:-1] or CORES)
    try:
        yield
    finally:
        os.sched_setaffinity(0, CORES)


@contextlib.contextmanager
def _ended(programs: Sequence[Program]) -> Iterator[None]:
    try:
        yield
    finally:
        for program in programs:
            program.kill()
