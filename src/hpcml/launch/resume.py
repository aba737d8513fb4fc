"""A run that has ended goes on from its checkpoint, in its own directory: in the queue where it was queued, else here."""

import contextlib
import fcntl
import os
from collections.abc import Iterator

from .. import queue, rundir
from ..errors import HpcmlError
from ..plan import Plan, from_json
from ..rundir import RunDir
from ..tracking.journal import reader
from . import slurm


def ready(run: RunDir) -> Plan:
    """Return the plan of a run that can go on.

    Raises:
        HpcmlError: it has not ended, it has completed, it kept no checkpoint, or it is a part of another.
        ServiceSilent: Slurm gives no answer.
    """
    _check(run)
    return from_json(rundir.read_json(run.plan))


def _check(run: RunDir) -> None:
    data = rundir.read_json(run.plan)
    if not data or "/" in run.id or data.get("work") not in ("notebook", "script", "command"):
        fix = "hpcml submit or hpcml compare starts it anew"
        raise HpcmlError(f"run {run.id} can't be resumed: it is no single job of hpcml", fix=fix)
    state = queue.state_of(run)
    if not state.is_final:
        fix = f"hpcml logs -f {run.id} follows it, hpcml cancel {run.id} ends it"
        raise HpcmlError(f"run {run.id} has not ended: it is {state.name}", fix=fix)
    if state.name == "COMPLETED":
        raise HpcmlError(
            f"run {run.id} has completed: there is nothing to go on with", fix="hpcml submit starts it anew"
        )
    if rundir.kept_at(run)[0] < 0:
        fix = "keep=[optimizer] in run.epochs(), or keep=True in run.callbacks(), makes a training keep them"
        raise HpcmlError(f"run {run.id} kept no checkpoint", origin=str(run.checkpoints), fix=fix)


def begin(run: RunDir, plan: Plan) -> int | None:
    """Count a resumption, and queue the run's script again where it was queued; returns Slurm's job id.

    None where the run is one of this machine: it then is to be run here, by ``local.run``.

    Raises:
        HpcmlError: somebody else has resumed it meanwhile, or sbatch refused; the run is as it was.
    """
    with _alone(run):
        _check(run)
        return _begin(run, plan)


@contextlib.contextmanager
def _alone(run: RunDir) -> Iterator[None]:
    """Two who resume one run come one after the other, and the second finds that it goes on."""
    folder = os.open(run.path, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.flock(folder, fcntl.LOCK_EX)
        yield
    finally:
        os.close(folder)


def _begin(run: RunDir, plan: Plan) -> int | None:
    restarts = (place["restart"] for _, place in reader.event_files(run.events))
    os.environ["HPCML_RESUMED"] = str(max(restarts, default=0) + 1)
    marker = rundir.read_json(run.status)
    queued = rundir.slurm_job_id(run) is not None
    run.status.unlink(missing_ok=True)
    try:
        job_id = slurm.queue(run, plan, run.script.read_text(encoding="utf-8")) if queued else None
    except BaseException:
        rundir.write_json(run.status, marker)
        raise
    if not queued:
        rundir.claim(run)
    run.report.unlink(missing_ok=True)
    return job_id
