"""The batch script's own part of a run: ``open`` it before srun, ``close`` it after.

Under ``hpcml submit`` the run is there already and ``open`` is not called. Standard library only.
"""

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .. import facts, job, plan, provision, rundir, site
from ..errors import STOPPED, HpcmlError
from ..rundir import RunDir
from ..slurm import commands
from . import ending

_EARLY_S = 75  # a minute that Slurm may warn too early, and what passes between the job's start and its ranks'
# The last delivery of a job that delivers itself: the end marker and the files. What is late stays for `hpcml sync`.
FINAL_DELIVERY_S = 60
_STATES = {0: "COMPLETED", STOPPED: "CANCELLED"}  # it was asked to stop, and did


def open_run(
    job_file: Path, site_name: str, params: dict[str, str], settings: dict[str, str], name: str | None = None
) -> RunDir:
    """Make the run directory of a job started by a plain ``sbatch``; a requeued job gets its first one again.

    Args:
        name: the variant's, below a parent run that ``$HPCML_RUN`` names.
    """
    where = site.load(site_name)
    wanted = job.load(job_file, params, settings)
    decided = plan.resolve(wanted, where, facts.gather(wanted, where, ask_queue=False))
    if decided.data.version:
        from ..data.versions import jobs

        decided = jobs.open_on_node(decided)
    root = rundir.runs_root(where, wanted.project)
    job_id = int(os.environ.get("SLURM_JOB_ID", "0") or 0)
    if rundir.restart_of(os.environ):
        earlier = next((run for run in rundir.every(root) if rundir.slurm_job_id(run) == job_id), None)
        if earlier:
            return earlier
    run = rundir.create(root, decided.name, time.time())
    provision.fill(run, decided, job_id or None)
    return run


def forget_earlier(run: RunDir, restart: int) -> None:
    """Remove the end marker of an earlier restart: a requeued job has not ended."""
    marker = rundir.read_json(run.status)
    if marker and marker.get("restarts", 0) < restart:
        run.status.unlink(missing_ok=True)


def close_run(run: RunDir, exit_code: int, signal: str | None = None) -> dict[str, Any]:
    """Write the end marker from the ranks' markers and return it.

    ``final`` tells whether the marker decides the state: it does where no stop signal came before the end, no rank was
    killed, and all have left their markers (srun ends with 0 when Slurm takes a lost node's job back into the queue);
    otherwise Slurm knows better (CANCELLED, TIMEOUT, PREEMPTED, OUT_OF_MEMORY, …), also of work that
    answered TERM with exit code 0. USR2 is a warning only: work that ends well after it is COMPLETED.
    """
    restart, now = rundir.restart_of(os.environ), time.time()
    ranks = [rundir.read_json(path) for path in sorted(run.path.glob("status.*.json"))]
    ranks = [rank for rank in ranks if rank.get("restart", 0) == restart]
    plan_data = rundir.read_json(run.plan)
    names = plan_data.get("target", ()) if plan_data.get("work") == "comparison" else ()
    variants = [marker for name in names if (marker := rundir.read_json(run.child(name).status))]
    stop = rundir.read_json(run.stop)
    stop = stop if stop.get("restart", -1) == restart else {}
    cleared_s = stop["time"] if stop and stop["signal"] != "SIGUSR2" else None
    tasks = 0 if signal or names else plan_data.get("nodes", 0) * plan_data.get("tasks_per_node", 0)
    failed = ending.cause(ranks, tasks, exit_code, cleared_s)
    ends = [failed] if failed else ranks
    if stop and all(ending.came_after(rank, stop["time"]) for rank in ends):
        signal = signal or str(stop["signal"])
    elif ends:
        signal = None  # the ranks ended by themselves first; the signal came from clearing the others away
    if failed:
        exit_code = int(failed["exit_code"])
    killed, silent = exit_code == 137, exit_code == 0 and len(ranks) < tasks
    ended: dict[str, Any] = {
        "state": _STATES.get(exit_code, "FAILED"),
        "exit_code": exit_code,
        "final": not (signal or killed or silent) or (exit_code in (0, STOPPED) and str(signal).endswith("USR2")),
        "reason": failed.get("reason", "") if failed else "",
        "failed_rank": failed["rank"] if failed else None,
        "signal": signal,
        "replicas_in_sync": next((r["replicas_in_sync"] for r in ranks if r.get("replicas_in_sync")), None),
        "lost": sum(rank.get("lost") or 0 for rank in ranks),
        "started": min((part.get("started", now) for part in ranks or variants), default=now),
        "ended": _work_ended(ranks or variants, now) if len(ranks) >= tasks else now,
        "restarts": restart,
        "slurm_job_id": int(os.environ.get("SLURM_JOB_ID", "0") or 0) or rundir.slurm_job_id(run),
    }
    rundir.write_json(run.status, ended)
    return ended


def _work_ended(parts: Sequence[Mapping[str, Any]], now: float) -> float:
    """When the last rank's work ended: what comes after, such as delivery, is not the run's time."""
    return max((part.get("ended") or now for part in parts), default=now)


