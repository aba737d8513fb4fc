"""Variants of one training side by side: what each measured, speed-up and efficiency, and what a reader must know.

Everything is read from the run directories, so that a comparison can be made again from what is on disk.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .. import plan as plans
from ..errors import HpcmlError
from ..rundir import RunDir
from . import frameworks, notes, records, scaling
from .frameworks import Framework
from .measured import Epoch, Measured, measure, plan_of
from .notes import BASELINE
from .row import MISSING, Row, device_kind, number_text, on_gpus, percent_text, replicas_text, speedup_text
from .scaling import Parts

if TYPE_CHECKING:
    from rich.table import Table

# What others draw and write a comparison with lies here too.
__all__ = [
    "Comparison",
    "ONGOING",
    "Row",
    "compare",
    "from_json",
    "marked_speedup",
    "number_text",
    "percent_text",
    "remarks",
    "replicas_text",
    "speedup_text",
    "table",
    "to_json",
]

ONGOING = {"RUNNING": "cyan", "PENDING": "yellow"}
# What trainers warn of in a rehearsal; the comparison's first note says it for all of them.
_SHARED_CORES = "share this machine's cores"


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
        return self.virtual and not any(on_gpus(row.measured) for row in self.rows)

    @property
    def heading(self) -> str:
        """Kind of device and, where all variants share it, the global batch."""
        kinds = list(dict.fromkeys(kind for row in self.rows if (kind := device_kind(row.measured))))
        if self.virtual and "CPU" in kinds:
            kinds.remove("CPU")  # the one-device baseline of a rehearsal
        heading = "training on " + (" and ".join(kinds) or "unknown devices")
        batch = self.shared_batch
        return heading if batch is None else f"{heading}, global batch {batch:,}"

    @property
    def mixed(self) -> bool:
        """Whether the variants trained with different frameworks, or builds of one, as far as is known."""
        return frameworks.differ([row.frameworks for row in self.rows])

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
    read = [records.read(run) for run in runs]
    measured = [_known(measure(run, found), states or {}) for run, found in zip(runs, read, strict=True)]
    base = next((m for m in measured if m.strategy == BASELINE), measured[0])
    known = {m.name: plan for m, run in zip(measured, runs, strict=True) if (plan := plan_of(run))}
    used = [frameworks.of_run(run, known.get(m.name), m) for m, run in zip(measured, runs, strict=True)]
    rows = tuple(
        dataclasses.replace(_row(m, base), frameworks=with_, parts=scaling.parts_of(found))
        for m, with_, found in zip(measured, used, read, strict=True)
    )
    unlike = [f"not like for like: {problem.what}" for problem in plans.unfair(known)] if known else []
    return Comparison(rows, base.name, (*unlike, *notes.of_tuning(known), *notes.of_rows(rows, base)))


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
            used = tuple(Framework(**one) for one in row.get("frameworks", ()))  # older ones have neither of these
            parts = Parts(**row["parts"]) if row.get("parts") else None
            rows.append(Row(Measured(**values), row["speedup"], row["efficiency"], used, parts))
        return Comparison(tuple(rows), data["baseline"], tuple(data["notes"]))
    except (KeyError, TypeError) as error:
        what = f"this is no comparison: {type(error).__name__}: {error}"
        raise HpcmlError(what, allowed="what compare wrote", fix="compare again: hpcml compare JOB…") from None


def table(comparison: Comparison) -> "Table":
    """Return the comparison as a table that fits a terminal of 80 columns.

    A state other than ``COMPLETED`` stands below its variant's name, and so do framework and version where they differ;
    reasons and warnings stand below the table. The comparison's notes are left to the caller to print.
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
        builds = [(f"\n {one.text}", "dim") for one in row.frameworks] if comparison.mixed else []
        drawn.add_row(Text.assemble(m.name, *state, *builds), *cells)
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


def marked_speedup(comparison: Comparison, row: Row) -> str:
    """Return a speed-up; that of a rehearsal with the star of the note that explains it."""
    star = "*" if comparison.rehearsal and row.speedup is not None else ""
    return speedup_text(row.speedup) + star


def _row(m: Measured, base: Measured) -> Row:
    speedup = m.samples_per_s / base.samples_per_s if m.samples_per_s is not None and base.samples_per_s else None
    if speedup is None or not m.replicas or not base.replicas:
        return Row(m, speedup, None)
    return Row(m, speedup, speedup / (m.replicas / base.replicas))
