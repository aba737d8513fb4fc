"""Whether a run that has ended can go on from a checkpoint, and how to say so."""

from .. import rundir
from ..errors import STOPPED
from ..rundir import RunDir
from ..slurm.text import ENDED

# It would fail again from the checkpoint, unless something from outside ended it: KILL and TERM among that.
_FROM_OUTSIDE = (STOPPED, 137, 143)


def step_to_resume(run: RunDir, state: str, exit_code: int | None) -> int | None:
    """Return the step of the checkpoint that ``hpcml resume`` lets a run go on from; None where that makes no sense.

    Args:
        state: of the run, as Slurm names it, or UNKNOWN.
    """
    plan = rundir.read_json(run.plan)
    if "/" in run.id or plan.get("work") not in ("notebook", "script", "command"):  # parts of others don't go on alone
        return None
    if state == "COMPLETED" or state not in {*ENDED, "UNKNOWN"}:
        return None
    if state == "FAILED" and exit_code not in _FROM_OUTSIDE:
        return None
    restart, step = rundir.kept_at(run)
    return step if restart >= 0 else None


def in_words(run_id: str, step: int) -> str:
    """Return the command that lets a run go on, and from where."""
    return f"hpcml resume {run_id} goes on from step {step}"
