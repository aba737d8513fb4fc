"""The pictures of a report: for the page as SVG, wide and narrow, and each as a PNG file in the run's ``plots``."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from .facts import Report
from .plot import COLOURS

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_PART_NAMES = {"device_compute": "device compute"}


@dataclass(frozen=True)
class Picture:
    """One picture; ``wide`` and ``narrow`` are SVG elements, ``png`` a file's content."""

    name: str
    title: str
    wide: str
    narrow: str
    png: bytes
    notes: tuple[str, ...] = ()


def draw(report: Report) -> list[Picture]:
    """Return the pictures that the facts give; none where matplotlib is missing."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        return []
    from . import curves, span, svg

    found = []
    if report.comparison:
        from . import plot

        figure, label = plot.figure(report.comparison), "Throughput and accuracy of the variants"
        narrow = f'<div class="scroll">{svg.inline(figure, "comparison-n", label)}</div>'
        wide = svg.inline(figure, "comparison", label)
        found.append(Picture("comparison", "Speed and accuracy", wide, narrow, svg.png(figure)))
    part = span.training(report)
    for name, title, panels, only, shaded in (
        ("training", "Training", curves.training(report), part, None),
        ("machine", "Machine", curves.machine(report), None, part),
    ):
        if panels:
            label = f"Curves over time: {', '.join(panel.title for panel in panels)}"
            figure = curves.draw(panels, report, only=only, shaded=shaded)
            narrow = svg.inline(curves.draw(panels, report, narrow=True, only=only, shaded=shaded), f"{name}-n", label)
            notes = (span.told(only, telemetry=bool(report.telemetry)),) if only else ()
            found.append(Picture(name, title, svg.inline(figure, name, label), narrow, svg.png(figure), notes))
    if report.split and report.split.parts_ms:
        label = "Where the time of a step goes"
        figure = _split(report, narrow=False)
        narrow = svg.inline(_split(report, narrow=True), "split-n", label)
        found.append(Picture("split", "Step time", svg.inline(figure, "split", label), narrow, svg.png(figure)))
    return found


def _split(report: Report, *, narrow: bool) -> "Figure":
    from matplotlib import style
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    from .curves import NARROW_IN, STYLE, WIDE_IN

    assert report.split
    with style.context(["default", STYLE]):
        width = NARROW_IN if narrow else WIDE_IN
        figure = Figure(figsize=(width, 1.35 if narrow else 1.0))
        FigureCanvasAgg(figure)
        axes = figure.add_axes((0.01, 0.1, 0.98, 0.34))
        at = 0.0
        for index, (name, ms) in enumerate(report.split.parts_ms.items()):
            label = f"{_PART_NAMES.get(name, name)} {ms:.1f} ms"
            axes.barh(0, ms, left=at, height=1.0, color=COLOURS[index % len(COLOURS)], label=label)
            at += ms
        axes.set_xlim(0, at or 1.0)
        axes.set_axis_off()
        figure.legend(loc="upper left", ncols=2 if narrow else 5, frameon=False, fontsize=8.5, handlelength=1.0)
    return figure
