"""A comparison as one picture: throughput on the left, accuracy by epoch on the right."""

import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import HpcmlError
from ..rundir import write_bytes
from .comparison import Comparison, Row, number_text, replicas_text, speedup_text

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

DPI = 100
WIDTH_IN = 12.0  # 1200 pixels
# Okabe and Ito's palette, told apart with every common colour blindness (jfly.uni-koeln.de/color, 2008); its yellow
# is too pale for lines on white. Markers and dashes carry the same difference without colour.
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#56B4E9", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
DASHES = ("-", "--", "-.", ":")
STYLE = {"font.size": 12, "axes.spines.top": False, "axes.spines.right": False, "axes.axisbelow": True}
GREY = "#555555"
LABEL_BACKGROUND = {"facecolor": "white", "edgecolor": "none", "pad": 1}  # no grid line through a number
# Below this span (points of accuracy) an axis would blow noise up to a difference.
LEAST_SPAN = 5.0
LONGEST_NAME = 22
LEGEND_COLUMNS = 4


def plot(comparison: Comparison, path: Path) -> None:
    """Write the picture as a PNG, 1200 pixels wide, atomically.

    Raises:
        HpcmlError: matplotlib is missing, or the file can't be written.
    """
    drawn, image = figure(comparison), io.BytesIO()
    from matplotlib import style

    with style.context("default"):  # a user's savefig.bbox or savefig.transparent would change size and ground
        drawn.savefig(image, format="png", dpi=DPI)
    try:
        write_bytes(path, image.getvalue())
    except OSError as error:
        fix = "free space, or point to a folder that you can write to"
        raise HpcmlError(f"{path} can't be written: {error.strerror}", fix=fix) from None


def figure(comparison: Comparison) -> "Figure":
    """Return the picture as a figure of matplotlib's, free of pyplot and of the user's style and backend.

    Raises:
        HpcmlError: matplotlib is missing.
    """
    try:
        from matplotlib import style
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
        from matplotlib.layout_engine import ConstrainedLayoutEngine
    except ImportError as error:
        fix = "pip install 'hpcml[tensorflow]'"
        raise HpcmlError(f"the plot needs matplotlib, which can't be imported: {error}", fix=fix) from None
    count = len(comparison.rows)
    height_in = max(5.2, 2.6 + 0.62 * count + 0.3 * math.ceil(count / LEGEND_COLUMNS))
    with style.context(["default", STYLE]):
        drawn = Figure(figsize=(WIDTH_IN, height_in), dpi=DPI, layout=ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.12))
        FigureCanvasAgg(drawn)
        heading = comparison.heading
        drawn.suptitle(heading[0].upper() + heading[1:], fontsize=15, fontweight="bold")
        speed, accuracy = drawn.subplots(1, 2, width_ratios=(1.15, 1))
        _speed(speed, comparison)
        _accuracy(accuracy, comparison.rows)
        handles, labels = accuracy.get_legend_handles_labels()
        if handles:  # outside the axes, where it can't cover a curve
            drawn.legend(handles, labels, loc="outside lower right", ncols=LEGEND_COLUMNS, frameon=False)
    return drawn


def _speed(axes: "Axes", comparison: Comparison) -> None:
    rows = comparison.rows
    values = [row.measured.samples_per_s or 0.0 for row in rows]
    bars = axes.barh(range(len(rows)), values, height=0.62, color=[_colour(i) for i in range(len(rows))])
    axes.bar_label(bars, [_bar_label(row) for row in rows], padding=6, bbox=LABEL_BACKGROUND)
    axes.set_yticks(range(len(rows)), [_bar_name(row) for row in rows])
    # One bar alone would fill the panel; the lower limit leaves a few bars' room.
    axes.set_ylim(max(len(rows), 3) - 0.4, -0.6)
    axes.set_xlim(0, max(values) * 1.5 or 1.0)  # 0.5: room for the label beside the longest bar
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}" if value >= 10 else f"{value:g}")
    if any(values):
        axes.locator_params(axis="x", nbins=5)
    else:
        axes.set_xticks([0])
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="x", color="#DDDDDD")
    axes.set_xlabel("Throughput (samples/s, all replicas)")
    axes.set_title(f"Speed, and speed-up over {_short(comparison.baseline)}", loc="left")
    if comparison.virtual:
        note = "virtual CPU devices: no speed-up can be expected"
        axes.text(0.99, 0.01, note, transform=axes.transAxes, ha="right", va="bottom", style="italic", color=GREY)


