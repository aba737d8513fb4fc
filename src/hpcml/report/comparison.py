"""Variants of one training side by side: what each measured, speed-up and efficiency, and what a reader must know.

Everything is read from the run directories, so that a comparison can be made again from what is on disk.
"""

import dataclasses
import math
import re
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .. import plan as plans
from ..errors import HpcmlError
from ..rundir import RunDir, read_json
from ..tracking import journal

if TYPE_CHECKING:
    from rich.table import Table

BASELINE = "original"
# Two seeds of one small training already differ by about a point: more than two needs a reason.
ACCURACY_POINTS = 2.0
MISSING = "–"
_TENSORFLOW_DEVICE = re.compile(r"(?:.*:)?(CPU|GPU|TPU):\d+", re.IGNORECASE)


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
        state: the end marker's, such as ``COMPLETED``; ``UNKNOWN`` without a marker of the last restart.
        replicas: replicas in sync; ``expected_replicas`` as planned.
        virtual: whether the devices are virtual CPU devices, which share the same cores.
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


@dataclass(frozen=True)
class Row:
    """A variant beside the baseline.

    Attributes:
        speedup: its samples/s over the baseline's.
        efficiency: speed-up over the ratio of replicas in sync; 1 is perfect scaling.
    """

    measured: Measured
    speedup: float | None
    efficiency: float | None


@dataclass(frozen=True)
class Comparison:
    """Variants in the order given; ``baseline`` names the one that speed-ups refer to."""

    rows: tuple[Row, ...]
    baseline: str
    notes: tuple[str, ...] = ()

    @property
    def virtual(self) -> bool:
        """Whether any variant ran on virtual CPU devices."""
        return any(row.measured.virtual for row in self.rows)

    @property
    def heading(self) -> str:
        """Kind of device and, where all variants share it, the global batch."""
        kinds = list(dict.fromkeys(kind for row in self.rows if (kind := _device_kind(row.measured))))
        if self.virtual and "CPU" in kinds:
            kinds.remove("CPU")  # the one-device baseline of a rehearsal
        heading = "training on " + (" and ".join(kinds) or "unknown devices")
        batch = self.shared_batch
        return heading if batch is None else f"{heading}, global batch {batch:,}"

    @property
    def shared_batch(self) -> int | None:
        """The global batch (samples a step) of all variants; None where they differ or have none."""
        batches = {row.measured.global_batch for row in self.rows}
        return batches.pop() if len(batches) == 1 else None


def measure(run: RunDir) -> Measured:
    """Read what a run measured; whatever is absent or unreadable is None, never an error."""
    plan = _plan(run)
    records, status = _last_restart(run)
    metrics = _metrics(records)
    state = status["state"] if isinstance(status.get("state"), str) else "UNKNOWN"
    told = [record for record in records if record["kind"] == "replicas" and record["rank"] == 0]
    replicas: Mapping[str, Any] = told[-1] if told else {}
    names = replicas.get("devices")
    validated = any("val_accuracy" in values for values in metrics.values())
    return Measured(
        name=run.id.rsplit("/", 1)[1] if "/" in run.id else plan.name if plan else run.id,
        run_id=run.id,
        strategy=plan.strategy if plan else None,
        state=state,
        replicas=_count(replicas.get("in_sync", status.get("replicas_in_sync"))),
        expected_replicas=_count(replicas.get("expected")),
        virtual=replicas.get("virtual") is True,
        devices=tuple(map(str, names)) if isinstance(names, list) else (),
        global_batch=_count(plan.effective_params.get("global_batch")) if plan else None,
        samples_per_s=_steady(metrics, "samples_per_s"),
        step_time_ms=_steady(metrics, "step_time_ms"),
        time_to_first_step_s=_number(metrics.get(0, {}).get("time_to_first_step_s")),
        accuracy=_final(metrics, "val_accuracy" if validated else "accuracy"),
        validated=validated,
        train_accuracy=_final(metrics, "accuracy"),
        epochs=_epochs(metrics),
        warnings=_warnings(records, metrics, replicas),
        error=None if state == "COMPLETED" else _error(records, status, run),
    )


def compare(runs: Sequence[RunDir]) -> Comparison:
    """Measure runs and set them beside the first whose strategy is ``original``, else beside the first.

    A run that failed keeps its row, with its state and reason.

    Raises:
        HpcmlError: no runs.
    """
    if not runs:
        raise HpcmlError("nothing to compare", allowed="one run or more", fix="hpcml compare JOB JOB…")
    measured = [measure(run) for run in runs]
    base = next((m for m in measured if m.strategy == BASELINE), measured[0])
    rows = tuple(_row(m, base) for m in measured)
    known = {m.name: plan for m, run in zip(measured, runs, strict=True) if (plan := _plan(run))}
    unlike = [f"not like for like: {problem.what}" for problem in plans.unfair(known)] if known else []
    return Comparison(rows, base.name, (*unlike, *_notes(rows, base)))


