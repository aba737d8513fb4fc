"""Delivery of a run directory to MLflow, on the person's side, during a run or after it.

The journal is the truth and MLflow a copy of it: ``deliver`` sends what MLflow does not have yet, notes it in
``delivered.json``, and may be killed and called again at any time. A point that is sent twice is stored once, since
MLflow's SQL store keys a metric by run, name, step, value and time, and the journal's times are kept.
"""

import contextlib
import fcntl
import functools
import getpass
import hashlib
import json
import logging
import math
import os
import posixpath
import re
import sys
import textwrap
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit, urlunsplit

from ..errors import HpcmlError, ServiceSilent
from ..rundir import RunDir, read_json, slurm_job_id, write_json
from ..site import Site, expand
from . import journal

ANSWER_S = 5  # a server that gives no first answer in this time is silent; MLflow's own default would wait 247 s
CALL_S = 20  # any later call
LOCK_WAIT_S = 60  # for another delivery to the same store
LOCK_TELL_S = 2

# MLflow's limits (mlflow/utils/validation.py).
MAX_POINTS = 1000  # metric points in one call
MAX_PAIRS = 100  # params or tags in one call
MAX_REQUEST_BYTES = 900_000  # of 1e6
MAX_NAME, MAX_PARAM, MAX_TAG = 250, 6000, 8000

RUN_TAG, PLAN_TAG, NAME_TAG, PARENT_TAG = "hpcml.run", "hpcml.plan", "hpcml.name.", "mlflow.parentRunId"
OURS = (RUN_TAG, PLAN_TAG, PARENT_TAG, "mlflow.runName")
KILLED = ("CANCELLED", "TIMEOUT", "PREEMPTED", "DEADLINE")
ALIVE = ("PENDING", "CONFIGURING", "RUNNING", "COMPLETING", "SUSPENDED", "STOPPED", "REQUEUED", "RESIZING", "SIGNALING")
LATER = "nothing is lost: the run directory has it all; `hpcml sync` delivers it later"


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
    with _opened(_address(uri), run) as store:
        return _deliver(store, run, parent)


# ---- the store ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Address:
    uri: str  # for MLflow
    shown: str  # for people and for delivered.json
    database: Path | None = None
    env: Mapping[str, str] = field(default_factory=dict)
    secrets: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Store:
    client: Any
    address: _Address


def _address(uri: str) -> _Address:
    """Take an address apart: credentials go into variables, so that no message of anybody's can show them."""
    scheme = uri.partition(":")[0].partition("+")[0]
    if "://" not in uri and not uri.startswith(("sqlite:", "databricks", "uc:")) or scheme == "file":
        fix = "set MLFLOW_TRACKING_URI, or the site's `tracking`"
        raise HpcmlError(f"MLflow keeps no runs in a folder: {uri}", allowed="sqlite:///FILE, http://HOST", fix=fix)
    if scheme == "sqlite":
        name = uri.partition("///")[2].partition("?")[0]
        if not name or name.startswith((":memory:", "file:")):
            return _Address(uri, uri)
        database = Path(unquote(name)).absolute()  # SQLAlchemy 2.1 decodes it too
        return _Address(uri, f"sqlite:///{database}", database)
    parts = urlsplit(uri)
    login, _, host = parts.netloc.rpartition("@")
    shown = urlunsplit(parts._replace(netloc=host))
    user, _, password = login.partition(":")
    secrets = tuple(filter(None, {password, unquote(password)}))
    if scheme not in ("http", "https"):
        return _Address(uri, shown, secrets=secrets)
    names = ("MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD")
    return _Address(shown, shown, None, dict(zip(names, map(unquote, (user, password)), strict=True)) if login else {})


@contextlib.contextmanager
def _opened(address: _Address, run: RunDir) -> Iterator[_Store]:
    """Yield MLflow's client with the store locked; whatever goes wrong with the service becomes ``ServiceSilent``."""
    quiet = {
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "DO_NOT_TRACK": "true",
        "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
        "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
        # Connections to a file are closed after use: nothing stays open in a process that lives on.
        **({"MLFLOW_SQLALCHEMYSTORE_POOLCLASS": "NullPool"} if address.database else {}),
    }
    patience = {"MLFLOW_HTTP_REQUEST_TIMEOUT": str(CALL_S), "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0"}
    chosen = {name: os.environ.get(name, value) for name, value in patience.items()}
    with _environment({**quiet, **chosen, **address.env}), warnings.catch_warnings(action="ignore"):
        errors = _service_errors()
        try:
            with _silenced("mlflow", "alembic", "sqlalchemy", "urllib3"), _locked(_lock_file(address, run), address):
                yield _Store(_client(address), address)
        except errors as error:
            words = re.sub(r"\s+", " ", str(error) or type(error).__name__)
            for secret in address.secrets:
                words = words.replace(secret, "***")
            what = f"MLflow at {address.shown} did not take {run.id}: {textwrap.shorten(words, 600, placeholder=' …')}"
            raise ServiceSilent(what, fix=LATER) from None
        except ImportError as error:
            raise HpcmlError(f"MLflow at {address.shown} needs a package: {error}", fix="pip install it") from None


