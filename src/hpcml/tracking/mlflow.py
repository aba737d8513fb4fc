"""Delivery of a run directory to MLflow, on the person's side, during a run or after it.

The journal is the truth and MLflow a copy of it: ``deliver`` sends what MLflow does not have yet, notes it in
``delivered.json``, and may be killed and called again at any time. A point that is sent twice is stored once, since
MLflow's SQL store keys a metric by run, name, step, value and time, and the journal's times are kept.
"""

import contextlib
import getpass
import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import HpcmlError
from ..rundir import RunDir, read_json, slurm_job_id, write_json
from ..site import Site, expand
from . import journal, store, translate
from .store import Store
from .translate import MAX_PARAM, MAX_TAG, NAME_TAG, PARENT_TAG, PLAN_TAG, RUN_TAG, Point, Said, text

# MLflow's limits for one call (its REST API, "Log Batch"), the last in bytes of JSON.
MAX_POINTS, MAX_PAIRS, MAX_BYTES = 1000, 100, 1_000_000


@dataclass(frozen=True)
class Delivery:
    """What one delivery did.

    Attributes:
        run_id: MLflow's id of the run.
        experiment: name of the MLflow experiment.
        points: metric points sent this time.
        artifacts: files sent this time.
        uri: MLflow's address, without credentials.
    """

    run_id: str
    experiment: str
    points: int
    artifacts: int
    uri: str


def store_uri(site: Site, project: Path) -> str:
    """Return MLflow's address: ``$MLFLOW_TRACKING_URI``, else the site's."""
    return os.environ.get("MLFLOW_TRACKING_URI") or expand(site.tracking, f"site {site.name}: tracking", project)


def deliver(run: RunDir, uri: str, *, parent: RunDir | None = None) -> Delivery:
    """Send to MLflow what it does not have yet of a run; its parent is delivered first.

    Args:
        run: the run; it may still be running.
        uri: ``sqlite:///<file>``, ``http(s)://[user:password@]<host>``, or whatever else MLflow takes.
        parent: the run that this one belongs to; by default that of a ``<parent>/<variant>`` id.

    Raises:
        ServiceSilent: MLflow gives no answer or refuses; what was sent until then is noted.
        HpcmlError: no such run, or its MLflow run or experiment was deleted.
    """
    if not run.path.is_dir():
        raise HpcmlError(f"no run directory at {run.path}", fix="hpcml runs list")
    # Two deliveries of one run to a server would both create it there; a variant's parent is created with it.
    lock = RunDir(run.root, run.id.partition("/")[0]).delivered.with_suffix(".lock")
    with store.opened(store.parse(uri), lock, run.id) as opened:
        return _deliver(opened, run, parent)


def is_delivered(run: RunDir) -> bool:
    """Whether MLflow has all that the run directory holds now; ``delivered.json`` alone says that a delivery began."""
    ledger = read_json(run.delivered)
    lines, artifacts = ledger.get("lines") or {}, ledger.get("artifacts") or {}
    return (
        ledger.get("state") == _state(read_json(run.status))
        and all(record["line"] <= lines.get(_event_file(run, record), 0) for record in journal.read(run.events))
        and all(artifacts.get(str(path.relative_to(run.path))) == now for path, now in _artifacts(run))
    )


def _deliver(to: Store, run: RunDir, parent: RunDir | None = None, fallback: str = "") -> Delivery:
    plan, status, ledger = read_json(run.plan), read_json(run.status), read_json(run.delivered)
    experiment = str(plan.get("experiment") or fallback or _experiment_of_variants(run))
    if not experiment:
        raise HpcmlError(f"{run.path} is no run: it holds no plan.json", fix="hpcml runs list")
    if parent is None and "/" in run.id:
        parent = RunDir(run.root, run.id.rpartition("/")[0])
    parent_id = _deliver(to, parent, None, experiment).run_id if parent else None
    mine = _known(to, run, ledger) or _tagged(to, run, experiment) or _created(to, run, plan, status, experiment)
    place = {"uri": to.address.shown, "experiment": experiment, "run_id": mine.info.run_id}
    if any(ledger.get(key) != place[key] for key in ("uri", "run_id")):
        ledger = dict(place)  # another store, or one that forgot the run: what was noted does not hold there
    said = Said()
    points = _send_journal(to, run, ledger, said)
    state = _state(status)
    params = {**said.params, **translate.params(plan)}
    tags = translate.tags(plan, state, slurm_job_id(run) or status.get("slurm_job_id"), said)
    tags |= {PLAN_TAG: _fingerprint(run)} | ({PARENT_TAG: parent_id} if parent_id else {})
    _send_facts(to, mine, params, tags, said)
    _send_state(to, mine, translate.status(state), status)
    artifacts = _send_artifacts(to, run, ledger)
    if {**ledger, **place, "state": state} != ledger:
        write_json(run.delivered, ledger | place | {"state": state})
    return Delivery(mine.info.run_id, experiment, points, artifacts, to.address.shown)


