"""The boundary between files and types: everything that is read back is validated here, once.

A document is a JSON object with a `schema`. An older schema is migrated before it is validated; a newer one is read for
what this program knows of it. What does not validate raises `DamagedError`, whose text is one clear line; readers count
such a file as absent.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any, ClassVar, Self, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from nanogpt_mac.files import lock, plain, write_json

__all__ = ["Amount", "Count", "DamagedError", "Document", "Number", "Record", "Share", "Size", "plain"]

MOST = 1e30  # of anything that is counted or measured here; more is a damaged number

Amount = Annotated[float, Field(ge=0, lt=MOST, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=0, lt=10**12)]
Size = Annotated[int, Field(gt=0, lt=10**12)]
Share = Annotated[float, Field(ge=0, allow_inf_nan=False)]


def _named(value: Any) -> Any:
    """JSON has no NaN and no infinity: they are written as their names (`plain`)."""
    return float(value) if value in ("nan", "inf", "-inf") else value


Number = Annotated[float, BeforeValidator(_named)]  # may be NaN or infinite: a loss, a gradient norm


class DamagedError(ValueError):
    """A file that cannot be what it should be; its text is one line: the file, the key, what stands there."""


class Record(BaseModel):
    """Something written down. Unknown keys are ignored: a newer program may have written them."""

    model_config = ConfigDict(frozen=True, extra="ignore", protected_namespaces=(), strict=False)


D = TypeVar("D", bound="Document")


class Document(Record):
    """A record with a file of its own."""

    SCHEMA: ClassVar[int] = 1
    schema_: Annotated[int, Field(alias="schema")] = 1

    model_config = ConfigDict(populate_by_name=True)

    @classmethod
    def migrated(cls, document: dict[str, Any], schema: int) -> dict[str, Any]:
        """`document` of an older `schema` in the words of this one."""
        return document

    @classmethod
    def parse(cls, document: Any, name: str) -> Self:
        """Validate a JSON object; `name` is what `DamagedError` calls it."""
        if not isinstance(document, dict):
            raise DamagedError(f"{name}: not a JSON object")
        schema = document.get("schema", 1)
        if not isinstance(schema, int) or isinstance(schema, bool) or schema < 1:
            raise DamagedError(f"{name}: schema={schema!r} is not a whole number")
        try:
            if schema < cls.SCHEMA:
                document = cls.migrated(dict(document), schema)
            return cls.model_validate(document)
        except ValidationError as error:
            raise DamagedError(f"{name}: {first(error)}") from error
        except (KeyError, TypeError, AttributeError, ValueError) as error:  # what an older schema cannot have been
            raise DamagedError(f"{name}: schema {schema} cannot be read: {error!r}"[:300]) from error

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read `path`. FileNotFoundError where there is none; `DamagedError` where it cannot be used."""
        if path.exists() and not path.is_file():
            raise DamagedError(f"{path.name}: not a file")  # a pipe would keep its reader waiting
        try:
            document = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise
        except (OSError, ValueError, RecursionError) as error:
            raise DamagedError(f"{path.name}: cannot be read: {type(error).__name__}") from error
        return cls.parse(document, path.name)

    def document(self) -> dict[str, Any]:
        """As it is written: JSON's own types, numbers that are not finite by their names."""
        return {"schema": self.SCHEMA} | plain(self.model_dump(mode="python", by_alias=True, exclude={"schema_"}))


def cached(kind: type[D], path: Path) -> D:
    """The document `path` of the cache folder; a fresh one where there is none, or it is damaged or foreign."""
    try:
        return kind.load(path)
    except (DamagedError, FileNotFoundError):
        return kind()


def update(kind: type[D], path: Path, change: Callable[[D], D]) -> None:
    """Change a document of the cache folder, one process at a time. Where that cannot be written nothing is kept."""
    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        with lock(path.with_name(f"{path.name}.lock")):
            write_json(path, change(cached(kind, path)).document())


def first(error: ValidationError) -> str:
    """The first of pydantic's complaints: key, value, what was expected."""
    details = error.errors(include_url=False)[0]
    key = ".".join(str(part) for part in details["loc"])
    if details["type"] == "missing":
        return f"has no {key}"
    if not key:  # a rule about several keys, worded where it stands
        return details["msg"].removeprefix("Value error, ")
    shown = repr(details.get("input"))
    shown = shown if len(shown) <= 60 else f"{shown[:57]}..."
    return f"{key}={shown}: {details['msg']}"
