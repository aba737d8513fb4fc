"""What is known of a run once it has ended, as one tree of facts, read from its run directory alone."""

import dataclasses
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .. import plan as plans
from .. import rundir
from ..rundir import RunDir, read_json
from ..tracking import journal
from . import absent, chain, logs, records, resumable, variants
from .comparison import ONGOING, Comparison, compare
from .measured import Measured, measure, plan_of
from .records import Records
from .series import Series
from .settings import Setting, settings_of
from .usage import Gpu, Usage, gpus_of, usage_of

PARTS = ("input", "host", "device_compute", "communication", "idle")


@dataclass(frozen=True)
class Outcome:
    """How the run ended.

    Attributes:
        state: Slurm's long name, ``RUNNING``, or ``UNKNOWN``.
        signal: the signal that asked it to stop, None for none.
        started, ended: seconds since the epoch; None where unknown. ``elapsed_s`` is what lies between.
    """

    state: str
    reason: str = ""
    exit_code: int | None = None
    signal: str | None = None
    failed_rank: int | None = None
    restarts: int = 0
    started: float | None = None
    ended: float | None = None
    elapsed_s: float | None = None

    @property
    def completed(self) -> bool:
        """Whether the work was done."""
        return self.state == "COMPLETED"


@dataclass(frozen=True)
class Wait:
    """A time in the queue: for Slurm's reason, from ``since`` (seconds since the epoch)."""

    reason: str
    since: float


@dataclass(frozen=True)
class Queue:
    """The way through the queue; ``waited_s`` until the first rank began."""

    slurm_job_id: int | None = None
    submitted: float | None = None
    waited_s: float | None = None
    waits: tuple[Wait, ...] = ()


@dataclass(frozen=True)
class Split:
    """Where the time of a step goes, in milliseconds, from a profile of steps ``first`` to ``last``.

    Attributes:
        step_ms: a profiled step, which the profiler slows down.
        left_out: steps that the epochs' speeds leave out because of the profile.
    """

    first: int | None
    last: int | None
    step_ms: float | None
    parts_ms: Mapping[str, float]
    advice: str = ""
    left_out: int = 0


@dataclass(frozen=True)
class Message:
    """What a rank said to a person."""

    level: str
    text: str
    rank: int
    at_s: float


