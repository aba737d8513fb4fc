"""A run in MLflow's terms: names, numbers and texts within its limits; params, tags and states. Pure."""

import functools
import hashlib
import math
import posixpath
import re
import sys
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

# MLflow's limits (mlflow/utils/validation.py), in characters.
MAX_NAME, MAX_PARAM, MAX_TAG = 250, 6000, 8000

RUN_TAG, PLAN_TAG, NAME_TAG, PARENT_TAG = "hpcml.run", "hpcml.plan", "hpcml.name.", "mlflow.parentRunId"
OURS = (RUN_TAG, PLAN_TAG, PARENT_TAG, "mlflow.runName")
KILLED = ("CANCELLED", "TIMEOUT", "PREEMPTED", "DEADLINE")
ALIVE = ("PENDING", "CONFIGURING", "RUNNING", "COMPLETING", "SUSPENDED", "STOPPED", "REQUEUED", "RESIZING", "SIGNALING")
_GPU_NAME = re.compile(r"gpu(\d+)\.name")
# The strategies that are Keras's; with horovod it is Keras or torch that trains, with others torch or nobody knows what.
KERAS = ("original", "mirrored", "multiworker")
# Metrics that only explain others: the steps that a profile left out of an epoch's speed.
BOOKKEEPING = frozenset(["profiled_steps"])
RESOURCES = ("nodes", "gpus_per_node", "tasks_per_node", "cpus_per_task", "mem_gb", "time_s")


class Point(NamedTuple):
    """One value of a metric: its name in MLflow, the time in milliseconds since the epoch, the step."""

    name: str
    value: float
    t: int
    step: int


@dataclass
class Said:
    """What a journal says besides metrics, and the original of each name that MLflow refuses."""

    params: dict[str, Any] = field(default_factory=dict)
    tags: dict[str, Any] = field(default_factory=dict)
    replicas: dict[str, Any] = field(default_factory=dict)
    originals: dict[str, str] = field(default_factory=dict)

    def take(self, record: Mapping[str, Any]) -> None:
        """Take in a record. A param keeps its first value, a tag rank 0's last, else its first.

        A param that is None or empty tells nothing and is left out.
        """
        values = record.get("values")
        if record["kind"] == "params" and isinstance(values, dict):
            self.params = {**known(values), **self.params}
        elif record["kind"] == "tags" and isinstance(values, dict):
            self.tags = {**self.tags, **values} if record["rank"] == 0 else {**values, **self.tags}
        elif record["kind"] == "replicas" and record["rank"] == 0:
            self.replicas = dict(record)

    def name(self, original: str) -> str:
        """Return the name that MLflow takes, and keep the original where it is another."""
        name = mlflow_name(original)
        if name != original:
            self.originals[name] = original
        return name


def points(record: Mapping[str, Any], said: Said, first_ms: int = 0) -> Iterator[Point]:
    """Yield the points of a record; a value, time or step that MLflow has no room for is left out.

    A ``sample`` becomes ``system/<name>``, which MLflow shows on a page of its own, over whole seconds; a ``profile``
    becomes ``profile/<name>`` at the last step of its window. Ranks other than 0 have ``rank_<n>/`` before all of that.
    ``BOOKKEEPING`` stays in the journal.

    Args:
        first_ms: time of the first sample in this record's file, in milliseconds since the epoch.
    """
    kind, t, rank = record["kind"], record["t"], record["rank"]
    if kind == "metric":
        prefix, step, values = "", record.get("step"), record.get("values")
    elif kind == "sample":
        prefix, step, values = "system/", max(0, t - first_ms) // 1000, record.get("values")
    elif kind == "profile":
        prefix, step, values = "profile/", record.get("last"), record.get("split")
    else:
        return
    if not (isinstance(step, int) and isinstance(values, dict)):
        return
    if not (-(2**63) <= step < 2**63 and 0 <= t < 2**63):
        return
    prefix = prefix if rank == 0 else f"rank_{rank}/{prefix}"
    for name, value in values.items():
        if isinstance(value, int | float) and not (kind == "metric" and name in BOOKKEEPING):
            yield Point(said.name(prefix + name), double(value), t, step)


def params(plan: Mapping[str, Any], said: Said | None = None) -> dict[str, Any]:
    """Return the params of a plan: its resources and choices, the work's defaults, what was set over them.

    What is None or empty is left out: of a job without a strategy the work itself may have told one. Keras's flavour is
    told where Keras trains.
    """
    keys = ("strategy", "keras", "precision") if uses_keras(plan.get("strategy"), said) else ("strategy", "precision")
    return known(
        {
            **{f"resources.{key}": plan[key] for key in RESOURCES if key in plan},
            **{key: plan[key] for key in keys if key in plan},
            **(plan.get("defaults") or {}),
            **(plan.get("params") or {}),
        }
    )


def uses_keras(strategy: str | None, said: Said | None = None) -> bool:
    """Return whether a strategy's work trains with Keras; horovod's as soon as the check of its ranks has told.

    Keras reports TensorFlow's full names of devices, ``/device:GPU:0``, torch's helper ``GPU:0``.
    """
    names = (said.replicas.get("devices") if said else None) or ()
    return strategy in KERAS or (strategy == "horovod" and any(str(name).startswith("/") for name in names))


