"""Bars and sparklines of characters."""

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Glyphs:
    """What bars and sparklines are drawn with."""

    blocks: str
    full: str
    empty: str
    rest: str = "…"


UNICODE = Glyphs("▁▂▃▄▅▆▇█", "█", "░")
ASCII = Glyphs("_.-=+*%#", "#", "-", "~")


def sparkline(values: Sequence[float], width: int, blocks: str = UNICODE.blocks) -> str:
    """Draw numbers as blocks, lowest to highest; of several in one column their mean. What is not finite is a gap.

    Args:
        width: columns at most; fewer numbers take fewer.
    """
    count = min(width, len(values))
    if count <= 0:
        return ""
    largest = max((abs(value) for value in values if math.isfinite(value)), default=0.0) or 1.0
    columns = []
    for index in range(count):
        part = values[index * len(values) // count : (index + 1) * len(values) // count]
        # Of the largest, so that no sum and no difference overflows.
        finite = [value / largest for value in part if math.isfinite(value)]
        columns.append(math.fsum(finite) / len(finite) if finite else math.nan)
    finite = [value for value in columns if math.isfinite(value)]
    low = min(finite, default=0.0)
    span = max(finite, default=0.0) - low
    if span <= 1e-9:  # level but for rounding
        span = math.inf
    steps = len(blocks) - 1
    return "".join(blocks[round((v - low) / span * steps)] if math.isfinite(v) else " " for v in columns)


def bar(share: float, width: int, glyphs: Glyphs = UNICODE) -> str:
    """Draw a share between 0 and 1."""
    full = round(max(0.0, min(1.0, share if math.isfinite(share) else 0.0)) * width)
    return glyphs.full * full + glyphs.empty * (width - full)
