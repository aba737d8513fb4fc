"""What mattered, as one picture: the speed along each setting, relative to the job as it is."""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import HpcmlError
from ..rundir import write_bytes
from .search import Line, Trial
from .space import shown
from .tuner import Tuning

if TYPE_CHECKING:
    from matplotlib.axes import Axes

DPI = 100
COLUMNS, PANEL_IN, LEAST_WIDTH_IN = 3, (4.0, 3.0), 7.5  # inches; the title needs the last
# Okabe and Ito's blue and vermilion, told apart with every common colour blindness (jfly.uni-koeln.de/color, 2008).
BLUE, RED, GREY = "#0072B2", "#D55E00", "#555555"
LEAST_SPAN = 0.1  # of the relative speed: a narrower axis would blow noise up to a difference


def plot(result: Tuning, path: Path) -> None:
    """Write the picture as a PNG, atomically.

    Raises:
        HpcmlError: there is nothing to draw, matplotlib is missing, or the file can't be written.
    """
    lines = result.lines
    if not lines or result.found is None or not result.found.start.speed:
        raise HpcmlError("no setting was tried, so there is nothing to draw")
    try:
        from matplotlib import style
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        fix = "pip install 'hpcml[report]'"
        raise HpcmlError(f"the plot needs matplotlib, which can't be imported: {error}", fix=fix) from None
    columns = min(COLUMNS, len(lines))
    rows = -(-len(lines) // columns)
    with style.context(["default", {"axes.spines.top": False, "axes.spines.right": False, "axes.axisbelow": True}]):
        size = (max(LEAST_WIDTH_IN, PANEL_IN[0] * columns), PANEL_IN[1] * rows + 0.5)
        drawn = Figure(figsize=size, dpi=DPI, layout="constrained")
        FigureCanvasAgg(drawn)
        panels = [drawn.add_subplot(rows, columns, number) for number in range(1, len(lines) + 1)]
        winner = result.found.winner.point
        for panel, line in zip(panels, lines, strict=True):
            _panel(panel, line, result.found.start.speed, winner.get(line.name))
            _span(panel, lines, result.found.start.speed)
        for panel in panels[::columns]:
            panel.set_ylabel("Relative speed")
        drawn.suptitle(
            f"What mattered: speed relative to the job as it was ({result.found.start.speed:,.0f} samples/s)"
        )
        image = io.BytesIO()
        drawn.savefig(image, format="png", dpi=DPI)
    try:
        write_bytes(path, image.getvalue())
    except OSError as error:
        raise HpcmlError(f"{path} can't be written: {error.strerror}", fix="free space") from None


def _panel(panel: "Axes", line: Line, start: float, chosen: object) -> None:
    # 1 == True in Python: a value is looked up by its position.
    now = line.trials[0][0]
    trials = sorted(line.trials, key=lambda pair: _place(pair[0]))
    speeds = [(trial.speed or 0.0) / start for _, trial in trials]
    good = [index for index, (_, trial) in enumerate(trials) if trial.speed]
    panel.plot(good, [speeds[index] for index in good], color=BLUE, marker="o", linewidth=2, markersize=7)
    for index, (value, trial) in enumerate(trials):
        if trial.speed is None:
            panel.annotate("failed", (index, 0.05), xycoords=("data", "axes fraction"), ha="center", color=RED)
        elif trial.cut:
            place = (index, speeds[index])
            panel.annotate("ended early", place, (0, -16), textcoords="offset points", ha="center", color=GREY)
        if value == chosen and type(value) is type(chosen):
            panel.plot(
                [index], [speeds[index]], color=RED, marker="o", markersize=11, fillstyle="none", markeredgewidth=2
            )
    panel.set_xticks(range(len(trials)), [_label(line.name, value, now) for value, _ in trials])
    panel.set_xlim(-0.5, len(trials) - 0.5)
    panel.axhline(1.0, color=GREY, linewidth=1, linestyle=":")
    panel.grid(axis="y", color="#DDDDDD")
    panel.set_title(f"{line.name}: best {line.effect:.2f} × worst", loc="left", fontsize=11)


def _label(name: str, value: object, now: object) -> str:
    text = shown(name, value)  # type: ignore[arg-type]
    return f"{text}\n(was)" if value == now and type(value) is type(now) else text


def _place(value: object) -> tuple[int, float, str]:
    """Numbers by size with -1, as many as it likes, last; the default, then words."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        return (1, float("inf") if value == -1 else float(value), "")
    return (0 if value is None or value is False else 2, 0.0, str(value))


def _span(axes: "Axes", lines: Sequence[Line], start: float) -> None:
    trials: list[Trial] = [trial for line in lines for _, trial in line.trials if trial.speed]
    speeds = [(trial.speed or 0.0) / start for trial in trials]
    low, high = min(speeds), max(speeds)
    pad = max(0.08 * (high - low), (LEAST_SPAN - (high - low)) / 2)
    axes.set_ylim(low - pad, high + 1.6 * pad)
