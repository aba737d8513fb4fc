"""Slurm's time limits as seconds, and back."""

import re

# Slurm's forms (sbatch(1), --time): minutes, minutes:seconds, hours:minutes:seconds, days-hours[:minutes[:seconds]].
_TIME = re.compile(
    r"(?:(?P<d>\d+)-(?P<dh>\d+)(?::(?P<dm>\d+))?(?::(?P<ds>\d+))?|(?P<a>\d+)(?::(?P<b>\d+))?(?::(?P<c>\d+))?)"
)


def seconds(time: str) -> int:
    """Return a Slurm time limit in seconds; raises ValueError where it isn't one."""
    match = _TIME.fullmatch(time.strip())
    if not match:
        raise ValueError(time)
    part = {key: int(value or 0) for key, value in match.groupdict().items()}
    if match["d"] is not None:
        return ((part["d"] * 24 + part["dh"]) * 60 + part["dm"]) * 60 + part["ds"]
    if match["c"] is not None:
        return (part["a"] * 60 + part["b"]) * 60 + part["c"]
    return part["a"] * 60 + part["b"]


def clock(total_s: float) -> str:
    """Return seconds as ``HH:MM:SS``, with ``D-`` in front from a day on."""
    minutes, second = divmod(round(total_s), 60)
    hours, minute = divmod(minutes, 60)
    days, hour = divmod(hours, 24)
    return (f"{days}-" if days else "") + f"{hour:02d}:{minute:02d}:{second:02d}"
