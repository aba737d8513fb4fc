"""A report as text for a terminal of 80 columns."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from . import comparison, tables
from .advice import REHEARSED, advice
from .cards import cards, lead, split_note, uses
from .causes import likely_causes
from .facts import Report
from .series import Series
from .text_of import MISSING, number, percent

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

WIDTH = 80
_BARS = "▁▂▃▄▅▆▇█"
_SPARK = 20
_MOST_SERIES = 10


def text(report: Report, console: "Console") -> None:
    """Print the report to a console of rich's."""
    from rich.padding import Padding
    from rich.text import Text

    outcome = report.outcome
    colour = "green" if outcome.completed else "yellow" if outcome.state in ("RUNNING", "PENDING") else "red"
    console.print(Text.assemble((report.name, "bold"), "  ", (outcome.state, f"bold {colour}")))
    for line in lead(report):
        console.print(Text(line, "dim"))
    for number_, cause in enumerate(likely_causes(report)):
        if number_ == 0:
            _heading(console, "Likely cause")
        console.print(Padding(Text(cause.sentence, f"bold {colour}"), (0, 0, 0, 2)))
        console.print(Padding(Text(cause.evidence, "dim"), (0, 0, 0, 2)))
        console.print(Padding(Text(f"what to do: {cause.fix}"), (0, 0, 0, 2)))
    if not outcome.completed and outcome.state not in comparison.ONGOING and report.logs:
        _heading(console, f"Last {len(report.logs[0].lines)} lines of {report.logs[0].path}")
        for line in report.logs[0].lines:
            console.print(Padding(Text(line), (0, 0, 0, 2)))
    _heading(console, "Figures")
    _rows(console, [[card.label, card.value, card.note] for card in cards(report)], right=1)
    if report.comparison:
        _heading(console, "Comparison")
        console.print(Padding(comparison.table(report.comparison), (0, 0, 0, 2)))
        for note in report.comparison.notes:
            console.print(Padding(Text(note), (0, 0, 0, 2)))
    elif made := tables.steps(report):
        _heading(console, made.title)
        _rows(console, [[cell.text for cell in row] for row in made.rows], right=3)
    else:
        _heading(console, "Requested against used")
        used = [[use.what, use.asked, use.used, percent(use.share)] for use in uses(report)]
        _rows(console, [["", "asked", "used", ""], *used])
    _curves(console, report)
    if report.split:
        _heading(console, "Step time, as profiled")
        total = report.split.step_ms or sum(report.split.parts_ms.values()) or 1
        split = [[n.replace("_", " "), f"{ms:.2f} ms", percent(ms / total)] for n, ms in report.split.parts_ms.items()]
        _rows(console, split, right=1)
        console.print(Padding(Text(split_note(report), "dim"), (0, 0, 0, 2)))
    if found := advice(report):
        _heading(console, "What to ask for next time")
        for one in found:
            console.print(Padding(Text(one.what, "bold"), (0, 0, 0, 2)))
            console.print(Padding(Text(one.evidence, "dim"), (0, 0, 0, 4)))
            for line in one.lines:
                console.print(Padding(Text(line, "cyan"), (0, 0, 0, 4)))
    if report.usage.rehearsal and not (report.comparison or report.steps) and outcome.completed:
        _heading(console, "What to ask for next time")
        console.print(Padding(Text(REHEARSED), (0, 0, 0, 2)))
    for title, lines in (("Warnings", _warnings(report)), ("Not recorded", report.missing)):
        if lines:
            _heading(console, title)
            for line in lines:
                console.print(Padding(Text(line), (0, 0, 0, 2)))


def _curves(console: "Console", report: Report) -> None:
    shown = [s for s in report.metrics if s.rank == 0 and len(s.values) > 1][:_MOST_SERIES]
    shown += [s for s in report.telemetry if s.name.endswith(("utilization_percent", "cpu/cores", "memory/used_mib"))]
    if shown:
        _heading(console, "Curves over time")
        ranks = len({s.rank for s in shown})
        rows = [
            [_name(s, ranks), sparkline(s), f"{number(s.low)} … {number(s.high)}", f"last {number(s.last)}"]
            for s in shown
        ]
        _rows(console, rows[: 2 * _MOST_SERIES])
    if once := tables.single(report):
        _heading(console, once.title)
        _rows(console, [[cell.text for cell in row] for row in once.rows])


def _name(series: Series, ranks: int) -> str:
    short = {"utilization_percent": "busy (%)", "cpu/cores": "cores busy", "memory/used_mib": "memory (MiB)"}
    name = series.name
    for ending, words in short.items():
        name = name.replace(ending, words)
    name = name.replace("/", " ")
    return name if ranks < 2 else f"{name}, rank {series.rank}"


def sparkline(series: Series) -> str:
    """Return a series as a row of bars, each the mean of its part of the time; a gap where nothing was recorded."""
    if series.low is None or series.high is None or not series.times_s:
        return MISSING
    begin, span = series.times_s[0], (series.times_s[-1] - series.times_s[0]) or 1.0
    sums = [[0.0, 0] for _ in range(_SPARK)]
    for time_s, value in zip(series.times_s, series.values, strict=True):
        if series.low <= value <= series.high:  # not so for NaN and infinities
            place = sums[min(_SPARK - 1, int((time_s - begin) / span * _SPARK))]
            place[0] += value
            place[1] += 1
    height = (series.high - series.low) or 1.0
    level = [None if not n else int((total / n - series.low) / height * (len(_BARS) - 1) + 0.5) for total, n in sums]
    if len(series.values) < _SPARK:
        level = [one for one in level if one is not None]
    return "".join(" " if one is None else _BARS[one] for one in level)


def _rows(console: "Console", rows: "Sequence[Sequence[str]]", right: int | None = None) -> None:
    from rich.padding import Padding
    from rich.table import Table
    from rich.text import Text

    table: Table = Table.grid(padding=(0, 2, 0, 0))
    for place in range(max((len(row) for row in rows), default=0)):
        table.add_column(
            justify="right" if place == right else "left", style="dim" if place == 0 else "", overflow="fold"
        )
    for row in rows:
        cells: list[RenderableType] = [Text(cell) for cell in row]
        table.add_row(*cells)
    console.print(Padding(table, (0, 0, 0, 2)))


def _heading(console: "Console", title: str) -> None:
    from rich.text import Text

    console.print()
    console.print(Text(title, "bold"))


def _warnings(report: Report) -> tuple[str, ...]:
    told = [m.text for m in report.messages if m.level == "warning"]
    return tuple(dict.fromkeys([*(report.plan.notes if report.plan else ()), *told, *report.measured.warnings]))
