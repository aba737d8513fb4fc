"""Delivery of a run directory to MLflow, during a run or after it.

The journal is the truth and MLflow a copy of it: ``deliver`` sends what MLflow does not have yet, notes it in
``delivered.json``, and may be killed and called again at any time. A point that is sent twice is stored once, since
MLflow's SQL store keys a metric by run, name, step, value and time (NaN by a flag of its own), and the journal's times
are kept. Two records of the same name, step, millisecond and value are one point.
"""

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import HpcmlError
from ..rundir import RunDir, owner_is_alive, read_json, slurm_job_id
from ..site import Site, expand
from . import ledger as ledgers
from . import place, provenance, store, translate, uploads
from .journal import Unreadable
from .ledger import Ledger
from .store import Store
from .translate import MAX_PARAM, MAX_TAG, NAME_TAG, PARENT_TAG, PLAN_TAG, Point, text
from .uploads import LOG as LOG

# MLflow's limits for one call (its REST API, "Log Batch"), the last in bytes of JSON.
MAX_POINTS, MAX_PAIRS, MAX_BYTES = 1000, 100, 1_000_000
# What is told while points are sent: how many by now, and which share of the journal that was new.
Tell = Callable[[int, float], None]


@dataclass(frozen=True)
class Delivery:
    """What one delivery did.

    Attributes:
        run_id: MLflow's id of the run.
        experiment: name of the MLflow experiment.
        points: metric points sent this time.
        artifacts: files sent this time.
        uri: MLflow's address, without credentials.
        unreadable: of all the journal the first lines that are no record, as (file, line, beginning of its text).
        skipped: how many of them there are.
    """

    run_id: str
    experiment: str
    points: int
    artifacts: int
    uri: str
    unreadable: tuple[tuple[str, int, str], ...] = ()
    skipped: int = 0


def store_uri(site: Site, project: Path) -> str:
    """Return MLflow's address: ``$MLFLOW_TRACKING_URI``, else the site's.

    Raises:
        HpcmlError: the variable names what can be no store of MLflow's.
    """
    typed = os.environ.get("MLFLOW_TRACKING_URI")
    if typed:
        store.check_typed(typed)
    return typed or expand(site.tracking, f"site {site.name}: tracking", project)


def deliver(
    run: RunDir,
    uri: str,
    *,
    parent: RunDir | None = None,
    files: bool = True,
    state: str = "",
    tell: Tell | None = None,
) -> Delivery:
    """Send to MLflow what it does not have yet of a run; its parent is delivered first.

    What stands in the journal as no record is passed over and told in the result.

    Args:
        run: the run; it may still be running.
        uri: ``sqlite:///<file>``, ``http(s)://[user:password@]<host>``, or whatever else MLflow takes.
        parent: the run that this one belongs to; by default that of a ``<parent>/<variant>`` id.
        files: whether to send files too; while a run goes on its logs change all the time.
        state: how the run ended where its end marker does not say.
        tell: what is called after each batch of points, with the points sent by now and the share of the new journal.

    Raises:
        ServiceSilent: MLflow gives no answer or refuses; what was sent until then is noted.
        HpcmlError: no such run, or its MLflow run or experiment was deleted, or the run directory takes no file.
    """
    if not run.path.is_dir():
        raise HpcmlError(f"no run directory at {run.path}", fix="hpcml runs list")
    # Two deliveries of one run to a server would both create it there; a variant's parent is created with it.
    lock = RunDir(run.root, run.id.partition("/")[0]).delivered.with_suffix(".lock")
    with store.opened(store.parse(uri), lock, run.id) as opened:
        return _deliver(opened, run, parent, files=files, state=state, tell=tell)


def is_delivered(run: RunDir, uri: str | None = None, *, state: str = "") -> bool:
    """Whether MLflow has all that the run directory holds now; ``delivered.json`` alone says that a delivery began.

    What was deleted in MLflow is not delivered: a SQLite store is asked, a server has said so at the last delivery.

    Args:
        uri: at this address; by default wherever it was delivered last.
        state: how the run ended where its end marker does not say.
    """
    ledger = ledgers.load(run)
    return (
        bool(ledger.place.get("uri"))
        and not ledger.gone
        and (uri is None or ledger.place.get("uri") == store.parse(uri).shown)
        and ledger.state == _state(run, read_json(run.status), state)
        and not place.is_missing(ledger.place)
        and not ledgers.has_news(run, ledger)
        and all(ledger.artifacts.get(str(path.relative_to(run.path))) == now for path, now in uploads.of(run))
    )


