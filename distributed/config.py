"""What a regression study consists of, as a validated YAML file."""

from __future__ import annotations

import importlib.resources
from pathlib import Path
from typing import Annotated, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from .point import Estimator, Kernel, SyntheticProblem

DEFAULT = "regression.yaml"

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NotNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Length = Annotated[int, Field(ge=2)]
# Fits over sizes and bandwidths need more points than they have parameters.
Lengths = Annotated[list[Length], Field(min_length=3)]
Bandwidths = Annotated[list[Positive], Field(min_length=4)]
Replicates = Annotated[int, Field(ge=2)]
Estimators = Annotated[list[Estimator], Field(min_length=1)]


class ConfigError(ValueError):
    """A study's configuration is not valid; the message is one line that names the key."""


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class BandwidthRule(_Section):
    """``h = constant * n**-rate``; a plain number is a bandwidth that stays."""

    constant: Positive
    rate: NotNegative = 0.0

    @model_validator(mode="before")
    @classmethod
    def _number(cls, value: object) -> object:
        return {"constant": value} if isinstance(value, int | float | str) else value

    def at(self, n: int) -> float:
        """The bandwidth for ``n`` keys."""
        return self.constant * n**-self.rate


class Convergence(_Section):
    """Error against the number of keys, with noise, at a bandwidth that follows a rule."""

    problem: SyntheticProblem
    estimators: Estimators
    n: Lengths
    d: int = Field(default=1, ge=1)
    bandwidth: BandwidthRule
    kernel: Kernel = "gaussian"
    ridge: NotNegative
    probe_ridge: Positive = 1e-3
    noise: NotNegative
    replicates: Replicates


class Tradeoff(_Section):
    """Squared bias and variance against the bandwidth, on the smooth problem."""

    estimators: Estimators
    n: Length
    bandwidth: Bandwidths
    ridge: NotNegative
    noise: NotNegative
    replicates: Replicates


class Exponents(_Section):
    """Bias against the bandwidth, on the smooth problem without noise, and the exponent fitted to it."""

    where: Literal["interior", "boundary"]
    estimators: list[Literal["softmax", "lla"]] = Field(min_length=1)
    n: Length
    bandwidth: Bandwidths
    ridge: NotNegative
    replicates: Replicates


class Real(_Section):
    """Leave-one-out prediction of the values of real attention heads."""

    estimators: Estimators
    layers: Literal["all"] | list[str] = "all"
    heads: Literal["all"] | Annotated[int, Field(ge=1)] | list[int] = "all"
    bandwidth: Positive | None = None
    kernel: Kernel = "dot"
    ridge: NotNegative
    probe_ridge: Positive = 1.0


class RegressionConfig(_Section):
    """The whole study; parts that are left out are not run.

    seed: of every random number. resamples: of each bootstrap.
    """

    seed: int = Field(default=0, ge=0)
    resamples: int = Field(default=1000, ge=100)
    convergence: list[Convergence] = []
    tradeoff: Tradeoff | None = None
    exponents: list[Exponents] = []
    real: Real | None = None

    @model_validator(mode="after")
    def _not_empty(self) -> RegressionConfig:
        if not (self.convergence or self.tradeoff or self.exponents or self.real):
            raise ValueError("expected at least one of convergence, tradeoff, exponents, real")
        return self


def load_config(path: str | Path | None = None) -> RegressionConfig:
    """Read and validate a study's configuration.

    path: a YAML file; the default grid, which ships with the package, if None. Returns a RegressionConfig.
    Raises FileNotFoundError, or ConfigError with one line that names the first key at fault.
    """
    if path is None:
        return parse_config(default_config_text())
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no file {path}")
    return parse_config(path.read_text(encoding="utf-8"))


def default_config_text() -> str:
    """The YAML text of the default grid, comments included."""
    return (importlib.resources.files(__package__) / "configs" / DEFAULT).read_text(encoding="utf-8")


def parse_config(text: str) -> RegressionConfig:
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
        return RegressionConfig.model_validate(content)
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
