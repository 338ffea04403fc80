"""How figures become text, the same in the terminal, in markdown and on the page. What is not known is an em dash."""

from __future__ import annotations

import math
from typing import Any

from nanogpt_mac.compare.results import runs

DASH = "—"
# What follows a variant's label everywhere.
MARKS = {"wrong": "WRONG", "failed": "FAILED", "partial": "partial", "waiting": "not timed yet"}


def get(document: Any, *path: str | int) -> Any:
    """document[path[0]][path[1]]..., or None as soon as something is missing or is no container."""
    for key in path:
        if isinstance(document, dict):
            document = document.get(key)
        elif isinstance(document, list) and isinstance(key, int) and -len(document) <= key < len(document):
            document = document[key]
        else:
            return None
    return document


def dicts(value: Any) -> list[dict[str, Any]]:
    """The dictionaries in a list; nothing where there is no list."""
    return [item for item in value if isinstance(item, dict)] if isinstance(value, list) else []


def num(value: Any) -> float | None:
    """A finite number, or None: records carry NaN and infinity by name."""
    return runs.number(value)


def nums(value: Any, count: int) -> list[float] | None:
    """`count` finite numbers, or None."""
    if not isinstance(value, list | tuple) or len(value) != count:
        return None
    found = [num(v) for v in value]
    return [v for v in found if v is not None] if None not in found else None


def text(value: Any, most: int = 2000) -> str:
    """One line of at most `most` characters, none a control: a record's own words never move a terminal's cursor."""
    if value is None or value == "":
        return DASH
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, dict):
        return ", ".join(f"{text(k)}: {text(v)}" for k, v in value.items()) or DASH
    if isinstance(value, list | tuple):
        return ", ".join(map(text, value)) or DASH
    said = str(value)
    line = " ".join("".join(c if c.isprintable() else " " for c in said[: 2 * most]).split()) or DASH
    return line if len(line) <= most and len(said) <= 2 * most else f"{line[: most - 1]}…"


def _fixed(value: float, digits: int = 4) -> str:
    """`digits` significant digits, not as a power of ten."""
    if value == 0:
        return "0"
    if abs(value) >= 1e12:
        return f"{value:.{digits}g}"  # no time that was measured
    decimals = max(0, digits - 1 - math.floor(math.log10(abs(value))))
    return f"{value:,.{min(decimals, 6)}f}"


def ms(value: Any) -> str:
    """Milliseconds, four significant digits: a per cent must be visible."""
    number = num(value)
    return DASH if number is None else _fixed(number)


def count(value: Any) -> str:
    number = num(value)
    return DASH if number is None else f"{number:,.0f}" if abs(number) < 1e15 else f"{number:.4g}"


def loss(value: Any) -> str:
    """Four decimals, as nanoGPT prints it; a loss that is not finite keeps its name."""
    number = num(value)
    return text(value) if number is None else f"{number:.4f}"


def percent(share: Any, digits: int = 1) -> str:
    """A share of 0..1 in per cent."""
    number = num(share)
    return DASH if number is None else f"{100 * number:.{digits}f} %"


def ratio(value: Any) -> str:
    number = num(value)
    return DASH if number is None else f"{number:.3f}" if number < 10 else f"{number:.1f}"


def interval(bounds: Any, how: Any = ms) -> str:
    """[low, high]"""
    pair = nums(bounds, 2)
    return DASH if pair is None else f"[{how(pair[0])}, {how(pair[1])}]"


def size(value: Any) -> str:
    """Bytes in binary units."""
    number = num(value)
    if number is None:
        return DASH
    for unit, step in (("TiB", 2**40), ("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if number >= step:
            return f"{number / step:.3g} {unit}" if number < 1000 * step else f"{number / step:,.0f} {unit}"
    return f"{number:.0f} B"


def seconds(value: Any) -> str:
    """1.23 s, 45 s, 6 min 07 s, 1 h 02 min"""
    number = num(value)
    if number is None:
        return DASH
    if abs(number) < 1:
        return f"{number * 1e3:.3g} ms"
    if number < 60:
        return f"{number:.3g} s"
    whole = round(number)
    return f"{whole // 60} min {whole % 60:02} s" if whole < 3600 else f"{whole // 3600} h {whole % 3600 // 60:02} min"


def rate(value: Any, unit: str) -> str:
    """A number with a decimal prefix: 1.16 TFLOP"""
    number = num(value)
    if number is None:
        return DASH
    for prefix, step in (("P", 1e15), ("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(number) >= step:
            return f"{number / step:.3g} {prefix}{unit}"
    return f"{number:.3g} {unit}"


def when(value: Any) -> str:
    """2026-11-21 14:05 of an ISO time."""
    return text(value)[:16].replace("T", " ") if isinstance(value, str) else DASH


def label(variant: Any) -> str:
    """A variant's name for people, with what is to be said against it: MPS compiled (WRONG)."""
    name = text(get(variant, "label") or get(variant, "name"), 80)
    mark = MARKS.get(state(variant))
    return f"{name} ({mark})" if mark else name


def state(variant: Any) -> str:
    """ok, wrong, partial, waiting or failed. A failed parity check is wrong, whatever else happened to the variant."""
    if get(variant, "parity") == "fail":
        return "wrong"
    known = get(variant, "state")
    if known in ("ok", *MARKS):
        return str(known)
    return "ok" if num(get(variant, "iter_ms", "median")) is not None else "failed"
