"""Where a run lies in MLflow: its experiment and its MLflow run, found again or made."""

import contextlib
import getpass
import hashlib
import os
import shlex
import sqlite3
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote

from .. import job as jobs
from ..errors import HpcmlError
from ..rundir import RunDir, read_json
from . import ledger
from .store import Store, parse
from .translate import MAX_TAG, PLAN_TAG, RUN_TAG, text


class Deleted(HpcmlError):
    """Somebody deleted the MLflow run or its experiment."""


def experiment_of(run: RunDir, plan: Mapping[str, Any]) -> str:
    """Return the name of a run's experiment; empty for what is no run.

    A comparison without a plan takes that of its variants. A script run bare belongs to the experiment of the jobs that
    run it, where they agree on one: ``ipython train.py`` and ``hpcml run jobs/train.toml`` then stand side by side.
    """
    if plan.get("work") == "session" and plan.get("target") and plan.get("project"):
        target = os.path.splitext(str(plan["target"][0]))[0]
        return _experiment_of_jobs(Path(plan["project"]), target) or str(plan.get("experiment") or "")
    if plan.get("experiment"):
        return str(plan["experiment"])
    plans = (read_json(path) for path in sorted(run.path.glob("*/plan.json")))
    return next((str(plan["experiment"]) for plan in plans if plan.get("experiment")), "")


def _experiment_of_jobs(project: Path, target: str) -> str:
    """Return the experiment of the jobs that run a script, or the notebook paired with it; empty unless they agree."""
    found = set()
    for path in sorted((project / "jobs").glob("*.toml")):
        with contextlib.suppress(HpcmlError, OSError):  # a base, or a job that is being written
            job = jobs.load(path)
            work = job.target[0] if job.target else ""
            if job.work in ("notebook", "script") and os.path.splitext(os.path.normpath(work))[0] == target:
                found.add(job.experiment or job.name)
    return found.pop() if len(found) == 1 else ""


def known(to: Store, run: RunDir, noted: Mapping[str, str]) -> Any:
    """Return the MLflow run that delivered.json names; None where there is none or this store has it not."""
    from mlflow.exceptions import MlflowException

    if noted.get("uri") != to.address.shown or "run_id" not in noted:
        return None
    try:
        found = to.client.get_run(noted["run_id"])
    except MlflowException as error:
        if error.error_code in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
            return None
        raise
    if found.info.lifecycle_stage == "deleted":
        experiment = to.client.get_experiment(found.info.experiment_id)
        if experiment.lifecycle_stage == "deleted":
            raise _deleted_experiment(to, experiment)
        restore = f"{_at(to)}mlflow runs restore --run-id {found.info.run_id}"
        raise Deleted(
            f"the MLflow run {found.info.run_id} of {run.id} was deleted in {to.address.shown}",
            fix=f"{restore}; or remove {run.delivered} to send the run anew",
        )
    return found


def is_missing(noted: Mapping[str, str]) -> bool:
    """Whether a SQLite store lacks the run that delivered.json names, or it was deleted there; False of a server.

    Asked of the file itself, since importing MLflow takes seconds. One that is locked can't be told about.
    """
    database = parse(noted["uri"]).database
    if database is None:
        return False
    query = """SELECT 1 FROM runs JOIN experiments USING (experiment_id)
        WHERE run_uuid = ? AND runs.lifecycle_stage = 'active' AND experiments.lifecycle_stage = 'active'"""
    try:
        with contextlib.closing(sqlite3.connect(f"file:{quote(str(database))}?mode=ro", uri=True, timeout=1)) as asked:
            return asked.execute(query, (noted.get("run_id"),)).fetchone() is None
    except sqlite3.Error as error:
        return "locked" not in str(error)


def _at(to: Store) -> str:
    """What stands before a command of MLflow's, so that it looks at this store."""
    return f"MLFLOW_TRACKING_URI={shlex.quote(to.address.shown)} "


