"""A matplotlib figure as an SVG to be put into a page: its colours are the page's, its ids its own."""

import io
import re
from typing import TYPE_CHECKING
from xml.etree import ElementTree

from .plot import COLOURS, GREY

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PNG_DPI = 130
_SVG, _XLINK = "http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"
# What the figures are drawn in, and the page's variable for it; page.css gives each a light and a dark value.
_VARIABLES = {
    **{colour.lower(): f"var(--c{number})" for number, colour in enumerate(COLOURS[:-1])},
    "#000000": "var(--ink)",
    GREY.lower(): "var(--soft)",
    "#dddddd": "var(--grid)",
    "#bbbbbb": "var(--mark)",
    "#ffffff": "var(--paper)",
}
_COLOUR = re.compile(r"#[0-9a-f]{6}\b", re.IGNORECASE)
_FONT = re.compile(r"font:\s*((?:bold|[6-9]00)\s)?[^;]*?([\d.]+px)[^;]*")
_BOLD = "; font-weight: 600"
_NUMBER = re.compile(r"-?\d+\.\d{2,}")


def inline(figure: "Figure", name: str, label: str) -> str:
    """Return a figure as an ``<svg>`` element.

    Args:
        name: begins all its ids, so that several can stand in one page.
        label: says what it shows to who can't see it.
    """
    from matplotlib import rc_context

    file = io.StringIO()
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": name, "path.simplify": True}):
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    ElementTree.register_namespace("", _SVG)
    ElementTree.register_namespace("xlink", _XLINK)
    root = ElementTree.fromstring(file.getvalue())
    for parent in list(root.iter()):
        for child in list(parent):
            if child.tag in (f"{{{_SVG}}}metadata", f"{{{_SVG}}}style"):
                parent.remove(child)
    for element in root.iter():
        _adapt(element, name)
    for size in ("width", "height"):
        root.attrib.pop(size, None)
    root.set("class", "plot")
    root.set("role", "img")
    root.set("aria-label", label)
    return ElementTree.tostring(root, encoding="unicode")


def _adapt(element: ElementTree.Element, name: str) -> None:
    for key, value in list(element.attrib.items()):
        if key == "id":
            element.set(key, f"{name}-{value}")
        elif key.endswith("href"):
            element.set(key, value.replace("#", f"#{name}-", 1))
        elif key == "clip-path":
            element.set(key, value.replace("url(#", f"url(#{name}-"))
        elif key == "style":
            value = _COLOUR.sub(lambda match: _VARIABLES.get(match[0].lower(), match[0]), value)
            element.set(key, _FONT.sub(_font, value))
        elif key in ("d", "transform", "points", "x", "y", "width", "height"):
            element.set(key, _NUMBER.sub(lambda match: f"{float(match[0]):.1f}".removesuffix(".0"), value))


def _font(match: re.Match[str]) -> str:
    return f"font-size: {match[2]}" + (_BOLD if match[1] else "")


def png(figure: "Figure") -> bytes:
    """Return a figure as a PNG file, on white."""
    from matplotlib import style

    file = io.BytesIO()
    with style.context("default"):
        figure.savefig(file, format="png", dpi=PNG_DPI, facecolor="white")
    return file.getvalue()
