"""What there is to see of a run while it goes on, from its run directory alone, reading only what is new."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from .. import rundir
from ..rundir import RunDir
from ..tracking import journal
from .logs import rank_logs
from .order import children
from .state import State

KINDS = ("metric", "sample", "params", "progress", "message", "replicas")
# Points kept of a curve; beyond twice as many every second one goes. A terminal has fewer columns.
MOST_POINTS = 512
MOST_WARNINGS = 20
MOST_LINES = 60


@dataclass(frozen=True)
class Request:
    """What was asked for: all nodes together, memory in MiB, time in seconds; None or 0 where nothing was said."""

    nodes: int = 1
    gpus: int = 0
    cores: int = 0
    memory_mib: float | None = None
    time_s: float = 0.0
    strategy: str | None = None


@dataclass(frozen=True)
class Gpu:
    """One GPU of the job as last sampled.

    Attributes:
        name: ``gpu0``; of a job that samples on several ranks with the rank, ``rank 4 gpu0``.
        model: what the driver calls it, empty where it was not recorded.
        t: when it was sampled, in seconds since the epoch.
        values: ``utilization_percent``, ``memory_used_mib``, ``memory_mib``, ``power_w``, ``temperature_c``, …; what the
            driver does not tell is left out.
    """

    name: str
    model: str
    t: float
    values: Mapping[str, float]


@dataclass(frozen=True)
class Curve:
    """A metric of rank 0, thinned out: each point's step and value; ``last`` is the newest value, whatever it is."""

    points: tuple[tuple[int, float], ...]
    last: float


@dataclass(frozen=True)
class Look:
    """A run at one moment.

    Attributes:
        progress: for each unit, ``cell`` and ``epoch``, the newest record.
        host: ``cpu/cores``, ``memory/used_mib``, ``io/…`` as last sampled, summed over the samplers of the job.
        warnings: the newest last.
        lines: the last log lines with their rank.
        below: the runs below: a comparison's variants, an array's calls.
    """

    state: State
    request: Request
    progress: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    curves: Mapping[str, Curve] = field(default_factory=dict)
    gpus: tuple[Gpu, ...] = ()
    host: Mapping[str, float] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()
    lines: tuple[tuple[int, str], ...] = ()
    below: tuple["Look", ...] = ()


