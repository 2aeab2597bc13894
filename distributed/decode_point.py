"""A point of the decode study: one operation on one cache, and nothing about what measures it."""

from __future__ import annotations

from typing import Annotated, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, model_validator

Operation = Literal["parallax", "softmax", "lla"]
Dtype = Literal["bfloat16", "float16", "float32"]
Cache = Literal["warm", "cold"]
PageSize = Annotated[int, Field(ge=16, le=256)]

ITEMSIZE = {"bfloat16": 2, "float16": 2, "float32": 4}


class Shape(NamedTuple):
    """Sizes of a decode call, in the order in which a grid lists them."""

    batch: Annotated[int, Field(ge=1)]
    query_heads: Annotated[int, Field(ge=1)]
    kv_heads: Annotated[int, Field(ge=1)]
    length: Annotated[int, Field(ge=1)]
    head_size: Annotated[int, Field(ge=1, le=256)]


class DecodePoint(BaseModel):
    """One new token a sequence against its cache, on one device.

    operation: what is computed. shape: sizes. dtype: of queries, probe, keys and values. page_size: positions
    a page, None for a cache without pages. cache: ``warm``, the same keys and values in every call, or
    ``cold``, rotated through more memory than the device's own caches hold. ridge: of LLA. seed: of the
    study.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    operation: Operation
    shape: Shape
    dtype: Dtype
    page_size: PageSize | None = None
    cache: Cache
    ridge: float = Field(default=0.1, gt=0, allow_inf_nan=False)
    seed: int = Field(default=0, ge=0)

    @model_validator(mode="after")
    def _whole_groups(self) -> DecodePoint:
        check_heads(self.shape)
        return self

    @property
    def cache_bytes(self) -> int:
        """Bytes of the keys and values that a call reads."""
        s = self.shape
        return 2 * s.batch * s.length * s.kv_heads * s.head_size * ITEMSIZE[self.dtype]

    @property
    def bytes_read(self) -> int:
        """Bytes that a call has to read: keys, values, queries, probe and the table of pages (int32)."""
        s = self.shape
        rows = s.batch * s.query_heads * s.head_size * ITEMSIZE[self.dtype]
        pages = 0 if self.page_size is None else 4 * s.batch * -(-s.length // self.page_size)
        return self.cache_bytes + rows * (2 if self.operation == "parallax" else 1) + pages

    @property
    def brief(self) -> str:
        """The few words that a progress bar has room for."""
        return f"{self.operation} {'x'.join(map(str, self.shape))} {self.cache}"

    @property
    def label(self) -> str:
        """The name that progress and errors give the point."""
        sizes = ", ".join(f"{name}={size}" for name, size in self.shape._asdict().items())
        pages = f", page_size={self.page_size}" if self.page_size else ""
        return f"decode: {self.operation}, {sizes}, {self.dtype}{pages}, {self.cache} cache"


def check_heads(shape: Shape) -> None:
    """Raise ValueError unless every key head has the same number of query heads."""
    if shape.query_heads % shape.kv_heads:
        raise ValueError(
            "expected query heads in a multiple of the key heads, "
            f"got {shape.query_heads} and {shape.kv_heads}"
        )
