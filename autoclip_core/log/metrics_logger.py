"""Sends a clipper's metrics to TensorBoard, W&B, MLflow or a `ClipLog`.

None of these packages is imported. An object with `add_scalar` is a TensorBoard
writer, one with `record` is a `ClipLog`. A function receives a dict and the step, as
`wandb.log` and `mlflow.log_metrics` do.
"""

import inspect
import math
from collections.abc import Callable, Mapping
from typing import Any

from autoclip_core.checks import check_count, format_error

Metrics = Mapping[str, Any]

Send = Callable[[dict[str, float], int], object]


class MetricsLogger:
    """Sends a clipper's metrics to any number of destinations, on one step in `every`.

    Metrics are read only on logged steps, in one device transfer, regardless of the
    number of destinations. A threshold of +inf, which means that there is none yet, is
    left out except in a `ClipLog`, because a curve cannot show it. A `ClipLog` also
    gets the metrics of the last step, which it reads for the totals of its summary.

    Args:
      places: the destinations: a TensorBoard `SummaryWriter`, `wandb.log` (or a run's
        `log`), `mlflow.log_metrics`, a `ClipLog`, or any function of a dict; a function
        may also take `step=`.
      every: log one step in `every`, >= 1.

    Raises:
      TypeError: a destination is none of these.
      ValueError: there is no destination, or `every` is below 1.

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
                "places must be at least one, got none; pass a SummaryWriter, "
                "wandb.log, mlflow.log_metrics or a ClipLog"
            )
        self._every = check_count("every", every, 1)
        self._senders = [make_sender(place) for place in places]
        self._logs = [place for place in places if hasattr(place, "read_later")]
        self._step = 0

    def __call__(
        self, metrics: Callable[[], Metrics] | Metrics, *, step: int | None = None
    ) -> None:
        """Log one step, if it is one in `every`.

        Args:
          metrics: a clipper's bound method, `clipper.metrics`, which is called only on
            logged steps; or the metrics themselves.
          step: the number of the step, from 0; without it the logger counts the calls.

        >>> send = MetricsLogger(lambda values, step: print(step, values), every=10)
        >>> send({"clip/norm": 1.5}, step=20)
        20 {'clip/norm': 1.5}
        """
        number = self._step if step is None else step
        self._step = number + 1
        if number % self._every:
            for log in self._logs:
                log.read_later(metrics)
            return
        values = metrics() if callable(metrics) else metrics
        numbers = {name: float(value) for name, value in values.items()}
        for send in self._senders:
            send(numbers, number)


def make_sender(place: Any) -> Send:
    """Return the function that sends metrics to a destination."""
    if hasattr(place, "add_scalar"):
        return lambda values, step: add_scalars(place, values, step)
    if hasattr(place, "record"):
        return lambda values, step: place.record(values)
    if not callable(place):
        rule = "a SummaryWriter, a ClipLog or a function of a dict"
        way_out = (
            "for W&B pass wandb.log, for MLflow mlflow.log_metrics, for tf.summary a "
            "function of values and step that calls tf.summary.scalar"
        )
        raise TypeError(format_error("places", rule, place, way_out))
    if accepts_step(place):
        return lambda values, step: place(drop_infinite(values), step=step)
    return lambda values, step: place(drop_infinite(values))


def add_scalars(writer: Any, values: dict[str, float], step: int) -> None:
    """Write each finite or NaN value under its name."""
    for name, value in drop_infinite(values).items():
        writer.add_scalar(name, value, step)


def drop_infinite(values: dict[str, float]) -> dict[str, float]:
    """Return the metrics without infinities; a curve shows NaN as a gap."""
    return {name: value for name, value in values.items() if not math.isinf(value)}


def accepts_step(function: Any) -> bool:
    """Return whether a function has an argument `step`; False if unknown (builtins)."""
    try:
        names = inspect.signature(function).parameters
    except (TypeError, ValueError):
        return False
    return "step" in names
