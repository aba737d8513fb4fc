"""Numbers as people read them; the terminal and the page show the same."""

from ..job import clock

MISSING = "–"


def seconds_text(seconds: float | None) -> str:
    """Return ``12.3 s`` below a minute, ``4 min 05 s`` below an hour, else ``HH:MM:SS``."""
    if seconds is None:
        return MISSING
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    if seconds < 3600:
        minutes, rest = divmod(round(seconds), 60)
        return f"{minutes} min {rest:02d} s" if minutes < 60 else clock(seconds)
    return clock(seconds)


def gib(value: float | None) -> str:
    """Return GiB with two or three digits."""
    if value is None:
        return MISSING
    return f"{value:.0f} GiB" if value >= 100 else f"{value:.1f} GiB" if value >= 0.95 else f"{value * 1024:.0f} MiB"


def percent(fraction: float | None, digits: int = 0) -> str:
    """Return a fraction as ``98 %``."""
    return MISSING if fraction is None else f"{100 * fraction:.{digits}f} %"


def number(value: float | None) -> str:
    """Return a number with four significant digits, thousands with commas; NaN and infinities by name."""
    if value is None:
        return MISSING
    if abs(value) >= 10_000 and value == value and abs(value) < 1e15:
        return f"{value:,.0f}"
    return f"{value:,.4g}"


def cores(value: float | None) -> str:
    """Return a number of busy cores with a tenth of one, below one with two significant digits: hardly busy is not idle."""
    if value is None:
        return MISSING
    return f"{value:.1f}" if value >= 0.995 or value == 0 else f"{value:.2g}"


def hours(value: float | None) -> str:
    """Return hours, with seconds for little ones: ``0.004 h (14 s)``."""
    if value is None:
        return MISSING
    if value == 0:
        return "0"
    return f"{value:.2f}" if value >= 0.095 else f"{value:.4f}"


def energy(wh: float | None) -> str:
    """Return watt hours, or kWh from a thousand on."""
    if wh is None:
        return MISSING
    return f"{wh / 1000:.2f} kWh" if wh >= 1000 else f"{wh:.0f} Wh" if wh >= 10 else f"{wh:.2f} Wh"