def noted(run: RunDir) -> Delivery:
    """Return what ``delivered.json`` says, as a delivery that sent nothing."""
    ledger = ledgers.load(run)
    return _told(ledger, 0, 0)


def _told(ledger: Ledger, points: int, artifacts: int) -> Delivery:
    uri, experiment, run_id = (ledger.place.get(key, "") for key in ("uri", "experiment", "run_id"))
    return Delivery(run_id, experiment, points, artifacts, uri, tuple(ledger.unreadable), ledger.skipped)


def _deliver(
    to: Store,
    run: RunDir,
    parent: RunDir | None = None,
    fallback: str = "",
    *,
    files: bool,
    state: str = "",
    tell: Tell | None = None,
) -> Delivery:
    plan, status, ledger = read_json(run.plan), read_json(run.status), ledgers.load(run)
    stays = ledger.place.get("uri") == to.address.shown
    experiment = (ledger.place.get("experiment") if stays else "") or place.experiment_of(run, plan) or fallback
    if not experiment:
        raise HpcmlError(f"{run.path} is no run: it holds no plan.json", fix="hpcml runs list")
    if parent is None and "/" in run.id:
        parent = RunDir(run.root, run.id.rpartition("/")[0])
    parent_id = _deliver(to, parent, None, experiment, files=files).run_id if parent else None
    mine = _found(to, run, ledger, experiment)
    here = {"uri": to.address.shown, "experiment": experiment, "run_id": mine.info.run_id}
    if ledger.place != here:
        ledger = Ledger(here)  # another store, or one that forgot the run: what was noted does not hold there
    points = _send_journal(to, run, ledger, tell)
    state = _state(run, status, state)
    asked = translate.params(plan)  # first, for MLflow shows parameters in the order they were sent; and they win
    params = {**asked, **ledger.said.params, **provenance.params(run), **asked}
    tags = translate.tags(plan, state, slurm_job_id(run) or status.get("slurm_job_id"), ledger.said)
    tags |= {PLAN_TAG: place.fingerprint(run)} | ({PARENT_TAG: parent_id} if parent_id else {})
    _send_facts(to, mine, params, tags, ledger)
    _send_state(to, mine, translate.status(state), _end_ms(run, status, ledger))
    artifacts = uploads.send(to, run, ledger) if files else 0
    if ledger.state != state or ledger.gone:
        ledger.state, ledger.gone = state, False
        ledger.save(run)
    return _told(ledger, points, artifacts)


def _found(to: Store, run: RunDir, ledger: Ledger, experiment: str) -> Any:
    """Return the run's MLflow run, made where there is none; that it was deleted is noted."""
    try:
        return (
            place.known(to, run, ledger.place)
            or place.tagged(to, run, experiment)
            or place.created(to, run, read_json(run.plan), read_json(run.status), experiment)
        )
    except place.Deleted:
        if ledger.place:
            ledger.gone = True
            ledger.save(run)
        raise


def _state(run: RunDir, status: Mapping[str, Any], told: str = "") -> str:
    """The run's state by its end marker, else as told; a process that died without a marker leaves it UNKNOWN."""
    if status.get("state") and (status.get("final") or not told):
        return str(status["state"])
    return told or ("UNKNOWN" if run.owner.exists() and not owner_is_alive(run) else "RUNNING")


def _end_ms(run: RunDir, status: Mapping[str, Any], ledger: Ledger) -> int | None:
    """When a run ended, in milliseconds since the epoch: by its marker, else its last record; None where nothing tells."""
    ended = status.get("ended")
    if isinstance(ended, int | float):
        return round(ended * 1000)
    newest = max((path.stat().st_mtime for path in run.events.glob("*.jsonl")), default=0.0)
    return ledger.last_ms or round(newest * 1000) or None