def _state(status: Mapping[str, Any]) -> str:
    return str(status.get("state") or "RUNNING")


def _event_file(run: RunDir, record: Mapping[str, Any]) -> str:
    return run.event_file(record["rank"], record["restart"], record["writer"]).name


def _experiment_of_variants(run: RunDir) -> str:
    plans = (read_json(path) for path in sorted(run.path.glob("*/plan.json")))
    return next((str(plan["experiment"]) for plan in plans if plan.get("experiment")), "")


def _known(to: Store, run: RunDir, ledger: Mapping[str, Any]) -> Any:
    """Return the MLflow run that delivered.json names; None where there is none or this store has it not."""
    from mlflow.exceptions import MlflowException

    if ledger.get("uri") != to.address.shown or not isinstance(ledger.get("run_id"), str):
        return None
    try:
        known = to.client.get_run(ledger["run_id"])
    except MlflowException as error:
        if error.error_code in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
            return None
        raise
    if known.info.lifecycle_stage == "deleted":
        experiment = to.client.get_experiment(known.info.experiment_id)
        if experiment.lifecycle_stage == "deleted":
            raise _deleted_experiment(to, experiment)
        raise HpcmlError(
            f"the MLflow run {known.info.run_id} of {run.id} was deleted in {to.address.shown}",
            fix=f"mlflow runs restore --run-id {known.info.run_id}; or remove {run.delivered} to send the run anew",
        )
    return known


def _tagged(to: Store, run: RunDir, experiment: str) -> Any:
    """Return the oldest MLflow run that carries this run's tag, None without one."""
    number = _experiment_id(to, experiment)
    if number is None:
        return None
    quote = '"' if "'" in run.id else "'"
    found = to.client.search_runs(
        [number], f"tags.`{RUN_TAG}` = {quote}{run.id}{quote}", order_by=["attributes.start_time ASC"]
    )
    # Recurring runs of two projects, or of two people at one server, may share an id; their plans differ.
    return next((hit for hit in found if hit.data.tags.get(PLAN_TAG) == _fingerprint(run)), None)


def _created(to: Store, run: RunDir, plan: Mapping[str, Any], status: Mapping[str, Any], experiment: str) -> Any:
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
    tags = {RUN_TAG: run.id, PLAN_TAG: _fingerprint(run)}
    with contextlib.suppress(KeyError, OSError):  # a user id without a name
        tags["mlflow.user"] = getpass.getuser()
    if plan.get("target"):
        tags["mlflow.source.name"] = text(plan["target"][0], MAX_TAG)
    start_ms = round(_started_s(run, status) * 1000)
    return to.client.create_run(number, start_time=start_ms, tags=tags, run_name=run.id)


def _experiment_id(to: Store, name: str) -> str | None:
    found = to.client.get_experiment_by_name(name)
    if found is not None and found.lifecycle_stage == "deleted":
        raise _deleted_experiment(to, found)
    return str(found.experiment_id) if found is not None else None


def _deleted_experiment(to: Store, experiment: Any) -> HpcmlError:
    return HpcmlError(
        f"the MLflow experiment {experiment.name!r} was deleted in {to.address.shown}",
        fix=f"mlflow experiments restore --experiment-id {experiment.experiment_id}; or `mlflow gc` ends it for good",
    )


def _fingerprint(run: RunDir) -> str:
    try:
        return hashlib.sha256(run.plan.read_bytes()).hexdigest()[:16]
    except FileNotFoundError:
        return "none"


def _started_s(run: RunDir, status: Mapping[str, Any]) -> float:
    """Seconds since the epoch; MLflow can't change a start, so it is the best known at the first delivery."""
    for marker in (status, read_json(run.status_of(0))):
        if isinstance(marker.get("started"), int | float):
            return float(marker["started"])
    first = next(journal.read(run.events), None)
    return first["t"] / 1000 if first else run.path.stat().st_mtime


