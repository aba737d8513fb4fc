"""To wait for a run, and to cancel it."""

import contextlib
import os
import signal
import time
from collections.abc import Callable

from .. import rundir
from ..errors import HpcmlError, ServiceSilent
from ..rundir import RunDir
from ..slurm import commands
from . import steps
from .order import children
from .state import State, state_of

POLL_S = 1.0


def wait(run: RunDir, tell: Callable[[State], None], poll_s: float = POLL_S) -> State:
    """Wait until a run has ended and return its state; ``tell`` is called with each new state.

    A controller that does not answer for a while is waited for: the job goes on without it.
    """
    last: State | None = None
    while True:
        try:
            state = state_of(run)
        except ServiceSilent:
            time.sleep(poll_s)
            continue
        if state != last:
            tell(state)
            last = state
        if state.is_final:
            return state
        time.sleep(poll_s)


def cancel(run: RunDir) -> State:
    """Cancel a run's Slurm job, or end the processes that run it on this machine; one that has ended is left as it is.

    Raises:
        HpcmlError: it runs on another machine, it is an interactive session, or scancel refused.
    """
    state = state_of(run)
    if state.is_final:
        return state
    submitted = rundir.read_json(run.submitted)
    plan = rundir.read_json(run.plan)
    if plan.get("work") == "session":
        where = "a process in an allocation" if submitted else "a process"
        raise HpcmlError(f"run {run.id} is {where}, not a job", fix=_by_hand(run))
    if state.slurm_job_id is not None and "/" in run.id and rundir.slurm_job_id(run) in (None, state.slurm_job_id):
        parent = RunDir(run.root, run.id.split("/")[0])
        if (
            rundir.slurm_job_id(parent) == state.slurm_job_id
            and rundir.read_json(parent.plan).get("work") == "comparison"
        ):
            raise HpcmlError(
                f"run {run.id} is a step of a comparison", fix=f"hpcml cancel {parent.id} cancels all of it"
            )
    if state.slurm_job_id is not None:
        with contextlib.suppress(OSError):
            rundir.write_json(run.submitted, {**submitted, "cancelled": time.time()})
        in_array = "array_index" in submitted
        commands.cancel(f"{state.slurm_job_id}_{submitted['array_index']}" if in_array else state.slurm_job_id)
    elif submitted.get("array"):
        for index in range(int(submitted["array"])):
            cancel(run.child(str(index)))
    elif plan.get("work") == "chain" and not rundir.owner_is_alive(run):
        _cancel_steps(run)
    elif plan.get("work") == "function" or rundir.owner_is_alive(run):
        _end_here(run)
    else:
        raise HpcmlError(f"run {run.id} is not a Slurm job", fix=_by_hand(run))
    return state


def _cancel_steps(run: RunDir) -> None:
    """Cancel what is left of a chain, its last step first: none begins because the one before it has gone."""
    with contextlib.suppress(OSError):
        rundir.write_json(run.submitted, {**rundir.read_json(run.submitted), "cancelled": time.time()})
    for step in reversed(children(run)):
        if rundir.slurm_job_id(step) is not None:
            cancel(step)
        elif not rundir.read_json(step.status).get("final"):
            steps.note_never(step, "cancelled before its turn")


def _by_hand(run: RunDir) -> str:
    """How to end a run that a terminal may hold, or none: after nohup, or in the background of a shell that is gone."""
    owner = rundir.read_json(run.owner)
    if not owner or not rundir.owner_is_alive(run):
        return "Ctrl-C in the terminal that it runs in"
    there = "" if rundir.is_owned_here(run) else f" on {owner['host']}"
    return f"Ctrl-C in its terminal; without one: kill {owner['pid']}{there}"


def _end_here(run: RunDir) -> None:
    """End a run of this machine as Ctrl-C in its terminal does. A function that had not begun gets its marker here."""
    told: set[int] = set()
    while not rundir.read_json(run.status).get("final") and rundir.owner_is_alive(run):
        owner = rundir.read_json(run.owner)
        if owner["host"] != os.uname().nodename:
            raise HpcmlError(f"run {run.id} runs on {owner['host']}", fix=f"hpcml cancel {run.id} there")
        if owner["pid"] not in told:
            told.add(owner["pid"])
            with contextlib.suppress(ProcessLookupError):
                os.kill(owner["pid"], signal.SIGTERM)
        time.sleep(POLL_S / 10)
    if rundir.read_json(run.plan).get("work") == "function" and not rundir.read_json(run.status):
        now = time.time()
        marker = {"state": "CANCELLED", "exit_code": 143, "final": True, "reason": "cancelled before it began"}
        rundir.write_json(run.status, {**marker, "started": now, "ended": now, "restarts": 0})
