"""An executed notebook as HTML to be put into a page: nothing in it runs, and nothing is loaded."""

import re
from pathlib import Path
from typing import Any

# A notebook with larger outputs than this would make the page slow to open; it lies beside the report anyway.
MOST_BYTES = 20 * 2**20
# Gone with all that is in them; of any other element that is not allowed only its tags go.
_FORBIDDEN = (
    "script",
    "style",
    "iframe",
    "object",
    "embed",
    "applet",
    "noscript",
    "template",
    "frameset",
    "head",
    "title",
)
_TEXT = (
    *(
        "a",
        "abbr",
        "b",
        "blockquote",
        "br",
        "code",
        "dd",
        "del",
        "details",
        "div",
        "dl",
        "dt",
        "em",
        "figure",
        "figcaption",
    ),
    *("h1", "h2", "h3", "h4", "h5", "h6", "hr", "i", "img", "ins", "kbd", "li", "main", "mark", "ol", "p", "pre", "s"),
    *("samp", "small", "span", "strong", "sub", "summary", "sup", "time", "tt", "u", "ul", "var"),
)
_TABLE = ("caption", "col", "colgroup", "table", "tbody", "td", "tfoot", "th", "thead", "tr")
_DRAWING = (
    *("svg", "g", "path", "rect", "circle", "ellipse", "line", "polyline", "polygon", "text", "tspan", "defs", "stop"),
    *("clippath", "lineargradient", "radialgradient", "marker", "pattern", "desc"),
)
_ALLOWED = frozenset((*_TEXT, *_TABLE, *_DRAWING))
_LOADS = ("src", "srcset", "poster", "background", "data", "action", "formaction", "ping", "xlink:href", "longdesc")
_CSS_LOADS = re.compile(r"url\s*\(|@import|expression\s*\(|image-set\s*\(", re.IGNORECASE)


def html(path: Path) -> str:
    """Return a notebook's cells and outputs as HTML; where that can't be made, a sentence that says why."""
    try:
        if path.stat().st_size > MOST_BYTES:
            return f"<p>The notebook is {path.stat().st_size >> 20} MiB large; it lies beside this report.</p>"
        import nbconvert
        import nbformat
    except ImportError as error:
        return f"<p>The notebook is not shown: {error.name} is not installed (pip install 'hpcml[report]').</p>"
    except OSError as error:
        return f"<p>The notebook can't be read: {error.strerror}.</p>"
    try:
        node = nbformat.read(path, as_version=4)
        exporter: Any = nbconvert.HTMLExporter
        body, _ = exporter(template_name="basic").from_notebook_node(node)
        return tamed(body)
    except Exception as error:  # a foreign file: whatever is wrong with it must not cost the report
        return f"<p>The notebook can't be shown: {_escaped(type(error).__name__)}. It lies beside this report.</p>"


def tamed(body: str) -> str:
    """Return HTML without anything that runs or loads: no scripts, no handlers, no address but of links and data."""
    from bs4 import BeautifulSoup

    soup = BeautifulSoup(body, "html.parser")
    for element in soup.find_all(_FORBIDDEN):
        element.decompose()
    for element in soup.find_all(True):
        if element.name.lower() in _ALLOWED:
            _tame(element)
        else:
            element.unwrap()
    return str(soup)


def _tame(element: Any) -> None:
    for name in list(element.attrs):
        value = str(element.attrs[name]).strip()
        lower = name.lower()
        if lower.startswith("on") or (lower == "style" and _CSS_LOADS.search(value)):
            del element.attrs[name]
        elif lower == "id":
            element.attrs[name] = f"notebook-{value}"  # no clash with the page's own
        elif (lower in _LOADS and not value.lower().startswith("data:image/")) or (
            lower == "href" and not re.match(r"https?:|mailto:|#", value, re.IGNORECASE)
        ):
            del element.attrs[name]
        elif lower == "href" and value.startswith("#"):
            element.attrs[name] = f"#notebook-{value[1:]}"


def _escaped(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;")


def css() -> str:
    """Return the colours of source code; empty where Pygments is missing, which nbconvert brings."""
    try:
        from pygments.formatters import HtmlFormatter  # type: ignore[import-untyped]
    except ImportError:
        return ""
    light = HtmlFormatter(style="default").get_style_defs(".highlight")
    dark = HtmlFormatter(style="github-dark").get_style_defs(".highlight")
    return f"{light}\n@media screen and (prefers-color-scheme: dark) {{\n{dark}\n}}\n"
