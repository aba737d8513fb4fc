"""How ranks end: a rank's last words, and which of several that failed was the cause of the others' end."""

import contextlib
import re
import signal
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .. import rundir
from ..errors import STOPPED
from ..plan import NEVER_CHECKED, Plan
from ..rundir import RunDir
from ..tracking.journal import reader

# Slurm may signal the work beside its worker, on another node by another clock.
_CLOCKS_S = 1.0
_SAID = ("params", "replicas", "finish", "lost")
# What a rank says whose peer has gone: the cause is another rank. Gloo; torch's TCPStore; NCCL (ncclRemoteError);
# TensorFlow's collectives over gRPC; Horovod.
_LOST_PEER = re.compile(
    r"closed by peer|reset by peer|failed to recv, got 0 bytes|Was the remote server|remote server shutdown"
    r"|ncclRemoteError|remote process exit|Horovod has been shut down|Collective ops is aborted|UnavailableError|HorovodInternalError"
)


def judged(run: RunDir, plan: Plan, rank: int, restart: int, code: int) -> tuple[int, str]:
    """Return a rank's exit code and why it failed, by its work's exit code and by what the work said of itself.

    A strategy that nobody checked may be several tasks that each trained the whole job: that is a failure.
    """
    if code == STOPPED and rundir.heeds_stop(run, restart):
        last = [line for line in rundir.last_lines(run.log(rank), 50) if line.startswith("hpcml: stopped by ")]
        return code, last[-1].removeprefix("hpcml: ") if last else "stopped as it was asked to"
    if code:
        return code, last_words(run.log(rank), code)
    own = [record for record in records_of(run, rank, restart) if record["writer"] == "rank"]
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
    reason = NEVER_CHECKED.format(strategy=plan.strategy)
    if plan.work == "function":  # what it returned is what was asked for; the job file may be another work's
        print(f"hpcml: warning: {reason}", file=sys.stderr, flush=True)
        return 0, ""
    return 1, reason


def records_of(run: RunDir, rank: int, restart: int) -> list[dict[str, Any]]:
    """Return what one rank has said of itself, from its own files only: each of many ranks asks this at the end."""
    found: list[dict[str, Any]] = []
    for path, place in reader.event_files(run.events):
        if (place["rank"], place["restart"]) == (rank, restart):
            with contextlib.suppress(OSError), path.open("rb") as file:
                records = reader.records_of(file, place, _SAID, 0)
                found += [record for record, _ in records if isinstance(record, dict)]
    return found


def superseded(run: RunDir, restart: int) -> bool:
    """Whether the run goes on in a later execution: after a node failure the first one may still be alive.

    Each execution has files of its own in the journal, so the newest shows.
    """
    return any(place["restart"] > restart for _, place in reader.event_files(run.events))


def last_words(log: Path, code: int) -> str:
    """Return why a rank's work ended with a code other than 0: the signal, its last exception, or its last line."""
    with log.open("rb") as file:
        file.seek(max(0, file.seek(0, 2) - 8192))
        lines = [line.strip() for line in file.read().decode(errors="replace").splitlines() if line.strip()]
    lines = [line for line in lines if not line.startswith("hpcml: rank ")]  # our own greeting is nobody's last word
    if code > 128 and code - 128 in list(signal.Signals):
        name = signal.Signals(code - 128).name
        # Gloo's and NCCL's own threads abort the process when a peer has gone, and say so above a list of addresses.
        said = next((f": {line}" for line in lines if name == "SIGABRT" and lost_its_peer(line)), "")
        return f"killed by {name}{' (often out of memory)' if name == 'SIGKILL' else said}"[:300]
    lines = [re.sub(r"^(\[rank\d+\]: )?([a-z_]\w*\.)*(?=[A-Z]\w*(Error|Exception)\b)", "", line) for line in lines]
    errors = [line for line in lines if line.split(":")[0].endswith(("Error", "Exception", "Interrupt"))]
    if errors and (lost := next((line for line in lines if line.startswith("Horovod has been shut down")), "")):
        return f"{errors[-1]} {lost}"[:300]  # Keras says only that its graph failed
    said = f"; its last line: {lines[-1]}" if lines else ""
    return (errors[-1] if errors else f"exit code {code}{said}")[:300]


def lost_its_peer(reason: str) -> bool:
    """Whether a rank ended only because another rank had gone."""
    return bool(_LOST_PEER.search(reason))


def came_after(rank: Mapping[str, Any], signal_s: float) -> bool:
    """Whether a rank ended after a signal was seen; what TERM killed may be gone before any worker has noted the time."""
    return bool(rank["ended"] >= signal_s - (_CLOCKS_S if rank.get("exit_code") == 128 + signal.SIGTERM else 0))


def cause(
    ranks: Sequence[Mapping[str, Any]], tasks: int, exit_code: int, cleared_s: float | None
) -> Mapping[str, Any] | None:
    """Return the marker of the rank whose end was the cause of the run's, None where none failed.

    Before the time stands the kind: nodes' clocks differ, and a notebook's engine notices a dead kernel after another
    rank has noticed its silence. A rank that failed by itself comes first; then one that left no marker, because its
    worker was killed; then one that lost its peer; and one that was cleared away last.

    Args:
        ranks: markers of this restart.
        tasks: how many ranks there should be; 0 where that is not known.
        exit_code: srun's.
        cleared_s: when the first rank was sent a signal that ends it; None where none was.
    """
    failed = [rank for rank in ranks if rank.get("exit_code")]
    silent = sorted({*range(tasks)} - {rank["rank"] for rank in ranks}) if exit_code == 128 + signal.SIGKILL else []

    def order(rank: Mapping[str, Any]) -> tuple[int, float]:
        cleared = cleared_s is not None and came_after(rank, cleared_s)
        return (3 if cleared else 2 if lost_its_peer(rank.get("reason", "")) else 0, rank["ended"])

    first = min(failed, key=order, default=None)
    if silent and (first is None or order(first)[0] > 1):
        reason = "its worker was killed by SIGKILL (often out of memory)"
        return {"rank": silent[0], "exit_code": exit_code, "reason": reason, "ended": 0.0}
    return first