@dataclass(frozen=True)
class Report:
    """All facts of a run.

    Attributes:
        path: the run directory.
        plan: as submitted; None where the directory holds none.
        ranks: ranks that wrote a journal.
        hosts: where they ran.
        epochs: when each epoch ended, in seconds since the run began, by number.
        metrics, telemetry: series on the same clock, seconds since the run began.
        threads, data, params, provenance: settings with their origins.
        logs: the last lines of the rank that failed, or of rank 0; of a comparison those of the first variant that
            failed.
        failed: the variants of a comparison that failed.
        comparison: of a run with variants, None for others.
        lost: records that could not be kept.
        left_out: metrics whose values were no numbers, and how often.
        resume_step: the step of the checkpoint that ``hpcml resume`` lets it go on from; None where it can't.
        missing: what could not be told, and why, in words.
        steps: of a chain; nothing for others.
    """

    id: str
    path: str
    made: float
    name: str
    work: str
    target: str
    outcome: Outcome
    queue: Queue
    plan: plans.Plan | None
    measured: Measured
    ranks: int
    hosts: tuple[str, ...]
    gpus: tuple[Gpu, ...]
    usage: Usage
    epochs: Mapping[int, float]
    metrics: tuple[Series, ...]
    telemetry: tuple[Series, ...]
    split: Split | None
    threads: tuple[Setting, ...]
    data: tuple[Setting, ...]
    params: tuple[Setting, ...]
    provenance: tuple[Setting, ...]
    messages: tuple[Message, ...]
    logs: tuple[logs.LogEnd, ...]
    notebook: str | None
    comparison: Comparison | None
    lost: int
    left_out: tuple[tuple[str, int], ...]
    missing: tuple[str, ...]
    failed: tuple["Report", ...] = ()
    resume_step: int | None = None
    steps: tuple[chain.Step, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Return the facts as plain JSON data; what JSON has no number for is ``"NaN"``, ``"Infinity"``, ``"-Infinity"``."""
        plain = _plain(
            dataclasses.asdict(dataclasses.replace(self, failed=())) | {"failed": [r.id for r in self.failed]}
        )
        assert isinstance(plain, dict)
        return plain


def collect(
    run: RunDir, *, state: str = "", reason: str = "", states: Mapping[str, tuple[str, str]] | None = None
) -> Report:
    """Read the facts of a run; what is absent or unreadable is None or empty, never an error.

    Args:
        state: how it ended where its own end marker does not say, such as Slurm's word on a killed job.
        reason: likewise.
        states: by name the states and reasons of a comparison's variants, likewise.
    """
    plan, submitted, found = plan_of(run), read_json(run.submitted), records.read(run)
    status = records.status_of(run, found)
    outcome = _outcome(run, status, found, state, reason)
    begin_s = outcome.started or found.first_s or 0.0
    telemetry = records.series_of(found.samples, begin_s)
    measured = dataclasses.replace(measure(run, found), state=outcome.state)
    gpus = gpus_of(found, telemetry, outcome.elapsed_s)
    split = _split(found)
    raw_plan = read_json(run.plan)
    is_comparison = raw_plan.get("work") == "comparison"
    children = variants.ordered(run, raw_plan) if is_comparison else []
    known = variants.states_of(children, outcome.state, states or {})
    compared = compare(children, known) if children else None
    failed = _failed(children, compared, known)
    report = Report(
        id=run.id,
        path=str(run.path),
        made=time.time(),
        name=plan.name if plan else run.id.rsplit("/", 1)[-1],
        work=plan.work if plan else str(raw_plan.get("work") or "unknown"),
        target=" ".join(plan.target) if plan else "",
        outcome=outcome,
        queue=_queue(run, submitted, outcome),
        plan=plan,
        measured=measured,
        ranks=len({rank for rank, _ in found.metrics} | set(found.params)),
        hosts=tuple(dict.fromkeys(str(p["host"]) for _, p in sorted(found.params.items()) if p.get("host"))),
        gpus=gpus,
        usage=usage_of(plan, outcome.elapsed_s, measured.virtual, found, telemetry, gpus),
        epochs={n: round(at - begin_s, 3) for n, at in sorted(found.epochs.items()) if n > 0},
        metrics=records.series_of(records.shown(found.metrics), begin_s),
        telemetry=telemetry,
        split=split,
        **settings_of(plan, found, read_json(run.path / "provenance.json")),
        messages=_messages(found, begin_s),
        logs=next((one.logs[:1] for one in failed if one.logs), ()) or logs.ends(run, outcome.failed_rank),
        notebook=str(run.notebook(0)) if run.notebook(0).is_file() else None,
        comparison=compared,
        # The marker counts what the journal tells, and what it had no room left to tell.
        lost=max(found.lost, status["lost"] if isinstance(status.get("lost"), int) else 0),
        left_out=tuple(sorted(journal.left_out(run.events).items())),
        missing=(),
        failed=failed,
        resume_step=resumable.step_to_resume(run, outcome.state, outcome.exit_code),
        steps=chain.steps(run, raw_plan),
    )
    return dataclasses.replace(report, missing=absent.missing(report))


def _failed(
    children: list[RunDir], compared: Comparison | None, known: Mapping[str, tuple[str, str]]
) -> tuple[Report, ...]:
    """The variants that began and did not complete; the first is what there is to look at."""
    found = []
    for child, row in zip(children, compared.rows if compared else (), strict=True):
        if row.measured.state not in ("COMPLETED", *ONGOING):
            state, reason = known.get(row.measured.name, ("", ""))
            one = collect(child, state=state, reason=reason)
            error = row.measured.error
            found.append(dataclasses.replace(one, measured=dataclasses.replace(one.measured, error=error)))
    return tuple(found)


def _outcome(run: RunDir, status: Mapping[str, Any], found: Records, state: str, reason: str) -> Outcome:
    marked = str(status.get("state") or "")
    if status.get("final") or not state:
        state = marked or ("RUNNING" if rundir.owner_is_alive(run) else "UNKNOWN")
        reason = str(status.get("reason") or "")
    if state == "UNKNOWN" and not reason:
        reason = "no end marker: it was killed, or its node was lost"
    started, ended = _time(status.get("started")), _time(status.get("ended"))
    started = started or found.first_s
    known_end = ended or found.last_s
    return Outcome(
        state=state,
        reason=reason,
        exit_code=_int(status.get("exit_code")),
        signal=str(status["signal"]) if status.get("signal") else None,
        failed_rank=_int(status.get("failed_rank")),
        restarts=found.restart,
        started=started,
        ended=ended,
        elapsed_s=max(0.0, known_end - started) if started is not None and known_end is not None else None,
    )


def _queue(run: RunDir, submitted: Mapping[str, Any], outcome: Outcome) -> Queue:
    at = _time(submitted.get("submitted"))
    told = submitted.get("waits")
    waits = [
        Wait(str(wait["reason"]), float(wait["since"]))
        for wait in (told if isinstance(told, list) else [])
        if isinstance(wait, dict) and wait.get("reason") and _time(wait.get("since")) is not None
    ]
    waited = max(0.0, outcome.started - at) if at is not None and outcome.started is not None else None
    return Queue(rundir.slurm_job_id(run), at, waited, tuple(waits))


def _split(found: Records) -> Split | None:
    told = [record for record in found.of_kind("profile") if isinstance(record.get("split"), dict)]
    if not told:
        return None
    record, values = told[-1], told[-1]["split"]
    parts = {part: ms for part in PARTS if (ms := _time(values.get(f"{part}_ms", values.get(part)))) is not None}
    advice = record.get("advice")
    lines = advice if isinstance(advice, list) else [advice] if advice else []
    step = _time(values.get("step_ms", values.get("step")))
    slowed = found.metrics.get((0, records.PROFILED_STEPS))
    left_out = int(sum(value for value in slowed.values if math.isfinite(value))) if slowed else 0
    return Split(_int(record.get("first")), _int(record.get("last")), step, parts, " ".join(map(str, lines)), left_out)


def _messages(found: Records, begin_s: float) -> tuple[Message, ...]:
    told = [
        Message(str(r.get("level") or "info"), str(r.get("text") or ""), r["rank"], round(r["t"] / 1000 - begin_s, 3))
        for r in found.of_kind("message")
    ]
    return tuple(message for message in told if message.text)


def _int(value: object) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def _time(value: object) -> float | None:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return float(value) if is_number and math.isfinite(value) else None  # type: ignore[arg-type]


def _plain(value: object) -> object:
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    return str(value) if isinstance(value, Path) else value