def _service_errors() -> tuple[type[Exception], ...]:
    try:
        from mlflow.exceptions import MlflowException
        from sqlalchemy.exc import SQLAlchemyError
    except ImportError as error:
        raise HpcmlError(f"MLflow is not installed here: {error}", fix="pip install 'hpcml[mlflow]'") from None
    return (MlflowException, SQLAlchemyError, OSError)


def _client(address: _Address) -> Any:
    """Return MLflow's client once the store has answered."""
    from mlflow import MlflowClient

    if address.database:
        address.database.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        # Logs and notebooks are as private here as in the run directory.
        os.close(os.open(address.database, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))
        _artifact_root(address.database).mkdir(mode=0o700, exist_ok=True)
    client = MlflowClient(tracking_uri=address.uri)
    probe = {"MLFLOW_HTTP_REQUEST_TIMEOUT": str(ANSWER_S), "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0"}
    with _environment(probe):
        client.search_experiments(max_results=1)
    return client


def _artifact_root(database: Path) -> Path:
    return database.parent / "mlartifacts"


def _lock_file(address: _Address, run: RunDir) -> Path:
    """One writer for each SQLite file; for a server, one for each run, or two would both create it."""
    if address.database:
        return address.database.with_name(address.database.name + ".lock")
    return RunDir(run.root, run.id.split("/")[0]).delivered.with_suffix(".lock")


@contextlib.contextmanager
def _locked(path: Path, address: _Address) -> Iterator[None]:
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        start, told = time.monotonic(), False
        while True:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                waited = time.monotonic() - start
            except OSError:
                break  # a file system without locks (Lustre mounted without flock): MLflow's own must do
            if waited > LOCK_WAIT_S:
                what = f"another delivery to MLflow at {address.shown} has held {path} for over {LOCK_WAIT_S} s"
                raise ServiceSilent(what, fix=LATER)
            if waited > LOCK_TELL_S and not told:
                told = True
                print(f"hpcml: waiting for another delivery to MLflow at {address.shown}", file=sys.stderr, flush=True)
            time.sleep(0.05)
        yield
    finally:
        os.close(handle)


@contextlib.contextmanager
def _environment(values: Mapping[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name, None) if value is None else os.environ.__setitem__(name, value)


@contextlib.contextmanager
def _silenced(*names: str) -> Iterator[None]:
    """Silence these loggers meanwhile: what matters of theirs arrives as an exception."""
    loggers = [logging.getLogger(name) for name in names]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL + 1)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


# ---- one run --------------------------------------------------------------------------------------------------------


def _deliver(store: _Store, run: RunDir, parent: RunDir | None = None, fallback: str = "") -> Delivery:
    plan = read_json(run.plan)
    experiment = plan.get("experiment") or fallback or _experiment_of_children(run)
    if not experiment:
        raise HpcmlError(f"{run.path} is no run: it holds no plan.json", fix="hpcml runs list")
    if parent is None and "/" in run.id:
        parent = RunDir(run.root, run.id.rpartition("/")[0])
    parent_id = _deliver(store, parent, None, experiment).run_id if parent else None
    ledger = read_json(run.delivered)
    status = read_json(run.status)
    mine = _find(store, run, ledger, experiment) or _create(store, run, plan, status, experiment, parent_id)
    if mine.info.run_id != ledger.get("run_id") or store.address.shown != ledger.get("uri"):
        ledger = {}
    ledger = {"uri": store.address.shown, "experiment": experiment, "run_id": mine.info.run_id, **ledger}
    said = _Said()
    points = _send_journal(store, run, ledger, said)
    state = str(status.get("state") or "RUNNING")
    tags = _tags(run, plan, state, said) | ({PARENT_TAG: parent_id} if parent_id else {})
    _send_facts(store, mine, {**_plan_params(plan), **said.unclaimed(plan)}, tags, said.renamed)
    _send_state(store, mine, state, status)
    artifacts = _send_artifacts(store, run, ledger)
    if ledger.get("state") != state:
        ledger["state"] = state
        write_json(run.delivered, ledger)
    return Delivery(mine.info.run_id, experiment, points, artifacts, store.address.shown)


