"""One rank's worker: sets up the environment, runs the work as a child, keeps its output, writes the rank's marker.

Started by srun or by hpcml's local launcher. Signals become a ``stop`` file and go on to the child; no signal handler
runs in user code. Standard library only, so that nothing here can start a thread before threads are set.
"""

import contextlib
import os
import select
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import IO

from .. import rundir
from ..errors import STOPPED, HpcmlError
from ..plan import Plan, from_json
from ..rundir import RunDir
from ..tracking import provenance
from . import batch, bootstrap, ending, staging
from .beside import beside
from .watchdog import Watchdog

# After TERM the work has this long before KILL; Slurm's own KillWait is 30 s by default.
GRACE_S = 20
# After USR2, which comes SIGNAL_S before the time limit, a training has this long to come to a step or epoch at which it
# can save; then it is ended at the checkpoint that it has, and the job has the rest to be requeued in.
STOP_S = 60
# The conversion ends itself after 60 s.
PROFILE_S = 90
_POLL_S = 0.2
_PR_SET_PDEATHSIG = 1  # linux/prctl.h
# What an ended child has written lies in the pipe (64 KiB); what comes later is of a process that it left behind.
_DRAIN_S = 2
# A rank that only lost its peer leaves the one that died this long to tell why: a notebook's engine looks for a dead
# kernel once a second, and our own exit makes srun clear the others away.
YIELD_S = 3
_FORWARDED = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2)


def run_rank(run: RunDir, plan: Plan) -> int:
    """Run one rank of a plan and return its exit code."""
    started = time.time()
    restart = rundir.restart_of(os.environ)
    rank = int(os.environ.get("HPCML_RANK") or os.environ.get("SLURM_PROCID") or 0)
    log = open(run.log(rank), "ab", buffering=0)  # noqa: SIM115 - open until the process ends
    reason, code = "", 2
    if plan.work != "function":  # submitit answers USR2 by itself
        # Slurm sends USR2 to every process of a step, and it ends those that don't expect it. Blocked before there are
        # threads, it stays so in the work, and waits for this process until the work is there.
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR2])
    batch.forget_earlier(run, restart)
    try:
        environment = {**os.environ, **plan.env.vars, "HPCML_RESTART": str(restart), "PYTHONUNBUFFERED": "1"}
        ready = bootstrap.prepare(environment, plan.strategy, plan.keras, plan.gpus_per_node, plan.tuning)
        rank = ready.topology.rank
        _say(log, rank, f"hpcml: {ready.describe()}")
        if rank == 0:
            provenance.complete(run, run.code if run.code.is_dir() else Path(plan.project))
        world = ready.topology.world
        dog = Watchdog(run, rank, world, restart, plan.stall_s, lambda text: _keep(log, text.encode()))
        with (
            staging.data(run, plan, ready, restart, lambda text: _say(log, rank, f"hpcml: {text}")) as variables,
            beside(run, ready, environment, restart) as hurry,
        ):
            worked, ended = _child(run, plan, {**environment, **variables}, log, rank, dog)
            code, reason, ended = dog.verdict(*ending.judged(run, plan, rank, restart, worked), ended)
            if code and (dog.reason or not worked):
                _say(log, rank, f"hpcml: {reason}")
            if code and world > 1:
                hurry.set()  # the others may wait for this rank in a collective until it has ended
            elif plan.profile and rank == 0:
                _split_profile(run)
    except HpcmlError as error:
        reason, ended = str(error).splitlines()[0], time.time()
        _say(log, rank, f"hpcml: {error}", error=True)
    except Exception as error:  # hpcml's own: the run must not end without a word
        reason, ended = f"internal error: {type(error).__name__}: {error}".splitlines()[0], time.time()
        _say(log, rank, f"{traceback.format_exc()}hpcml: {reason}; please report it", error=True)
    told = ending.records_of(run, rank, restart)
    replicas = next((r.get("in_sync") for r in reversed(told) if r["kind"] == "replicas"), None)
    lost = sum(r["count"] for r in told if r["kind"] == "lost" and isinstance(r.get("count"), int))
    marker = {"rank": rank, "exit_code": code, "reason": reason, "replicas_in_sync": replicas, "lost": lost}
    if not ending.superseded(run, restart):
        rundir.write_json(run.status_of(rank), {**marker, "started": started, "ended": ended, "restart": restart})
    if code and ending.lost_its_peer(reason):
        _wait_for_the_cause(run, restart)
    cleared_away = code == 143 and rundir.read_json(run.stop).get("restart") == restart
    stalled = rundir.read_json(run.stalled).get("restart") == restart  # all have the same to say
    if code and rank and not cleared_away and not stalled and code != STOPPED:
        print(f"hpcml: rank {rank} failed: {reason}\n  its log: {run.log(rank)}", file=sys.stderr, flush=True)
    return code