def to_json(comparison: Comparison) -> dict[str, Any]:
    """Return the comparison as plain JSON data: fractions, seconds and samples/s, nothing rounded."""
    return dataclasses.asdict(comparison)


def from_json(data: Mapping[str, Any]) -> Comparison:
    """Return the comparison that ``to_json`` described.

    Raises:
        HpcmlError: the data is something else.
    """
    try:
        rows = []
        for row in data["rows"]:
            values = {**row["measured"], "epochs": tuple(Epoch(**epoch) for epoch in row["measured"]["epochs"])}
            values |= {key: tuple(values[key]) for key in ("devices", "warnings")}
            rows.append(Row(Measured(**values), row["speedup"], row["efficiency"]))
        return Comparison(tuple(rows), data["baseline"], tuple(data["notes"]))
    except (KeyError, TypeError) as error:
        what = f"this is no comparison: {type(error).__name__}: {error}"
        raise HpcmlError(what, allowed="what compare wrote", fix="compare again: hpcml compare JOB…") from None


def table(comparison: Comparison) -> "Table":
    """Return the comparison as a table that fits a terminal of 80 columns.

    A state other than ``COMPLETED`` stands below its variant's name, reasons and warnings below the table. The
    comparison's notes are left to the caller to print.
    """
    from rich import box
    from rich.table import Table
    from rich.text import Text

    drawn = Table(
        title=Text(f"{comparison.heading}\nspeed-up over {comparison.baseline}"),
        title_justify="left",
        title_style="bold",
        caption=Text("\n".join(["", *told])) if (told := remarks(comparison)) else None,
        caption_justify="left",
        caption_style="",
        box=box.SIMPLE_HEAD,
        show_edge=False,
        padding=(0, 0, 0, 1),
        pad_edge=False,
    )
    drawn.add_column("variant", overflow="fold")
    headers = ["replicas", "samples\nper s", "speed-\nup", "effi-\nciency", "step\n(ms)", "first\nstep (s)"]
    measured = [row.measured for row in comparison.rows]
    all_validated = all(m.validated for m in measured if m.accuracy is not None)
    headers.append("val.\naccuracy" if all_validated else "accuracy")
    same_batch = len({row.measured.global_batch for row in comparison.rows}) == 1
    for header in headers if same_batch else ["global\nbatch", *headers]:
        drawn.add_column(header, justify="right", no_wrap=True)
    for row in comparison.rows:
        m = row.measured
        cells = [replicas_text(m), number_text(m.samples_per_s), speedup_text(row.speedup)]
        cells += [percent_text(row.efficiency, 0), number_text(m.step_time_ms), number_text(m.time_to_first_step_s)]
        cells += [percent_text(m.accuracy, 1)]
        if not same_batch:
            cells.insert(0, MISSING if m.global_batch is None else f"{m.global_batch:,}")
        state = () if m.state == "COMPLETED" else ("\n", (m.state, "bold red"))
        drawn.add_row(Text.assemble(m.name, *state), *cells)
    return drawn


def remarks(comparison: Comparison) -> list[str]:
    """Return why variants failed, then what they warned of; a warning that several share is told once."""
    measured = [row.measured for row in comparison.rows]
    told = [f"{m.name} {m.state}: {m.error}" for m in measured if m.error]
    for warning in dict.fromkeys(warning for m in measured for warning in m.warnings):
        told.append(f"{', '.join(m.name for m in measured if warning in m.warnings)}: {warning}")
    return told


def number_text(value: float | None) -> str:
    """Return a number with about three digits, ``–`` for none."""
    if value is None:
        return MISSING
    digits = 0 if value == 0 or abs(value) >= 100 else 1 if abs(value) >= 10 else 2
    return f"{value:,.{digits}f}"


def speedup_text(value: float | None) -> str:
    """Return ``1.85×``, ``–`` for none."""
    return MISSING if value is None else f"{value:.2f}×"


def percent_text(fraction: float | None, digits: int) -> str:
    """Return a fraction as ``98.1 %``, ``–`` for none."""
    return MISSING if fraction is None else f"{100 * fraction:.{digits}f} %"


def replicas_text(m: Measured) -> str:
    """Return the replicas in sync, such as ``2`` or ``1 of 2``, ``–`` for unknown."""
    if m.replicas is None:
        return MISSING
    short = m.expected_replicas is not None and m.expected_replicas != m.replicas
    return f"{m.replicas} of {m.expected_replicas}" if short else str(m.replicas)


def _plan(run: RunDir) -> plans.Plan | None:
    try:
        return plans.from_json(read_json(run.plan))
    except (KeyError, TypeError):
        return None


