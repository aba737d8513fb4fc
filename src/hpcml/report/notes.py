"""What a reader of a comparison must know beside its numbers, one sentence or two for each."""

from collections.abc import Mapping, Sequence

from ..plan import Plan
from . import frameworks, scaling
from .measured import Measured
from .row import Row, on_gpus, percent_text, speedup_text
from .scaling import Shared

BASELINE = "original"
# Two seeds of one small training already differ by about a point: more than two needs a reason.
ACCURACY_POINTS = 2.0


def of_rows(rows: Sequence[Row], base: Measured) -> list[str]:
    """Return the notes on variants beside their baseline, which is one of them."""
    notes = []
    shared = max((row.measured.replicas or 0 for row in rows if row.measured.virtual), default=0)
    if any(row.measured.virtual for row in rows):
        detail = f": {shared} replicas share the same cores" if shared > 1 else ""
        star = "" if any(on_gpus(row.measured) for row in rows) else "* "
        notes.append(f"{star}On virtual CPU devices no speed-up can be expected{detail}.")
    if base.strategy != BASELINE and len(rows) > 1:
        notes.append(f"No variant is the {BASELINE}: speed-ups are over {base.name}, the first.")
    if not base.samples_per_s and len(rows) > 1:
        notes.append(f"No speed-up: {base.name} ({base.state}) has no samples/s to compare with.")
    notes += frameworks.notes([(row.measured, row.frameworks) for row in rows])
    notes += _accuracy_notes([row.measured for row in rows])
    first = next(row for row in rows if row.measured is base)
    return notes + [_slower_note(row, first) for row in rows if _is_slower(row, first)]


def _is_slower(row: Row, first: Row) -> bool:
    scaled = (row.measured.replicas or 0) > (first.measured.replicas or 0)
    return row.speedup is not None and row.speedup < 1 and scaled and _steady(row.measured) and on_gpus(row.measured)


def _steady(m: Measured) -> bool:
    """Whether its speed is that of epochs after the first."""
    return m.state == "COMPLETED" and sum(epoch.samples_per_s is not None for epoch in m.epochs) > 1


def _slower_note(row: Row, first: Row) -> str:
    """Why a variant is slower on its GPUs, and what would change it; in numbers where those of both can be set together."""
    m, base = row.measured, first.measured
    alike = m.global_batch is not None and m.global_batch == base.global_batch and base.replicas == 1
    if not (alike and m.replicas and m.samples_per_s and base.samples_per_s and _steady(base) and on_gpus(base)):
        now = "" if m.global_batch is None else f" than {m.global_batch:,}"
        return (
            f"{m.name} is slower on {m.replicas} GPUs ({speedup_text(row.speedup)}): at this batch a step of the model is "
            f"too small to share; try a larger global batch{now}."
        )
    assert m.global_batch is not None
    theirs, ours = frameworks.engine(first.frameworks), frameworks.engine(row.frameworks)
    alone_ms, shared_ms = (1000 * m.global_batch / speed for speed in (base.samples_per_s, m.samples_per_s))
    step = Shared(
        m.global_batch, m.replicas, alone_ms, shared_ms, first.parts, row.parts, theirs if theirs != ours else ""
    )
    return scaling.explain(m.name, speedup_text(row.speedup), step)


def of_tuning(known: Mapping[str, Plan]) -> list[str]:
    """Return who is tuned and who is not: that changes no result and is no reason to refuse, but it changes the speeds."""
    tuned = [f"{name} ({', '.join(plan.tuning.given)})" for name, plan in known.items() if plan.tuning.given]
    if not tuned or len(tuned) == len(known):
        return []
    rest = ", ".join(name for name, plan in known.items() if not plan.tuning.given)
    return [
        f"Tuned: {', '.join(tuned)}. Not tuned: {rest}. hpcml tune for all of them, or none, compares strategies alone."
    ]


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
