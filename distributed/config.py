"""What a regression study consists of, as a validated YAML file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from . import study_file
from .point import Estimator, Kernel, SyntheticProblem
from .study_file import Section

DEFAULT = "regression.yaml"

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NotNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Length = Annotated[int, Field(ge=2)]
# Fits over sizes and bandwidths need more points than they have parameters.
Lengths = Annotated[list[Length], Field(min_length=3)]
Bandwidths = Annotated[list[Positive], Field(min_length=4)]
Replicates = Annotated[int, Field(ge=2)]
Estimators = Annotated[list[Estimator], Field(min_length=1)]


class BandwidthRule(Section):
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


class Convergence(Section):
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


class Tradeoff(Section):
    """Squared bias and variance against the bandwidth, on the smooth problem."""

    estimators: Estimators
    n: Length
    bandwidth: Bandwidths
    ridge: NotNegative
    noise: NotNegative
    replicates: Replicates


class Exponents(Section):
    """Bias against the bandwidth, on the smooth problem without noise, and the exponent fitted to it."""

    where: Literal["interior", "boundary"]
    estimators: list[Literal["softmax", "lla"]] = Field(min_length=1)
    n: Length
    bandwidth: Bandwidths
    ridge: NotNegative
    replicates: Replicates


class Real(Section):
    """Leave-one-out prediction of the values of real attention heads."""

    estimators: Estimators
    layers: Literal["all"] | list[str] = "all"
    heads: Literal["all"] | Annotated[int, Field(ge=1)] | list[int] = "all"
    bandwidth: Positive | None = None
    kernel: Kernel = "dot"
    ridge: NotNegative
    probe_ridge: Positive = 1.0


class RegressionConfig(Section):
    """The whole study; parts that are left out are not run.

    seed: of every random number. resamples: of each bootstrap.
    """

    seed: int = Field(default=0, ge=0)
    resamples: int = Field(default=1000, ge=100)
    convergence: list[Convergence] = Field(default_factory=list)
    tradeoff: Tradeoff | None = None
    exponents: list[Exponents] = Field(default_factory=list)
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
    return parse_config(default_config_text()) if path is None else study_file.load(RegressionConfig, path)


def default_config_text() -> str:
    """The YAML text of the default grid, comments included."""
    return study_file.shipped_text(DEFAULT)


def parse_config(text: str) -> RegressionConfig:
    """Validate the YAML text of a configuration. Raises ConfigError."""
    return study_file.parse(RegressionConfig, text)
