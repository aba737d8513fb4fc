"""Variants of one training side by side: what each measured, speed-up and efficiency, and what a reader must know.

Everything is read from the run directories, so that a comparison can be made again from what is on disk.
"""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .. import plan as plans
from ..errors import HpcmlError
from ..rundir import RunDir
from .measured import Epoch, Measured, measure, plan_of

if TYPE_CHECKING:
    from rich.table import Table

BASELINE = "original"
# Two seeds of one small training already differ by about a point: more than two needs a reason.
ACCURACY_POINTS = 2.0
MISSING = "–"
ONGOING = {"RUNNING": "cyan", "PENDING": "yellow"}
# What trainers warn of in a rehearsal; the comparison's first note says it for all of them.
_SHARED_CORES = "share this machine's cores"
_TENSORFLOW_DEVICE = re.compile(r"(?:.*:)?(CPU|GPU|TPU):\d+", re.IGNORECASE)


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
    def rehearsal(self) -> bool:
        """Whether no variant ran on a GPU and some ran on virtual CPU devices: its speed-ups tell nothing."""
        return self.virtual and not any(_on_gpus(row.measured) for row in self.rows)

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


def compare(runs: Sequence[RunDir], states: Mapping[str, tuple[str, str]] | None = None) -> Comparison:
    """Measure runs and set them beside the first whose strategy is ``original``, else beside the first.

    A run that failed keeps its row, with its state and reason.

    Args:
        states: by name the state and reason of runs whose own end marker does not say.

    Raises:
        HpcmlError: no runs.
    """
    if not runs:
        raise HpcmlError("nothing to compare", allowed="one run or more", fix="hpcml compare JOB JOB…")
    measured = [_known(measure(run), states or {}) for run in runs]
    base = next((m for m in measured if m.strategy == BASELINE), measured[0])
    rows = tuple(_row(m, base) for m in measured)
    known = {m.name: plan for m, run in zip(measured, runs, strict=True) if (plan := plan_of(run))}
    unlike = [f"not like for like: {problem.what}" for problem in plans.unfair(known)] if known else []
    return Comparison(rows, base.name, (*unlike, *_notes(rows, base)))


def _known(m: Measured, states: Mapping[str, tuple[str, str]]) -> Measured:
    """A run as measured, with the state that others know of one without an end marker."""
    state, reason = states.get(m.name, ("", ""))
    if m.state != "UNKNOWN" or state in ("", "UNKNOWN"):
        return m
    return dataclasses.replace(m, state=state, error=None if state in ("COMPLETED", *ONGOING) else reason or m.error)


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
        cells = [replicas_text(m), number_text(m.samples_per_s), marked_speedup(comparison, row)]
        cells += [percent_text(row.efficiency, 0), number_text(m.step_time_ms), number_text(m.time_to_first_step_s)]
        cells += [percent_text(m.accuracy, 1)]
        if not same_batch:
            cells.insert(0, MISSING if m.global_batch is None else f"{m.global_batch:,}")
        state = () if m.state == "COMPLETED" else ("\n", (m.state, ONGOING.get(m.state, "bold red")))
        drawn.add_row(Text.assemble(m.name, *state), *cells)
    return drawn


def remarks(comparison: Comparison) -> list[str]:
    """Return why variants failed, then what they warned of; a warning that several share, or a note says, is told once."""
    measured = [row.measured for row in comparison.rows]
    told = [f"{m.name} {m.state}: {m.error}" for m in measured if m.error]
    for warning in dict.fromkeys(warning for m in measured for warning in m.warnings):
        if comparison.virtual and _SHARED_CORES in warning:
            continue
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


def marked_speedup(comparison: Comparison, row: Row) -> str:
    """Return a speed-up; that of a rehearsal with the star of the note that explains it."""
    star = "*" if comparison.rehearsal and row.speedup is not None else ""
    return speedup_text(row.speedup) + star


def percent_text(fraction: float | None, digits: int) -> str:
    """Return a fraction as ``98.1 %``, ``–`` for none."""
    return MISSING if fraction is None else f"{100 * fraction:.{digits}f} %"


def replicas_text(m: Measured) -> str:
    """Return the replicas in sync, such as ``2`` or ``1 of 2``, ``–`` for unknown."""
    if m.replicas is None:
        return MISSING
    short = m.expected_replicas is not None and m.expected_replicas != m.replicas
    return f"{m.replicas} of {m.expected_replicas}" if short else str(m.replicas)


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
        star = "" if any(_on_gpus(row.measured) for row in rows) else "* "
        notes.append(f"{star}On virtual CPU devices no speed-up can be expected{detail}.")
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
