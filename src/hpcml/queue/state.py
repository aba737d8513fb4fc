"""A run's state, climbed for: its own end marker → squeue → scontrol → sacct.

Where none of them is left it is TIMEOUT past the time limit, else UNKNOWN with the reason.
"""

import contextlib
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from .. import rundir
from ..errors import HpcmlError
from ..rundir import RunDir
from ..slurm import commands
from ..slurm.text import ENDED, WAITING, JobState
from . import orphan, steps
from .progress import progress

# Slurm acts on a time limit about 10 s late, and its clock is not ours.
LATE_S = 90
# What Slurm says of a job by its id, of an array's job by `<array's id>_<index>`; None where it doesn't know it.
Ask = Callable[[str], JobState | None]


@dataclass(frozen=True)
class State:
    """A run's state.

    Attributes:
        name: Slurm's long state name, or UNKNOWN.
        reason: why it waits, failed, or is unknown.
        source: who said so: ``marker``, ``squeue``, ``scontrol``, ``sacct`` or ``hpcml``.
        progress: the newest progress of rank 0, such as ``cell 4/9 · epoch 2/5 accuracy 0.93``.
        started, ended: seconds since the epoch; None while unknown.
        expected_start: when Slurm thinks that a waiting job begins, in seconds since the epoch; it changes all the time.
    """

    run_id: str
    name: str
    reason: str = ""
    source: str = ""
    slurm_job_id: int | None = None
    exit_code: int | None = None
    replicas_in_sync: int | None = None
    progress: str = ""
    submitted: float | None = None
    started: float | None = None
    ended: float | None = None
    expected_start: float | None = field(default=None, compare=False)

    @property
    def is_final(self) -> bool:
        """Whether the run has ended for good."""
        return self.name in ENDED or self.name == "UNKNOWN"

    @property
    def since(self) -> float | None:
        """When it came into this state, in seconds since the epoch: waiting since submission, running since its start."""
        return self.submitted if self.name in WAITING else self.started

    @property
    def told_by(self) -> str:
        """Who said so, in words; empty where nothing but the run directory was needed."""
        words = {"marker": "as the job noted at its end", "hpcml": "as its run directory shows"}
        return words.get(self.source, f"says {self.source}" if self.source else "")


def state_of(run: RunDir, ask: Ask | None = None) -> State:
    """Return a run's state.

    Args:
        ask: what to ask about jobs instead of Slurm's commands one by one.

    Raises:
        ServiceSilent: Slurm gives no answer and the marker alone doesn't tell.
    """
    marker, submitted = rundir.read_json(run.status), rundir.read_json(run.submitted)
    key = _key(run, submitted)
    if marker.get("final") and _is_queued_again(run, marker, key, ask):
        marker = {}
    common: dict[str, Any] = {
        "run_id": run.id,
        "slurm_job_id": int(key.partition("_")[0]) if key else None,
        "progress": "" if marker.get("final") else progress(run),
        "submitted": submitted.get("submitted"),
        "started": marker.get("started"),
        "ended": marker.get("ended"),
        "replicas_in_sync": marker.get("replicas_in_sync"),
    }
    if marker.get("final"):
        return State(
            name=marker["state"], reason=marker.get("reason", ""), source="marker",
            exit_code=marker.get("exit_code"), **common,
        )  # fmt: skip
    if submitted.get("array"):
        return _of_array(run, int(submitted["array"]), common, ask)
    plan = rundir.read_json(run.plan)
    if plan.get("work") == "chain":
        return steps.whole(run, plan, common, lambda step: state_of(step, ask))
    if key is None:
        told = steps.without_job(run, lambda step: state_of(step, ask))
        return _as_told(told, common) if told else _without_slurm(run, common)
    ask = ask or commands.job_state
    if plan.get("work") == "session":
        return _of_session(run, key, common, ask)
    known = ask(key)
    if told := steps.held_back(run, known, lambda step: state_of(step, ask)):
        return _as_told(told, common)
    if known is None:
        return _forgotten(run, marker, common)
    if known.ended:
        return _settled(run, marker, known, common)
    if known.waiting:  # what it did before it was put back into the queue says nothing of now
        common |= {"progress": "", "started": None, "ended": None, "replicas_in_sync": None}
        _note_wait(run, submitted, known.reason)
        return State(name=known.state, reason=known.reason, source=known.source, expected_start=known.start, **common)
    if _is_part(run):
        return _variant(run, marker, common)
    if known.start and known.start > (common["ended"] or 0):  # later than what the marker of an earlier restart says
        common |= {"started": known.start, "ended": None, "replicas_in_sync": None}
    return State(name=known.state, reason=known.reason, source=known.source, **common)


