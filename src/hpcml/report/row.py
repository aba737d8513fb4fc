"""A variant of a comparison, its numbers as people read them, and what its devices are."""

import re
from dataclasses import dataclass

from .frameworks import Framework
from .measured import Measured
from .scaling import Parts

MISSING = "–"
_TENSORFLOW_DEVICE = re.compile(r"(?:.*:)?(CPU|GPU|TPU):\d+", re.IGNORECASE)


@dataclass(frozen=True)
class Row:
    """A variant beside the baseline.

    Attributes:
        speedup: its samples/s over the baseline's.
        efficiency: speed-up over the ratio of replicas in sync; 1 is perfect scaling.
        frameworks: what it trained with, as far as is known.
        parts: of a step, where it was profiled.
    """

    measured: Measured
    speedup: float | None
    efficiency: float | None
    frameworks: tuple[Framework, ...] = ()
    parts: Parts | None = None


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


def device_kind(m: Measured) -> str:
    """Return what a run trained on: ``GPUs``, ``CPU``, ``virtual CPU devices``; empty where unknown."""
    if m.virtual:
        return "virtual CPU devices"
    kinds = dict.fromkeys(match[1].upper() if (match := _TENSORFLOW_DEVICE.fullmatch(n)) else n for n in m.devices)
    return " and ".join(kind if kind == "CPU" or kind in m.devices else f"{kind}s" for kind in kinds)


def on_gpus(m: Measured) -> bool:
    """Whether a run trained on GPUs, as far as is known."""
    return bool(m.devices) and not m.virtual and "CPU" not in device_kind(m)
