"""One rank's worker: sets up the environment, runs the work as a child, keeps its output, writes the rank's marker.

Started by srun or by hpcml's local launcher. Signals become a ``stop`` file and go on to the child; no signal handler
runs in user code. Standard library only, so that nothing here can start a thread before threads are set.
"""

import contextlib
import os
import re
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import IO

from .. import rundir
from ..errors import HpcmlError
from ..plan import NEVER_CHECKED, Plan, from_json
from ..rundir import RunDir
from ..tracking import journal
from . import batch, bootstrap
from .beside import beside

# After TERM the work has this long before KILL; Slurm's own KillWait is 30 s by default.
GRACE_S = 20
# The conversion ends itself after 60 s.
PROFILE_S = 90
_POLL_S = 0.2
# What an ended child has written lies in the pipe (64 KiB); what comes later is of a process that it left behind.
_DRAIN_S = 2
_FORWARDED = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2)


def run_rank(run: RunDir, plan: Plan) -> int:
    """Run one rank of a plan and return its exit code."""
    started = time.time()
    restart = int(os.environ.get("SLURM_RESTART_COUNT", "0") or 0)
    rank = int(os.environ.get("HPCML_RANK") or os.environ.get("SLURM_PROCID") or 0)
    log = open(run.log(rank), "ab", buffering=0)  # noqa: SIM115 - open until the process ends
    reason, code = "", 2
    batch.forget_earlier(run, restart)
    try:
        environment = {**os.environ, **plan.env.vars, "HPCML_RESTART": str(restart), "PYTHONUNBUFFERED": "1"}
        ready = bootstrap.prepare(environment, plan.strategy, plan.keras, plan.gpus_per_node)
        rank = ready.topology.rank
        _say(log, rank, f"hpcml: {ready.describe()}")
        with beside(run, ready, environment, restart):
            code = _child(run, plan, {**environment, **ready.variables}, log, rank)
            if plan.profile and rank == 0:
                _split_profile(run)
        reason = "" if code == 0 else _last_words(run.log(rank), code)
        if code == 0:
            code, reason = _judged(run, plan, rank, restart)
            if reason:
                _say(log, rank, f"hpcml: {reason}")
    except HpcmlError as error:
        reason = str(error).splitlines()[0]
        _say(log, rank, f"hpcml: {error}", error=True)
    records = [r for r in journal.read(run.events) if r["rank"] == rank and r["restart"] == restart]
    replicas = next((r.get("in_sync") for r in reversed(records) if r["kind"] == "replicas"), None)
    lost = journal.lost(run.events, rank, restart)
    marker = {"rank": rank, "exit_code": code, "reason": reason, "replicas_in_sync": replicas, "lost": lost}
    rundir.write_json(run.status_of(rank), {**marker, "started": started, "ended": time.time(), "restart": restart})
    cleared_away = code == 143 and rundir.read_json(run.stop).get("restart") == restart
    if code and rank and not cleared_away:
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


