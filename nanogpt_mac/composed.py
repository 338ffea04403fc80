"""A command's composed config as a file: how a process hands work to another, which composes nothing itself.

Text would be composed with less context than its parent had: other folders of configs, an environment, a clock.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from nanogpt_mac.errors import InputError

FLAG = "--composed"  # of every command: FILE in place of overrides


def write(path: Path, config: Any, search_path: Sequence[str] = ()) -> list[str]:
    """Write `config`, a dataclass, and the folders of configs beside conf/; the arguments that hand them over."""
    path.write_text(json.dumps({"config": asdict(config), "search_path": list(search_path)}), encoding="utf-8")
    return [FLAG, str(path)]


def read(path: str, schema: type) -> tuple[Any, list[str]]:
    """The config, a `schema`, and the folders of configs. InputError for a file that is damaged or another version's.

    JSON is Python's: NaN and infinities stand for themselves.
    """
    from pydantic import TypeAdapter, ValidationError

    try:
        document = json.loads(Path(path).read_text(encoding="utf-8"))
        given, search_path = document["config"], list(map(str, document["search_path"]))
        config: Any = TypeAdapter(schema).validate_python(given)
    except OSError as error:
        raise InputError(f"{FLAG} {path}: cannot be read: {error.strerror}") from error
    except ValidationError as error:
        found = error.errors(include_url=False)[0]
        key = ".".join(map(str, found["loc"]))
        raise InputError(f"{FLAG} {path}: {key}={found.get('input')!r}: {found['msg']}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{FLAG} {path}: is damaged ({error!r}); leave it out and name keys instead") from error
    if odd := _keys(given) ^ _keys(asdict(config)):
        raise InputError(f"{FLAG} {path}: {min(odd)}: is of another version; leave it out and name keys instead")
    return config, search_path


def _keys(value: Any, prefix: str = "") -> set[str]:
    """Every key of nested dictionaries, dotted."""
    if not isinstance(value, dict):
        return set()
    return {f"{prefix}{k}" for k in value}.union(*(_keys(v, f"{prefix}{k}.") for k, v in value.items()))