def tagged(to: Store, run: RunDir, experiment: str) -> Any:
    """Return the oldest MLflow run that carries this run's tag, None without one."""
    number = _experiment_id(to, experiment)
    if number is None:
        return None
    quote = '"' if "'" in run.id else "'"
    found = to.client.search_runs(
        [number], f"tags.`{RUN_TAG}` = {quote}{run.id}{quote}", order_by=["attributes.start_time ASC"]
    )
    # Recurring runs of two projects, or of two people at one server, may share an id; their plans differ.
    return next((hit for hit in found if hit.data.tags.get(PLAN_TAG) == fingerprint(run)), None)


def created(to: Store, run: RunDir, plan: Mapping[str, Any], status: Mapping[str, Any], experiment: str) -> Any:
    """Create the MLflow run, and its experiment where there is none, and return it."""
    from mlflow.exceptions import MlflowException

    number = _experiment_id(to, experiment)
    if number is None:
        # MLflow's own default for a SQLite store is ./mlruns, wherever this process happens to be.
        root = to.address.artifact_root.as_uri() if to.address.artifact_root else None
        try:
            number = to.client.create_experiment(experiment, artifact_location=root)
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
            number = _experiment_id(to, experiment)  # somebody else was faster
    tags = {RUN_TAG: run.id, PLAN_TAG: fingerprint(run)}
    with contextlib.suppress(KeyError, OSError):  # a user id without a name
        tags["mlflow.user"] = getpass.getuser()
    if plan.get("target") and plan.get("work") != "comparison":
        tags["mlflow.source.name"] = text(plan["target"][0], MAX_TAG)
    # Set once: what a person writes there instead stays.
    tags["mlflow.note.content"] = text(_description(run, plan), MAX_TAG)
    start_ms = round(_started_s(run, status) * 1000)
    return to.client.create_run(number, start_time=start_ms, tags=tags, run_name=_shown_name(run))


def _description(run: RunDir, plan: Mapping[str, Any]) -> str:
    """What MLflow's page says of the run, in Markdown."""
    what = f"`{plan['target'][0]}`" if plan.get("target") else str(plan.get("name") or run.id)
    where = f" on {plan['site']}" if plan.get("site") else ""
    return f"{what}{where}. Its report is the artifact `report.html`; its files: `hpcml status {run.id}`."


def _shown_name(run: RunDir) -> str:
    """The run's name before its time: MLflow's lists show some 15 characters of it. The id is a tag."""
    date, _, rest = run.id.rpartition("/")[2].partition("-")
    time, _, name = rest.partition("-")
    return f"{name} {date}-{time}" if name and (date + time).isdecimal() else run.id.rpartition("/")[2]


def _experiment_id(to: Store, name: str) -> str | None:
    found = to.client.get_experiment_by_name(name)
    if found is not None and found.lifecycle_stage == "deleted":
        raise _deleted_experiment(to, found)
    return str(found.experiment_id) if found is not None else None


def _deleted_experiment(to: Store, experiment: Any) -> Deleted:
    restore = f"{_at(to)}mlflow experiments restore --experiment-id {experiment.experiment_id}"
    return Deleted(
        f"the MLflow experiment {experiment.name!r} was deleted in {to.address.shown}",
        fix=f"{restore}; or `mlflow gc` ends it for good",
    )


def fingerprint(run: RunDir) -> str:
    """Return what tells this run's plan from all others."""
    try:
        return hashlib.sha256(run.plan.read_bytes()).hexdigest()[:16]
    except FileNotFoundError:
        return "none"


def _started_s(run: RunDir, status: Mapping[str, Any]) -> float:
    """Seconds since the epoch; MLflow can't change a start, so it is the best known at the first delivery."""
    for marker in (status, read_json(run.status_of(0))):
        if isinstance(marker.get("started"), int | float):
            return float(marker["started"])
    records = (line.found for line in ledger.new_lines(run, ledger.Ledger()) if isinstance(line.found, dict))
    first = next(records, None)
    return float(first["t"]) / 1000 if first else run.path.stat().st_mtime
