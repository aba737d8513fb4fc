"""What a person asks about runs: their state, progress and logs, and to cancel them.

A run's state is climbed for: its own end marker → squeue → scontrol → sacct. Where none of them is left it is
TIMEOUT past the time limit, else UNKNOWN with the reason.
"""

import contextlib
import os
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import rundir
from .errors import HpcmlError, ServiceSilent
from .rundir import RunDir
from .slurm import commands
from .slurm.text import ENDED, JobState
from .tracking import journal

# Slurm acts on a time limit about 10 s late, and its clock is not ours.
LATE_S = 90
POLL_S = 1.0


@dataclass(frozen=True)
class State:
    """A run's state.

    Attributes:
        name: Slurm's long state name, or UNKNOWN.
        reason: why it waits, failed, or is unknown.
        source: who said so: ``marker``, ``squeue``, ``scontrol``, ``sacct`` or ``hpcml``.
        progress: the newest progress of rank 0, such as ``cell 4/9 · epoch 2/5 accuracy 0.93``.
        started, ended: seconds since the epoch; None while unknown.
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

    @property
    def is_final(self) -> bool:
        """Whether the run has ended for good."""
        return self.name in ENDED or self.name == "UNKNOWN"


def state_of(run: RunDir) -> State:
    """Return a run's state.

    Raises:
        ServiceSilent: Slurm gives no answer and the marker alone doesn't tell.
    """
    marker = rundir.read_json(run.status)
    submitted = rundir.read_json(run.submitted)
    parent = RunDir(run.root, run.id.split("/")[0])
    job_id = rundir.slurm_job_id(run) or (rundir.slurm_job_id(parent) if "/" in run.id else None)
    common: dict[str, Any] = {
        "run_id": run.id,
        "slurm_job_id": job_id,
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
        return _of_array(run, int(submitted["array"]), common)
    if job_id is None:
        return _without_slurm(run, common)
    if rundir.read_json(run.plan).get("work") == "session":
        return _of_session(run, job_id, common)
    in_array = "array_index" in submitted
    known = commands.job_state(f"{job_id}_{submitted['array_index']}" if in_array else job_id)
    if known is None:
        return _forgotten(run, marker, common)
    if "/" in run.id and not in_array and not known.ended:
        return _variant(run, marker, common)
    if known.ended:
        return _settled(run, marker, known, common)
    return State(name=known.state, reason=known.reason, source=known.source, **common)


def _of_session(run: RunDir, job_id: int, common: dict[str, Any]) -> State:
    """A bare run inside an allocation is one process of it: what becomes of the job tells little of the run."""
    state = _without_slurm(run, common)
    if state.name == "RUNNING" and not rundir.is_owned_here(run):
        known = commands.job_state(job_id)
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


def _of_array(run: RunDir, count: int, common: dict[str, Any]) -> State:
    """An array goes on while one of its jobs does; it is COMPLETED when all of them are, else as the first that isn't."""
    ended: list[State] = []
    for index in range(count):
        state = state_of(run.child(str(index)))
        if not state.is_final:
            done = {"progress": f"{len(ended)} of {count} or more have ended"} if ended else {}
            return State(name=state.name, reason=state.reason, source=state.source, **{**common, **done})
        ended.append(state)
    worst = next((state for state in ended if state.name != "COMPLETED"), ended[0])
    reason = f"{worst.run_id}: {worst.reason}" if worst.name != "COMPLETED" else ""
    return State(name=worst.name, reason=reason, source=worst.source, exit_code=worst.exit_code, **common)


def _settled(run: RunDir, marker: dict[str, Any], known: JobState, common: dict[str, Any]) -> State:
    """Slurm's word on an ended job goes into the marker: without accounting it forgets the job after a while."""
    told = {"TIMEOUT": "past its time limit", "CANCELLED": "cancelled"}
    reason = told.get(known.state) or marker.get("reason") or known.reason
    code = known.exit_code if known.exit_code is not None else marker.get("exit_code")
    final = {"state": known.state, "reason": reason, "exit_code": code, "final": True, "told_by": known.source}
    with contextlib.suppress(OSError):
        rundir.write_json(run.status, {**marker, **final})
    return State(name=known.state, reason=reason, source=known.source, exit_code=code, **common)