def states_of(runs: Iterable[RunDir]) -> tuple[list[State], HpcmlError | None]:
    """Return many runs' states with one question to Slurm, and why it gave no answer where it gave none.

    A run that needed the answer is then told as its run directory last showed it.
    """
    wanted = list(runs)
    markers = [rundir.read_json(run.status) for run in wanted]
    keys = [_key(run, rundir.read_json(run.submitted)) for run in wanted]
    live = [key for key, marker in zip(keys, markers, strict=True) if key and not _is_done(marker)]
    asking = [run for run, marker in zip(wanted, markers, strict=True) if not marker.get("final")]
    live += [key for run in steps.beside(asking) if (key := _key(run, rundir.read_json(run.submitted)))]
    silence: HpcmlError | None = None
    known: dict[str, JobState] = {}
    try:
        known = commands.job_states(sorted({key.partition("_")[0] for key in live}))
    except HpcmlError as error:
        silence = error

    def ask(key: str) -> JobState | None:
        if silence is not None:
            raise silence
        return known.get(key)

    return [_last_known(run, ask) for run in wanted], silence


def _last_known(run: RunDir, ask: Ask) -> State:
    try:
        return state_of(run, ask)
    except HpcmlError:
        logs = any(any(run.path.glob(pattern)) for pattern in ("logs/out.*.txt", "*/logs/out.*.txt"))
        begun = run.status.exists() or logs
        submitted = rundir.read_json(run.submitted)
        key = _key(run, submitted)
        return State(
            run_id=run.id, name="RUNNING" if begun else "PENDING", reason="as last known: Slurm gives no answer",
            source="hpcml", slurm_job_id=int(key.partition("_")[0]) if key else None, progress=progress(run),
            submitted=submitted.get("submitted"),
        )  # fmt: skip


def _key(run: RunDir, submitted: dict[str, Any]) -> str | None:
    """The name that Slurm has for a run's job, None where it has none; a variant's is its comparison's."""
    own = rundir.slurm_job_id(run)
    if own is None and "/" in run.id:
        own = rundir.slurm_job_id(RunDir(run.root, run.id.split("/")[0]))
    if own is None:
        return None
    return f"{own}_{submitted['array_index']}" if "array_index" in submitted else str(own)


def _is_done(marker: dict[str, Any]) -> bool:
    return bool(marker.get("final")) and marker.get("state") == "COMPLETED"


def _is_queued_again(run: RunDir, marker: dict[str, Any], key: str | None, ask: Ask | None) -> bool:
    """Whether a job that has left its end marker is to run again: Slurm requeues by itself, or was told to.

    Who completed is not asked about. Without an answer the marker is believed.
    """
    if key is None or _is_done(marker) or rundir.read_json(run.plan).get("work") == "session":
        return False
    try:
        known = (ask or commands.queued_state)(key)
    except HpcmlError:
        return False
    if known is None or known.ended:
        return False
    # Its restart's first rank removes the marker; a variant of a comparison waits for its turn until then.
    again = known.restarts is not None and known.restarts > (marker.get("restarts") or 0)
    return known.waiting or (again and not _is_part(run))


def _is_part(run: RunDir) -> bool:
    """Whether a run is a part of another's job, as a variant is; a step of a chain and a call of an array have their own."""
    return "/" in run.id and rundir.slurm_job_id(run) is None


def _as_told(told: tuple[str, str], common: dict[str, Any]) -> State:
    return State(name=told[0], reason=told[1], source="hpcml", **common)


def _of_session(run: RunDir, key: str, common: dict[str, Any], ask: Ask) -> State:
    """A bare run inside an allocation is one process of it: what becomes of the job tells little of the run."""
    state = _without_slurm(run, common)
    if state.name == "RUNNING" and not rundir.is_owned_here(run):
        known = ask(key)
        if known is None or known.ended:
            return State(name="UNKNOWN", reason="its allocation ended before its end marker", source="hpcml", **common)
    return state


def _variant(run: RunDir, marker: dict[str, Any], common: dict[str, Any]) -> State:
    """A variant of a comparison whose job goes on: a step of it that Slurm tells nothing about."""
    if marker:
        return State(name=marker["state"], reason=marker.get("reason", ""), source="marker", **common)
    if any(run.logs.glob("out.*.txt")):
        return State(name="RUNNING", source="hpcml", **common)
    return State(name="PENDING", reason="waits for its turn in the comparison", source="hpcml", **common)


def _of_array(run: RunDir, count: int, common: dict[str, Any], ask: Ask | None) -> State:
    """An array goes on while one of its jobs does; it is COMPLETED when all of them are, else as the first that isn't."""
    ended: list[State] = []
    for index in range(count):
        state = state_of(run.child(str(index)), ask)
        if not state.is_final:
            done = {"progress": f"{len(ended)} of {count} or more have ended"} if ended else {}
            return State(name=state.name, reason=state.reason, source=state.source, **{**common, **done})
        ended.append(state)
    worst = next((state for state in ended if state.name != "COMPLETED"), ended[0])
    reason = f"{worst.run_id}: {worst.reason}" if worst.name != "COMPLETED" else ""
    return State(name=worst.name, reason=reason, source=worst.source, exit_code=worst.exit_code, **common)


