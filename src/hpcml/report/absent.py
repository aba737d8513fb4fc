"""What a reader might look for in a report and not find, and why."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .facts import Report


def missing(report: "Report") -> tuple[str, ...]:
    """Return what could not be told, in words; nothing where the runs below have a report each."""
    if report.comparison or report.steps:
        return ()
    told = []
    if not report.telemetry:
        told.append("GPU and CPU curves, peak memory and energy: no telemetry was recorded")
    elif not report.gpus and report.usage.gpus_asked:
        told.append("GPU curves: no GPU was seen by the telemetry")
    if not report.metrics:
        told.append("training curves: nothing was logged; hpcml.begin() and run.log(step, loss=…) record metrics")
    if report.split is None:
        told.append("step-time split: no profile was taken; [profile] steps = [10, 20] in the job file takes one")
    if report.lost:
        told.append(f"{report.lost} records: they could not be written (a full disk or quota)")
    if report.left_out:
        names = ", ".join(f"{name} ({count} times)" for name, count in report.left_out)
        told.append(f"values that are no numbers: {names}")
    return tuple(told)
