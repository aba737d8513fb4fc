"""The states of a chain and of its steps, each a run of its own with a Slurm job of its own, or none.

What a step's own run directory and Slurm don't tell, those that it needs do: it waits for them, or it never started
because one of them failed. That holds without accounting too, when Slurm has forgotten the jobs.
"""

import contextlib
import time
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

from .. import rundir
from ..rundir import RunDir
from ..slurm.text import JobState

if TYPE_CHECKING:
    from .state import State

    Look = Callable[[RunDir], State]

NEVER = "never started: "


def is_chain(run: RunDir) -> bool:
    """Whether a run is a chain of steps."""
    return rundir.read_json(run.plan).get("work") == "chain"


def chain_of(run: RunDir) -> tuple[RunDir, Mapping[str, Any]] | None:
    """Return the chain that a run is a step of, and what the chain knows of it; None for any other run."""
    if "/" not in run.id:
        return None
    parent = RunDir(run.root, run.id.partition("/")[0])
    plan = rundir.read_json(parent.plan)
    if plan.get("work") != "chain":
        return None
    step = next((one for one in plan.get("steps") or () if one["run"] == run.id), None)
    return (parent, step) if step else None


def needed(parent: RunDir, step: Mapping[str, Any]) -> list[RunDir]:
    """Return the runs of the steps that one needs."""
    known = rundir.read_json(parent.plan).get("steps") or ()
    runs = {one["name"]: RunDir(parent.root, one["run"]) for one in known}
    return [runs[name] for name in step["needs"] if name in runs]


def beside(runs: Iterable[RunDir]) -> list[RunDir]:
    """Return all steps of the chains among some runs, and of those that a step among them belongs to."""
    tops = {RunDir(run.root, run.id.partition("/")[0]): None for run in runs}
    return [step for chain in tops if is_chain(chain) for step in rundir.children(chain)]


def has_begun(run: RunDir) -> bool:
    """Whether a step's work was ever started."""
    return run.status.exists() or run.owner.exists() or any(run.logs.glob("out.*.txt"))


def is_due(parent: RunDir, step: Mapping[str, Any], look: "Look | None" = None) -> bool:
    """Whether a step that needs no job can be done now: it is not done, and all that it needs has completed."""
    from .state import state_of

    look = look or state_of
    if rundir.read_json(RunDir(parent.root, step["run"]).status).get("final"):
        return False
    return all(look(run).name == "COMPLETED" for run in needed(parent, step))


def held_back(run: RunDir, known: JobState | None, look: "Look") -> tuple[str, str] | None:
    """Return state and reason of a step whose job waits for others', or that Slurm took out of the queue for one that failed.

    Args:
        known: what Slurm says of the job; None where it has forgotten it.
        look: what tells the state of another step.

    Returns:
        None where what Slurm says is all there is to say.
    """
    waits = known is not None and known.waiting
    if (known and not known.ended and not waits) or (told := _by_needs(run, look)) is None:
        return None
    if told[0] == "PENDING" and not waits:
        return None
    if not waits:
        note_never(run, told[1])
    return told


def without_job(run: RunDir, look: "Look") -> tuple[str, str] | None:
    """As ``held_back``, of a step that has no Slurm job: one that nobody will start any more is told too."""
    found = chain_of(run)
    if found is None or has_begun(run):
        return None
    parent, step = found
    told, alive = _by_needs(run, look), rundir.owner_is_alive(parent)
    if told and (told[0] == "CANCELLED" or step["here"] or alive):
        return told
    return ("PENDING", "") if alive else ("CANCELLED", f"{NEVER}the chain's process ended")


def _by_needs(run: RunDir, look: "Look") -> tuple[str, str] | None:
    """State and reason of a step that has not begun, by those that it needs; None where they are no reason."""
    found = chain_of(run)
    if found is None or has_begun(run):
        return None
    parent, step = found
    waits: list[str] = []
    for other in needed(parent, step):
        state, name = look(other), other.id.rpartition("/")[2]
        if state.is_final and state.name != "COMPLETED":
            reason = state.reason if state.reason.startswith(NEVER) else f"{NEVER}{name} is {state.name}"
            return "CANCELLED", reason
        if not state.is_final:
            waits.append(name)
    if waits:
        return "PENDING", f"waits for {' and '.join(waits)}"
    if step["here"] and not rundir.owner_is_alive(parent):
        return "PENDING", f"is done by hpcml sync {parent.id}"
    return None


def note_never(run: RunDir, reason: str) -> None:
    """Mark a step that will never start: what it needs is not asked about again."""
    now = time.time()
    marker = {"state": "CANCELLED", "exit_code": 1, "final": True, "reason": reason, "started": None, "ended": now}
    with contextlib.suppress(OSError):
        rundir.write_json(run.status, {**marker, "restarts": 0})


def whole(run: RunDir, plan: Mapping[str, Any], common: Mapping[str, Any], look: "Look") -> "State":
    """Return the state of a chain: it goes on while a step does, and is what the first step is that did not complete."""
    from .state import State

    own = [step for step in plan.get("steps") or () if str(step["run"]).startswith(f"{run.id}/")]
    states = [look(RunDir(run.root, step["run"])) for step in own]
    begun = [state.started for state in states if state.started]
    values = {**common, "started": min(begun, default=None)}
    left = [(step, state) for step, state in zip(own, states, strict=True) if not state.is_final]
    failed = [state for state in states if state.is_final and state.name != "COMPLETED"]
    first = next((state for state in failed if not state.reason.startswith(NEVER)), failed[0] if failed else None)
    if left:
        if all(step["here"] for step, _ in left) and not rundir.owner_is_alive(run):
            names = " and ".join(step["name"] for step, _ in left)
            return State(name="COMPLETING", reason=f"{names}: hpcml sync {run.id}", source="hpcml", **values)
        active = next((state for _, state in left if state.name != "PENDING"), left[0][1])
        jobs_begun = any(state.started for step, state in zip(own, states, strict=True) if not step["here"])
        # Slurm's other words for a step that is on its way, or cleared away, say less of the whole.
        name = "PENDING" if active.name == "PENDING" and not jobs_begun else "RUNNING"
        reason = f"{_name(active)}: {active.reason}" if active.reason else ""
        return State(name=name, reason=reason, source=active.source, **values)
    ended = max((state.ended for state in states if state.ended and state.started), default=None)
    name, reason, code = "COMPLETED", "", 0
    if first is not None:
        name, code = first.name, first.exit_code or 1
        reason = f"step {_name(first)}: {first.reason}" if first.reason else f"step {_name(first)} is {first.name}"
    marker = {"state": name, "exit_code": code, "final": True, "reason": reason, "restarts": 0}
    with contextlib.suppress(OSError):
        rundir.write_json(run.status, {**marker, "started": values["started"], "ended": ended})
    return State(name=name, reason=reason, source="hpcml", exit_code=code, **{**values, "ended": ended})


def _name(state: "State") -> str:
    return state.run_id.rpartition("/")[2]
