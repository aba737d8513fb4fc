"""Two live programs take turns at the machine, so that a pair of speeds is measured in the same seconds.

A machine shared with others changes its speed by half from one tenth of a second to the next, and two measurements of
ten seconds, one after the other, then differ by a tenth. So both programs run at once on the same core, one of them
always stopped (SIGSTOP to all of its processes that run), and change over every 25 ms. The clock of each counts only while
it runs. On one core whatever a program does beside its work is taken from the work. What it waits for without computing
(a disk, a timer) goes on while it is stopped, and is counted by half.

The program reports its spans of work as lines of a file, ``<samples> <began> <ended>`` in seconds of the monotonic
clock (``time.perf_counter``), and ends its work when it finds the file of ``$BENCH_STOP``.
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

CORES = sorted(os.sched_getaffinity(0))
TURN_S = 0.025  # shorter than the machine's changes of speed, longer than what a change-over costs
ORDER = (0, 1, 1, 0)  # a drift of the machine within four turns falls on both
TIMEOUT_S = 300  # for the start with its first span, and for the end
STOP_S = 60  # hpcml ends its workers within 25 s of TERM
LOOK_S = 0.05
STOPPED = (psutil.STATUS_STOPPED, psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD)

# Reports the spans of a Keras training. The first epoch builds the graph: it is the first line, and not counted. Keras
# calls callbacks in their order: those of hpcml come first, so their work is counted. Validation is left out.
KERAS = '''
import os
import time


class Clock(tf.keras.callbacks.Callback):
    """Writes a line for each span of training: samples, begin, end."""

    def __init__(self):
        super().__init__()
        self.began, self.file = time.perf_counter(), open(os.environ["BENCH_SPANS"], "w", buffering=1)

    def on_test_begin(self, logs=None):
        self.span(0)

    def on_test_end(self, logs=None):
        self.began = time.perf_counter()

    def on_epoch_end(self, epoch, logs=None):
        self.span(len(train) * global_batch)
        if os.path.exists(os.environ["BENCH_STOP"]):
            self.model.stop_training = True
        self.began = time.perf_counter()

    def span(self, samples):
        self.file.write(f"{samples} {self.began!r} {time.perf_counter()!r}\\n")


'''


class Program:
    """One side of a pair: a program in a folder, with the turns that it had.

    Args:
        name: of its files in the folder.
    """

    def __init__(self, name: str, words: Sequence[str], environment: Mapping[str, str], folder: Path) -> None:
        self.words = words
        self.spans, self.stop, self.log = (folder / f"{name}.{what}" for what in ("spans", "stop", "log"))
        for path in (self.spans, self.stop):
            path.unlink(missing_ok=True)
        own = {"BENCH_SPANS": str(self.spans), "BENCH_STOP": str(self.stop)}
        with self.log.open("wb") as file:
            self.child = subprocess.Popen(
                ["taskset", "--cpu-list", str(CORES[-1]), *words], cwd=folder, env={**environment, **own},
                stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT,
            )  # fmt: skip
        self.turns: list[tuple[float, float]] = []
        self.seconds = 0.0
        self._processes, self._held = self._tree(), list[psutil.Process]()

    def await_work(self) -> None:
        """Wait until it reports its first span.

        Raises:
            RuntimeError: it ended before, or takes over five minutes; with its last words.
        """
        self.await_spans(1)
        self._processes = self._tree()
        *self._held, work = self._processes
        _signal([*self._held, work], signal.SIGSTOP)
        _await_stop([work])  # the other program may still run, and nothing that stands back for it comes to its stop

    def await_spans(self, count: int) -> None:
        """Wait until it has reported so many spans.

        Raises:
            RuntimeError: it ended before, or takes over five minutes; with its last words.
        """
        deadline = time.monotonic() + TIMEOUT_S
        while not self.spans.exists() or self.spans.read_text().count("\n") < count:
            if self.child.poll() is not None or time.monotonic() > deadline:
                raise self._failure()
            time.sleep(LOOK_S)

    def turn(self, seconds: float) -> None:
        """Let it run for a while, all its processes within the clock."""
        *others, work = self._processes
        began = time.perf_counter()
        _signal([work, *self._held], signal.SIGCONT)
        time.sleep(seconds)
        # To stop and continue one that sleeps would wake it twice, at a cost of its own in each turn.
        self._held = [process for process in others if _status(process) == psutil.STATUS_RUNNING]
        _signal([*self._held, work], signal.SIGSTOP)
        _await_stop([work])  # one that stands back for it stops after it
        ended = time.perf_counter()
        _await_stop(self._held)
        self.turns.append((began, ended))
        self.seconds += ended - began
        if len(self.turns) % 40 == 0:  # it may have started processes meanwhile
            self._processes = self._tree()

    def samples_per_s(self) -> float:
        """Return its samples in a second of its turns.

        Raises:
            RuntimeError: it had finished before the turns had.
        """
        if self.child.poll() is not None:
            raise self._failure()
        lines = [line.split() for line in self.spans.read_text().splitlines(keepends=True) if line.endswith("\n")]
        spans = [(int(samples), float(began), float(ended)) for samples, began, ended in lines]
        spans = [span for span in spans if span[1] >= self.turns[0][0]]
        return sum(samples for samples, _, _ in spans) / sum(overlap(self.turns, *span[1:]) for span in spans)

    def end(self) -> None:
        """Tell it to end and wait for it.

        Raises:
            RuntimeError: it failed; with its last words.
        """
        self.stop.touch()
        _signal(self._processes, signal.SIGCONT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            if self.child.wait(TIMEOUT_S) == 0:
                return
        raise self._failure()

    def kill(self) -> None:
        """End it if it still runs: TERM, so that hpcml ends its own children."""
        if self.child.poll() is None:
            self.child.terminate()
            self._processes = self._tree()
            _signal(self._processes, signal.SIGCONT)
            self.child.wait(STOP_S)

    def _tree(self) -> list[psutil.Process]:
        """Return its processes, the one that does the work last: the one that reports its spans."""
        own = psutil.Process(self.child.pid)
        return sorted([own, *own.children(recursive=True)], key=self._reports)

    def _reports(self, process: psutil.Process) -> bool:
        with contextlib.suppress(psutil.NoSuchProcess):
            return any(file.path == str(self.spans) for file in process.open_files())
        return False

    def _failure(self) -> RuntimeError:
        words = self.log.read_text(errors="replace")[-2000:]
        return RuntimeError(f"{' '.join(self.words)}: exit status {self.child.poll()}\n{words}")


def _await_stop(processes: Sequence[psutil.Process]) -> None:
    """Wait until the kernel has stopped processes: only then another may run."""
    for process in processes:
        while _status(process) not in STOPPED:
            time.sleep(0.0002)


def _status(process: psutil.Process) -> str:
    try:
        return process.status()
    except psutil.NoSuchProcess:
        return psutil.STATUS_DEAD


def _signal(processes: Sequence[psutil.Process], number: signal.Signals) -> None:
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.send_signal(number)


def overlap(turns: Sequence[tuple[float, float]], began: float, ended: float) -> float:
    """Return how many of the seconds between two times lie in turns, which are in order and apart."""
    first = max(0, bisect.bisect(turns, (began,)) - 1)
    until = bisect.bisect(turns, (ended,))
    return sum(max(0.0, min(ended, off) - max(began, on)) for on, off in turns[first:until])


def race(programs: Sequence[Program], seconds: float) -> list[float]:
    """Let two programs that were started take turns until each had so many seconds; return the samples/s of each."""
    with _ended(programs), _elsewhere():
        for program in programs:
            program.await_work()
        for index in itertools.cycle(ORDER):
            programs[index].turn(TURN_S)
            if min(program.seconds for program in programs) >= seconds:
                break
        speeds = [program.samples_per_s() for program in programs]
        for program in programs:
            program.end()
    return speeds


def racing(
    ours: Callable[[], Program], other: Callable[[], Program], seconds: float
) -> Callable[[bool], tuple[float, float]]:
    """Return what starts two programs and lets them race, for :func:`bench.pairs.measure`."""

    def both(ours_first: bool) -> tuple[float, float]:
        starts = (ours, other) if ours_first else (other, ours)
        first, second = race([start() for start in starts], seconds)
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