def _child(run: RunDir, plan: Plan, environment: dict[str, str], log: IO[bytes], rank: int) -> int:
    words, folder = command_of(run, plan, rank, int(environment["HPCML_RESTART"]))
    try:
        child = subprocess.Popen(
            words, cwd=folder, env=environment, stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
    except OSError as error:
        raise HpcmlError(
            f"{words[0]} can't be started: {error.strerror}", fix="check the job's command and [env]"
        ) from None
    _forward(run, child, int(environment["HPCML_RESTART"]))
    try:
        for chunk in _output(run, child):
            _keep(log, chunk)
            if rank == 0:
                _show(chunk)
        code = child.wait()
        while _saves(run, child):
            time.sleep(_POLL_S)
    finally:
        _kill_group(child, signal.SIGKILL)  # what the work left behind ends with it, as under Slurm
    return code if code >= 0 else 128 - code


def _output(run: RunDir, child: subprocess.Popen[bytes]) -> Iterator[bytes]:
    """Yield what the child writes until it has ended; a process that it left behind may hold its output open for ever."""
    assert child.stdout is not None
    pipe, end = child.stdout.fileno(), _end_of(child)
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


def _end_of(child: subprocess.Popen[bytes]) -> int:
    """Return a descriptor that becomes readable when the child has ended, so that nobody needs to poll."""
    reading, writing = os.pipe()

    def wait() -> None:
        child.wait()
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


def _forward(run: RunDir, child: subprocess.Popen[bytes], restart: int) -> None:
    """Turn signals into a stop file; the first TERM or INT also reaches the child's whole group, KILL follows after a while.

    Slurm sends TERM twice on a cancel; passed on twice, the second would cut short the saving that the first began.
    """
    ending: list[int] = []

    def handler(number: int, frame: FrameType | None) -> None:
        if number != signal.SIGUSR2 and not ending:
            ending.append(number)
            _kill_group(child, signal.SIGTERM)
            timer = threading.Timer(GRACE_S, _kill_group, (child, signal.SIGKILL))
            timer.daemon = True
            timer.start()
        stop = rundir.read_json(run.stop)
        if stop.get("restart") != restart or (stop.get("signal") == "SIGUSR2" and number != signal.SIGUSR2):
            with contextlib.suppress(OSError):
                name = signal.Signals(number).name
                rundir.write_json(run.stop, {"signal": name, "time": time.time(), "restart": restart})

    for number in _FORWARDED:
        signal.signal(number, handler)


def _kill_group(child: subprocess.Popen[bytes], number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child.pid, number)


def _saves(run: RunDir, child: subprocess.Popen[bytes]) -> bool:
    """Whether a run that was asked to stop still has processes: a shell dies of TERM at once, the training in it saves."""
    restart = int(os.environ.get("SLURM_RESTART_COUNT", "0") or 0)
    stop = rundir.read_json(run.stop)
    if stop.get("restart") != restart or stop["signal"] == "SIGUSR2" or time.time() > stop["time"] + GRACE_S:
        return False
    try:
        os.killpg(child.pid, 0)
    except ProcessLookupError:
        return False
    return True


def _split_profile(run: RunDir) -> None:
    """Turn the profile into the parts of a step, in a process of its own: xprof is large, and may fail as it likes."""
    words = [sys.executable, "-P", "-m", "hpcml.tracking.profile", str(run.path)]
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        subprocess.run(words, stdin=subprocess.DEVNULL, timeout=PROFILE_S, check=False)


def _judged(run: RunDir, plan: Plan, rank: int, restart: int) -> tuple[int, str]:
    """Judge work that ended with 0: what it said of itself, and whether its strategy was ever checked.

    A strategy that nobody checked may be several tasks that each trained the whole job: that is a failure.
    """
    own = [r for r in journal.read(run.events) if r["rank"] == rank and r["restart"] == restart]
    said = next((r for r in reversed(own) if r["kind"] == "finish"), None)
    if said and said.get("state") != "COMPLETED":
        return 1, str(said.get("reason") or "the work called run.finish() with another state than COMPLETED")
    if plan.strategy is None and plan.tasks > 1 and plan.work in ("notebook", "script") and not own and rank == 0:
        print(
            f"hpcml: warning: {plan.tasks} tasks ran and none called hpcml.begin(); unless the work divides itself, "
            "each of them has done all of it",
            file=sys.stderr,
            flush=True,
        )
    if plan.strategy is None or any(r["kind"] == "replicas" for r in own):
        return 0, ""
    return 1, NEVER_CHECKED.format(strategy=plan.strategy)


def _last_words(log: Path, code: int) -> str:
    if code > 128 and code - 128 in list(signal.Signals):
        name = signal.Signals(code - 128).name
        return f"killed by {name}" + (" (often out of memory)" if name == "SIGKILL" else "")
    with log.open("rb") as file:
        file.seek(max(0, file.seek(0, os.SEEK_END) - 8192))
        lines = [line.strip() for line in file.read().decode(errors="replace").splitlines() if line.strip()]
    lines = [line for line in lines if not line.startswith("hpcml: rank ")]  # our own greeting is nobody's last word
    lines = [re.sub(r"^([a-z_]\w*\.)+(?=[A-Z]\w*(Error|Exception)\b)", "", line) for line in lines]
    errors = [line for line in lines if line.split(":")[0].endswith(("Error", "Exception", "Interrupt"))]
    said = f"; its last line: {lines[-1]}" if lines else ""
    return (errors[-1] if errors else f"exit code {code}{said}")[:300]


def _say(log: IO[bytes], rank: int, text: str, *, error: bool = False) -> None:
    _keep(log, text.encode() + b"\n")
    if error:
        print(text, file=sys.stderr, flush=True)
    elif rank == 0:
        _show(text.encode() + b"\n")


def _as_word(value: object) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return value if isinstance(value, str) else str(value)


def main() -> int:
    """Run this rank of the run that the environment names."""
    os.umask(0o077)
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