def _send_journal(to: Store, run: RunDir, ledger: Ledger, tell: Tell | None = None) -> int:
    """Send the metrics behind the noted lines, in the journal's order, and note the lines after each call.

    One call is under way while the next is put together: most of a call is waiting for the store.
    """
    sent, before = 0, sum(ledger.offsets.values())
    new = sum(path.stat().st_size for path in run.events.glob("*.jsonl")) - before
    with ThreadPoolExecutor(1, "hpcml-delivery") as executor:
        under_way: Future[None] | None = None
        behind: dict[str, tuple[int, int]] = {}
        for points, reached in _calls(run, ledger):
            if under_way:
                under_way.result()
                _note(run, ledger, behind)
                if tell and new > 0:
                    tell(sent, min(1.0, (sum(ledger.offsets.values()) - before) / new))
            under_way, behind = executor.submit(_send_points, to, ledger.place["run_id"], points), reached
            sent += len(points)
        if under_way:
            under_way.result()
            _note(run, ledger, behind)
    return sent


def _calls(run: RunDir, ledger: Ledger) -> Iterator[tuple[list[Point], dict[str, tuple[int, int]]]]:
    """Yield the points of one call after the other, each with the line and byte that each file is sent to by then."""
    reached: dict[str, tuple[int, int]] = {}
    chunk: list[Point] = []
    size, costs = 0, dict[str, int]()
    for line in ledgers.new_lines(run, ledger):
        for point in _points(line, ledger):
            name = point.name
            cost = costs.get(name) or costs.setdefault(name, len(ascii(name)) + 160)  # bytes of JSON, all but the name
            if len(chunk) == MAX_POINTS or size + cost > MAX_BYTES * 0.9:
                yield chunk, dict(reached)
                size, chunk, costs = 0, [], costs if len(costs) < MAX_POINTS else {}
            size += cost
            chunk.append(point)
        reached[line.file] = line.number, line.end
    if chunk or reached:
        yield chunk, reached


def _points(line: ledgers.Line, ledger: Ledger) -> Iterable[Point]:
    record = line.found
    if isinstance(record, Unreadable):
        ledger.note_unreadable(record)
    if not isinstance(record, dict):
        return ()
    ledger.said.take(record)
    if ledger.last_ms < record["t"] < 2**63:
        ledger.last_ms = record["t"]
    first_ms = ledger.firsts.setdefault(line.file, record["t"]) if record["kind"] == "sample" else 0
    return translate.points(record, ledger.said, first_ms)


def _send_points(to: Store, run_id: str, points: list[Point]) -> None:
    from mlflow.entities import Metric

    if points:
        metrics = [Metric(point.name, point.value, point.t, point.step) for point in points]
        to.client.log_batch(run_id, metrics=metrics, synchronous=True)


def _note(run: RunDir, ledger: Ledger, reached: Mapping[str, tuple[int, int]]) -> None:
    for file, (line, end) in reached.items():
        ledger.lines[file], ledger.offsets[file] = line, end
    ledger.save(run)


def _send_facts(to: Store, mine: Any, params: Mapping[str, Any], tags: Mapping[str, Any], ledger: Ledger) -> None:
    """Send the params that MLflow lacks, since it lets none change, and the tags that differ."""
    from mlflow.entities import Param, RunTag

    said = ledger.said
    values = {said.name(name): text(value, MAX_PARAM) for name, value in params.items()}
    labels = {said.name(name): text(value, MAX_TAG) for name, value in tags.items()}
    labels |= {NAME_TAG + name: text(original, MAX_TAG) for name, original in said.originals.items()}
    new = [Param(name, value) for name, value in values.items() if name not in mine.data.params]
    changed = [RunTag(name, value) for name, value in labels.items() if mine.data.tags.get(name) != value]
    for start in range(0, len(new), MAX_PAIRS):
        to.client.log_batch(mine.info.run_id, params=new[start : start + MAX_PAIRS], synchronous=True)
    for start in range(0, len(changed), MAX_PAIRS):
        to.client.log_batch(mine.info.run_id, tags=changed[start : start + MAX_PAIRS], synchronous=True)


def _send_state(to: Store, mine: Any, wanted: str, end_ms: int | None) -> None:
    there = mine.info
    if wanted == "RUNNING":
        if there.status != "RUNNING":
            to.client.update_run(there.run_id, status="RUNNING")
        return
    end_ms = there.end_time if end_ms is None else end_ms
    if there.status != wanted or there.end_time is None or there.end_time != end_ms:
        to.client.set_terminated(there.run_id, wanted, end_ms)
