"""Overrides as text: which keys hold free text or a path, and how Hydra is handed exactly what was typed for them."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args, get_type_hints

from nanogpt_mac.errors import InputError

GIVEN = re.compile(r"(\+{0,2})([\w.]+)=(.*)", re.DOTALL)  # a value given: not `~key`, not `key@package=`
QUOTED = r"'(?:\\.|[^'\\])*'|\"(?:\\.|[^\"\\])*\""
PARTS = re.compile(rf"\s*({QUOTED})\s*(?:,|$)|([^,]*)(?:,|$)", re.DOTALL)  # between commas; quotes keep those inside
SWEEP = re.compile(r"\s*(choice|glob|range|interval|tag|shuffle|sort)\(.*\)\s*", re.DOTALL)
INTERPOLATION = re.compile(r"(\\*)\$\{")
MISSING, NOT_MISSING = "???", "\0???"  # OmegaConf's mark of a value that must be given; that text, typed

WORDS, PATH = "words", "path"


# -- which keys are text ----------------------------------------------------------------------------------------------


def text_field(default: Any, kind: str = WORDS, **metadata: Any) -> Any:
    """A field with free text, or a list of texts (`default` is then `list`): it arrives as the shell handed it over."""
    given: dict[str, Any] = {"default_factory" if callable(default) else "default": default}
    return dataclasses.field(**given, metadata={"text": kind, **metadata})


def path_field(default: Any, **metadata: Any) -> Any:
    """As `text_field`, for a path or a name: a leading ~ is the home folder, and a sweep (-m) may list several."""
    return text_field(default, PATH, **metadata)


@dataclass(frozen=True)
class TextKey:
    is_path: bool
    is_list: bool
    nullable: bool


def text_keys(schema: type, prefix: str = "") -> dict[str, TextKey]:
    """The keys of a config's dataclass that are text, dotted."""
    hints = get_type_hints(schema)
    keys: dict[str, TextKey] = {}
    for field in dataclasses.fields(schema):
        hint, name = hints[field.name], prefix + field.name
        if dataclasses.is_dataclass(hint) and isinstance(hint, type):
            keys |= text_keys(hint, f"{name}.")
        elif kind := field.metadata.get("text"):
            keys[name] = TextKey(kind == PATH, hint == list[str], type(None) in get_args(hint))
    return keys


def flags(schema: type, prefix: str = "") -> set[str]:
    """The keys of a config's dataclass that are true or false, dotted."""
    hints, found = get_type_hints(schema), set[str]()
    for field in dataclasses.fields(schema):
        hint = hints[field.name]
        if dataclasses.is_dataclass(hint) and isinstance(hint, type):
            found |= flags(hint, f"{prefix}{field.name}.")
        elif hint is bool or set(get_args(hint)) == {bool, type(None)}:
            found.add(prefix + field.name)
    return found


# -- handing a text to Hydra ------------------------------------------------------------------------------------------


def quoted(value: str) -> str:
    """Any text as a quoted string of Hydra's grammar."""
    escaped = re.sub(r"(\\*)'", r"\1\1\\'", value)  # backslashes count only before a quote
    return f"'{escaped}{escaped[len(escaped.rstrip(chr(92))) :]}'"


