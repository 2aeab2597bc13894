"""Where the points of a study are evaluated: in this process, or by actors of a Ray cluster."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from parallax_core.data import AttentionSample

from .point import Point, PointError

Row = dict[str, object]
Evaluate = Callable[[Point, AttentionSample | None], Row]

# Ray restarts a lost actor and runs its point again; a point that raises is not run again.
MAX_RESTARTS = 2


def run_local(
    evaluate: Evaluate, points: Sequence[Point], sample: AttentionSample | None
) -> Iterator[tuple[int, Row]]:
    """Evaluate points one after another in this process.

    evaluate: the study's function. points: what to evaluate. sample: passed on to it.
    Yields ``(index, row)``. Raises PointError.
    """
    for index, point in enumerate(points):
        yield index, evaluate(point, sample)


def run_ray(
    evaluate: Evaluate,
    points: Sequence[Point],
    sample: AttentionSample | None,
    workers: int | None = None,
) -> Iterator[tuple[int, Row]]:
    """Evaluate points on actors, each with one CPU, of the cluster that RAY_ADDRESS names or of an own one.

    evaluate: the study's function, importable on the workers. points: what to evaluate; the costly ones are
    best put first. sample: sent to the workers once. workers: actors, one a CPU of the cluster if None.
    Yields ``(index, row)`` as they come. Raises PointError, also when a worker dies for good.
    """
    import ray

    with _cluster(workers):
        cpus = int(ray.cluster_resources().get("CPU", 0))
        if (workers or 1) > cpus:
            raise ValueError(f"workers: expected at most the {cpus} CPUs of the cluster, got {workers or 1}")
        evaluator = ray.remote(num_cpus=1, max_restarts=MAX_RESTARTS, max_task_retries=MAX_RESTARTS)(
            _Evaluator
        )
        # An argument of each call, not of the actor: a restarted actor could not get its own back.
        sample_ref = ray.put(sample)
        idle = [evaluator.remote(evaluate) for _ in range(min(workers or cpus, len(points)))]
        waiting = iter(enumerate(points))
        running = {}
        while True:
            while idle and (task := next(waiting, None)) is not None:
                actor = idle.pop()
                running[actor.evaluate.remote(task[1], sample_ref)] = (actor, *task)
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

    def evaluate(self, point: Point, sample: AttentionSample | None) -> Row:
        return self._evaluate(point, sample)


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
