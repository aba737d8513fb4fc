"""Time series as a run recorded them, reduced to what a picture can show."""

import itertools
import math
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field

# Pixel columns that a series is reduced for: each keeps at most four points.
COLUMNS = 250


@dataclass(frozen=True)
class Series:
    """One quantity over time; statistics are over all finite points, the points are those that a picture needs.

    Attributes:
        name: as recorded, such as ``val_accuracy`` or ``gpu0/power_w``.
        rank: the rank that recorded it.
        count: points recorded, also those that are not finite.
        mean, low, high, p95, last: None where no point is finite; ``last`` is the last point, whatever it is.
        times_s: seconds since the run began; ``values`` has as many, NaN and infinities as they were.
    """

    name: str
    rank: int
    count: int
    mean: float | None
    low: float | None
    high: float | None
    p95: float | None
    last: float | None
    times_s: tuple[float, ...] = ()
    values: tuple[float, ...] = ()


@dataclass
class Points:
    """Points as they are read: 24 bytes each, so that a million of them is little."""

    times_s: "array[float]" = field(default_factory=lambda: array("d"))
    values: "array[float]" = field(default_factory=lambda: array("d"))
    steps: "array[int]" = field(default_factory=lambda: array("q"))

    def add(self, time_s: float, value: float, step: int = 0) -> None:
        """Append one point; a sample of telemetry has no step."""
        self.steps.append(step)
        self.times_s.append(time_s)
        self.values.append(value)

    def series(self, name: str, rank: int, begin_s: float) -> Series:
        """Return the series, its times counted from ``begin_s``, in the order of time."""
        times: Sequence[float] = self.times_s
        values: Sequence[float] = self.values
        if any(later < earlier for earlier, later in itertools.pairwise(times)):  # two writers, or a clock
            order = sorted(range(len(times)), key=times.__getitem__)
            times, values = [times[i] for i in order], [values[i] for i in order]
        finite = sorted(value for value in values if math.isfinite(value))
        kept = m4(times, values, COLUMNS)
        return Series(
            name=name,
            rank=rank,
            count=len(values),
            mean=math.fsum(finite) / len(finite) if finite else None,
            low=finite[0] if finite else None,
            high=finite[-1] if finite else None,
            p95=finite[math.ceil(0.95 * len(finite)) - 1] if finite else None,
            last=values[-1] if values else None,
            times_s=tuple(round(times[i] - begin_s, 3) for i in kept),
            values=tuple(values[i] for i in kept),
        )


def m4(times: Sequence[float], values: Sequence[float], columns: int) -> list[int]:
    """Return the indices that draw the same line in so many pixel columns: of each its first, last, lowest, highest.

    Jugel, Jerzak, Hackenbroich and Markl, "M4: A Visualization-Oriented Time Series Data Aggregation", VLDB 2014. Of
    points that are not finite each column keeps the first, which is a gap in the line.

    Args:
        times: rising; ``values`` has as many.
    """
    if len(times) <= 4 * columns:
        return list(range(len(times)))
    scale = columns / ((times[-1] - times[0]) or 1.0)
    kept: list[int] = []
    start = 0
    while start < len(times):
        column = int((times[start] - times[0]) * scale)
        end = start
        low = high = gap = -1
        while end < len(times) and int((times[end] - times[0]) * scale) == column:
            value = values[end]
            if not math.isfinite(value):
                gap = end if gap < 0 else gap
            elif low < 0:
                low = high = end
            elif value < values[low]:
                low = end
            elif value > values[high]:
                high = end
            end += 1
        kept += sorted({start, end - 1, low, high, gap} - {-1})
        start = end
    return kept
