"""A point of a study: everything that decides one row, and nothing about where it runs."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

Estimator = Literal[
    "softmax", "lla", "parallax-solved", "parallax-fitted", "global-ridge", "linear-attention"
]
SyntheticProblem = Literal["linear", "smooth", "piecewise"]
Kernel = Literal["dot", "gaussian"]


class Point(BaseModel):
    """One estimator on one problem at one size.

    experiment: the part of the study that the row belongs to. problem: ``linear``, ``smooth``, ``piecewise``
    or ``kv``. n: keys a sequence. d: head size. bandwidth: kernel width ``h`` in key units,
    ``scale = 1/h**2``. ridge: of the solved probe, in squared key units. probe_ridge: of the fit of ``W_R``.
    noise: standard deviation added to the values. replicates: independent sequences. seed: of the study.
    layer, heads: of the attention file, for ``kv``.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    experiment: str
    problem: Literal["linear", "smooth", "piecewise", "kv"]
    estimator: Estimator
    n: int = Field(ge=2)
    d: int = Field(ge=1)
    bandwidth: float = Field(gt=0, allow_inf_nan=False)
    kernel: Kernel = "gaussian"
    ridge: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    probe_ridge: float = Field(default=1e-3, gt=0, allow_inf_nan=False)
    noise: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    replicates: int = Field(default=1, ge=1)
    seed: int = Field(default=0, ge=0)
    layer: str | None = None
    heads: tuple[int, ...] | None = None

    @property
    def brief(self) -> str:
        """The few words that a progress bar has room for."""
        return f"{self.experiment}, {self.estimator}"

    @property
    def label(self) -> str:
        """The name that progress and errors give the point."""
        where = f" {self.layer}" if self.layer is not None else ""
        return (
            f"{self.experiment}: {self.estimator} on {self.problem}{where}, n={self.n}, d={self.d}, "
            f"bandwidth={self.bandwidth:.4g}, ridge={self.ridge:.3g}, noise={self.noise:.3g}, "
            f"seed={self.seed}"
        )


class PointError(RuntimeError):
    """A point of a study failed; the message names the point and the reason."""
