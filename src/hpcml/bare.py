"""A run that no worker started: ipython, JupyterLab, a bare srun, torchrun. It does for itself what a worker does."""

import contextlib
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from . import rundir
from . import site as sites
from .errors import INTERRUPTED
from .job import project_of
from .node import batch, beside, bootstrap, session
from .node.topology import Topology
from .plan import Plan
from .rundir import RunDir
from .slurm import commands
from .tracking import journal, provenance
from .tracking.telemetry import Telemetry

# It delivers when it ends; a server that is away must not hold the shell longer than this.
DELIVERY_S = 60
# Ranks of one training end within moments of each other.
OTHERS_S = 30


@dataclass(frozen=True)
class Session:
    """A bare run of this process: what it was prepared with, and what watches it."""

    dir: RunDir
    plan: Plan
    ready: bootstrap.Bootstrap
    restart: int
    started: float
    watching: Telemetry | None


def begin(strategy: str | None, restart: int, begun: int) -> Session:
    """Prepare this process and make or join the run's directory.

    Args:
        strategy: of the training, None for none.
        restart: times that Slurm requeued the job.
        begun: runs that this process has begun before.

    Raises:
        HpcmlError: devices that were given can't be used, or no run directory can be made.
    """
    given = dict(os.environ)
    where, _ = sites.choose(None, commands.cluster_name())
    script = session.script()
    folder = project_of(script if script else Path.cwd() / "session.py")
    decided = session.plan_of(strategy, where, script, folder)
    prepared = bootstrap.prepare(os.environ, strategy, decided.keras)
    os.environ.update({k: v for k, v in prepared.variables.items() if k != bootstrap.HANDOVER})
    place = prepared.topology
    root = rundir.runs_root(where, folder)
    try:
        if place.world == 1:
            run = rundir.create(root, decided.name)
        else:
            run = rundir.adopt(root, session.shared_id(root, decided.name, place, restart, begun))
        if place.rank == 0:
            _found(run, decided)
    except OSError as error:
        raise rundir.unwritable(root, error) from None
    print(f"hpcml: run {run.id} · {strategy or 'no strategy'} · {prepared.describe()}", flush=True)
    watching = beside.watch(run, prepared, given, restart)
    return Session(run, decided, prepared, restart, time.time(), watching)


def _found(run: RunDir, decided: Plan) -> None:
    """Write what launchers write of their runs."""
    rundir.write_json(run.plan, decided.to_json())
    provenance.begin(run, decided)()
    provenance.complete(run, Path(decided.project))
    rundir.claim(run)
    if os.environ.get("SLURM_JOB_ID"):
        submitted = {"slurm_job_id": int(os.environ["SLURM_JOB_ID"]), "submitted": time.time()}
        rundir.write_json(run.submitted, submitted)


def end(held: Session, code: int, reason: str, untold: int) -> None:
    """Write the end marker of this rank; rank 0 waits for the others', writes the run's, and delivers to MLflow.

    Args:
        code: exit code.
        untold: points that the journal could not keep and not tell of.
    """
    if held.watching:
        held.watching.stop()
    try:
        _mark(held, code, reason, untold)
    except OSError as error:
        print(f"hpcml: warning: the run has no end marker: {error}", file=sys.stderr, flush=True)
    if held.ready.topology.rank == 0:
        _deliver(held.dir)


def _mark(held: Session, code: int, reason: str, untold: int) -> None:
    run, number = held.dir, held.ready.topology.rank
    rank = {"rank": number, "exit_code": code, "reason": reason, "restart": held.restart}
    checks = (record for record in journal.read(run.events, kinds={"replicas"}) if record["rank"] == number)
    replicas = next((check["in_sync"] for check in checks), None)
    lost = journal.lost(run.events, number, held.restart) + untold
    left_out = journal.left_out(run.events, number, held.restart)
    ended = {"replicas_in_sync": replicas, "lost": lost, "left_out": left_out}
    ended |= {"started": held.started, "ended": time.time()}
    rundir.write_json(run.status_of(number), {**rank, **ended})
    if number:
        return
    missing = _wait_for_others(run, held.ready.topology, held.restart)
    marker = batch.close_run(run, code)
    if code == INTERRUPTED:
        marker |= {"state": "CANCELLED"}
        rundir.write_json(run.status, marker)
    if missing:
        text = f"rank {missing[0]} gave no end marker within {OTHERS_S} s of rank 0's"
        marker |= {"state": "FAILED", "exit_code": 1, "reason": marker["reason"] or text}
        rundir.write_json(run.status, marker)
    print(f"hpcml: run {run.id} · {marker['state']} · {run.path}", flush=True)


def _wait_for_others(run: RunDir, place: Topology, restart: int) -> list[int]:
    """Wait, bounded, until the other ranks have left their markers; returns those that have not."""
    deadline = time.monotonic() + OTHERS_S
    while True:
        ended = [rundir.read_json(run.status_of(rank)) for rank in range(place.world)]
        missing = [rank for rank, marker in enumerate(ended) if marker.get("restart", -1) != restart]
        if not missing or time.monotonic() > deadline:
            return missing
        time.sleep(0.1)


def _deliver(run: RunDir) -> None:
    """Deliver in a process of its own, so that MLflow's imports, threads and failures stay out of this one."""
    with contextlib.suppress(OSError):
        words = [sys.executable, "-m", "hpcml.cli", "sync", run.id]
        environment = {**os.environ, "HPCML_RUNS": str(run.root)}
        try:
            done = subprocess.run(words, env=environment, timeout=DELIVERY_S, check=False, stdin=subprocess.DEVNULL)
            silent = done.returncode != 0
        except subprocess.TimeoutExpired:
            silent = True
        if silent:
            print(f"hpcml: not delivered to MLflow; nothing is lost: hpcml sync {run.id}", file=sys.stderr)
