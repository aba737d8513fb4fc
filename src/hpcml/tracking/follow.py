"""Delivery to MLflow in the background, while a run goes on.

    python -m hpcml.tracking.follow RUN_ROOT RUN_ID

A process of its own, of the lowest priority: it sends what is new in the journal every few seconds and never more than
the time of half a percent of a core, until the run has ended, then once more with the run's files. Importing MLflow takes
seconds of a core: for that it waits until one is idle, for a minute. Whatever MLflow does goes to ``logs/delivery.txt`` in
the run directory and is tried again, after pauses that grow to a minute. The run doesn't wait for it, and what is not
delivered at the end stays for ``hpcml sync``.

Started by :func:`start` it ends with its starter, whose end of a pipe closes. Until it delivers it needs the standard
library only.
"""

import contextlib
import importlib.util
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Literal, TextIO

from .. import rundir, site
from ..errors import HpcmlError
from ..rundir import RunDir
from . import host

EVERY_S = 5.0
# Growing pauses after failures, doubled each time.
LONGEST_PAUSE_S = 60.0
# Of one core: a training beside it on the same core must not notice.
SHARE = 0.005
NICE = 19
# Of one core, over the last pause: where that was idle there is room for importing MLflow; after so many seconds it is
# imported without. The least share that a kernel with autogroup grants is 1.5 % of a core (sched(7): 15 against 1024).
IDLE, PATIENCE_S = 0.25, 60.0
# The starter waits so long for the last delivery, and then goes on by itself: on a busy machine the follower may get no
# core for minutes.
FINISH_S = 5.0
_HELD = "--held"
# Importing MLflow imports numpy; nothing here computes, and no GPU is ours.
_MODEST = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")


def start(run: RunDir, uri: str) -> "subprocess.Popen[bytes] | None":
    """Start the delivery of a run in the background.

    Args:
        run: its directory, already made.
        uri: MLflow's address; it reaches the process by its environment, so that credentials stay out of the process list.

    Returns:
        The process, for :func:`finish`. It ends soon after this one, however this one ends. None where it can't start.
    """
    if importlib.util.find_spec("mlflow") is None:
        return None
    words = [sys.executable, "-P", "-m", __name__, _HELD, str(run.root), run.id]
    environment = {**os.environ, **_MODEST, "CUDA_VISIBLE_DEVICES": "", "MLFLOW_TRACKING_URI": uri}
    try:
        with _log_of(run) as log:
            # A session of its own: Ctrl-C at a terminal is for the work, which may write points until its end.
            return subprocess.Popen(
                words, env=environment, stdin=subprocess.PIPE, stdout=log, stderr=log, start_new_session=True
            )
    except OSError:
        return None


def hurry(child: "subprocess.Popen[bytes] | None") -> None:
    """Tell a follower that the work is done: it need not stand back any more, and ``finish`` comes soon."""
    if child is not None and child.stdin is not None:
        with contextlib.suppress(OSError):
            child.stdin.write(b"\n")
            child.stdin.flush()


def finish(child: "subprocess.Popen[bytes] | None", timeout_s: float = FINISH_S) -> bool:
    """Let a follower deliver once more, and end it; returns whether it came to its end by itself within the time.

    Args:
        child: from :func:`start`; ended already is fine, and None.
        timeout_s: then it is killed, which loses nothing: what it has not noted is sent again.
    """
    if child is None:
        return False
    assert child.stdin is not None
    with contextlib.suppress(OSError):
        child.stdin.close()
    try:
        return child.wait(timeout_s) == 0
    except subprocess.TimeoutExpired:
        return False
    finally:
        if child.poll() is None:
            child.kill()
            child.wait()


def in_job(run: RunDir) -> "subprocess.Popen[bytes] | None":
    """Start the delivery from inside a job, for rank 0's worker; None where the person's side delivers."""
    return _start_where(run, job=True)


@contextlib.contextmanager
def from_outside(run: RunDir) -> "Iterator[subprocess.Popen[bytes] | None]":
    """Deliver in the background from the person's side meanwhile; yields None where the job delivers itself."""
    child = _start_where(run, job=False)
    try:
        yield child
    finally:
        finish(child, 0)


def _start_where(run: RunDir, *, job: bool) -> "subprocess.Popen[bytes] | None":
    from .mlflow import store_uri

    plan = rundir.read_json(run.plan)
    with contextlib.suppress(HpcmlError, KeyError):  # said when the run is delivered at last
        where = site.load(plan["site"])
        uri = store_uri(where, Path(plan["project"]))
        if where.delivers_in_job(uri) == job:
            return start(run, uri)
    return None