def unquoted(value: str) -> str:
    """The text of a quoted string of Hydra's grammar."""
    mark, inner = value[0], value[1:-1]
    inner = re.sub(rf"(\\+){mark}", lambda found: found[1][: len(found[1]) // 2] + mark, inner)
    return inner[: len(inner) - (len(inner) - len(inner.rstrip("\\"))) // 2]


def escaped(value: str) -> str:
    """Any text, so that OmegaConf finds no interpolation in it, and no missing value."""
    return NOT_MISSING if value == MISSING else INTERPOLATION.sub(lambda found: found[1] * 2 + r"\${", value)


def unescaped(value: str) -> str:
    """The text behind `escaped`; a real interpolation stays as it is."""

    def plain(found: re.Match[str]) -> str:
        return found[1][: len(found[1]) // 2] + "${" if len(found[1]) % 2 else found[0]

    return MISSING if value == NOT_MISSING else INTERPOLATION.sub(plain, value)


def found_again(value: str) -> str:
    """The text that OmegaConf gives back of `escaped`."""
    return MISSING if value == NOT_MISSING else value


def literal(value: str) -> str:
    """Any text, so that Hydra's grammar and OmegaConf give back exactly it."""
    return quoted(escaped(value))


def listed(values: Sequence[str]) -> str:
    """A list as it is typed: quotes keep a comma, or a blank at an end."""
    return f"[{','.join(map(quoted, values))}]"


def for_hydra(arguments: Sequence[str], keys: Mapping[str, TextKey], sweeps: bool) -> list[str]:
    """Command-line arguments with the texts of `keys` as `literal`, whatever is in them.

    `null` stays what it is where a key may be null. Of a list, quotes around an element are Hydra's. With `sweeps` (-m)
    commas separate paths, but for a name that exists, and choice(...), glob(...) and the like keep their meaning.
    """

    def one(argument: str) -> str:
        match = GIVEN.fullmatch(argument)
        key = keys.get(match[2]) if match else None
        if match is None or key is None or (key.nullable and match[3] == "null"):
            return argument
        return f"{match[1]}{match[2]}={_value(match[3], key, sweeps)}"

    return [one(argument) for argument in arguments]


def _value(value: str, key: TextKey, sweeps: bool) -> str:
    if key.is_list:
        bracketed = re.fullmatch(r"\s*\[(.*)\]\s*", value, re.DOTALL)
        if sweeps and (SWEEP.fullmatch(value) or re.search(r"\]\s*,\s*\[", value)):
            return value  # lists to sweep over
        inner = bracketed[1] if bracketed else value
        return f"[{','.join(_literals(inner, key.is_path, strip=bool(bracketed)))}]" if inner.strip() else "[]"
    if sweeps and key.is_path and not exists(value):
        return value if SWEEP.fullmatch(value) else ",".join(_literals(value, True))
    return literal(_expanded(value) if key.is_path else value)


def _literals(values: str, are_paths: bool, strip: bool = False) -> list[str]:
    """What stands between commas, each as a `literal`; quotes around one are taken off."""
    parts, begin = [], 0
    while begin <= len(values):
        match = PARTS.match(values, begin)
        assert match is not None
        part = unquoted(match[1]) if match[1] else match[2].strip() if strip else match[2]
        parts.append(literal(_expanded(part) if are_paths else part))
        if not match[0].endswith(",") or match.end() == match.start():
            break
        begin = match.end()
    return parts


def _expanded(value: str) -> str:
    return str(_at_home(value)) if value.startswith("~") else value


def exists(value: str) -> bool:
    """Whether a path is there; a text that cannot be a path is not."""
    try:
        return _at_home(value).exists()
    except (OSError, ValueError):
        return False


def _at_home(value: str) -> Path:
    """The path, a leading ~ or ~user expanded where there is such a home."""
    try:
        return Path(value).expanduser()
    except RuntimeError:
        return Path(value)


# -- keys and names ---------------------------------------------------------------------------------------------------


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


def refuse(overrides: Sequence[str], flags: Collection[str]) -> None:
    """InputError for a number in place of true or false, which OmegaConf would take."""
    for override in overrides:
        key, _, value = override.lstrip("+").partition("=")
        if key in flags and re.fullmatch(r"[+-]?[0-9]+", value) and value not in ("0", "1"):
            raise InputError(f"{override}: use true or false")


def slug(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9_.]+", "-", text).strip("-.").lower()[:80] or "way"


def mapped(value: Any, change: Callable[[str], str]) -> Any:
    """`value` with every text in it changed: of lists and dictionaries a new one, of a dataclass in place."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, list):
        return [mapped(each, change) for each in value]
    if isinstance(value, dict):
        return {key: mapped(each, change) for key, each in value.items()}
    if dataclasses.is_dataclass(value):
        for field in dataclasses.fields(value):
            setattr(value, field.name, mapped(getattr(value, field.name), change))
    return value
