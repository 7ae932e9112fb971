"""A clipper's metrics to TensorBoard, W&B, MLflow or a `ClipLog`, every so many steps.

Nothing of theirs is imported: what has `add_scalar` is a TensorBoard writer, what has
`record` is a log of ours, and a function takes a dict and the step, as `wandb.log` and
`mlflow.log_metrics` do.
"""

import inspect
import math
from collections.abc import Callable, Mapping
from typing import Any

from autoclip_core.checks import check_count, format_error

Metrics = Mapping[str, Any]

Send = Callable[[dict[str, float], int], object]


class MetricsLogger:
    """Sends a clipper's metrics to any number of places, once in so many steps.

    In between it does not even ask for them: on an accelerator a step that is not
    logged costs no transfer, and one that is costs one, however many places there are.
    A threshold that does not exist yet (+inf) is left out, because no curve shows it.

    Args:
      places: where to: a TensorBoard `SummaryWriter`, `wandb.log` (or a run's `log`),
        `mlflow.log_metrics`, a `ClipLog`, or any function of a dict, which may take
        `step=`.
      every: log one step in so many, >= 1.

    Raises:
      TypeError: a place is none of these.
      ValueError: there is no place, or `every` is below 1.

    >>> from autoclip_core import MetricsLogger
    >>> send = MetricsLogger(lambda values, step: print(step, values), every=2)
    >>> for step in range(3):
    ...     send(lambda: {"clip/norm": 1.5, "clip/threshold": float("inf")})
    0 {'clip/norm': 1.5}
    2 {'clip/norm': 1.5}
    """

    def __init__(self, *places: Any, every: int = 50) -> None:
        if not places:
            raise ValueError(
                "places must be at least one, got none; give a SummaryWriter, "
                "wandb.log, mlflow.log_metrics or a ClipLog"
            )
        self._every = check_count("every", every, 1)
        self._send = [sender(place) for place in places]
        self._step = 0

    def __call__(
        self, metrics: Callable[[], Metrics] | Metrics, *, step: int | None = None
    ) -> None:
        """Take one step.

        Args:
          metrics: a clipper's bound method, `clipper.metrics`, which is called only on
            a step that is logged; or the metrics themselves.
          step: the number of the step, from 0; counted here if not given.

        >>> send = MetricsLogger(lambda values, step: print(step, values), every=10)
        >>> send({"clip/norm": 1.5}, step=20)
        20 {'clip/norm': 1.5}
        """
        number = self._step if step is None else step
        self._step = number + 1
        if number % self._every:
            return
        values = metrics() if callable(metrics) else metrics
        plain = {name: float(value) for name, value in values.items()}
        for send in self._send:
            send(plain, number)


def sender(place: Any) -> Send:
    """Return how metrics go to a place."""
    if hasattr(place, "add_scalar"):
        return lambda values, step: add_scalars(place, values, step)
    if hasattr(place, "record"):
        return lambda values, step: place.record(values)
    if not callable(place):
        rule = "a SummaryWriter, a ClipLog or a function of a dict"
        way_out = "for W&B give wandb.log, for MLflow mlflow.log_metrics"
        raise TypeError(format_error("places", rule, place, way_out))
    if takes_step(place):
        return lambda values, step: place(shown(values), step=step)
    return lambda values, step: place(shown(values))


def add_scalars(writer: Any, values: dict[str, float], step: int) -> None:
    """Write each number under its name."""
    for name, value in shown(values).items():
        writer.add_scalar(name, value, step)


def shown(values: dict[str, float]) -> dict[str, float]:
    """Return what a curve can show: a NaN norm is a gap, an infinity is left out."""
    return {name: value for name, value in values.items() if not math.isinf(value)}


def takes_step(function: Any) -> bool:
    """Return whether a function has an argument `step`; builtins may not tell."""
    try:
        names = inspect.signature(function).parameters
    except (TypeError, ValueError):
        return False
    return "step" in names
