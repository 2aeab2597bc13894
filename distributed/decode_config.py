"""What a decode study consists of, and the points that it lists."""

from __future__ import annotations

from itertools import product
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from . import study_file
from .decode_point import Cache, DecodePoint, Dtype, Operation, PageSize, Shape, check_heads
from .peer_name import PeerName
from .study_file import Section

DEFAULT = "decode.yaml"


def _checked(shape: Shape) -> Shape:
    check_heads(shape)
    return shape


class Grid(Section):
    """Every combination of what it lists. shapes: ``[batch, query heads, key heads, length, head size]``."""

    operations: Annotated[list[Operation], Field(min_length=1)]
    dtypes: Annotated[list[Dtype], Field(min_length=1)]
    shapes: Annotated[list[Annotated[Shape, AfterValidator(_checked)]], Field(min_length=1)]
    page_sizes: Annotated[list[PageSize | None], Field(min_length=1)] = Field(default=[None])
    caches: Annotated[list[Cache], Field(min_length=1)] = Field(default=["cold", "warm"])
    ridge: float = Field(default=0.1, gt=0, allow_inf_nan=False)


class DecodeConfig(Section):
    """The whole study.

    seed: of every random number. rounds: turns of every competitor, fewer where they would take longer than
    ``seconds``. rotation: MiB that a cold cache is rotated through. host_cost: also time, on a GPU and with
    warm caches, the call from Python to the launch. peers: the libraries that are timed beside, of those that
    the device has. fa3: path of vLLM's FlashAttention-3 library. gpu, cpu: the grids of the two devices.
    """

    seed: int = Field(default=0, ge=0)
    rounds: int = Field(default=20, ge=3)
    seconds: float = Field(default=2.0, gt=0, allow_inf_nan=False)
    rotation: int = Field(default=512, ge=1)
    host_cost: bool = True
    peers: list[PeerName] = Field(default=list(PeerName))
    fa3: str | None = None
    gpu: list[Grid] = Field(default_factory=list)
    cpu: list[Grid] = Field(default_factory=list)


def decode_points(config: DecodeConfig, device: Literal["gpu", "cpu"]) -> list[DecodePoint]:
    """List the points of a study, in the order of its rows.

    config: the study. device: whose grid. Returns the points. Raises ValueError where that grid is empty.
    """
    grids: list[Grid] = getattr(config, device)
    if not grids:
        raise ValueError(f"{device}: expected a grid for the device that is measured, got none")
    return [
        DecodePoint(
            operation=operation,
            shape=shape,
            dtype=dtype,
            page_size=page_size,
            cache=cache,
            ridge=grid.ridge,
            seed=config.seed,
        )
        for grid in grids
        for operation, dtype, page_size, shape, cache in product(
            grid.operations, grid.dtypes, grid.page_sizes, grid.shapes, grid.caches
        )
    ]


def load_decode_config(path: str | Path | None = None) -> DecodeConfig:
    """Read and validate a study's configuration.

    path: a YAML file; the default grids, which ship with the package, if None. Returns a DecodeConfig.
    Raises FileNotFoundError, or ConfigError with one line that names the first key at fault.
    """
    if path is None:
        return study_file.parse(DecodeConfig, study_file.shipped_text(DEFAULT))
    return study_file.load(DecodeConfig, path)