def goes_on(run: RunDir, marker: Mapping[str, Any]) -> bool:
    """Whether a run is to be put back into the queue: stopped before its time limit, or a rank killed, and it came further.

    Work that failed would fail again. After a TERM a job that Slurm cancels, or whose time is over, stays so; one that still
    runs is preempted, and would be requeued by Slurm if it had not stopped first.
    """
    plan_data = rundir.read_json(run.plan)
    is_part = "/" in run.id and rundir.slurm_job_id(run) is None  # of a job that is more than this run
    if is_part or plan_data.get("work") in ("comparison", "function"):
        return False
    most = plan_data.get("slurm", {}).get("max_requeues", 0)
    warned = marker["signal"] in ("USR2", "SIGUSR2") and marker["exit_code"] in (STOPPED, 137)
    killed = marker["exit_code"] == 137 and not marker["signal"]
    if rundir.kept_at(run)[0] != marker["restarts"]:
        return False
    preempted = marker["exit_code"] == STOPPED and marker["signal"] in ("TERM", "SIGTERM") and _still_runs()
    return preempted or (marker["restarts"] < most and (warned or killed))


def out_of_time(run: RunDir, marker: dict[str, Any]) -> dict[str, Any]:
    """Return the marker of a run that was stopped before its time limit and is not to be requeued again.

    One that was warned sooner than Slurm would have done it was stopped by a person.
    """
    plan_data, stop = rundir.read_json(run.plan), rundir.read_json(run.stop)
    most, limit_s = plan_data.get("slurm", {}).get("max_requeues", 0), plan_data.get("time_s", 0)
    warned = marker["exit_code"] == STOPPED and str(marker["signal"]).endswith("USR2") and "time" in stop
    if not warned or not 0 < most <= marker["restarts"]:  # another reason keeps it out of the queue
        return marker
    if stop["time"] - marker["started"] < limit_s - plan.warning_s(limit_s) - _EARLY_S:
        return marker
    times = f"the {most} requeues that it may have (max_requeues) are used up"
    ended = {**marker, "state": "TIMEOUT", "reason": f"{marker['reason']}, just before its time limit; {times}"}
    rundir.write_json(run.status, ended)
    return ended


def _still_runs() -> bool:
    with contextlib.suppress(HpcmlError):
        known = commands.job_state(os.environ["SLURM_JOB_ID"])
        return known is not None and known.state == "RUNNING"
    return False


def _requeue(run: RunDir, marker: Mapping[str, Any]) -> None:
    """Put the job back into the queue; where Slurm refuses, the run has ended."""
    restart, step = marker["restarts"], rundir.kept_at(run)[1]
    rundir.write_json(run.status, {**marker, "final": False})
    print(f"hpcml: run {run.id} is requeued (restart {restart + 1}) and goes on from step {step}", flush=True)
    try:
        commands.requeue(os.environ["SLURM_JOB_ID"])
    except HpcmlError as error:
        rundir.write_json(run.status, marker)
        print(f"hpcml: {error}", file=sys.stderr, flush=True)


def _report(run: RunDir) -> None:
    """Make the report where the job itself delivers it; elsewhere the next command that sees the run ended does."""
    words = [sys.executable, "-P", "-m", "hpcml.report", str(run.root), run.id]
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        subprocess.run(words, stdin=subprocess.DEVNULL, timeout=FINAL_DELIVERY_S, check=False)


def main() -> int:
    """``open JOB --site S`` prints the run's id; ``close EXIT_CODE`` writes its marker."""
    import argparse

    parser = argparse.ArgumentParser(prog="hpcml.node.batch")
    verbs = parser.add_subparsers(dest="verb", required=True)
    opening = verbs.add_parser("open")
    opening.add_argument("job", type=Path)
    opening.add_argument("--site", required=True)
    opening.add_argument("--overrides", type=json.loads, default={})
    closing = verbs.add_parser("close")
    closing.add_argument("exit_code", type=int)
    closing.add_argument("--signal")
    asked = parser.parse_args()
    os.umask(0o077)
    try:
        if asked.verb == "open":
            values = asked.overrides
            print(open_run(asked.job, asked.site, values.get("params", {}), values.get("settings", {})).id)
            return 0
        run = current_run()
        if ending.superseded(run, rundir.restart_of(os.environ)):
            print(f"hpcml: run {run.id} goes on in a later execution, so nothing is noted of this one", flush=True)
            return 0
        marker = close_run(run, asked.exit_code, asked.signal or None)
        if os.environ.get("SLURM_JOB_ID") and goes_on(run, marker):
            _requeue(run, marker)
            return 0
        out_of_time(run, marker)
        from ..tracking import follow  # a submit has no use for it

        if delivery := follow.in_job(run):
            _report(run)
            follow.finish(delivery, FINAL_DELIVERY_S)
        print(f"hpcml: run {run.id} ended with exit code {asked.exit_code}", flush=True)
        return 0
    except HpcmlError as error:
        print(f"hpcml: {error}", file=sys.stderr)
        return error.exit_code


def current_run() -> RunDir:
    """Return the run that ``HPCML_RUNS`` and ``HPCML_RUN`` name.

    Raises:
        HpcmlError: they name none.
    """
    root, id = os.environ.get("HPCML_RUNS"), os.environ.get("HPCML_RUN")
    if not root or not id:
        raise HpcmlError(
            "HPCML_RUNS and HPCML_RUN are not set", fix="start it through hpcml run, submit or a rendered script"
        )
    return rundir.adopt(Path(root), id)


if __name__ == "__main__":
    sys.exit(main())