def _send_journal(to: Store, run: RunDir, ledger: dict[str, Any], said: Said) -> int:
    """Send the metrics behind the noted lines, in the journal's order, and note the lines after each call."""
    lines: dict[str, int] = ledger.setdefault("lines", {})
    reached = dict(lines)
    sent, size, chunk = 0, 0, list[Point]()
    for record in journal.read(run.events):
        said.take(record)
        points = list(translate.points(record, said))
        file = _event_file(run, record)
        if record["line"] <= lines.get(file, 0):
            continue
        for point in points:
            cost = len(json.dumps(point.name)) + 160  # bytes of the request: the name, and all that is around it
            if len(chunk) == MAX_POINTS or size + cost > MAX_BYTES * 0.9:
                sent += _send_points(to, run, ledger, chunk, reached)
                size, chunk = 0, []
            size += cost
            chunk.append(point)
        reached[file] = record["line"]
    return sent + _send_points(to, run, ledger, chunk, reached)


def _send_points(
    to: Store, run: RunDir, ledger: dict[str, Any], points: list[Point], reached: Mapping[str, int]
) -> int:
    from mlflow.entities import Metric

    if points:
        metrics = [Metric(point.name, point.value, point.t, point.step) for point in points]
        to.client.log_batch(ledger["run_id"], metrics=metrics, synchronous=True)
    if ledger["lines"] != reached:
        ledger["lines"].update(reached)
        write_json(run.delivered, ledger)
    return len(points)


def _send_facts(to: Store, mine: Any, params: Mapping[str, Any], tags: Mapping[str, Any], said: Said) -> None:
    """Send the params that MLflow lacks, since it lets none change, and the tags that differ."""
    from mlflow.entities import Param, RunTag

    values = {said.name(name): text(value, MAX_PARAM) for name, value in params.items()}
    labels = {said.name(name): text(value, MAX_TAG) for name, value in tags.items()}
    labels |= {NAME_TAG + name: text(original, MAX_TAG) for name, original in said.originals.items()}
    new = [Param(name, value) for name, value in values.items() if name not in mine.data.params]
    changed = [RunTag(name, value) for name, value in labels.items() if mine.data.tags.get(name) != value]
    for start in range(0, len(new), MAX_PAIRS):
        to.client.log_batch(mine.info.run_id, params=new[start : start + MAX_PAIRS], synchronous=True)
    for start in range(0, len(changed), MAX_PAIRS):
        to.client.log_batch(mine.info.run_id, tags=changed[start : start + MAX_PAIRS], synchronous=True)


def _send_state(to: Store, mine: Any, wanted: str, status: Mapping[str, Any]) -> None:
    there = mine.info
    if wanted == "RUNNING":
        if there.status != "RUNNING":
            to.client.update_run(there.run_id, status="RUNNING")
        return
    ended = status.get("ended")
    end_ms = round(ended * 1000) if isinstance(ended, int | float) else there.end_time
    if there.status != wanted or there.end_time is None or there.end_time != end_ms:
        to.client.set_terminated(there.run_id, wanted, end_ms)


def _send_artifacts(to: Store, run: RunDir, ledger: dict[str, Any]) -> int:
    """Send the files that are new, or changed since they were sent."""
    noted: dict[str, list[int]] = ledger.setdefault("artifacts", {})
    sent = 0
    for path, now in _artifacts(run):
        key = str(path.relative_to(run.path))
        if noted.get(key) != now:
            to.client.log_artifact(ledger["run_id"], str(path), None if path.parent == run.path else path.parent.name)
            noted[key] = now
            sent += 1
            write_json(run.delivered, ledger)
    return sent


def _artifacts(run: RunDir) -> Iterator[tuple[Path, list[int]]]:
    """Yield each file that MLflow gets, with its time and size before the upload: what is appended then goes next."""
    notebooks = (run.notebook(0), *sorted(run.path.glob("notebook.*.ipynb")))
    single = (run.plan, run.script, run.comparison, run.plot, run.path / "report.html")
    for path in dict.fromkeys((*notebooks, *single, *sorted(run.logs.glob("*")))):
        if path.is_file():
            stat = path.stat()
            yield path, [stat.st_mtime_ns, stat.st_size]
