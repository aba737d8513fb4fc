"""The curves of a run as matplotlib figures: training above, machine below, on one time axis with epochs marked."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import TYPE_CHECKING, Any

from .facts import Report
from .plot import COLOURS, DASHES, GREY
from .series import Series, m4
from .span import Span, end_s

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Points of one figure, so that its SVG stays below 100 kB: a point takes some 13 bytes.
POINTS = 5000
# Both figures share these, so that a moment lies at the same place in each. Inches.
WIDE_IN, NARROW_IN = 8.4, 4.0
PANEL_IN, HEAD_IN, FOOT_IN = 1.02, 0.34, 0.46
LEFT_IN, RIGHT_IN = 0.62, 0.12
# More lines than these are shown as their mean and range.
MOST_LINES = 4
MOST_EPOCHS = 40
MOST_PANELS = 8
_BINS = 200
STYLE = {
    "font.family": "sans-serif",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": GREY,
    "xtick.color": GREY,
    "ytick.color": GREY,
    "axes.axisbelow": True,
    "svg.fonttype": "none",
    "path.simplify": True,
}
_UNITS = {"s": 1, "min": 60, "h": 3600}
_GRID, _EPOCH = "#DDDDDD", "#BBBBBB"


@dataclass(frozen=True)
class Line:
    """A labelled line of a panel; the area between ``low`` and ``high`` is the range that it is the mean of."""

    label: str
    times_s: Sequence[float]
    values: Sequence[float]
    low: Sequence[float] | None = None
    high: Sequence[float] | None = None


@dataclass(frozen=True)
class Panel:
    """One pair of axes; ``top`` is the end of its scale where the quantity has one."""

    title: str
    lines: tuple[Line, ...]
    top: float | None = None
    from_zero: bool = True


def training(report: Report) -> tuple[Panel, ...]:
    """Return the panels of what rank 0 logged: throughput, accuracy and loss first, then the work's own metrics.

    A single value is no curve: ``tables.single`` tells it.
    """
    own = {series.name: series for series in report.metrics if series.rank == 0}
    panels = []
    if "samples_per_s" in own:
        panels.append(Panel("Throughput (samples/s)", (_line("samples_per_s", own.pop("samples_per_s")),)))
    for name in ("epoch_time_s", "step_time_ms", "time_to_first_step_s"):  # told in numbers, by each epoch
        own.pop(name, None)
    names = sorted(own, key=lambda name: (_rank_of(name), list(own).index(name)))
    for base in dict.fromkeys(name.removeprefix("val_") for name in names):
        pair = [(name, own[name]) for name in (base, f"val_{base}") if name in own]
        is_fraction = "accuracy" in base and all((s.high or 0) <= 1 for _, s in pair)
        lines = tuple(_line("validation" if n != base else "training", s, 100 if is_fraction else 1) for n, s in pair)
        title = "Learning rate" if base == "lr" else base.replace("_", " ") or "(no name)"
        title = f"{title[0].upper()}{title[1:]}" + (" (%)" if is_fraction else "")
        panels.append(
            Panel(title, lines if len(pair) > 1 or pair[0][0] != base else (_named(lines[0], ""),), None, False)
        )
    return tuple(panel for panel in panels if any(len(line.times_s) > 1 for line in panel.lines))[:MOST_PANELS]


def _rank_of(name: str) -> int:
    base = name.removeprefix("val_")
    return 0 if "accuracy" in base else 1 if base == "loss" else 3 if base in ("lr", "learning_rate") else 2


def machine(report: Report) -> tuple[Panel, ...]:
    """Return the panels of what the telemetry measured: GPUs, then cores, memory and files."""
    panels = [
        Panel("GPU utilisation (%)", _of_gpus(report, "utilization_percent"), 100),
        Panel("GPU memory (GiB)", _of_gpus(report, "memory_used_mib", 1 / 1024)),
        Panel("GPU power (W)", _of_gpus(report, "power_w")),
        Panel("CPU cores busy", _of_nodes(report, {"cpu/cores": ""})),
        Panel("Memory (GiB)", _of_nodes(report, {"memory/used_mib": ""}, 1 / 1024)),
        Panel("Files (MiB/s)", _of_nodes(report, {"io/read_mib_s": "read", "io/write_mib_s": "written"})),
    ]
    return tuple(panel for panel in panels if any(line.times_s for line in panel.lines))


def draw(
    panels: Sequence[Panel],
    report: Report,
    *,
    narrow: bool = False,
    only: Span | None = None,
    shaded: Span | None = None,
) -> "Figure":
    """Return the panels one below the other as a figure, free of pyplot and of the user's style.

    Args:
        only: the part of the run to draw; by default all of it.
        shaded: the part of the run to mark as the training.

    Raises:
        ImportError: matplotlib is missing.
    """
    from matplotlib import style
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    width = NARROW_IN if narrow else WIDE_IN
    height = FOOT_IN + len(panels) * (PANEL_IN + HEAD_IN)
    columns = max(20, POINTS // 4 // max(1, sum(len(panel.lines) for panel in panels)))
    with style.context(["default", STYLE]):
        figure = Figure(figsize=(width, height))
        FigureCanvasAgg(figure)
        begin, end = (only.begin_s, only.end_s) if only else (0.0, end_s(report))
        unit = _time_unit(end)
        for number, panel in enumerate(panels):
            top = height - number * (PANEL_IN + HEAD_IN) - HEAD_IN
            box = (LEFT_IN / width, (top - PANEL_IN) / height, (width - LEFT_IN - RIGHT_IN) / width, PANEL_IN / height)
            axes = figure.add_axes(box)
            _draw_panel(axes, panel, columns, narrow)
            axes.set_xlim(begin, end)
            _mark_epochs(axes, report.epochs)
            if shaded:
                axes.axvspan(
                    shaded.first_s, shaded.last_s, color=_GRID, alpha=0.6, linewidth=0, zorder=0, gid="training"
                )
            _time_axis(axes, begin, end, unit, narrow=narrow)
            axes.tick_params(axis="x", labelbottom=number == len(panels) - 1)
        axes.set_xlabel(_time_label(unit, only, shaded, narrow=narrow), fontsize=8, color=GREY)
    return figure


def _draw_panel(axes: "Axes", panel: Panel, columns: int, narrow: bool) -> None:
    for index, line in enumerate(panel.lines):
        kept = m4(line.times_s, line.values, columns)
        times, values = [line.times_s[i] for i in kept], [_shown(line.values[i]) for i in kept]
        if line.low is not None and line.high is not None:
            axes.fill_between(line.times_s, line.low, line.high, color=COLOURS[index], alpha=0.25, linewidth=0)
        few = len(times) <= 60
        axes.plot(
            times,
            values,
            label=line.label,
            color=COLOURS[index % len(COLOURS)],
            linestyle=DASHES[index % len(DASHES)] if few else "-",  # dashes of a noisy line are noise
            linewidth=1.6 if few else 1.1,
            marker="o" if few else None,
            markersize=3,
            clip_on=False,
            gid=f"curve-{index}",
        )
    axes.set_title(panel.title, loc="left", fontsize=9.5, fontweight="bold", pad=6, parse_math=False)
    if any(line.label for line in panel.lines):
        axes.legend(
            loc="lower right",
            bbox_to_anchor=(1.0, 0.98),
            ncols=2 if narrow else 4,
            frameon=False,
            fontsize=8,
            borderpad=0,
            handlelength=1.6,
            columnspacing=1.2,
        )
    axes.grid(axis="y", color=_GRID, linewidth=0.7)
    axes.tick_params(length=0, labelsize=8)
    axes.locator_params(axis="y", nbins=4)
    axes.yaxis.set_major_formatter(_y_text)
    _y_limits(axes, panel)


def _y_limits(axes: "Axes", panel: Panel) -> None:
    low, high = axes.get_ylim()
    if panel.top is not None:
        axes.set_ylim(0, panel.top * 1.03)
    elif panel.from_zero:
        axes.set_ylim(0, high * 1.05 if high > 0 else 1.0)
    elif high - low < 1e-9:
        axes.set_ylim(low - 0.5, high + 0.5)


def _mark_epochs(axes: "Axes", epochs: Mapping[int, float]) -> None:
    """Mark the end of each epoch, of many only each so-manieth."""
    every = max(1, math.ceil(len(epochs) / MOST_EPOCHS))
    for number, at in epochs.items():
        if number % every == 0:
            axes.axvline(at, color=_EPOCH, linewidth=0.8, linestyle=(0, (2, 2)), zorder=0.5, gid=f"epoch-{number}")


def _time_axis(axes: "Axes", begin: float, end: float, unit: str, *, narrow: bool) -> None:
    from matplotlib.ticker import MaxNLocator, MultipleLocator

    scale = _UNITS[unit]
    ticks = MaxNLocator(nbins=4 if narrow else 8, steps=[1, 2, 3, 5, 10]).tick_values(begin / scale, end / scale)
    axes.xaxis.set_major_locator(MultipleLocator(float(ticks[1] - ticks[0]) * scale))
    axes.xaxis.set_major_formatter(lambda value, _: f"{value / scale:g}")


def _time_label(unit: str, only: Span | None, shaded: Span | None, *, narrow: bool) -> str:
    """What the axis shows and its marks mean; a narrow figure has room for about 60 characters a line."""
    marks = "dashed: end of an epoch" + ("; shaded: training" if shaded else "")
    if only is None:
        return f"Time since the start ({unit}); {marks}"
    begins = f"start-up, {only.first_s / _UNITS[unit]:.3g} {unit}, is left out"
    return f"Time since the start ({unit}); {begins}{chr(10) if narrow else '; '}{marks}"


def _time_unit(seconds: float) -> str:
    return "s" if seconds < 180 else "min" if seconds < 3 * 3600 else "h"


def _y_text(value: float, _: Any) -> str:
    return (
        f"{value:,.0f}" if abs(value) >= 1000 else f"{value:g}" if abs(value) >= 1e-4 or value == 0 else f"{value:.0e}"
    )


def _shown(value: float) -> float:
    return value if math.isfinite(value) else math.nan


def _line(label: str, series: Series, scale: float = 1.0) -> Line:
    values = series.values if scale == 1 else [value * scale for value in series.values]
    return Line("" if label == "samples_per_s" else label, series.times_s, values)


def _named(line: Line, label: str) -> Line:
    return Line(label, line.times_s, line.values)


def _of_gpus(report: Report, what: str, scale: float = 1.0) -> tuple[Line, ...]:
    by_key = {(series.rank, series.name): series for series in report.telemetry}
    found = [(gpu, by_key[key]) for gpu in report.gpus if (key := (gpu.rank, f"gpu{gpu.index}/{what}")) in by_key]
    ranks = {gpu.rank for gpu, _ in found}
    names = [f"GPU {gpu.index}" + (f" of rank {gpu.rank}" if len(ranks) > 1 else "") for gpu, _ in found]
    return _together([_line(name, series, scale) for name, (_, series) in zip(names, found, strict=True)], "GPUs")


def _of_nodes(report: Report, names: Mapping[str, str], scale: float = 1.0) -> tuple[Line, ...]:
    ranks = {series.rank for series in report.telemetry if series.name in names}
    lines = [
        _line(" ".join(filter(None, [names[s.name], f"rank {s.rank}" if len(ranks) > 1 else ""])), s, scale)
        for s in report.telemetry
        if s.name in names
    ]
    return _together(lines, "ranks")


def _together(lines: list[Line], what: str) -> tuple[Line, ...]:
    """Return lines as they are, many as their mean and range in bins of time."""
    if len(lines) <= MOST_LINES:
        return tuple(lines)
    ends = [line.times_s[-1] for line in lines if line.times_s]
    width = (max(ends, default=0.0) or 1.0) / _BINS
    bins: dict[int, list[float]] = {}
    for line in lines:
        for number, values in _binned(line, lambda time_s: min(_BINS - 1, int(time_s / width))).items():
            bins.setdefault(number, []).append(fmean(values))
    order = sorted(bins)
    times = [(number + 0.5) * width for number in order]
    means = [fmean(bins[number]) for number in order]
    lows, highs = [min(bins[number]) for number in order], [max(bins[number]) for number in order]
    return (Line(f"mean and range of {len(lines)} {what}", times, means, lows, highs),)


def _binned(line: Line, bin_of: Callable[[float], int]) -> dict[int, list[float]]:
    found: dict[int, list[float]] = {}
    pairs: Iterable[tuple[float, float]] = zip(line.times_s, line.values, strict=True)
    for time_s, value in pairs:
        if math.isfinite(value):
            found.setdefault(bin_of(time_s), []).append(value)
    return found
