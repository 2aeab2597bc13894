"""The synthetic regression problems: how keys are drawn, what their values are, where they are asked."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

# The lowest corner of the cube of keys, in every coordinate.
CORNER = 0.5
SEGMENTS = 4


@dataclass(frozen=True)
class Queries:
    """Points at which a function is asked, the same in every replicate.

    x: ``(Q, d)``. truth: ``(Q,)``, the noise-free values. seen: the fraction of the sequence that comes
    before the queries.
    """

    x: np.ndarray
    truth: np.ndarray
    seen: float = 1.0


@dataclass(frozen=True)
class Problem:
    """A distribution of sequences of keys and noise-free values, with queries inside and at the boundary.

    sequence: ``(rng, n) -> (keys (n, d), values (n,))``. interior, boundary: the two sets of queries.
    """

    sequence: Callable[[np.random.Generator, int], tuple[np.ndarray, np.ndarray]]
    interior: Queries
    boundary: Queries


def seed_sequence(seed: int, *identity: object) -> np.random.SeedSequence:
    """The random stream of one identity: it depends on nothing else, neither on order nor on workers.

    seed: of the study. identity: values whose ``repr`` names the stream. Returns a SeedSequence to spawn
    from.
    """
    digest = hashlib.sha256(repr(identity).encode()).digest()
    return np.random.SeedSequence([seed, *np.frombuffer(digest, dtype="<u4").tolist()])


def synthetic_problem(name: str, d: int, seed: int) -> Problem:
    """Build the problem of that name.

    name: ``linear``: the value of key ``k`` is ``u.k``; ``smooth``: it is ``exp(u.x)`` with ``x = k - 1/2``,
    whose first and second derivatives along ``u`` are ``f`` itself. For both ``u = (1, ..., 1) / sqrt(d)``,
    ``x`` is uniform on the unit cube, and the queries are its centre and the centre of the face ``x_1 = 0``;
    no query is the origin of the keys, where estimators without an intercept answer 0 whatever the data.
    ``piecewise``: four segments a sequence, each with keys about its own centre and its own linear map, asked
    when the last segment is complete (interior) and when it has just begun (boundary). d: head size. seed: of
    the study, which draws the centres and the maps.
    Returns a Problem. Raises ValueError for another name.
    Source: Fan and Gijbels, Local Polynomial Modelling (1996), section 3.2, for the first two; the
    non-stationary task of arXiv 2510.01450 for the third.
    """
    if name == "linear":
        return _on_cube(d, lambda k, u: k @ u)
    if name == "smooth":
        return _on_cube(d, lambda k, u: np.exp((k - CORNER) @ u))
    if name == "piecewise":
        return _piecewise(d, np.random.default_rng(seed_sequence(seed, "piecewise", d)))
    raise ValueError(f"name: expected 'linear', 'smooth' or 'piecewise', got {name!r}")


def draw(
    problem: Problem, n: int, noise: float, streams: list[np.random.SeedSequence]
) -> tuple[np.ndarray, np.ndarray]:
    """Draw one noisy sequence a stream.

    n: keys a sequence. noise: standard deviation of what is added to the values. streams: one a replicate.
    Returns keys ``(R, n, 1, d)`` and values ``(R, n, 1, 1)``, float64.
    """
    keys, values = [], []
    for stream in streams:
        rng = np.random.default_rng(stream)
        x, f = problem.sequence(rng, n)
        keys.append(x)
        values.append(f + noise * rng.standard_normal(n) if noise else f)
    return np.stack(keys)[:, :, None, :], np.stack(values)[:, :, None, None]


def _on_cube(d: int, value: Callable[[np.ndarray, np.ndarray], np.ndarray]) -> Problem:
    u = np.full(d, d**-0.5)
    centre, face = np.full((1, d), CORNER + 0.5), np.full((1, d), CORNER + 0.5)
    face[0, 0] = CORNER

    def sequence(rng: np.random.Generator, n: int) -> tuple[np.ndarray, np.ndarray]:
        keys = CORNER + rng.random((n, d))
        return keys, value(keys, u)

    return Problem(sequence, Queries(centre, value(centre, u)), Queries(face, value(face, u)))


def _piecewise(d: int, rng: np.random.Generator) -> Problem:
    directions = rng.standard_normal((SEGMENTS, d))
    centres = directions / np.linalg.norm(directions, axis=1, keepdims=True)
    if d >= SEGMENTS:  # orthogonal centres: no two segments overlap by the luck of the draw
        centres = np.linalg.qr(directions.T)[0].T
    maps = rng.standard_normal((SEGMENTS, d))
    spread = 0.5 / np.sqrt(d)

    def segment_keys(rng: np.random.Generator, segment: np.ndarray) -> np.ndarray:
        return centres[segment] + spread * rng.standard_normal((len(segment), d))

    def sequence(rng: np.random.Generator, n: int) -> tuple[np.ndarray, np.ndarray]:
        segment = np.arange(n) * SEGMENTS // n
        x = segment_keys(rng, segment)
        return x, np.einsum("nd,nd->n", x, maps[segment])

    last = np.full(8, SEGMENTS - 1)
    x = segment_keys(rng, last)
    truth = x @ maps[-1]
    just_begun = (SEGMENTS - 1 + 1 / 16) / SEGMENTS
    return Problem(sequence, Queries(x, truth), Queries(x, truth, seen=just_begun))