class Follower:
    """Delivers a run, and the variants of a comparison, as their journals grow."""

    def __init__(self, run: RunDir, uri: str, log: TextIO) -> None:
        self.run, self.uri, self.log = run, uri, log
        self.failures, self.trouble, self.since, self.warm = 0, "", 0.0, False

    def step(self, *, last: bool = False) -> float:
        """Deliver what is new and return the seconds to pause; whatever fails is logged.

        Args:
            last: the run has ended: send its state and files too.
        """
        from . import ledger as ledgers

        began = time.process_time()
        try:
            for one in (self.run, *rundir.children(self.run)):
                if last or ledgers.has_news(one, ledgers.load(one)):
                    self._deliver(one, files=last)
        except Exception as error:  # MLflow's and SQLAlchemy's own, too: nothing of theirs ends the follower
            self._failed(error)
            return min(LONGEST_PAUSE_S, EVERY_S * 2.0 ** min(self.failures, 10))
        self._recovered()
        # The first delivery imports MLflow and may make the database: seconds that don't come again.
        cost_s = time.process_time() - began if self.warm else 0.0
        self.warm = self.warm or "mlflow" in sys.modules
        return min(LONGEST_PAUSE_S, max(EVERY_S, cost_s / SHARE))

    def _deliver(self, run: RunDir, *, files: bool) -> None:
        from .mlflow import deliver  # the first time it takes seconds

        deliver(run, self.uri, files=files)

    def _failed(self, error: Exception) -> None:
        text = str(error) if isinstance(error, HpcmlError) else f"{type(error).__name__}: {error}"
        if not self.failures:
            self.since = time.time()
        if text != self.trouble:  # an outage of a night is one entry
            self._say(text)
        self.failures, self.trouble = self.failures + 1, text

    def _recovered(self) -> None:
        if self.failures:
            self._say(f"delivers again, after {self.failures} failures in {time.time() - self.since:.0f} s")
        self.failures, self.trouble = 0, ""

    def _say(self, text: str) -> None:
        with contextlib.suppress(OSError):  # a full disk
            self.log.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}\n")
            self.log.flush()


def follow(run: RunDir, uri: str, log: TextIO, *, held: bool) -> int:
    """Deliver until the run has ended, then once more; returns the exit status: 0 where the last delivery succeeded.

    Args:
        held: until standard input closes; else until there is an end marker, or the run's owner is gone.
    """
    follower = Follower(run, uri, log)
    pause, began, idle_s = EVERY_S, time.monotonic(), host.idle_core_s()
    while (heard := _wait(run, pause, held=held)) != "over":
        was_idle_s, idle_s = idle_s, host.idle_core_s()
        crowded = was_idle_s is not None and idle_s is not None and idle_s - was_idle_s < IDLE * pause
        if heard:
            stand_up()
        if heard or follower.warm or not crowded or time.monotonic() - began > PATIENCE_S:
            pause = follower.step()
    stand_up()
    follower.step(last=True)
    return 1 if follower.failures else 0


def _wait(run: RunDir, pause_s: float, *, held: bool) -> Literal["", "hurry", "over"]:
    """Wait, and return early with what is heard: that the work is done, or that the run is over."""
    deadline = time.monotonic() + pause_s
    while (left := deadline - time.monotonic()) > 0:
        if held:
            if select.select([0], [], [], left)[0]:
                return "hurry" if os.read(0, 4096) else "over"
            continue
        if run.status.exists() or (run.owner.exists() and not rundir.owner_is_alive(run)):
            return "over"
        time.sleep(min(left, 1.0))
    return ""


def stand_back() -> None:
    """Compute only where nobody else wants to.

    On a core that a training fills, a niced process of 10 takes a tenth of it, for the half a minute that importing
    MLflow and making a database then take; one of the class idle takes 0.3 % (sched(7): weight 3 against 1024). In a
    kernel that groups processes by session (autogroup) the nice value of the group counts.
    """
    with contextlib.suppress(OSError):
        os.nice(NICE)
    if os.getsid(0) == os.getpid():  # else the group is somebody's terminal, and all that runs in it
        with contextlib.suppress(OSError):
            Path("/proc/self/autogroup").write_text(str(NICE))
    with contextlib.suppress(OSError, AttributeError):
        os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))


def stand_up() -> None:
    """Compute as any niced process does: the work is done, and somebody waits."""
    with contextlib.suppress(OSError, AttributeError):
        os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))


def _log_of(run: RunDir) -> TextIO:
    from .mlflow import LOG

    run.logs.mkdir(mode=0o700, parents=True, exist_ok=True)
    handle = os.open(run.logs / LOG, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
    return os.fdopen(handle, "a", encoding="utf-8", errors="backslashreplace")


def main(words: list[str]) -> int:
    """Follow the run that the command line names."""
    held = words[:1] == [_HELD]
    if len(words) - held != 2:
        print(f"usage: python -m {__spec__.name if __spec__ else __name__} RUN_ROOT RUN_ID", file=sys.stderr)
        return 2
    run = RunDir(Path(words[-2]).absolute(), words[-1])
    os.umask(0o077)
    stand_back()
    if held:  # Slurm sends TERM to all of a step; the work may write points until its own end
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR2):
            signal.signal(number, signal.SIG_IGN)
    try:
        plan = rundir.read_json(run.plan)
        uri = os.environ.get("MLFLOW_TRACKING_URI")
        if not uri and not plan:
            raise HpcmlError(f"{run.path} is no run: it holds no plan.json", fix="hpcml runs list")
        from .mlflow import store_uri

        uri = uri or store_uri(site.load(plan["site"]), Path(plan["project"]))
        with _log_of(run) as log:
            return follow(run, uri, log, held=held)
    except HpcmlError as error:
        print(f"hpcml: {error}", file=sys.stderr)
        return error.exit_code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
