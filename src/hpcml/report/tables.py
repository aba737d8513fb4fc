"""The tables of a report's page, as text with the share that a meter shows."""

from collections.abc import Sequence
from dataclasses import dataclass

from .cards import split_note, uses, wait_text
from .comparison import marked_speedup, number_text, percent_text, remarks, replicas_text
from .facts import Report
from .text_of import MISSING, energy, gib, hours, number, percent, seconds_text

# More rows of epochs than these say nothing that the curves don't.
MOST_EPOCHS = 25
# What the cards, and the notes of the table of epochs, tell.
_TOLD_BY_EPOCH = ("samples_per_s", "epoch_time_s", "step_time_ms", "time_to_first_step_s")


@dataclass(frozen=True)
class Cell:
    """A table's cell; ``kind`` is ``num``, ``wrap`` or empty; ``meters`` holds the percentage of a bar, or nothing."""

    text: str
    kind: str = ""
    meters: tuple[int, ...] = ()


@dataclass(frozen=True)
class Table:
    """A table with its title and what is said below it."""

    id: str
    title: str
    head: tuple[Cell, ...]
    rows: tuple[tuple[Cell, ...], ...]
    notes: tuple[str, ...] = ()


def comparison(report: Report) -> Table | None:
    """Return the variants with speed-up and efficiency; None for a run without variants."""
    if report.comparison is None:
        return None
    rows = []
    for row in report.comparison.rows:
        m = row.measured
        state = "" if m.state == "COMPLETED" else f" – {m.state}"
        cells = [replicas_text(m), number_text(m.samples_per_s), marked_speedup(report.comparison, row)]
        cells += [percent_text(row.efficiency, 0), number_text(m.step_time_ms), number_text(m.time_to_first_step_s)]
        used = (
            f" ({', '.join(one.text for one in row.frameworks)})" if report.comparison.mixed and row.frameworks else ""
        )
        rows.append([f"{m.name}{used}{state}", *cells, percent_text(m.accuracy, 1)])
    head = ["Variant", "Replicas", "Samples/s", "Speed-up", "Efficiency", "Step (ms)", "First step (s)", "Accuracy"]
    heading = report.comparison.heading
    title = f"{heading[0].upper()}{heading[1:]}; speed-up over {report.comparison.baseline}"
    return _table("comparison", title, head, rows, [*report.comparison.notes, *remarks(report.comparison)])


def steps(report: Report) -> Table | None:
    """Return the steps of a chain; None for any other run."""
    rows = [
        [one.name, one.state, one.text, MISSING if one.elapsed_s is None else seconds_text(one.elapsed_s)]
        for one in report.steps
    ]
    return _table("steps", "Steps", ["Step", "State", "", "Time"], rows, left=3)


def usage(report: Report) -> Table | None:
    """Return what was asked for beside what was used; None where the runs below have one each."""
    if report.comparison or report.steps:
        return None
    found = uses(report)
    rows = [[use.what, use.asked, use.used, percent(use.share)] for use in found]
    notes = []
    if report.usage.capped:
        notes.append("On this machine cores, memory and time are upper bounds only, capped to what it has.")
    if report.queue.waited_s is not None:
        notes.append(f"It waited {seconds_text(report.queue.waited_s)} in the queue: {wait_text(report)}.")
    head = ["Resource", "Requested", "Used", "Share"]
    return _table("usage", "Requested against used", head, rows, notes, left=3, shares=[use.share for use in found])


