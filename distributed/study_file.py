"""A study's configuration as a YAML file: read, validated, and refused in one line that names the key."""

from __future__ import annotations

import importlib.resources
from pathlib import Path
from typing import TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

Model = TypeVar("Model", bound=BaseModel)


class ConfigError(ValueError):
    """A study's configuration is not valid; the message is one line that names the key."""


class Section(BaseModel):
    """A part of a configuration: it does not change, and has no keys but its own."""

    model_config = ConfigDict(frozen=True, extra="forbid")


def load(model: type[Model], path: str | Path) -> Model:
    """Read and validate a configuration.

    model: what it consists of. path: a YAML file. Returns the model.
    Raises FileNotFoundError, or ConfigError with one line that names the first key at fault.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no file {path}")
    return parse(model, path.read_text(encoding="utf-8"))


def shipped_text(name: str) -> str:
    """The YAML text of a grid that ships with the package, comments included. name: of its file."""
    return (importlib.resources.files(__package__) / "configs" / name).read_text(encoding="utf-8")


def parse(model: type[Model], text: str) -> Model:
    """Validate the YAML text of a configuration. Raises ConfigError."""
    try:
        content = yaml.safe_load(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"line {mark.line + 1}: " if mark is not None else ""
        raise ConfigError(f"{where}not YAML: {getattr(error, 'problem', None) or error}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"expected keys and values, got {type(content).__name__}")
    try:
        return model.model_validate(content)
    except ValidationError as error:
        raise ConfigError(_first(error)) from error


def _first(error: ValidationError) -> str:
    first, *rest = error.errors(include_url=False)
    key = ".".join(str(part) for part in first["loc"])
    message = {"extra_forbidden": "unknown key", "missing": "missing"}.get(first["type"], first["msg"])
    valued = first["type"] not in ("extra_forbidden", "missing") and not isinstance(first["input"], dict)
    got = f", got {first['input']!r}" if valued else ""
    more = f" (and {len(rest)} more)" if rest else ""
    return f"{key}: {message}{got}{more}" if key else f"{message}{more}"