def _note_wait(run: RunDir, submitted: dict[str, Any], reason: str) -> None:
    """Keep why the job waits, for its report: afterwards nobody knows."""
    waits = submitted.get("waits") or []
    if reason and (not waits or waits[-1]["reason"] != reason):
        with contextlib.suppress(OSError):
            rundir.write_json(run.submitted, {**submitted, "waits": [*waits, {"reason": reason, "since": time.time()}]})


def _settled(run: RunDir, marker: dict[str, Any], known: JobState, common: dict[str, Any]) -> State:
    """Slurm's word on an ended job goes into the marker: without accounting it forgets the job after a while."""
    told = {"TIMEOUT": "past its time limit", "CANCELLED": "cancelled", "NODE_FAIL": "a node of the job was lost"}
    reason = told.get(known.state) or marker.get("reason") or known.reason
    code = known.exit_code if known.exit_code is not None else marker.get("exit_code")
    final = {"state": known.state, "reason": reason, "exit_code": code, "final": True, "told_by": known.source}
    with contextlib.suppress(OSError):
        rundir.write_json(run.status, {**marker, **final})
    return State(name=known.state, reason=reason, source=known.source, exit_code=code, **common)


def _without_slurm(run: RunDir, common: dict[str, Any]) -> State:
    """A local or bare run: it is running while its process is; that one has left a marker, or died without a word.

    Of one that died the ranks may have left theirs: what these say is kept as the run's.
    """
    if rundir.owner_is_alive(run):
        with contextlib.suppress(OSError):
            common = {**common, "started": run.owner.stat().st_mtime}
        return State(name="RUNNING", source="hpcml", **common)
    marker = rundir.read_json(run.status)  # again: it may have been written, and the process ended, since
    if marker:
        return _marked(marker, common)
    if "/" in run.id and not run.owner.exists() and rundir.owner_is_alive(RunDir(run.root, run.id.split("/")[0])):
        return State(name="PENDING", reason="waits for its turn in the comparison", source="hpcml", **common)
    if rundir.read_json(run.plan).get("work") in ("comparison", "session"):  # these have no launcher
        return State(name="UNKNOWN", reason="its process ended without an end marker", source="hpcml", **common)
    if orphan.is_ending(run):
        return State(name="COMPLETING", reason=f"{orphan.KILLED}; its ranks are ending", source="hpcml", **common)
    if marker := orphan.marker_of(run):
        with contextlib.suppress(OSError):
            rundir.write_json(run.status, marker)
        return _marked(marker, common)
    return State(name="UNKNOWN", reason=orphan.why_unknown(run), source="hpcml", **common)


def _marked(marker: dict[str, Any], common: dict[str, Any]) -> State:
    seen = {key: marker.get(key) for key in ("started", "ended", "replicas_in_sync", "exit_code")}
    reason = str(marker.get("reason", ""))
    return State(name=str(marker["state"]), reason=reason, source="marker", **{**common, **seen})


def _forgotten(run: RunDir, marker: dict[str, Any], common: dict[str, Any]) -> State:
    """Slurm does not know the job any more: judge by our own marker and the time limit."""
    plan = rundir.read_json(run.plan)
    begun = marker.get("started") or common.get("submitted") or 0
    seen_until = marker.get("ended") or time.time()
    limit = plan.get("time_s") or 0
    early = min(LATE_S, limit / 2)  # a short limit leaves no room for all of it
    if (marker.get("signal") or not marker) and rundir.read_json(run.submitted).get("cancelled"):
        name, reason = "CANCELLED", "cancelled by hpcml; Slurm has forgotten the job"
    elif marker and marker.get("signal") and limit and float(seen_until) - float(begun) >= limit - early:
        name, reason = "TIMEOUT", f"signal {marker['signal']} at the time limit; Slurm has forgotten the job"
    elif marker and marker.get("exit_code") == 137:
        name, reason = "FAILED", "killed by SIGKILL (often out of memory); Slurm has forgotten the job"
    elif marker and not marker.get("signal"):
        name, reason = str(marker["state"]), str(marker.get("reason", ""))
    elif marker:
        name, reason = "UNKNOWN", f"ended by {marker['signal']} before its time limit; Slurm has forgotten the job"
    elif limit and time.time() > float(begun) + limit + LATE_S and any(run.logs.glob("out.*")):
        name, reason = "TIMEOUT", "past its time limit without an end marker; Slurm has forgotten the job"
    else:
        name, reason = "UNKNOWN", "no end marker, and squeue, scontrol and sacct don't know the job"
    return State(name=name, reason=reason, source="hpcml", **common)