def _accuracy(axes: "Axes", rows: Sequence[Row]) -> None:
    from matplotlib.ticker import MaxNLocator

    shown: list[float] = []
    curves = [_curve(row) for row in rows]
    validation = any(kind == "validation" for _, _, kind in curves)
    for index, (row, (numbers, percents, kind)) in enumerate(zip(rows, curves, strict=True)):
        if not numbers:
            continue
        shown += percents
        name = _short(row.measured.name)
        axes.plot(
            numbers,
            percents,
            label=f"{name} (training data)" if validation and kind == "training" else name,
            color=_colour(index),
            marker=MARKERS[index % len(MARKERS)],
            linestyle=DASHES[index % len(DASHES)],
            linewidth=2.2,
            markersize=7,
            clip_on=False,  # 0 % and 100 % lie on the frame
            markeredgecolor="white",  # keeps markers apart where curves lie on each other
        )
    what = "Validation" if validation or not shown else "Training"
    axes.set_title(f"{what} accuracy by epoch", loc="left")
    axes.set_xlabel("Epoch")
    axes.set_ylabel("Accuracy (%)")
    if not shown:
        axes.set(xticks=[], yticks=[])
        axes.text(0.5, 0.5, "no accuracy recorded", transform=axes.transAxes, ha="center", color=GREY)
        return
    axes.grid(color="#DDDDDD")
    axes.set_ylim(*_span(shown))
    epochs = [number for numbers, _, _ in curves for number in numbers]
    margin = 0.25 + 0.02 * (max(epochs) - min(epochs))
    axes.set_xlim(min(epochs) - margin, max(epochs) + margin)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))


def _curve(row: Row) -> tuple[list[int], list[float], str]:
    """Epoch numbers, accuracies in percent, and the data they are of."""
    kind = "validation" if row.measured.validated else "training"
    pairs: list[tuple[int, Any]] = [
        (epoch.number, epoch.val_accuracy if row.measured.validated else epoch.accuracy)
        for epoch in row.measured.epochs
    ]
    kept = [(number, 100 * value) for number, value in pairs if value is not None]
    return [number for number, _ in kept], [value for _, value in kept], kind


def _span(percents: Sequence[float]) -> tuple[float, float]:
    """Limits of the accuracy axis: within 0 to 100, around the values, at least ``LEAST_SPAN`` wide."""
    low, high = min(percents), max(percents)
    pad = max((LEAST_SPAN - (high - low)) / 2, 0.08 * (high - low))
    bottom, top = max(low - pad, 0.0), min(high + pad, 100.0)
    bottom = max(min(bottom, top - LEAST_SPAN), 0.0)
    return bottom, max(top, bottom + LEAST_SPAN)


def _bar_name(row: Row) -> str:
    name, replicas = _short(row.measured.name), row.measured.replicas
    if replicas is None:
        return name
    return f"{name}\n{replicas_text(row.measured)} replica{'' if replicas == 1 else 's'}"


def _bar_label(row: Row) -> str:
    m = row.measured
    if m.samples_per_s is None:
        return f"{m.state}: no speed measured"
    text = number_text(m.samples_per_s)
    if row.speedup is not None:
        text += f"  ({speedup_text(row.speedup)})"
    return text if m.state == "COMPLETED" else f"{text}\n{m.state}"


def _colour(index: int) -> str:
    return COLOURS[index % len(COLOURS)]


def _short(name: str) -> str:
    return name if len(name) <= LONGEST_NAME else f"{name[: LONGEST_NAME - 1]}…"