def _last_restart(run: RunDir) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Records and end marker of the last restart; the marker of an earlier one says nothing and counts as absent."""
    records, status = list(journal.read(run.events)), read_json(run.status)
    ended = _count(status.get("restarts"))
    last = max([ended or 0, *(record["restart"] for record in records)])
    return [r for r in records if r["restart"] == last], {} if ended is not None and ended < last else status


def _metrics(records: Iterable[Mapping[str, Any]]) -> dict[int, dict[str, float | None]]:
    """Rank 0's metrics by step, in order; a later record of a step adds to it. NaN and infinities become None."""
    found: dict[int, dict[str, float | None]] = {}
    for record in records:
        step, values = _count(record.get("step")), record.get("values")
        if record["kind"] == "metric" and record["rank"] == 0 and step is not None and isinstance(values, dict):
            found.setdefault(step, {}).update({name: _number(value) for name, value in values.items()})
    return dict(sorted(found.items()))


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
    records: Iterable[Mapping[str, Any]],
    metrics: Mapping[int, Mapping[str, float | None]],
    replicas: Mapping[str, Any],
) -> tuple[str, ...]:
    told = [r["text"] for r in records if r["kind"] == "message" and r.get("level") == "warning" and r.get("text")]
    warnings = [_first_line(str(text)) for text in told]
    in_sync, expected = _count(replicas.get("in_sync")), _count(replicas.get("expected"))
    if in_sync is not None and expected is not None and in_sync != expected:
        warnings.append(f"{in_sync} of {expected} replicas in sync: not the training that was asked for")
    if len(_recorded(metrics, "samples_per_s")) == 1:
        warnings.append("one epoch only, so its speed includes tracing and warm-up; train two or more")
    return tuple(dict.fromkeys(warnings))


def _error(records: Iterable[Mapping[str, Any]], status: Mapping[str, Any], run: RunDir) -> str:
    """Of each rank's last error the earliest: when one worker dies, the others' errors only follow from it.

    The marker's reason stands in, and goes first for a run that was ended from outside (TIMEOUT, CANCELLED, …).
    """
    by_rank = {}
    for r in sorted(records, key=lambda record: int(record["t"])):
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


def _row(m: Measured, base: Measured) -> Row:
    speedup = m.samples_per_s / base.samples_per_s if m.samples_per_s is not None and base.samples_per_s else None
    if speedup is None or not m.replicas or not base.replicas:
        return Row(m, speedup, None)
    return Row(m, speedup, speedup / (m.replicas / base.replicas))


def _notes(rows: Sequence[Row], base: Measured) -> list[str]:
    notes = []
    shared = max((row.measured.replicas or 0 for row in rows if row.measured.virtual), default=0)
    if any(row.measured.virtual for row in rows):
        detail = f": {shared} replicas share the same cores" if shared > 1 else ""
        notes.append(f"On virtual CPU devices no speed-up can be expected{detail}.")
    if base.strategy != BASELINE and len(rows) > 1:
        notes.append(f"No variant is the {BASELINE}: speed-ups are over {base.name}, the first.")
    if not base.samples_per_s and len(rows) > 1:
        notes.append(f"No speed-up: {base.name} ({base.state}) has no samples/s to compare with.")
    notes += _accuracy_notes([row.measured for row in rows])
    for row in rows:
        m = row.measured
        scaled = (m.replicas or 0) > (base.replicas or 0)
        steady = m.state == "COMPLETED" and sum(epoch.samples_per_s is not None for epoch in m.epochs) > 1
        if row.speedup is not None and row.speedup < 1 and scaled and steady and _on_gpus(m):
            now = "" if m.global_batch is None else f" than {m.global_batch:,}"
            notes.append(
                f"{m.name} is slower on {m.replicas} GPUs ({speedup_text(row.speedup)}): at this batch a step of the "
                f"model is too small to share; try a larger global batch{now}."
            )
    return notes


def _accuracy_notes(measured: Sequence[Measured]) -> list[str]:
    ended = [(m.accuracy, m) for m in measured if m.state == "COMPLETED" and m.accuracy is not None]
    notes = []
    training = [m.name for _, m in ended if not m.validated]
    if training:
        whose = "" if len(training) == len(ended) else f" for {', '.join(training)}"
        notes.append(f"Accuracy is on training data{whose}: no validation accuracy recorded.")
    for validated in (True, False):
        alike = [(accuracy, m.name) for accuracy, m in ended if m.validated is validated]
        low, high = min(alike, default=(0.0, "")), max(alike, default=(0.0, ""))
        points = round(100 * (high[0] - low[0]), 6)  # 0.98 - 0.96 must not come out above 2 points
        if points > ACCURACY_POINTS:
            notes.append(
                f"Accuracy differs by {points:.1f} points: {high[1]} {percent_text(high[0], 1)}, {low[1]} "
                f"{percent_text(low[0], 1)}. Variants of one training should agree."
            )
    return notes


def _device_kind(m: Measured) -> str:
    if m.virtual:
        return "virtual CPU devices"
    kinds = dict.fromkeys(match[1].upper() if (match := _TENSORFLOW_DEVICE.fullmatch(n)) else n for n in m.devices)
    return " and ".join(kind if kind == "CPU" or kind in m.devices else f"{kind}s" for kind in kinds)


def _on_gpus(m: Measured) -> bool:
    return bool(m.devices) and not m.virtual and "CPU" not in _device_kind(m)