class Watcher:
    """Keeps what was read of a run; each ``look`` reads what came since."""

    def __init__(self, run: RunDir) -> None:
        self.run = run
        self.plan = rundir.read_json(run.plan)
        self._below: dict[str, Watcher] = {}
        self._reader = journal.Reader(run.events, KINDS)
        self._restart = 0
        self._begin_anew()

    @property
    def is_comparison(self) -> bool:
        """Whether the runs below are few and of different kinds: a comparison's variants, a chain's steps."""
        return self.plan.get("work") in ("comparison", "chain")

    def runs(self) -> list[RunDir]:
        """Return the runs whose states ``look`` wants: this one, then those below it."""
        return [self.run, *children(self.run)]

    def look(self, states: Mapping[str, State]) -> Look:
        """Read what is new.

        Args:
            states: by run id, of all ``runs``.
        """
        self.plan = self.plan or rundir.read_json(self.run.plan)
        for record in self._reader.new():
            self._take(record)
        below = [state for id, state in states.items() if id.rpartition("/")[0] == self.run.id]
        return Look(
            state=states[self.run.id],
            request=_request(self.plan),
            progress=dict(self._progress),
            curves={name: Curve(tuple(points), self._last[name]) for name, points in self._points.items()},
            gpus=self._gpus(),
            host=self._host(),
            warnings=tuple(self._warnings),
            lines=tuple(self._lines()),
            below=tuple(self._below_look(state) for state in below),
        )

    def _below_look(self, state: State) -> Look:
        """A variant is read like any run; of an array's calls, which may be thousands, the state is enough."""
        if not self.is_comparison:
            return Look(state=state, request=Request())
        name = state.run_id.rpartition("/")[2]
        if name not in self._below:
            self._below[name] = Watcher(self.run.child(name))
        return self._below[name].look({state.run_id: state})

    def _begin_anew(self) -> None:
        self._progress: dict[str, dict[str, Any]] = {}
        self._points: dict[str, list[tuple[int, float]]] = {}
        self._strides: dict[str, list[int]] = {}  # name → [every so many points is kept, points seen]
        self._last: dict[str, float] = {}
        self._samples: dict[int, dict[str, tuple[float, float]]] = {}  # rank → name → (seconds, value)
        self._params: dict[int, dict[str, Any]] = {}
        self._warnings: dict[str, None] = {}

    def _take(self, record: Mapping[str, Any]) -> None:
        restart, rank = record["restart"], record["rank"]
        if restart < self._restart:
            return
        if restart > self._restart:  # what an earlier restart said is of another time
            self._restart = restart
            self._begin_anew()
        kind, values = record["kind"], record.get("values")
        if kind == "metric" and rank == 0 and isinstance(values, dict) and isinstance(record.get("step"), int):
            for name, value in _numbers(values).items():
                self._add(name, record["step"], value)
        elif kind == "sample" and isinstance(values, dict):
            at = record["t"] / 1000
            self._samples.setdefault(rank, {}).update({k: (at, v) for k, v in _numbers(values).items()})
        elif kind == "params" and isinstance(values, dict):
            self._params.setdefault(rank, {}).update(values)
        elif kind == "progress" and rank == 0 and _counts(record):
            self._progress[record["unit"]] = dict(record)
        elif kind == "message" and record.get("level") in ("warning", "error"):
            self._warn(str(record.get("text", "")))

    def _warn(self, text: str) -> None:
        self._warnings.pop(text, None)  # said again: the newest last
        self._warnings[text] = None
        if len(self._warnings) > MOST_WARNINGS:
            del self._warnings[next(iter(self._warnings))]

    def _add(self, name: str, step: int, value: float) -> None:
        points, stride = self._points.setdefault(name, []), self._strides.setdefault(name, [1, 0])
        self._last[name] = value
        if stride[1] % stride[0] == 0:
            points.append((step, value))
        stride[1] += 1
        if len(points) >= 2 * MOST_POINTS:
            del points[1::2]
            stride[0] *= 2

    def _gpus(self) -> tuple[Gpu, ...]:
        found: dict[tuple[int, int], dict[str, tuple[float, float]]] = {}
        for rank, samples in self._samples.items():
            for name, sample in samples.items():
                device, slash, quantity = name.partition("/")
                if slash and device.startswith("gpu") and device[3:].isdecimal():
                    found.setdefault((rank, int(device[3:])), {})[quantity] = sample
        several = len({rank for rank, _ in found}) > 1
        gpus = []
        for (rank, index), samples in sorted(found.items()):
            params = self._params.get(rank, {})
            values = {quantity: value for quantity, (_, value) in samples.items()}
            total = params.get(f"gpu{index}.memory_mib")
            if isinstance(total, int | float):
                values["memory_mib"] = float(total)
            name = f"rank {rank} gpu{index}" if several else f"gpu{index}"
            model = str(params.get(f"gpu{index}.name") or "")
            gpus.append(Gpu(name, model, max(at for at, _ in samples.values()), values))
        return tuple(gpus)

    def _host(self) -> dict[str, float]:
        total: dict[str, float] = {}
        for samples in self._samples.values():
            for name, (_, value) in samples.items():
                if name.startswith(("cpu/", "memory/", "io/")):
                    total[name] = total.get(name, 0.0) + value
        return total

    def _lines(self) -> list[tuple[int, str]]:
        """The end of one rank's log, for lines have no times to mix them by: of the rank that failed, else the first."""
        failed = rundir.read_json(self.run.status).get("failed_rank")
        paths = rank_logs(self.run)
        for path in [p for p in paths if p == self.run.log(failed or 0)] + paths:
            if lines := rundir.last_lines(path, MOST_LINES):
                rank = int(path.name.split(".")[1])
                return [(rank, line) for line in lines]
        return []


def _numbers(values: Mapping[str, Any]) -> dict[str, float]:
    return {name: float(value) for name, value in values.items() if isinstance(value, int | float)}


def _counts(record: Mapping[str, Any]) -> bool:
    return all(isinstance(record.get(key), int) for key in ("done", "total")) and isinstance(record.get("unit"), str)


def _request(plan: Mapping[str, Any]) -> Request:
    def number(key: str) -> float:
        value = plan.get(key)
        return value if isinstance(value, int | float) and math.isfinite(value) else 0

    nodes = int(number("nodes")) or 1
    return Request(
        nodes=nodes,
        gpus=nodes * int(number("gpus_per_node")),
        cores=nodes * int(number("tasks_per_node")) * int(number("cpus_per_task")),
        memory_mib=nodes * 1024 * number("mem_gb") or None,
        time_s=number("time_s"),
        strategy=plan.get("strategy"),
    )
