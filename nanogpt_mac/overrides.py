"""Hydra's overrides as text: `key=value`, quoted, merged, turned into names."""

from __future__ import annotations

import re
from collections.abc import Sequence


def quoted(key: str, value: str) -> str:
    """`key=value` with any value, in Hydra's grammar; one that is quoted already stays as it is."""
    if len(value) > 1 and value[0] == value[-1] and value[0] in "'\"":
        return f"{key}={value}"
    escaped = re.sub(r"(\\*)'", r"\1\1\\'", value)  # backslashes count only before a quote
    trailing = len(escaped) - len(escaped.rstrip("\\"))
    return f"{key}='{escaped}{chr(92) * trailing}'"


def key_of(override: str) -> str:
    """The key, or the group, that an override names."""
    return override.lstrip("+~").split("=")[0].split("@")[0]


def merged(*groups: Sequence[str]) -> list[str]:
    """Overrides one after the other; of those with the same key the last alone, which Hydra would have refused."""
    last: dict[str, str] = {}
    for override in (override for group in groups for override in group):
        last.pop(key_of(override), None)
        last[key_of(override)] = override
    return list(last.values())


def slug(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9_.]+", "-", text).strip("-.").lower()[:80] or "way"