def progress(run: RunDir) -> str:
    """Return how far rank 0 is, in words; empty before it said anything."""
    variants = rundir.children(run) if rundir.read_json(run.plan).get("work") == "comparison" else []
    if variants:
        names = rundir.read_json(run.plan)["target"]
        number = min(sum(run.child(name).status.exists() for name in names), len(names) - 1)
        return f"[{number + 1}/{len(names)}] {names[number]} · {progress(run.child(names[number]))}".rstrip(" ·")
    newest: dict[str, str] = {}
    for record in journal.read(run.events):
        if record["kind"] == "progress" and record["rank"] == 0:
            text = f" {record['text']}" if record.get("text") else ""
            unit = record["unit"]
            done = record["done"] + (unit == "cell" and record["done"] < record["total"])  # the cell that it is in
            newest[unit] = text.strip() if unit == "epoch" and text else f"{unit} {done}/{record['total']}{text}"
    return " · ".join(newest[unit] for unit in sorted(newest))


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
    """Cancel a run's Slurm job; a run that has ended already is left as it is.

    Raises:
        HpcmlError: the run has no Slurm job, or scancel refused.
    """
    state = state_of(run)
    if state.is_final:
        return state
    submitted = rundir.read_json(run.submitted)
    plan = rundir.read_json(run.plan)
    if plan.get("work") == "session":
        raise HpcmlError(
            f"run {run.id} is a process in an allocation, not a job", fix="Ctrl-C where it runs, or end it there"
        )
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
    elif plan.get("work") == "function":
        _end_here(run)
    else:
        raise HpcmlError(f"run {run.id} is not a Slurm job", fix="it runs in a terminal of yours: Ctrl-C there")
    return state


def _end_here(run: RunDir) -> None:
    """End a function on this machine: its processes belong to no terminal. One that had not begun gets its marker here."""
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
    if not rundir.read_json(run.status):
        now = time.time()
        marker = {"state": "CANCELLED", "exit_code": 143, "final": True, "reason": "cancelled before it began"}
        rundir.write_json(run.status, {**marker, "started": now, "ended": now, "restarts": 0})


def log_paths(run: RunDir) -> list[Path]:
    """Return a run's logs: Slurm's own first, then each rank's by rank; of a comparison those of its variants."""
    slurm = sorted(run.logs.glob("slurm-*.out"))
    ranks = sorted(run.logs.glob("out.*.txt"), key=lambda path: int(path.name.split(".")[1]))
    variants = sorted(path for path in run.path.glob("*/logs") if path.parent != run.code)
    children = [path for child in variants for path in sorted(child.glob("out.*.txt"))]
    return slurm + ranks + children


def follow(run: RunDir, ended: Callable[[], bool], poll_s: float = POLL_S / 2) -> Iterator[tuple[Path, str]]:
    """Yield each new line of every rank's log with its path, until the run has ended; by polling, for Lustre and NFS."""
    at: dict[Path, int] = {}
    rest: dict[Path, bytes] = {}
    while True:
        over = ended()
        for path in [p for p in log_paths(run) if p.name.startswith("out.")]:
            with path.open("rb") as file:
                file.seek(at.get(path, 0))
                text = rest.pop(path, b"") + file.read()
                at[path] = file.tell()
            *lines, last = text.split(b"\n")
            if last and not over:
                rest[path] = last
            elif last:
                lines.append(last)
            yield from ((path, line.decode(errors="replace")) for line in lines)
        if over:
            return
        time.sleep(poll_s)


def _without_slurm(run: RunDir, common: dict[str, Any]) -> State:
    """A local or bare run: it is running while its process is; that one has left a marker, or died without a word."""
    if rundir.owner_is_alive(run):
        return State(name="RUNNING", source="hpcml", **common)
    marker = rundir.read_json(run.status)  # again: it may have been written, and the process ended, since
    if marker:
        seen = {key: marker.get(key) for key in ("started", "ended", "replicas_in_sync", "exit_code")}
        reason = str(marker.get("reason", ""))
        return State(name=str(marker["state"]), reason=reason, source="marker", **{**common, **seen})
    if "/" in run.id and not run.owner.exists() and rundir.owner_is_alive(RunDir(run.root, run.id.split("/")[0])):
        return State(name="PENDING", reason="waits for its turn in the comparison", source="hpcml", **common)
    reason = "its process ended without an end marker"
    return State(name="UNKNOWN", reason=reason, source="hpcml", **common)


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
