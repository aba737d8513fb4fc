"""What one variant of a training measured, read from its run directory alone."""

import dataclasses
import math
import statistics
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from .. import plan as plans
from ..rundir import RunDir, read_json
from . import records
from .records import Records

_NAMES = ("samples_per_s", "step_time_ms", "time_to_first_step_s", "accuracy", "val_accuracy")


@dataclass(frozen=True)
class Epoch:
    """One epoch as rank 0 recorded it; ``number`` counts from 1, accuracies are fractions (0 to 1)."""

    number: int
    samples_per_s: float | None = None
    val_accuracy: float | None = None
    accuracy: float | None = None


@dataclass(frozen=True)
class Measured:
    """What one run measured in its last restart; None where it recorded nothing.

    Attributes:
        strategy: the job's, else the one that ``begin()`` was told.
        state: the end marker's, such as ``COMPLETED``; ``UNKNOWN`` without a marker of the last restart.
        replicas: replicas in sync; ``expected_replicas`` as planned.
        virtual: whether the devices are virtual CPU devices, which share the same cores; a job that asked for no GPU has none.
        devices: names as the framework gives them.
        global_batch: samples a step, over all replicas.
        samples_per_s: over all replicas; median of the epochs after the first, which also traces and warms up. A
            single epoch is used as it is, with a warning.
        step_time_ms: median likewise.
        accuracy: fraction (0 to 1) at the last epoch; on validation data where ``validated``, else on training data.
        error: one line, for a run that did not complete.
    """

    name: str
    run_id: str
    strategy: str | None
    state: str
    replicas: int | None
    expected_replicas: int | None
    virtual: bool
    devices: tuple[str, ...]
    global_batch: int | None
    samples_per_s: float | None
    step_time_ms: float | None
    time_to_first_step_s: float | None
    accuracy: float | None
    validated: bool
    train_accuracy: float | None
    epochs: tuple[Epoch, ...] = ()
    warnings: tuple[str, ...] = ()
    error: str | None = None


def measure(run: RunDir, found: Records | None = None) -> Measured:
    """Read what a run measured; whatever is absent or unreadable is None, never an error.

    Args:
        found: its records, where they were read already.
    """
    plan, found = plan_of(run), found or records.read(run)
    status, told, metrics = records.status_of(run, found), found.others, _metrics(found)
    state = status["state"] if isinstance(status.get("state"), str) else "UNKNOWN"
    synced = [record for record in told if record["kind"] == "replicas" and record["rank"] == 0]
    replicas: Mapping[str, Any] = synced[-1] if synced else {}
    names = replicas.get("devices")
    validated = any("val_accuracy" in values for values in metrics.values())
    return Measured(
        name=run.id.rsplit("/", 1)[1] if "/" in run.id else plan.name if plan else run.id,
        run_id=run.id,
        strategy=(plan.strategy if plan else None) or _told(found, "strategy"),
        state=state,
        replicas=_count(replicas.get("in_sync", status.get("replicas_in_sync"))),
        expected_replicas=_count(replicas.get("expected")),
        virtual=replicas.get("virtual") is True and _param(found, "virtual_cpu_devices") != 0,
        devices=tuple(map(str, names)) if isinstance(names, list) else (),
        global_batch=_count(plan.effective_params.get("global_batch")) if plan else None,
        samples_per_s=_steady(metrics, "samples_per_s"),
        step_time_ms=_steady(metrics, "step_time_ms"),
        time_to_first_step_s=_number(metrics.get(0, {}).get("time_to_first_step_s")),
        accuracy=_final(metrics, "val_accuracy" if validated else "accuracy"),
        validated=validated,
        train_accuracy=_final(metrics, "accuracy"),
        epochs=_epochs(metrics),
        warnings=_warnings(told, metrics, replicas),
        error=None if state == "COMPLETED" else _error(told, status, run),
    )


def plan_of(run: RunDir) -> plans.Plan | None:
    try:
        return plans.from_json(read_json(run.plan))
    except (KeyError, TypeError):
        return None


