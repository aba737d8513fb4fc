"""A run of this machine whose launcher was killed: how it ended, from the markers that its ranks left.

The launcher writes a run's end marker last. Where it could not, this says what it would have said.
"""

import time
from collections.abc import Mapping, Sequence
from typing import Any

from .. import rundir
from ..errors import STOPPED
from ..rundir import RunDir

KILLED = "its launcher was killed"
# A worker is sent TERM when its launcher dies, gives its work 20 s to save, and then writes its marker.
ENDING_S = 30
# A rank that TERM ended may be gone before any worker has noted the time of the signal.
_CLOCKS_S = 1.0


def is_ending(run: RunDir) -> bool:
    """Whether ranks whose launcher has died may still be saving: they were told to stop a moment ago."""
    stop = rundir.read_json(run.stop)
    told = stop.get("signal") not in (None, "SIGUSR2") and isinstance(stop.get("time"), int | float)
    return told and time.time() < stop["time"] + ENDING_S and bool(_missing(run, _ranks(run)))


def marker_of(run: RunDir) -> dict[str, Any]:
    """Return the end marker that a killed launcher would have left; empty where a rank's own is missing."""
    ranks = _ranks(run)
    if not ranks or _missing(run, ranks):
        return {}
    restart = max(int(rank.get("restart") or 0) for rank in ranks)
    stop = rundir.read_json(run.stop)
    stopped = stop.get("restart") == restart and stop.get("signal") != "SIGUSR2"
    told_s = float(stop.get("time") or 0.0) - _CLOCKS_S
    was_ended = stopped and all(rank["ended"] >= told_s for rank in ranks)
    failed = min((rank for rank in ranks if rank["exit_code"]), key=lambda rank: float(rank["ended"]), default=None)
    code = int(failed["exit_code"]) if failed else 0
    reason = str(failed.get("reason") or "") if failed else ""
    if was_ended:  # as a launcher says that a signal ends
        state, reason = "CANCELLED", f"{KILLED}" + (f"; {reason}" if code == STOPPED else ", which ended the work")
    elif failed:
        state, reason = "CANCELLED" if code == STOPPED else "FAILED", f"{reason}; {KILLED} too".removeprefix("; ")
    else:
        state = "COMPLETED"
    return {
        "state": state,
        "exit_code": code or (143 if was_ended else 0),
        "final": True,
        "reason": reason,
        "failed_rank": failed["rank"] if failed else None,
        "signal": stop["signal"] if was_ended else None,
        "replicas_in_sync": next((rank["replicas_in_sync"] for rank in ranks if rank.get("replicas_in_sync")), None),
        "lost": sum(rank.get("lost") or 0 for rank in ranks),
        "started": min(float(rank["started"]) for rank in ranks),
        "ended": max(float(rank["ended"]) for rank in ranks),
        "restarts": restart,
        "slurm_job_id": None,
    }


def why_unknown(run: RunDir) -> str:
    """Return what can be said of a run whose ranks have not all left a marker."""
    ranks = _ranks(run)
    if not ranks:
        return "its process ended without an end marker"
    silent = _missing(run, ranks)
    whose = f"rank{'s' * (len(silent) > 1)} {', '.join(map(str, silent))}"
    first = min(ranks, key=lambda rank: float(rank["ended"]))
    said = f"; rank {first['rank']}: {first['reason']}" if first.get("reason") else ""
    return f"{KILLED}, and {whose} left no end marker{said}"


def _ranks(run: RunDir) -> list[dict[str, Any]]:
    """The ranks' markers of this launcher's time: what is older than its claim is of an earlier restart."""
    found = []
    for path in sorted(run.path.glob("status.*.json")):
        try:
            is_new = path.stat().st_mtime_ns >= run.owner.stat().st_mtime_ns
        except OSError:
            continue
        marker = rundir.read_json(path)
        if is_new and all(
            isinstance(marker.get(key), int | float) for key in ("rank", "exit_code", "started", "ended")
        ):
            found.append(marker)
    return found


def _missing(run: RunDir, ranks: Sequence[Mapping[str, Any]]) -> list[int]:
    plan = rundir.read_json(run.plan)
    tasks = int(plan.get("nodes") or 1) * int(plan.get("tasks_per_node") or 1)
    return sorted({*range(tasks)} - {int(rank["rank"]) for rank in ranks})