def _experiment_of_children(run: RunDir) -> str:
    plans = (read_json(path) for path in sorted(run.path.glob("*/plan.json")))
    return next((str(plan["experiment"]) for plan in plans if plan.get("experiment")), "")


def _find(store: _Store, run: RunDir, ledger: Mapping[str, Any], experiment: str) -> Any:
    """Return the MLflow run that this run already has: the one in delivered.json, else the one tagged with its id."""
    from mlflow.entities import ViewType
    from mlflow.exceptions import MlflowException

    if ledger.get("uri") == store.address.shown and isinstance(ledger.get("run_id"), str):
        with contextlib.suppress(MlflowException):
            known = store.client.get_run(ledger["run_id"])
            if known.info.lifecycle_stage == "deleted":
                _existing_experiment(store, experiment)
                raise HpcmlError(
                    f"the MLflow run {ledger['run_id']} of {run.id} was deleted in {store.address.shown}",
                    fix=f"mlflow runs restore --run-id {ledger['run_id']}, or remove {run.delivered} to send it anew",
                )
            return known
    number = _existing_experiment(store, experiment)
    if number is None:
        return None
    quote = '"' if "'" in run.id else "'"
    found = store.client.search_runs(
        [number], f"tags.`{RUN_TAG}` = {quote}{run.id}{quote}", ViewType.ACTIVE_ONLY, order_by=["start_time ASC"]
    )
    # Recurring runs of two projects, or of two people at one server, may share an id; their plans differ.
    same = (hit for hit in found if hit.data.tags.get(PLAN_TAG) in (None, _fingerprint(run)))
    return next(same, None)


def _existing_experiment(store: _Store, name: str) -> str | None:
    found = store.client.get_experiment_by_name(name)
    if found is not None and found.lifecycle_stage == "deleted":
        raise HpcmlError(
            f"the MLflow experiment {name!r} was deleted in {store.address.shown}",
            fix=f"mlflow experiments restore --experiment-id {found.experiment_id}, or `mlflow gc` to end it for good",
        )
    return str(found.experiment_id) if found is not None else None


def _create(
    store: _Store, run: RunDir, plan: Mapping[str, Any], status: Mapping[str, Any], experiment: str, parent: str | None
) -> Any:
    from mlflow.exceptions import MlflowException

    number = _existing_experiment(store, experiment)
    if number is None:
        database = store.address.database
        root = _artifact_root(database).as_uri() if database else None  # MLflow's default is ./mlruns, wherever we are
        try:
            number = store.client.create_experiment(experiment, artifact_location=root)
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
            number = _existing_experiment(store, experiment)  # somebody else was faster
    tags = {RUN_TAG: run.id, PLAN_TAG: _fingerprint(run), **({PARENT_TAG: parent} if parent else {})}
    with contextlib.suppress(KeyError, OSError):  # no name for this user id
        tags["mlflow.user"] = getpass.getuser()
    if plan.get("target"):
        tags["mlflow.source.name"] = _text(plan["target"][0], MAX_TAG)
    started = _started_s(run, status)
    return store.client.create_run(number, start_time=round(started * 1000), tags=tags, run_name=run.id)


def _fingerprint(run: RunDir) -> str:
    try:
        return hashlib.sha256(run.plan.read_bytes()).hexdigest()[:16]
    except FileNotFoundError:
        return "none"


def _started_s(run: RunDir, status: Mapping[str, Any]) -> float:
    """Seconds since the epoch: MLflow can't change a start later, so the best that is known at the first delivery."""
    for marker in (status, read_json(run.status_of(0))):
        if isinstance(marker.get("started"), int | float):
            return float(marker["started"])
    first = next(journal.read(run.events), None)
    return first["t"] / 1000 if first else run.path.stat().st_mtime


def _send_state(store: _Store, mine: Any, state: str, status: Mapping[str, Any]) -> None:
    word = state.partition(" ")[0].rstrip("+")  # sacct says `CANCELLED by 1000`
    if word in ALIVE:
        if mine.info.status != "RUNNING":
            store.client.update_run(mine.info.run_id, status="RUNNING")
        return
    there = "FINISHED" if word == "COMPLETED" else "KILLED" if word in KILLED else "FAILED"
    ended = status.get("ended")
    end_ms = round(ended * 1000) if isinstance(ended, int | float) else mine.info.end_time
    if (mine.info.status, mine.info.end_time) != (there, end_ms) or end_ms is None:
        store.client.set_terminated(mine.info.run_id, there, end_ms)


