"""Queries, keys and values of real attention heads, from safetensors files and the sample shipped here."""

from __future__ import annotations

import importlib.resources
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

SAMPLE = "minilm_qkv_sample.safetensors"


class Heads(NamedTuple):
    """Some heads of one layer, float64.

    q: ``(B, L, Hq, D)``. k: ``(B, L, Hkv, D)``. v: ``(B, L, Hkv, Dv)``. numbers: of the key heads, as the
    model counts them.
    """

    q: np.ndarray
    k: np.ndarray
    v: np.ndarray
    numbers: tuple[int, ...]


@dataclass(frozen=True)
class AttentionSample:
    """The attention heads of a file.

    layers: by name, ``q``, ``k`` and ``v`` as the file stores them. heads: the number of each key head in its
    model. metadata: of the file. source: what to call the file.
    """

    layers: dict[str, tuple[np.ndarray, np.ndarray, np.ndarray]]
    heads: tuple[int, ...]
    metadata: dict[str, str]
    source: str

    def select(self, layer: str, heads: tuple[int, ...] | None = None) -> Heads:
        """Take some key heads of a layer, with the query heads that they serve.

        layer: a name in ``layers``. heads: numbers in ``self.heads``, all of them if None.
        Returns Heads. Raises ValueError for a layer or a head that the file lacks.
        """
        if layer not in self.layers:
            raise ValueError(f"layer: {self.source} has {', '.join(self.layers)}, got {layer!r}")
        heads = self.heads if heads is None else tuple(heads)
        missing = [head for head in heads if head not in self.heads]
        if missing:
            have = ", ".join(map(str, self.heads))
            raise ValueError(f"heads: {self.source} has heads {have}, got {', '.join(map(str, missing))}")
        q, k, v = (array.astype(np.float64) for array in self.layers[layer])
        group = q.shape[2] // k.shape[2]
        index = [self.heads.index(head) for head in heads]
        of_queries = [group * i + j for i in index for j in range(group)]
        return Heads(q[:, :, of_queries], k[:, :, index], v[:, :, index], heads)

    def spread(self, count: int) -> tuple[int, ...]:
        """At most ``count`` head numbers, evenly spaced over the heads of the file."""
        step = max(1, len(self.heads) // count)
        return self.heads[::step][:count]


def load_sample() -> AttentionSample:
    """Read the sample that the package ships: two layers of a sentence encoder on four English documents.

    Returns an AttentionSample with ``layer0`` and ``layer5``, each ``(4, 256, 4, 32)`` float16, heads 0, 3,
    6, 9.
    """
    with importlib.resources.as_file(importlib.resources.files(__name__) / SAMPLE) as path:
        return load(path)


def load(path: str | Path) -> AttentionSample:
    """Read the attention heads of a safetensors file.

    path: a file with tensors ``q``, ``k``, ``v`` or, for each of its layers, ``NAME.q``, ``NAME.k``,
    ``NAME.v``, of shape ``(B, L, H, D)`` and a floating dtype; the metadata entry ``heads`` may number the
    key heads.
    Returns an AttentionSample.
    Raises FileNotFoundError, or ValueError if the file is no safetensors file or lacks such tensors.
    """
    from safetensors import SafetensorError, safe_open

    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no file {path}")
    try:
        with safe_open(path, framework="numpy") as file:
            metadata = dict(file.metadata() or {})
            names = sorted(file.keys())
            prefixes = dict.fromkeys(name[:-1] for name in names if _is_part(name))
            missing = [prefix + part for prefix in prefixes for part in "qkv" if prefix + part not in names]
            if missing or not prefixes:
                raise ValueError(
                    f"{path} lacks {', '.join(missing) or 'tensors q, k, v or NAME.q, NAME.k, NAME.v'}; "
                    f"it has {', '.join(names) or 'none'}"
                )
            layers = {
                prefix.rstrip(".") or "qkv": tuple(file.get_tensor(prefix + part) for part in "qkv")
                for prefix in prefixes
            }
    except SafetensorError as error:
        raise ValueError(f"{path} is not a safetensors file: {error}") from error
    for layer, (q, k, v) in layers.items():
        _validate(path, layer, q, k, v)
    return AttentionSample(layers, _head_numbers(path, metadata, layers), metadata, path.name)


def _is_part(name: str) -> bool:
    return name[-1:] in ("q", "k", "v") and name[-2:-1] in ("", ".")


def _validate(path: Path, layer: str, q: np.ndarray, k: np.ndarray, v: np.ndarray) -> None:
    for name, array in (("q", q), ("k", k), ("v", v)):
        if array.ndim != 4 or 0 in array.shape:
            raise ValueError(f"{path}: {layer}.{name}: expected shape (B, L, H, D), got {array.shape}")
        if not np.isfinite(array).all():
            raise ValueError(f"{path}: {layer}.{name}: expected finite numbers, got NaN or Inf")
    if k.shape[:3] != v.shape[:3]:
        raise ValueError(
            f"{path}: {layer}.v: expected shape {(*k.shape[:3], 'Dv')} to match k, got {v.shape}"
        )
    if q.shape[:2] != k.shape[:2] or q.shape[3] != k.shape[3] or q.shape[2] % k.shape[2]:
        raise ValueError(
            f"{path}: {layer}.q: expected the batch, length and head size of k {k.shape} and a multiple "
            f"of its heads, got {q.shape}"
        )


def _head_numbers(path: Path, metadata: dict[str, str], layers: dict) -> tuple[int, ...]:
    counts = {k.shape[2] for _, k, _ in layers.values()}
    if len(counts) > 1:
        raise ValueError(
            f"{path}: expected the same number of key heads in every layer, got {sorted(counts)}"
        )
    (count,) = counts
    if "heads" not in metadata:
        return tuple(range(count))
    try:
        numbers = tuple(int(number) for number in metadata["heads"].split(","))
    except ValueError:
        numbers = ()
    if len(set(numbers)) != count:
        raise ValueError(
            f"{path}: metadata heads: expected {count} distinct numbers separated by commas, "
            f"got {metadata['heads']!r}"
        )
    return numbers
