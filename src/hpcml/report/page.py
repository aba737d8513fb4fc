"""A report as one HTML file that needs nothing else: no script, no network; the browser is told to refuse both."""

import re
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import HpcmlError
from . import notebook, tables
from .advice import REHEARSED, Advice, advice
from .cards import cards, lead
from .causes import likely_causes
from .facts import Report
from .settings import Setting, asked_of
from .tables import Table

if TYPE_CHECKING:
    from .pictures import Picture

_FOLDER = Path(__file__).parent
# Where a name, path or hash may go on in the next line: behind a sign, unless that stands in a number, and in what has
# no sign for long. A browser left alone breaks 0.003 and float32 anywhere.
_SIGN = re.compile(r"(?<![0-9][_/.:,=@-])(?<=[_/.:,=@-])(?=\w)|(?<=[_/.:,=@-])(?=[^\W\d_])")
_LONG = re.compile(r"[^\W_]{25,}")
_PIECE = 16


@dataclass(frozen=True)
class Block:
    """A section of the page; each kind of section uses some of these."""

    id: str
    title: str
    notes: tuple[str, ...] = ()
    lines: tuple[str, ...] = ()
    text: str = ""
    open: str = ""
    html: Any = ""
    pictures: Sequence[Any] = ()
    tables: Sequence[Table] = ()
    items: Sequence[Setting] = ()
    advice: Sequence[Any] = ()


@dataclass(frozen=True)
class _Item:
    what: str
    evidence: str
    toml: tuple[str, ...] = field(default_factory=tuple)


@dataclass(frozen=True)
class _Drawn:
    wide: Any
    narrow: Any


def html(report: Report, pictures: "Sequence[Picture]" = ()) -> str:
    """Return the report as one HTML page.

    Raises:
        HpcmlError: Jinja is missing.
    """
    try:
        import jinja2
        from markupsafe import Markup
    except ImportError as error:
        fix = "pip install 'hpcml[report]'"
        raise HpcmlError(f"the report's page needs {error.name}, which can't be imported", fix=fix) from None
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_FOLDER),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["breakable"] = _breakable
    shown_notebook = _notebook(report, Markup)
    style = (_FOLDER / "page.css").read_text(encoding="utf-8") + (notebook.css() if shown_notebook else "")
    logs = _logs(report)
    state = report.outcome.state
    mood = "good" if state == "COMPLETED" else "warn" if state in ("RUNNING", "PENDING") else "bad"
    page = {
        "title": report.name,
        "css": Markup(style),
        "state": state,
        "mood": mood,
        "lead": lead(report),
        "causes": likely_causes(report),
        "cards": cards(report),
        "advice": _advice(report),
        "sections": _sections(report, pictures, Markup),
        "lists": _lists(report),
        "settings": _settings(report),
        "first_logs": [block for block in logs if block.open],
        "logs": [block for block in logs if not block.open],
        "notebooks": shown_notebook,
        "footer": f"{report.id} · {report.path} · made {time.strftime('%Y-%m-%d %H:%M:%S', time.localtime(report.made))} by hpcml",
    }
    text = environment.get_template("page.html.jinja").render(page=page)
    return re.sub(r"\n{2,}", "\n", text).encode("utf-8", "replace").decode()


def _breakable(text: str) -> Any:
    """Return text as HTML that may break at signs only; what is copied from it stays whole."""
    from markupsafe import Markup, escape

    marked = _SIGN.sub("\0", text.replace("\0", ""))
    marked = _LONG.sub(lambda run: "\0".join(re.findall(f".{{1,{_PIECE}}}", run[0])), marked)
    return Markup(str(escape(marked)).replace("\0", "<wbr>"))


def _advice(report: Report) -> list[Block]:
    items = [_item(one) for one in advice(report)]
    notes: tuple[str, ...] = ()
    if not items and report.outcome.completed and not (report.comparison or report.steps):
        if report.usage.rehearsal:
            notes = (REHEARSED,)
        elif report.telemetry:
            notes = ("The requests fit what was used.",)
    return [Block("advice", "", advice=items, notes=notes)] if items or notes else []


def _item(one: Advice) -> _Item:
    return _Item(one.what, one.evidence, ("\n".join([f"[{one.table}]", *one.lines]),) if one.lines else ())


def _sections(report: Report, pictures: "Sequence[Picture]", markup: Any) -> list[Block]:
    """Pictures and tables in the order of what is asked first; a table goes into the section of its picture."""
    drawn = {p.name: _Drawn(markup(p.wide), markup(p.narrow)) for p in pictures}
    titles, said = {p.name: p.title for p in pictures}, {p.name: p.notes for p in pictures}
    made = {"comparison": tables.comparison(report), "usage": tables.usage(report), "gpus": tables.gpus(report)}
    made |= {"split": tables.split(report), "epochs": tables.epochs(report)}
    made |= {"single": tables.single(report), "steps": tables.steps(report)}
    sections = []
    for name in ("comparison", "steps", "training", "single", "machine", "split", "usage", "gpus", "epochs"):
        table, picture = made.get(name), drawn.get(name)
        if table or picture:
            title = table.title if table else titles[name]
            notes = (*said.get(name, ()), *(table.notes if table else ()))
            shown = (picture,) if picture else ()
            sections.append(Block(name, title, pictures=shown, tables=(table,) if table else (), notes=notes))
    return sections


def _lists(report: Report) -> list[Block]:
    warned = [m.text for m in report.messages if m.level in ("warning", "error")]
    told = [*dict.fromkeys([*(report.plan.notes if report.plan else ()), *warned, *report.measured.warnings])]
    blocks = [Block("warnings", "Notes and warnings", lines=tuple(told))] if told else []
    if report.missing:
        blocks.append(Block("missing", "Not recorded", lines=report.missing))
    return blocks


def _settings(report: Report) -> list[Block]:
    groups = [
        ("Parameters", report.params),
        ("Resources and strategy", asked_of(report.plan, report.measured)),
        ("Threads", report.threads),
        ("Data", report.data),
        ("Environment and provenance", report.provenance),
    ]
    return [Block("", title, items=items) for title, items in groups if items]


def _logs(report: Report) -> list[Block]:
    blocks = []
    for number_, end in enumerate(report.logs):
        whose = "Slurm's output" if end.rank is None else f"the log of rank {end.rank}"
        if end.rank is not None and report.failed:
            whose += f" of {next(one.name for one in report.failed if one.logs)}"
        is_open = "open" if number_ == 0 and not report.outcome.completed and report.outcome.state != "RUNNING" else ""
        title = f"Last {len(end.lines)} lines of {whose}"
        blocks.append(Block(f"log-{number_}", title, text="\n".join(end.lines), open=is_open))
    return blocks


def _notebook(report: Report, markup: Any) -> list[Block]:
    if report.notebook is None:
        return []
    return [Block("notebook", "Executed notebook", html=markup(notebook.html(Path(report.notebook))))]
