"""A matplotlib figure as inline SVG: colours are the page's CSS variables, text stays text, ids are its own."""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from xml.etree import ElementTree

WIDTH_PT = 400  # one column of a desktop page, the whole width of a phone: so text is readable on both
FONT_PT = 12  # the page makes it smaller where it is wide

# matplotlib wants colours; these stand for CSS variables and exist nowhere else.
_VARIABLES = ["ink", "muted", "rule", "accent", "bar", "wrong", "page", *(f"s{i}" for i in range(1, 8))]
COLOURS = {name: f"#0001{i:02x}" for i, name in enumerate(_VARIABLES)}

_REFERENCE = re.compile(r"#([\w-]+)")
_FONT = re.compile(r"font:\s*(?:(\d{3})\s+)?([\d.]+px)[^;]*")
_NUMBER = re.compile(r"-?\d+\.\d+")


@contextmanager
def style() -> Iterator[None]:
    """How every figure is drawn."""
    import matplotlib

    settings: dict[Any, Any] = {
        "font.size": FONT_PT,
        "text.color": COLOURS["ink"],
        "text.parse_math": False,  # labels are data: a dollar sign is a dollar sign
        "axes.edgecolor": COLOURS["rule"],
        "axes.labelcolor": COLOURS["muted"],
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.facecolor": "none",
        "axes.axisbelow": True,
        "figure.facecolor": "none",
        "grid.color": COLOURS["rule"],
        "grid.linewidth": 0.6,
        "xtick.color": COLOURS["rule"],
        "ytick.color": COLOURS["rule"],
        "xtick.labelcolor": COLOURS["muted"],
        "ytick.labelcolor": COLOURS["muted"],
        "svg.fonttype": "none",
    }
    with matplotlib.rc_context(settings), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")  # the browser has its own fonts
        yield


def figure(height_pt: float) -> tuple[Any, Any]:
    """A figure of the page's column width and its one axes."""
    from matplotlib.figure import Figure  # without pyplot, which keeps figures and picks a GUI
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    made = Figure(figsize=(WIDTH_PT / 72, height_pt / 72), layout=ConstrainedLayoutEngine(w_pad=0.02, h_pad=0.02))
    return made, made.add_subplot()


def inline(drawn: Any, identifier: str, title: str, description: str) -> str:
    """The figure as an <svg> element for an HTML page, the same bytes every time; call within `style()`."""
    import matplotlib

    file = io.StringIO()
    nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    with matplotlib.rc_context({"svg.hashsalt": identifier}):
        drawn.savefig(file, format="svg", metadata=nothing)
    root = ElementTree.fromstring(file.getvalue())
    for element in root.iter():
        for child in [c for c in element if _bare(c.tag) in ("metadata", "style")]:
            element.remove(child)
        element.tag = _bare(element.tag)
        element.attrib = {_bare(key): _attribute(_bare(key), value) for key, value in element.attrib.items()}
        element.tail = None
    used = {
        name
        for e in root.iter()
        for key, value in e.attrib.items()
        if key != "id"
        for name in _REFERENCE.findall(value)
    }
    for element in root.iter():
        if element.get("id") not in used:
            element.attrib.pop("id", None)
    root.attrib = {
        "viewBox": root.attrib["viewBox"],
        "role": "img",
        "aria-labelledby": f"{identifier}-t {identifier}-d",
    }
    for tag, words in (("desc", description), ("title", title)):
        named = ElementTree.Element(tag, {"id": f"{identifier}-{tag[0]}"})
        named.text = words
        root.insert(0, named)
    return ElementTree.tostring(root, encoding="unicode")


def _bare(name: str) -> str:
    return name.rpartition("}")[2]


def _attribute(name: str, value: str) -> str:
    if name == "style":
        value = _FONT.sub(lambda m: f"font-size: {m[2]}" + (f"; font-weight: {m[1]}" if m[1] else ""), value)
        for variable, colour in COLOURS.items():
            value = value.replace(colour, f"var(--{variable})")
    elif name in ("d", "x", "y", "width", "height", "transform", "points"):
        value = " ".join(_NUMBER.sub(lambda m: f"{float(m[0]):.1f}".removesuffix(".0"), value).split())
    return value
