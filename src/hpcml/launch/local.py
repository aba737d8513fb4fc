"""Run a plan here and now: the same workers as child processes, or as a step of the allocation that we are in."""

import contextlib
import os
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from queue import Empty, SimpleQueue
from types import FrameType

from .. import provision, rundir
from ..interpreter import need_python, python_of
from ..node import batch, bootstrap, topology
from ..plan import Plan
from ..rundir import RunDir
from ..slurm import commands
from .prepare import with_data

# After TERM the ranks have this long before KILL: a little more than a worker gives its child.
GRACE_S = 25


def make(plan: Plan, root: Path) -> RunDir:
    """Make the run directory of a plan that is to run here; nothing stays behind where that fails.

    Raises:
        HpcmlError: its Python is not there, its data can't be had, or the project can't be copied.
    """
    need_python(plan)
    plan = with_data(plan)
    run_dir = rundir.create(root, plan.name)
    try:
        provision.fill(run_dir, plan)
    except BaseException:
        shutil.rmtree(run_dir.path, ignore_errors=True)
        raise
    return run_dir


def run(plan: Plan, run_dir: RunDir) -> dict[str, object]:
    """Run all ranks of a plan in a prepared run directory and return the end marker.

    A rank that fails ends the others; the time limit ends them all (state TIMEOUT); Ctrl-C too (CANCELLED).
    """
    rundir.claim(run_dir)
    ended = _Ended()
    with ended.watching():
        workers = _start(plan, run_dir)
        ended.wait(workers, plan.time_s)
        _end(workers)
    codes = [worker.returncode for worker in workers]
    worst = next((code if code > 0 else 128 - code for code in codes if code), 0)
    marker = batch.close_run(run_dir, worst)
    if ended.cause:
        reason = {"TIMEOUT": f"past the time limit of {plan.time_s} s", "CANCELLED": "interrupted"}[ended.cause]
        marker |= {"state": ended.cause, "reason": reason}
    marker |= {"final": True}
    rundir.write_json(run_dir.status, marker)
    return marker


class _Ended:
    """Why the workers are being ended from outside; set by signals and the time limit."""

    def __init__(self) -> None:
        self.cause = ""
        self._exits: SimpleQueue[int] = SimpleQueue()  # one that a signal handler may put into (reentrant)

    def wait(self, workers: Sequence[subprocess.Popen[bytes]], time_s: int) -> None:
        """Wait until all workers have ended or one has failed, the time is up, or a signal came; nothing polls meanwhile."""
        for worker in workers:
            threading.Thread(target=lambda worker=worker: self._exits.put(worker.wait()), daemon=True).start()
        deadline = time.monotonic() + time_s
        for _ in workers:
            try:
                code = self._exits.get(timeout=max(0.0, deadline - time.monotonic()) if time_s else None)
            except Empty:
                self.cause = "TIMEOUT"
            if self.cause or code:
                return

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Let INT, TERM and HUP (the terminal has gone) end the workers instead of this process."""

        def handler(number: int, frame: FrameType | None) -> None:
            if not self.cause:
                with contextlib.suppress(OSError):  # not print: it may be printing
                    os.write(2, f"\nhpcml: stopping; the work has up to {GRACE_S} s to save\n".encode())
            self.cause = "CANCELLED"
            self._exits.put(0)

        before = {number: signal.signal(number, handler) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
        try:
            yield
        finally:
            for number, old in before.items():
                signal.signal(number, old)


def _start(plan: Plan, run_dir: RunDir) -> list[subprocess.Popen[bytes]]:
    own = {"HPCML_RUN": run_dir.id, "HPCML_RUNS": str(run_dir.root), "HPCML_PROJECT": plan.project}
    python = python_of(plan)
    inside = bool(os.environ.get("SLURM_JOB_ID"))
    if inside and plan.nodes > 1:
        words = ["srun", "--overlap", f"--nodes={plan.nodes}", f"--ntasks={plan.tasks}"]
        words += [f"--ntasks-per-node={plan.tasks_per_node}", f"--cpus-per-task={plan.cpus_per_task}"]
        environment = {**commands.clean_environment(bootstrap.outer_environment(os.environ)), **_job_variables(), **own}
        return [_popen([*words, "--kill-on-bad-exit=1", python, "-P", "-m", "hpcml.node.worker"], environment)]
    environment = {**bootstrap.outer_environment(os.environ), **own, "HPCML_CPUS_PER_TASK": str(plan.cpus_per_task)}
    environment.setdefault("HPCML_PORT", str(topology.free_first_port(plan.tasks)))
    # submitit names a result by the last of these; its local controller knows one task, us.
    names = ("HPCML_RANK", "SUBMITIT_LOCAL_GLOBALID") if plan.work == "function" else ("HPCML_RANK",)
    ranks = ({**dict.fromkeys(names, str(rank)), "HPCML_WORLD_SIZE": str(plan.tasks)} for rank in range(plan.tasks))
    return [_popen([python, "-P", "-m", "hpcml.node.worker"], {**environment, **rank}) for rank in ranks]


def _popen(words: list[str], environment: dict[str, str]) -> subprocess.Popen[bytes]:
    # A session of their own: Ctrl-C at the terminal reaches the ranks through us, once.
    return subprocess.Popen(words, env=environment, stdin=subprocess.DEVNULL, start_new_session=True)


def _job_variables() -> dict[str, str]:
    """What srun needs to find the allocation that we are in, without what binds a step."""
    kept = (
        "SLURM_JOB_ID",
        "SLURM_JOBID",
        "SLURM_JOB_NODELIST",
        "SLURM_NODELIST",
        "SLURM_JOB_NUM_NODES",
        "SLURM_NNODES",
    )
    return {name: os.environ[name] for name in kept if name in os.environ}


def _end(workers: list[subprocess.Popen[bytes]]) -> None:
    for worker in workers:
        if worker.poll() is None:
            worker.send_signal(signal.SIGTERM)
    deadline = time.monotonic() + GRACE_S
    for worker in workers:
        try:
            worker.wait(max(0.1, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            worker.kill()
            worker.wait()
