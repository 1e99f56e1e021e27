"""Files, whole or not at all: TOML in, text and JSON out; and where what is made once is kept (the cache)."""

from __future__ import annotations

import json
import os
import tomllib
import types
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, JsonValue, ValidationError, ValidationInfo, field_validator

from bench.errors import UserError, unknown

CACHE_VARIABLE = "CISS_BENCH_CACHE"


class Table(BaseModel):
    """What a TOML file (or a table in it) may hold: every key is known, typed and documented."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _no_truth_for_a_number(cls, value: Any, info: ValidationInfo) -> Any:
        """`true` is not 1: pydantic would take it."""
        if isinstance(value, bool) and info.field_name is not None:
            kinds = set(_kinds(cls.model_fields[info.field_name].annotation))
            if not kinds & {bool, Any} and kinds & {int, float}:
                raise ValueError(f"{str(value).lower()} is not a number")
        return value


M = TypeVar("M", bound=BaseModel)


def _kinds(annotation: Any) -> Iterator[Any]:
    """The plain types that an annotation allows."""
    if typing.get_origin(annotation) in (typing.Union, types.UnionType, typing.Annotated):
        for part in typing.get_args(annotation):
            yield from _kinds(part)
    else:
        yield annotation


def load_toml(path: Path) -> dict[str, object]:
    """The content of a TOML file as it stands.

    Raises:
        UserError: not there, not readable, not TOML.
    """
    try:
        return tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not a TOML file in UTF-8: {error}") from None


def read_toml(path: Path, model: type[M]) -> M:
    """A TOML file as a model that knows each of its keys.

    Raises:
        UserError: one line: file, key, value, what is allowed, and the nearest word that is.
    """
    return checked(load_toml(path), model, str(path))


def checked(content: Any, model: type[M], where: str) -> M:
    """Some content as a model; `where` names the file in errors."""
    try:
        return model.model_validate(content)
    except ValidationError as error:
        raise explained(error, model, where) from None


def explained(error: ValidationError, model: type[BaseModel], where: str) -> UserError:
    """The first thing that a model does not like, in one line."""
    errors = error.errors()
    first = next((e for e in errors if e["type"] == "extra_forbidden"), errors[0])
    names = [str(part) for part in first["loc"] if not str(part).endswith("]")]
    place = ".".join(names)
    if first["type"] == "extra_forbidden":
        parent = _model_at(model, names[:-1])
        at = f"{where}: {'.'.join(names[:-1])}" if names[:-1] else where
        return unknown(
            "table" if isinstance(first["input"], dict) else "key", names[-1], parent.model_fields, at
        )
    if first["type"] == "missing":
        return UserError(f"{where}: {place}: missing; this key must be given")
    shown = "" if isinstance(first["input"], dict | BaseModel) else f" = {first['input']!r}"
    if first["type"] == "literal_error":
        allowed = [str(word) for word in _words(_model_at(model, names[:-1]), names[-1])]
        return unknown("value", first["input"], allowed, f"{where}: {place}")
    message = str(first.get("ctx", {}).get("error", first["msg"]))
    return UserError(f"{where}: {place}{shown}: {message}" if place else f"{where}: {message}")


def _model_at(model: type[BaseModel], names: list[str]) -> type[BaseModel]:
    """The model that a path of keys leads to."""
    for name in names:
        field = model.model_fields.get(name)
        for kind in _kinds(field.annotation if field else None):
            inner = [kind, *typing.get_args(kind)]
            found = next((k for k in inner if isinstance(k, type) and issubclass(k, BaseModel)), None)
            if found is not None:
                model = found
    return model


def _words(model: type[BaseModel], name: str) -> list[Any]:
    """The words of a field that allows only some."""
    field = model.model_fields.get(name)
    found: list[Any] = []
    for kind in _kinds(field.annotation if field else None):
        if typing.get_origin(kind) is typing.Literal:
            found += typing.get_args(kind)
    return found


# ---- whole files -------------------------------------------------------------------------------------------


def write_text(path: Path, text: str) -> None:
    """Write a file so that a reader sees the old one or the new one, never a part."""
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        aside.write_text(text, encoding="utf-8")
        aside.replace(path)
    except OSError:
        aside.unlink(missing_ok=True)
        raise


def write_json(path: Path, content: JsonValue) -> None:
    """Write JSON, whole."""
    write_text(path, json.dumps(content, indent=1) + "\n")


def read_json(path: Path) -> JsonValue:
    """The content of a JSON file, None if it is not there.

    Raises:
        UserError: it is damaged.
    """
    try:
        content: JsonValue = json.loads(path.read_text(encoding="utf-8"))
        return content
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: damaged: {error}; delete it and run again") from None


def check_writable(folder: Path) -> None:
    """Make a folder and write into it; OSError if that cannot be."""
    folder.mkdir(parents=True, exist_ok=True)
    probe = folder / f".probe-{os.getpid()}"
    probe.write_text("")
    probe.unlink()


def cache() -> Path:
    """Where what is made once is kept: $CISS_BENCH_CACHE, else ./data/cache. Nothing in it is missed if it is
    deleted."""
    return Path(os.environ.get(CACHE_VARIABLE) or Path("data") / "cache")