def command_of(run: RunDir, plan: Plan, rank: int, restart: int) -> tuple[list[str], Path]:
    """Return the words that start the work, and the folder it starts in."""
    code = run.code
    if plan.work == "notebook":
        notebook = code / plan.target[0]
        words = [sys.executable, "-m", "hpcml.notebook.execute", str(notebook), str(run.notebook(rank))]
        parameters = run.path / f"parameters.{rank}.json"
        rundir.write_json(parameters, plan.params)
        place = ["--run-root", str(run.root), "--run-id", run.id, "--rank", str(rank), "--restart", str(restart)]
        return [*words, "--parameters", str(parameters), "--cwd", str(notebook.parent), *place], notebook.parent
    arguments = [] if plan.inject else [word for k, v in plan.params.items() for word in (f"--{k}", _as_word(v))]
    if plan.work == "function":
        # submitit keeps all calls of an array in the folder of the run above them. -P: no folder of ours is imported from.
        folder = RunDir(run.root, run.id.split("/")[0]).functions
        return [sys.executable, "-P", "-u", "-m", "submitit.core._submit", str(folder)], run.path
    if plan.work == "script":
        script = plan.target[0]
        runner = ["bash"] if script.endswith(".sh") else [sys.executable, "-u"]
        return [*runner, script, *arguments], code
    return [*plan.target, *arguments], code


def _wait_for_the_cause(run: RunDir, restart: int) -> None:
    """Return when the rank that ended the others has left its marker, when this one is cleared away, or soon."""
    deadline = time.monotonic() + YIELD_S
    while time.monotonic() < deadline and not _told_to_end(run, restart):
        ranks = [rundir.read_json(path) for path in run.path.glob("status.*.json")]
        failed = [rank["reason"] for rank in ranks if rank.get("restart") == restart and rank.get("exit_code")]
        if not all(map(ending.lost_its_peer, failed)):
            return
        time.sleep(_POLL_S)


def _child(
    run: RunDir, plan: Plan, environment: dict[str, str], log: IO[bytes], rank: int, dog: Watchdog
) -> tuple[int, float]:
    """Run the work; return its exit code and when its process ended, which others that it left behind may outlive."""
    words, folder = command_of(run, plan, rank, int(environment["HPCML_RESTART"]))
    try:
        child = subprocess.Popen(
            words, cwd=folder, env={**environment, **dog.prepare()}, stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
    except OSError as error:
        dog.end()
        raise HpcmlError(
            f"{words[0]} can't be started: {error.strerror}", fix="check the job's command and [env]"
        ) from None
    _forward(run, child, int(environment["HPCML_RESTART"]), plan.slurm.max_requeues)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGUSR2])
    dog.begin(lambda number: _kill_group(child, number))
    ended: list[float] = []
    try:
        for chunk in _output(run, child, ended):
            _keep(log, chunk)
            if rank == 0:
                _show(chunk)
        code = child.wait()
        while _saves(run, child):
            time.sleep(_POLL_S)
    finally:
        dog.end()
        _kill_group(child, signal.SIGKILL)  # what the work left behind ends with it, as under Slurm
    return code if code >= 0 else 128 - code, ended[0] if ended else time.time()


def _output(run: RunDir, child: subprocess.Popen[bytes], ended: list[float]) -> Iterator[bytes]:
    """Yield what the child writes until it has ended; a process that it left behind may hold its output open for ever."""
    assert child.stdout is not None
    pipe, end = child.stdout.fileno(), _end_of(child, ended)
    watched = [pipe, end]
    over = float("inf")
    while True:
        ready = select.select(watched, [], [], None if end in watched else _POLL_S)[0]
        if end in ready:
            watched.remove(end)
            over = time.monotonic() + _DRAIN_S
        if pipe in ready:
            chunk = os.read(pipe, 65536)
            if not chunk:
                return
            yield chunk
        if end not in watched and (pipe not in ready or time.monotonic() > over) and not _saves(run, child):
            return


def _end_of(child: subprocess.Popen[bytes], ended: list[float]) -> int:
    """Return a descriptor that becomes readable when the child has ended, so that nobody needs to poll; notes the time."""
    reading, writing = os.pipe()

    def wait() -> None:
        child.wait()
        ended.append(time.time())
        os.close(writing)

    threading.Thread(target=wait, daemon=True).start()
    return reading


