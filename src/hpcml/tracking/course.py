"""The course of a training, as a run's journal has it."""

from pathlib import Path

from . import journal


def of(events: Path, rank: int) -> dict[str, list[float]]:
    """Return each metric's values in the order of their steps, those of earlier restarts too.

    Of a step that a restart has repeated the last value counts. What belongs to no epoch (step 0) is left out.
    """
    found: dict[str, dict[int, float]] = {}
    for record in journal.read(events, kinds={"metric"}):
        if record["rank"] == rank and record["step"]:
            for name, value in record["values"].items():
                found.setdefault(name, {})[record["step"]] = value
    return {name: [values[step] for step in sorted(values)] for name, values in found.items()}


def was_checked(events: Path, rank: int) -> bool:
    """Return whether a rank has told how many replicas train together."""
    return any(record["rank"] == rank for record in journal.read(events, kinds={"replicas"}))
