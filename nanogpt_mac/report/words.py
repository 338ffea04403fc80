"""How figures become text, the same in the terminal, in markdown and on the page. What is not known is an em dash."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from nanogpt_mac.records.figures import Ratio

DASH = "—"


def number(value: object) -> float | None:
    """A finite number, or None."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        return float(value) if math.isfinite(value) else None
    except OverflowError:  # a whole number that no float holds
        return None


def text(value: object, most: int = 2000) -> str:
    """One line of at most `most` characters, none a control: a record's own words never move a terminal's cursor."""
    if value is None or value == "":
        return DASH
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, Mapping):
        return ", ".join(f"{text(k)}: {text(v)}" for k, v in value.items()) or DASH
    if isinstance(value, list | tuple):
        return ", ".join(map(text, value)) or DASH
    whole = str(value)
    line = " ".join(printable(whole[: 2 * most]).split()) or DASH
    return line if len(line) <= most and len(whole) <= 2 * most else f"{line[: most - 1]}…"


def printable(words: str) -> str:
    return "".join(c if c.isprintable() else " " for c in words)


def ms(value: object) -> str:
    """Milliseconds, four significant digits: a per cent must be visible."""
    known = number(value)
    if known is None:
        return DASH
    if known == 0 or abs(known) >= 1e12:  # no time that was measured
        return f"{known:.4g}"
    return f"{known:,.{min(max(0, 3 - math.floor(math.log10(abs(known)))), 6)}f}"


def count(value: object) -> str:
    known = number(value)
    return DASH if known is None else f"{known:,.0f}" if abs(known) < 1e15 else f"{known:.4g}"


def loss(value: object) -> str:
    """Four decimals, as nanoGPT prints it; a loss that is not finite keeps its name."""
    known = number(value)
    return text(value) if known is None else f"{known:.4f}"


def percent(share: object, digits: int = 1) -> str:
    """A share of 0..1 in per cent."""
    known = number(share)
    return DASH if known is None else f"{100 * known:.{digits}f} %"


def ratio(value: object) -> str:
    known = number(value)
    return (
        DASH if known is None else f"{known:.3f}" if known < 10 else f"{known:.1f}" if known < 1e6 else f"{known:.1g}"
    )


def interval(bounds: Sequence[float] | None, how: Callable[[object], str] = ms) -> str:
    """[low, high]"""
    return DASH if bounds is None else f"[{how(bounds[0])}, {how(bounds[1])}]"


def compared(found: Ratio | None) -> str:
    """1.231 [1.225, 1.238], with the word tie where the interval contains 1."""
    return DASH if found is None else beside(ratio(found.value), interval(found.ci, ratio)) + " tie" * bool(found.tie)


def beside(value: str, more: str) -> str:
    """A figure and what belongs beside it, such as its interval."""
    return value if DASH in (value, more) else f"{value} {more}"


def size(value: object) -> str:
    """Bytes in binary units."""
    known = number(value)
    if known is None:
        return DASH
    for unit, step in (("TiB", 2**40), ("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if known >= step:
            return f"{known / step:.3g} {unit}" if known < 1000 * step else f"{known / step:,.0f} {unit}"
    return f"{known:.0f} B"


def seconds(value: object) -> str:
    """1.23 s, 45 s, 6 min 07 s, 1 h 02 min"""
    known = number(value)
    if known is None:
        return DASH
    if abs(known) < 1:
        return f"{known * 1e3:.3g} ms"
    if known < 60:
        return f"{known:.3g} s"
    whole = round(known)
    return f"{whole // 60} min {whole % 60:02} s" if whole < 3600 else f"{whole // 3600} h {whole % 3600 // 60:02} min"


def rate(value: object, unit: str) -> str:
    """A number with a decimal prefix: 1.16 TFLOP"""
    known = number(value)
    if known is None:
        return DASH
    for prefix, step in (("P", 1e15), ("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(known) >= step:
            return f"{known / step:.3g} {prefix}{unit}"
    return f"{known:.3g} {unit}"


def when(value: str | None) -> str:
    """2026-11-21 14:05 of an ISO time."""
    return text(value)[:16].replace("T", " ") if value else DASH


def plural(amount: int, one: str, many: str | None = None) -> str:
    return f"{amount} {one if amount == 1 else many or f'{one}s'}"


def listed(names: Sequence[str]) -> str:
    """A, B and C"""
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
