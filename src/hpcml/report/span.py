"""Which part of a run the training's curves are drawn over: a long start-up must not squeeze them into a corner."""

from dataclasses import dataclass

from .facts import Report
from .text_of import seconds_text

# The training's curves get an axis of their own where the training takes less of the run than this.
LEAST_SHARE = 0.5
_MARGIN = 0.03


@dataclass(frozen=True)
class Span:
    """A part of the time axis, in seconds since the run began; ``first_s`` is when the first step was over.

    The axis begins a little before the first step, and ends a little after the last point.
    """

    first_s: float
    last_s: float
    begin_s: float
    end_s: float


def end_s(report: Report) -> float:
    """Return the end of the run's time axis, in seconds since the run began."""
    last = [series.times_s[-1] for series in (*report.metrics, *report.telemetry) if series.times_s]
    return max([report.outcome.elapsed_s or 0.0, *last]) or 1.0


def training(report: Report) -> Span | None:
    """Return the part that the training took; None where it is most of the run, so that one axis serves all curves."""
    own = [series.times_s for series in report.metrics if series.rank == 0 and series.times_s]
    if not own:
        return None
    first, last = min(times[0] for times in own), max(times[-1] for times in own)
    length = last - first
    if length <= 0 or length >= LEAST_SHARE * end_s(report):
        return None
    return Span(first, last, max(0.0, first - _MARGIN * length), min(end_s(report), last + _MARGIN * length))


def told(span: Span, *, telemetry: bool) -> str:
    """Return why the training's axis is not the whole run's, in words.

    Args:
        telemetry: whether the machine's curves are there.
    """
    took = f"Start-up took {seconds_text(span.first_s)}, training {seconds_text(span.last_s - span.first_s)}"
    whole = " The machine's curves show the whole run, the training shaded." if telemetry else ""
    return f"{took}: these curves begin with the first step.{whole}"