# ---- metrics, params, tags ------------------------------------------------------------------------------------------


@dataclass
class _Said:
    """What the journal says besides metrics."""

    params: dict[str, Any] = field(default_factory=dict)
    tags: dict[str, Any] = field(default_factory=dict)
    replicas: dict[str, Any] = field(default_factory=dict)
    renamed: dict[str, str] = field(default_factory=dict)

    def take(self, record: Mapping[str, Any]) -> None:
        values = record.get("values") if isinstance(record.get("values"), dict) else {}
        assert isinstance(values, dict)
        if record["kind"] == "params":  # files come rank 0 first, and the first value stays
            self.params = {**values, **self.params}
        elif record["kind"] == "tags":
            self.tags = {**self.tags, **values} if record["rank"] == 0 else {**values, **self.tags}
        elif record["kind"] == "replicas" and record["rank"] == 0:
            self.replicas = dict(record)

    def unclaimed(self, plan: Mapping[str, Any]) -> dict[str, Any]:
        """Params of the journal that the plan doesn't have."""
        known = _plan_params(plan)
        return {name: value for name, value in self.params.items() if name not in known}


def _send_journal(store: _Store, run: RunDir, ledger: dict[str, Any], said: _Said) -> int:
    """Send the metrics behind the noted lines, in the journal's order; note the lines after each call."""
    lines: dict[str, int] = ledger.setdefault("lines", {})
    reached = dict(lines)
    chunk: list[Any] = []
    size = sent = 0

    def flush() -> None:
        nonlocal chunk, size, sent
        if chunk:
            store.client.log_batch(ledger["run_id"], metrics=chunk, synchronous=True)
        sent, size, chunk = sent + len(chunk), 0, []
        if reached != lines:
            lines.update(reached)
            write_json(run.delivered, ledger)

    for record in journal.read(run.events):
        said.take(record)
        file = run.event_file(record["rank"], record["restart"], record["writer"]).name
        points = list(_points(record, said.renamed))
        if record["line"] > lines.get(file, 0):
            for point in points:
                # 160: the bytes of a point's JSON around its name
                cost = 160 + len(json.dumps(point.key))
                if len(chunk) == MAX_POINTS or size + cost > MAX_REQUEST_BYTES:
                    flush()
                chunk.append(point)
                size += cost
            reached[file] = record["line"]
    flush()
    return sent


def _points(record: Mapping[str, Any], renamed: dict[str, str]) -> Iterator[Any]:
    """Yield MLflow's metrics of one record; a value or step that MLflow has no room for is left out."""
    from mlflow.entities import Metric

    step, values = record.get("step"), record.get("values")
    if record["kind"] != "metric" or not isinstance(step, int) or not isinstance(values, dict):
        return
    if not (-(2**63) <= step < 2**63 and 0 <= record["t"] < 2**63):
        return
    for name, value in values.items():
        if isinstance(value, int | float):
            full = name if record["rank"] == 0 else f"rank_{record['rank']}/{name}"
            yield Metric(_renamed(full, renamed), _double(value), record["t"], step)


def _double(value: float) -> float:
    """A database has no infinities: they become the largest numbers of their sign; NaN stays."""
    if math.isnan(value):
        return math.nan
    return float(max(-sys.float_info.max, min(sys.float_info.max, value)))


def _plan_params(plan: Mapping[str, Any]) -> dict[str, Any]:
    resources = ("nodes", "gpus_per_node", "tasks_per_node", "cpus_per_task", "mem_gb", "time_s")
    return {
        **{f"resources.{key}": plan[key] for key in resources if key in plan},
        **{key: plan[key] for key in ("strategy", "keras", "precision") if key in plan},
        **(plan.get("defaults") or {}),
        **(plan.get("params") or {}),
    }


def _tags(run: RunDir, plan: Mapping[str, Any], state: str, said: _Said) -> dict[str, Any]:
    """Return the run's tags; the work's own may replace all but those that find the run again."""
    devices = [str(name).upper() for name in said.replicas.get("devices") or ()]
    if said.replicas.get("virtual"):
        device = "CPU (virtual devices)"
    elif said.replicas:
        device = "CPU" if all("CPU" in name for name in devices) else "GPU"
    else:
        device = "GPU (requested)" if plan.get("gpus_per_node") else "CPU"
    job_id = slurm_job_id(run) or read_json(run.status).get("slurm_job_id")
    tags = {
        "Training device": device,
        "Phase": "Experimental",
        "strategy": plan.get("strategy"),
        "site": plan.get("site"),
        "slurm_job_id": job_id,
        "state": state,
    }
    own = {name: value for name, value in said.tags.items() if name not in OURS}
    return {name: value for name, value in {**tags, **own}.items() if value is not None}