def known(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return values without those that are None or empty text; zero and False are known."""
    return {name: value for name, value in values.items() if value is not None and value != ""}


def tags(plan: Mapping[str, Any], state: str, job_id: int | None, said: Said) -> dict[str, Any]:
    """Return the tags of a run, where each value of its plan came from among them; the work's own win over all but ``OURS``."""
    # The runs below have a device and a strategy each; an action trains on none.
    compares = plan.get("work") in ("comparison", "chain", "action")
    ours = {
        "Training device": None if compares else device(plan, said),
        "Phase": "train",
        "strategy": None if compares else plan.get("strategy") or said.params.get("strategy"),
        "site": plan.get("site"),
        "slurm_job_id": job_id,
        "state": state,
    }
    origins = {f"origin.{key}": origin for key, origin in (plan.get("origins") or {}).items()}
    own = {name: value for name, value in said.tags.items() if name not in OURS}
    values = {**origins, **ours, **own}
    # MLflow's page shows tags in the order they were sent, and where values came from is a dozen of them.
    return {name: values[name] for name in {**ours, **own, **origins} if values[name] is not None}


def device(plan: Mapping[str, Any], said: Said) -> str:
    """Return what a run trains on, such as ``2 × NVIDIA A100-SXM4-40GB`` or ``CPU (2 virtual devices)``.

    The number is that of the replicas in sync, before one was reported that of the GPUs requested; the names are those
    of rank 0's GPUs. Virtual devices stand in for GPUs: a job that asks for none trains on none of them.
    """
    in_sync = said.replicas.get("in_sync")
    replicas = in_sync if isinstance(in_sync, int) else 0
    if said.replicas.get("virtual") and said.params.get("virtual_cpu_devices") == 0:
        return f"CPU ({replicas} ranks)" if replicas > 1 else "CPU"
    if said.replicas.get("virtual"):
        return f"CPU ({replicas or 1} virtual device{'s' if replicas > 1 else ''})"
    trains_on = [str(name).upper() for name in said.replicas.get("devices") or ()]
    requested = int(plan.get("nodes") or 1) * int(plan.get("gpus_per_node") or 0)
    if trains_on and all("CPU" in name for name in trains_on):
        return "CPU"
    if not said.replicas and (not requested or said.params.get("virtual_cpu_devices")):
        return "CPU"  # none was asked for, or CPUs stand in for them
    indexed = [(int(hit[1]), str(value)) for key, value in said.params.items() if (hit := _GPU_NAME.fullmatch(key))]
    names = Counter(name for _, name in sorted(indexed))
    if len(names) > 1:
        return ", ".join(f"{count} × {name}" for name, count in names.items())
    count = replicas or requested or len(indexed)
    return f"{count or 1} × {next(iter(names), 'GPU')}" + ("" if said.replicas or indexed else " (requested)")


def status(state: str) -> str:
    """Return MLflow's status for a state of ours; the tag ``state`` keeps the difference."""
    word = state.partition(" ")[0].rstrip("+")  # sacct says `CANCELLED by 1000` and, cut, `CANCELLED+`
    if word in ALIVE:
        return "RUNNING"
    return "FINISHED" if word == "COMPLETED" else "KILLED" if word in KILLED else "FAILED"


def double(value: float) -> float:
    """Return a number as a database keeps it: infinities become the largest of their sign, NaN stays."""
    try:
        if math.isnan(value):
            return math.nan
    except OverflowError:  # a whole number of more than 308 digits
        value = math.inf if value > 0 else -math.inf
    return float(max(-sys.float_info.max, min(sys.float_info.max, value)))


def text(value: Any, most: int) -> str:
    """Return a value as text that any database takes: no NUL, no lone surrogate, cut at ``most`` characters."""
    clean = str(value).encode("utf-8", "backslashreplace").decode().replace("\0", "\\0")
    return clean if len(clean) <= most else clean[: most - 1] + "…"


@functools.lru_cache(maxsize=4096)
def mlflow_name(name: str) -> str:
    """Return a name as MLflow takes it: itself, or each refused character as ``:XX`` for each of its UTF-8 bytes.

    MLflow refuses ``%`` too, hence the colon; a colon before two hex digits is escaped itself, so that no two names
    become one. A name too long for that is cut, with a hash at its end.
    """

    def hexed(match: re.Match[str]) -> str:
        return "".join(f":{byte:02X}" for byte in match[0].encode("utf-8", "surrogatepass"))

    escaped = re.sub(r"[^\w./: -]|:(?=[0-9A-Fa-f]{2})", hexed, name)
    if posixpath.normpath(escaped) != escaped or escaped.startswith(("/", "..")) or escaped == ".":
        escaped = re.sub(r"/|^\.+", hexed, escaped) or "unnamed"  # MLflow takes names for paths: `a//b`, `../a`
    if escaped == name and len(name) <= MAX_NAME:
        return name
    most = MAX_NAME - len(NAME_TAG)  # so that a tag can be named after it
    if len(escaped) <= most:
        return escaped
    digest = hashlib.sha256(name.encode("utf-8", "surrogatepass")).hexdigest()[:8]
    return f"{escaped[: most - 9].rstrip('/')}-{digest}"