def _param(found: Records, name: str) -> object:
    return found.params.get(0, {}).get(name)


def _told(found: Records, name: str) -> str | None:
    value = _param(found, name)
    return value if isinstance(value, str) and value else None


def _metrics(found: Records) -> dict[int, dict[str, float | None]]:
    """Rank 0's metrics by step, in order; a later record of a step adds to it. NaN and infinities become None."""
    by_step: dict[int, dict[str, float | None]] = {}
    for name in _NAMES:
        points = found.metrics.get((0, name))
        for step, value in zip(points.steps, points.values, strict=True) if points else ():
            by_step.setdefault(step, {})[name] = _number(value)
    return dict(sorted(by_step.items()))


def _number(value: object) -> float | None:
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


def _count(value: object) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def _recorded(metrics: Mapping[int, Mapping[str, float | None]], name: str) -> list[float]:
    return [value for step, values in metrics.items() if step > 0 and (value := values.get(name)) is not None]


def _steady(metrics: Mapping[int, Mapping[str, float | None]], name: str) -> float | None:
    values = _recorded(metrics, name)
    return statistics.median(values[1:] or values) if values else None


def _final(metrics: Mapping[int, Mapping[str, float | None]], name: str) -> float | None:
    """The value at the last epoch that recorded it: one that ended as NaN has none, whatever came before."""
    return next((values[name] for values in reversed(list(metrics.values())) if name in values), None)


def _epochs(metrics: Mapping[int, Mapping[str, float | None]]) -> tuple[Epoch, ...]:
    names = [field.name for field in dataclasses.fields(Epoch)][1:]
    return tuple(
        Epoch(step, **{name: values.get(name) for name in names})
        for step, values in metrics.items()
        if step > 0 and any(name in values for name in names)
    )


def _warnings(
    told: Iterable[Mapping[str, Any]],
    metrics: Mapping[int, Mapping[str, float | None]],
    replicas: Mapping[str, Any],
) -> tuple[str, ...]:
    texts = [r["text"] for r in told if r["kind"] == "message" and r.get("level") == "warning" and r.get("text")]
    warnings = [_first_line(str(text)) for text in texts]
    in_sync, expected = _count(replicas.get("in_sync")), _count(replicas.get("expected"))
    if in_sync is not None and expected is not None and in_sync != expected:
        warnings.append(f"{in_sync} of {expected} replicas in sync: not the training that was asked for")
    if len(_recorded(metrics, "samples_per_s")) == 1:
        warnings.append("one epoch only, so its speed includes tracing and warm-up; train two or more")
    return tuple(dict.fromkeys(warnings))


def _error(told: Iterable[Mapping[str, Any]], status: Mapping[str, Any], run: RunDir) -> str:
    """Of each rank's last error the earliest: when one worker dies, the others' errors only follow from it.

    The marker's reason stands in, and goes first for a run that was ended from outside (TIMEOUT, CANCELLED, …).
    """
    by_rank = {}
    for r in sorted(told, key=lambda record: int(record["t"])):
        if r["kind"] == "message" and r.get("level") == "error" and r.get("text"):
            by_rank[r["rank"]] = r
    said = str(min(by_rank.values(), key=lambda record: int(record["t"]))["text"]) if by_rank else ""
    reason = str(status.get("reason") or "")
    if said or reason:
        return _first_line((said or reason) if status.get("state") == "FAILED" else (reason or said))
    if not status:
        return f"no end marker: not ended yet, or killed; hpcml status {run.id}"
    code, signal = status.get("exit_code"), status.get("signal")
    how = f"stopped by {signal}" if signal else "no reason recorded" if code is None else f"exit code {code}"
    return f"{how}; hpcml logs {run.id}"


def _first_line(text: str) -> str:
    """The line that says what happened: the first, of a traceback the last."""
    lines = [line.strip() for line in text.splitlines() if line.strip()] or [""]
    return lines[-1] if lines[0].startswith("Traceback") else lines[0]