def _send_facts(
    store: _Store, mine: Any, params: Mapping[str, Any], tags: Mapping[str, Any], renamed: dict[str, str]
) -> None:
    """Send the params that MLflow lacks, since it lets none change, and the tags that differ."""
    from mlflow.entities import Param, RunTag

    wanted = {_renamed(name, renamed): _text(value, MAX_PARAM) for name, value in params.items()}
    labels = {_renamed(name, renamed): _text(value, MAX_TAG) for name, value in tags.items()}
    labels |= {NAME_TAG + name: _text(original, MAX_TAG) for name, original in renamed.items()}
    new = [Param(name, value) for name, value in wanted.items() if name not in mine.data.params]
    changed = [RunTag(name, value) for name, value in labels.items() if mine.data.tags.get(name) != value]
    for start in range(0, len(new), MAX_PAIRS):
        store.client.log_batch(mine.info.run_id, params=new[start : start + MAX_PAIRS], synchronous=True)
    for start in range(0, len(changed), MAX_PAIRS):
        store.client.log_batch(mine.info.run_id, tags=changed[start : start + MAX_PAIRS], synchronous=True)


def _text(value: Any, most: int) -> str:
    """Return a value as text that any database takes: no NUL, no lone surrogates, not too long."""
    text = str(value).encode("utf-8", "backslashreplace").decode().replace("\0", "\\0")
    return text if len(text) <= most else text[: most - 1] + "…"


def _renamed(name: str, renamed: dict[str, str]) -> str:
    """Return the name that MLflow takes, and note the original where it is another."""
    known = mlflow_name(name)
    if known != name:
        renamed[known] = name
    return known


@functools.lru_cache(maxsize=4096)
def mlflow_name(name: str) -> str:
    """Return a name as MLflow takes it: itself, or each refused character as ``:`` and the hex of its UTF-8 bytes.

    MLflow refuses ``%`` too, hence the colon. A colon before two hex digits is escaped itself, so ``unquote`` with
    ``:`` for ``%`` gives the original back; only names over 239 characters are cut, with a hash at the end.
    """

    def hexed(match: re.Match[str]) -> str:
        return "".join(f":{byte:02X}" for byte in match[0].encode("utf-8", "surrogatepass"))

    escaped = re.sub(r"[^\w./: -]|:(?=[0-9A-Fa-f]{2})", hexed, name)
    if posixpath.normpath(escaped) != escaped or escaped.startswith(("/", "..")) or escaped == ".":
        escaped = re.sub(r"/|^\.+", hexed, escaped) or "unnamed"  # MLflow takes names for paths: `a//b`, `../a`
    if escaped == name and len(name) <= MAX_NAME:
        return name
    most = MAX_NAME - len(NAME_TAG)  # so that a tag can carry the original
    if len(escaped) <= most:
        return escaped
    digest = hashlib.sha256(name.encode("utf-8", "surrogatepass")).hexdigest()[:8]
    return f"{escaped[: most - 9].rstrip('/')}-{digest}"


# ---- artifacts ------------------------------------------------------------------------------------------------------


def _artifacts(run: RunDir) -> Sequence[Path]:
    notebooks = [run.notebook(0), *sorted(run.path.glob("notebook.*.ipynb"))]
    single = [run.plan, run.script, run.comparison, run.plot, run.path / "report.html"]
    logs = sorted(run.logs.glob("*"))
    return list(dict.fromkeys(path for path in (*notebooks, *single, *logs) if path.is_file()))


def _send_artifacts(store: _Store, run: RunDir, ledger: dict[str, Any]) -> int:
    """Send the files that are new or changed since they were sent."""
    noted: dict[str, list[int]] = ledger.setdefault("artifacts", {})
    sent = 0
    for path in _artifacts(run):
        try:
            stat = path.stat()  # before the upload: what is appended meanwhile is sent next time
        except FileNotFoundError:
            continue
        key, now = str(path.relative_to(run.path)), [stat.st_mtime_ns, stat.st_size]
        if noted.get(key) == now:
            continue
        folder = None if path.parent == run.path else path.parent.name
        store.client.log_artifact(ledger["run_id"], str(path), folder)
        noted[key] = now
        sent += 1
        write_json(run.delivered, ledger)
    return sent
