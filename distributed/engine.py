"""Where the points of a study are evaluated: in this process, or by actors of a Ray cluster."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple, Protocol

from .point import PointError

Row = dict[str, object]


class StudyPoint(Protocol):
    """What an engine knows of a point. label: its name in errors. brief: its name in progress."""

    @property
    def label(self) -> str: ...

    @property
    def brief(self) -> str: ...


# A study's function: a point and what all points of the study share.
Evaluate = Callable[[Any, Any], Row]


class Share(NamedTuple):
    """What one Ray actor takes of a cluster. cpus: None for all of a node. gpus: whole ones."""

    cpus: int | None
    gpus: int = 0


ONE_CPU = Share(cpus=1)

# Ray restarts a lost actor and runs its point again; a point that raises is not run again.
MAX_RESTARTS = 2


def check_engine(engine: str, workers: int | None) -> None:
    """Raise ValueError for an engine that there is not, or for workers that it does not have."""
    if engine not in ("ray", "local"):
        raise ValueError(f"engine: expected 'ray' or 'local', got {engine!r}")
    if workers is not None and (engine == "local" or workers < 1):
        raise ValueError(
            f"workers: expected a positive number and the engine 'ray', got {workers} and {engine!r}"
        )


def run(
    evaluate: Evaluate,
    points: Sequence[StudyPoint],
    shared: object = None,
    *,
    engine: Literal["ray", "local"] = "local",
    workers: int | None = None,
    share: Share = ONE_CPU,
    progress: Callable[[int, int, StudyPoint], None] | None = None,
) -> list[Row]:
    """Evaluate the points of a study.

    evaluate: the study's function. points: what to evaluate. shared: its second argument. engine: ``local``,
    this process, or ``ray``. workers, share: Ray actors, as many as the cluster has room for if None, and
    what each of them takes. progress: called with the number of points done, of all points, and the point
    just done.
    Returns a row a point, in the order of the points. Raises PointError for the first point that fails,
    ValueError for a cluster without room for the workers.
    """
    if engine == "local":
        results = run_local(evaluate, points, shared)
    else:
        results = run_ray(evaluate, points, shared, workers, share)
    rows: list[Row] = [{} for _ in points]
    for done, (index, row) in enumerate(results, 1):
        rows[index] = row
        if progress is not None:
            progress(done, len(points), points[index])
    return rows


def run_local(evaluate: Evaluate, points: Sequence[StudyPoint], shared: object) -> Iterator[tuple[int, Row]]:
    """Evaluate points one after another in this process.

    evaluate: the study's function. points: what to evaluate. shared: passed on to it.
    Yields ``(index, row)``. Raises PointError.
    """
    for index, point in enumerate(points):
        yield index, evaluate(point, shared)


def run_ray(
    evaluate: Evaluate,
    points: Sequence[StudyPoint],
    shared: object,
    workers: int | None = None,
    share: Share = ONE_CPU,
) -> Iterator[tuple[int, Row]]:
    """Evaluate points on actors of the cluster that RAY_ADDRESS names or of an own one.

    evaluate: the study's function, importable on the workers. points: what to evaluate; the costly ones are
    best put first. shared: sent to the workers once. workers: actors, as many as there is room for if None.
    share: what each of them takes.
    Yields ``(index, row)`` as they come. Raises PointError, also when a worker dies for good, and ValueError
    for a cluster without room for the workers.
    """
    import ray

    # A cluster of our own has as many CPUs as its workers need.
    with _cluster(workers if share == ONE_CPU else None):
        cpus, room, what = _room(share)
        if (workers or 1) > room:
            raise ValueError(
                f"workers: expected at most the {room} {what} of the cluster, got {workers or 1}"
            )
        evaluator = ray.remote(
            num_cpus=cpus, num_gpus=share.gpus, max_restarts=MAX_RESTARTS, max_task_retries=MAX_RESTARTS
        )(_Evaluator)
        # An argument of each call, not of the actor: a restarted actor could not get its own back.
        shared_ref = ray.put(shared)
        idle = [evaluator.remote(evaluate) for _ in range(min(workers or room, len(points)))]
        waiting = iter(enumerate(points))
        running = {}
        while True:
            while idle and (task := next(waiting, None)) is not None:
                actor = idle.pop()
                running[actor.evaluate.remote(task[1], shared_ref)] = (actor, *task)
            if not running:
                return
            (done,), _ = ray.wait(list(running), num_returns=1)
            actor, index, point = running.pop(done)
            try:
                row = ray.get(done)
            except ray.exceptions.RayTaskError as error:
                raise error.as_instanceof_cause() from None
            except ray.exceptions.RayActorError as error:
                raise PointError(f"{point.label}: its worker died: {error}") from error
            idle.append(actor)
            yield index, row


class _Evaluator:
    def __init__(self, evaluate: Evaluate) -> None:
        self._evaluate = evaluate

    def evaluate(self, point: StudyPoint, shared: object) -> Row:
        return self._evaluate(point, shared)


def _room(share: Share) -> tuple[int, int, str]:
    """CPUs of one actor, how many actors the cluster has room for, and what limits them."""
    import ray

    if share.gpus:
        return share.cpus or 1, int(ray.cluster_resources().get("GPU", 0)) // share.gpus, "GPUs"
    nodes = [int(node["Resources"].get("CPU", 0)) for node in ray.nodes() if node["Alive"]]
    if share.cpus is None:
        largest = max(nodes)
        return largest, nodes.count(largest) if largest else 0, "largest nodes"
    return share.cpus, sum(nodes) // share.cpus, "CPUs"


@contextmanager
def _cluster(workers: int | None) -> Iterator[None]:
    import ray

    if ray.is_initialized():  # the caller's connection, which is not ours to close
        yield
        return
    quiet = {"log_to_driver": False, "logging_level": logging.ERROR}
    if os.environ.get("RAY_ADDRESS"):
        ray.init(**quiet)
    else:
        # Ray's own reports of its use, which nobody asked this cluster for.
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        ray.init(address="local", num_cpus=workers, include_dashboard=False, **quiet)
    try:
        yield
    finally:
        ray.shutdown()