def gpus(report: Report) -> Table | None:
    """Return one row for each GPU; None without telemetry of any."""
    rows = []
    for gpu in report.gpus:
        memory = MISSING if gpu.memory_peak_mib is None else gib(gpu.memory_peak_mib / 1024)
        ours = MISSING if gpu.memory_ours_mib is None else gib(gpu.memory_ours_mib / 1024)
        cells = [percent(gpu.utilization), memory, ours, _with(gpu.power_mean_w, "W")]
        cells += [_with(gpu.temperature_peak_c, "°C"), percent(gpu.throttled)]
        cells += [energy(None if gpu.energy_j is None else gpu.energy_j / 3600)]
        name = f"GPU {gpu.index}" + (f", rank {gpu.rank}" if len({g.rank for g in report.gpus}) > 1 else "")
        rows.append([f"{name}: {gpu.name}" if gpu.name else name, *cells])
    notes = []
    if rows and report.usage.gpu_hours is not None:
        busy = "" if report.usage.gpu_hours_busy is None else f", {hours(report.usage.gpu_hours_busy)} of them busy"
        joules = "" if report.usage.energy_wh is None else f"; {energy(report.usage.energy_wh)}"
        notes.append(f"{hours(report.usage.gpu_hours)} GPU-hours{busy}{joules}.")
    head = ["GPU", "Busy", "Memory, peak", "ours", "Power, mean", "Hottest", "Throttled", "Energy"]
    return _table("gpus", "GPUs", head, rows, notes)


def split(report: Report) -> Table | None:
    """Return where the time of a step goes, the largest part first; None without a profile."""
    if report.split is None:
        return None
    total = report.split.step_ms or sum(report.split.parts_ms.values()) or None
    parts = sorted(report.split.parts_ms.items(), key=lambda item: -item[1])
    shares = [ms / total if total else None for _, ms in parts]
    rows = [[part.replace("_", " "), f"{ms:.2f}", percent(s)] for (part, ms), s in zip(parts, shares, strict=True)]
    notes = [note for note in (split_note(report), report.split.advice) if note]
    return _table("split", "Step time, as profiled", ["Part", "ms a step", "Share"], rows, notes, shares=shares)


def epochs(report: Report) -> Table | None:
    """Return the last epochs; None where none was recorded."""
    told = report.measured.epochs
    columns = {
        "Epoch": [str(epoch.number) for epoch in told],
        "Samples/s": [number(epoch.samples_per_s) for epoch in told],
        "Accuracy": [percent_text(epoch.accuracy, 2) for epoch in told],
        "Validation accuracy": [percent_text(epoch.val_accuracy, 2) for epoch in told],
    }
    columns = {head: cells for head, cells in columns.items() if set(cells) != {MISSING}}
    rows = list(zip(*columns.values(), strict=True))[-MOST_EPOCHS:]
    title = "Epochs" if len(told) <= MOST_EPOCHS else f"The last {MOST_EPOCHS} of {len(told)} epochs"
    notes = []
    if report.measured.time_to_first_step_s is not None:
        notes.append(f"The first step ended {seconds_text(report.measured.time_to_first_step_s)} after hpcml.begin().")
    if report.split is not None and report.split.left_out:
        notes.append(f"The speeds leave out the {report.split.left_out} steps that the profile slowed down.")
    return _table("epochs", title, list(columns), rows, notes)


def single(report: Report) -> Table | None:
    """Return what rank 0 logged just once; None where there is nothing of the kind."""
    found = [series for series in report.metrics if series.rank == 0 and series.count == 1]
    rows = [[series.name, number(series.last)] for series in found if series.name not in _TOLD_BY_EPOCH]
    return _table("single", "Logged once", ["Metric", "Value"], rows)


def _table(
    id: str,
    title: str,
    head: Sequence[str],
    rows: Sequence[Sequence[str]],
    notes: Sequence[str] = (),
    left: int = 1,
    shares: Sequence[float | None] = (),
) -> Table | None:
    """A table whose first columns are words and whose others are numbers, the last with a bar where shares are given."""
    kinds = ["wrap" if number < left else "num" for number in range(len(head))]
    made = []
    for number_, row in enumerate(rows):
        share = shares[number_] if shares else None
        meters = () if share is None else (min(100, max(0, round(100 * share))),)
        cells = [Cell(text, kind) for text, kind in zip(row, kinds, strict=True)]
        made.append((*cells[:-1], Cell(cells[-1].text, cells[-1].kind, meters)))
    header = tuple(Cell(text, kind) for text, kind in zip(head, kinds, strict=True))
    return Table(id, title, header, tuple(made), tuple(notes)) if rows else None


def _with(value: float | None, unit: str) -> str:
    return MISSING if value is None else f"{value:.0f} {unit}"
