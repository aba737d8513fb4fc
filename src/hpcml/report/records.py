"""A run's journal in one pass: the records of its last restart, sorted by what a report asks of them."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, TypeGuard

from ..rundir import RunDir, read_json
from ..tracking import journal
from .series import Points, Series

# Steps that a profile slowed down, which an epoch's speed leaves out.
PROFILED_STEPS = "profiled_steps"
BOOKKEEPING = frozenset([PROFILED_STEPS])


@dataclass
class Records:
    """What the journal of the last restart says.

    Attributes:
        metrics, samples: points by rank and name; metrics are the work's, samples the telemetry's.
        totals: the telemetry's last word by rank and name.
        params: each rank's params; ``tags`` those of rank 0 over the others'.
        epochs: when each epoch of rank 0 ended, in seconds since the epoch of Unix, by number.
        others: the remaining records as they are: ``message``, ``replicas``, ``finish``, ``profile``.
        first_s: time of the first record; None without any.
    """

    restart: int = 0
    metrics: dict[tuple[int, str], Points] = field(default_factory=dict)
    samples: dict[tuple[int, str], Points] = field(default_factory=dict)
    totals: dict[tuple[int, str], float] = field(default_factory=dict)
    params: dict[int, dict[str, Any]] = field(default_factory=dict)
    tags: dict[str, Any] = field(default_factory=dict)
    epochs: dict[int, float] = field(default_factory=dict)
    others: list[dict[str, Any]] = field(default_factory=list)
    first_s: float | None = None
    last_s: float | None = None
    lost: int = 0

    def take(self, record: dict[str, Any]) -> None:
        """Take in one record; one of another shape than its kind's is left out."""
        time_s, rank, kind = record["t"] / 1000, record["rank"], record["kind"]
        values = record.get("values")
        self.first_s = time_s if self.first_s is None else min(self.first_s, time_s)
        self.last_s = time_s if self.last_s is None else max(self.last_s, time_s)
        if kind == "metric" and isinstance(values, dict) and _is_step(record.get("step")):
            _add(self.metrics, rank, time_s, values, record["step"])
            if rank == 0 and "epoch_time_s" in values:
                self.epochs.setdefault(record["step"], time_s)
        elif kind == "sample" and isinstance(values, dict):
            _add(self.samples, rank, time_s, values, 0)
        elif kind == "totals" and isinstance(values, dict):
            self.totals |= {(rank, name): float(value) for name, value in values.items() if _is_number(value)}
        elif kind == "params" and isinstance(values, dict):
            self.params.setdefault(rank, {}).update(values)
        elif kind == "tags" and isinstance(values, dict):
            self.tags = {**self.tags, **values} if rank == 0 else {**values, **self.tags}
        elif kind == "progress":
            if record.get("unit") == "epoch" and rank == 0 and isinstance(record.get("done"), int):
                self.epochs[record["done"]] = time_s
        elif kind == "lost":
            count = record.get("count")
            self.lost += count if isinstance(count, int) else 0
        else:
            self.others.append(record)

    def of_kind(self, kind: str) -> list[dict[str, Any]]:
        """Return the remaining records of a kind, in the order of time."""
        return sorted((record for record in self.others if record["kind"] == kind), key=lambda r: int(r["t"]))


def read(run: RunDir) -> Records:
    """Read a run's journal; what is unreadable in it is left out."""
    marked = read_json(run.status).get("restarts")
    found = Records(restart=marked if _is_step(marked) else 0)  # one that recorded nothing hides what was before
    for record in journal.read(run.events):
        if record["restart"] > found.restart:
            found = Records(restart=record["restart"])
        if record["restart"] == found.restart:
            found.take(record)
    return found


def status_of(run: RunDir, found: Records) -> dict[str, Any]:
    """Return the end marker; that of an earlier restart says nothing and counts as absent."""
    status = read_json(run.status)
    marked = status.get("restarts")
    return {} if isinstance(marked, int) and marked < found.restart else status


def shown(points: Mapping[tuple[int, str], Points]) -> dict[tuple[int, str], Points]:
    """Return the metrics without those that only explain others."""
    return {key: found for key, found in points.items() if key[1] not in BOOKKEEPING}


def series_of(points: Mapping[tuple[int, str], Points], begin_s: float) -> tuple[Series, ...]:
    """Return series in the order of rank and first appearance."""
    ordered = sorted(points.items(), key=lambda item: item[0][0])
    return tuple(found.series(name, rank, begin_s) for (rank, name), found in ordered)


def _add(to: dict[tuple[int, str], Points], rank: int, time_s: float, values: Mapping[str, Any], step: int) -> None:
    for name, value in values.items():
        if _is_number(value):
            points = to.get((rank, name))
            if points is None:
                points = to[rank, name] = Points()
            points.add(time_s, value, step)


def _is_step(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool) and -(2**63) <= value < 2**63


def _is_number(value: object) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    try:
        float(value)
    except OverflowError:  # a whole number of more than 308 digits
        return False
    return True