def _keep(log: IO[bytes], text: bytes) -> None:
    """Write to the log; a full disk costs lines of it, not the training."""
    try:
        log.write(text)
    except OSError as error:
        if not getattr(_keep, "told", False):
            _keep.told = True  # type: ignore[attr-defined]
            print(f"hpcml: warning: the log is not complete: {error}", file=sys.stderr, flush=True)


def _show(text: bytes) -> None:
    """Write to stdout; where its reader has left (``| head``) the work goes on, and the log has everything."""
    try:
        sys.stdout.buffer.write(text)
        sys.stdout.buffer.flush()
    except OSError:
        # Python would try again at its end, fail again, and exit with 120.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _forward(run: RunDir, child: subprocess.Popen[bytes], restart: int, requeues: int) -> None:
    """Turn signals into a stop file; the first TERM or INT also reaches the child's whole group, KILL follows after a while.

    USR2 is a warning. Work that keeps checkpoints stops by itself after it, or is ended at its last one in time for the job
    to be requeued.

    Slurm sends TERM twice on a cancel; passed on twice, the second would cut short the saving that the first began.
    """
    ending: list[int] = []

    def handler(number: int, frame: FrameType | None) -> None:
        now = time.time()  # before the child can have died of it
        if number != signal.SIGUSR2 and not ending:
            ending.append(number)
            _kill_group(child, signal.SIGTERM)
            _later(GRACE_S, child)
        elif number == signal.SIGUSR2 and restart < requeues and rundir.heeds_stop(run, restart):
            _later(STOP_S, child)
        stop = rundir.read_json(run.stop)
        # A training that saves has stopped for the first of them; what comes then clears its ranks away.
        graver = stop.get("signal") == "SIGUSR2" and number != signal.SIGUSR2 and not rundir.heeds_stop(run, restart)
        if stop.get("restart") != restart or graver:
            with contextlib.suppress(OSError):
                name = signal.Signals(number).name
                rundir.write_json(run.stop, {"signal": name, "time": now, "restart": restart})

    for number in _FORWARDED:
        signal.signal(number, handler)


def _later(seconds: float, child: subprocess.Popen[bytes]) -> None:
    timer = threading.Timer(seconds, _kill_group, (child, signal.SIGKILL))
    timer.daemon = True
    timer.start()


def _kill_group(child: subprocess.Popen[bytes], number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child.pid, number)


def _saves(run: RunDir, child: subprocess.Popen[bytes]) -> bool:
    """Whether a run that was asked to stop still has processes: a shell dies of TERM at once, the training in it saves."""
    restart = rundir.restart_of(os.environ)
    if not _told_to_end(run, restart) or time.time() > rundir.read_json(run.stop)["time"] + GRACE_S:
        return False
    try:
        os.killpg(child.pid, 0)
    except ProcessLookupError:
        return False
    return True


def _told_to_end(run: RunDir, restart: int) -> bool:
    """Whether a rank was sent a signal that ends it; USR2 only warns."""
    stop = rundir.read_json(run.stop)
    return stop.get("restart") == restart and stop["signal"] != "SIGUSR2"


def _split_profile(run: RunDir) -> None:
    """Turn the profile into the parts of a step, in a process of its own: xprof is large, and may fail as it likes."""
    words = [sys.executable, "-P", "-m", "hpcml.tracking.profile", str(run.path)]
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        subprocess.run(words, stdin=subprocess.DEVNULL, timeout=PROFILE_S, check=False)


def _say(log: IO[bytes], rank: int, text: str, *, error: bool = False) -> None:
    _keep(log, text.encode() + b"\n")
    if error:
        print(text, file=sys.stderr, flush=True)
    elif rank == 0:
        _show(text.encode() + b"\n")


def _end_with_launcher() -> None:
    """Have TERM sent here when hpcml run dies without a word: nobody else would end its ranks (prctl(2)). Linux has it."""
    if sys.platform == "linux" and "HPCML_RANK" in os.environ:
        import ctypes

        with contextlib.suppress(AttributeError, OSError):
            ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def _as_word(value: object) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return value if isinstance(value, str) else str(value)


def main() -> int:
    """Run this rank of the run that the environment names."""
    os.umask(0o077)
    _end_with_launcher()
    try:
        run = batch.current_run()
        data = rundir.read_json(run.plan)
        if not data:
            raise HpcmlError(f"no plan in {run.path}", fix="start it through hpcml run, submit or a rendered script")
        return run_rank(run, from_json(data))
    except HpcmlError as error:
        print(f"hpcml: {error}", file=sys.stderr, flush=True)
        return error.exit_code
    except OSError as error:
        print(f"hpcml: the run directory can't be used: {error}", file=sys.stderr, flush=True)
        return 2


if __name__ == "__main__":
    sys.exit(main())
