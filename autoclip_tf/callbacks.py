"""Add the clip statistics to the logs and the history of `fit`."""

import warnings
from collections.abc import Sequence
from typing import Any

import keras

from autoclip_core.checks import format_error
from autoclip_core.clipper.metrics import name_update_metrics

from .find_clippers import AnyClipper, clippers_of
from .policy_clipper import PolicyClipper
from .state.transformer import split_pairs

NAMES = ("clip/norm", "clip/threshold", "clip/clip_rate", "clip/nonfinite_total")
"""The metrics that are logged; `Clipper.metrics` documents all metrics. Those of an
`UpdateClipper` are `UPDATE_NAMES`."""

UPDATE_NAMES = tuple(name_update_metrics(dict.fromkeys(NAMES, 0.0)))
"""The same of the updates."""


def _has_batch_hooks() -> bool:
    """Return False: tf_keras asks whether a callback acts in each batch."""
    return False


class ClipLogger(keras.callbacks.Callback):  # type: ignore[misc]
    """Put the clippers' metrics into the logs of each epoch, with one read per epoch.

    They reach `History`, and each callback that is listed after this one, such as
    `CSVLogger` and `TensorBoard`. Norm and threshold belong to the epoch's last
    step; clip rate and count begin at the first step of the run, not of the epoch.
    Several clippers of gradients are numbered `clip/0/norm`, `clip/1/norm` in the order
    of `clippers_of(model)`. The metrics of updates are `clip/update_norm` and so on.
    With several rows, `clip/update_norm` is the norm of all as one row: in `TrustClip`,
    the root mean square of all elements. It works in the `fit` of Keras 3 and of
    tf_keras. A clipper that took no step in an epoch is a `RuntimeWarning`.

    Args:
      clippers: a clipper, or a list of clippers, in the order of their numbers; by
        default `clippers_of(model)`: those of the model's own optimizers.

    Raises:
      TypeError: a value in `clippers` is not a clipper.
      ValueError: `clippers` is empty; or the model has no clipper when training begins.

    >>> import numpy as np
    >>> from autoclip_tf import QuantileClip
    >>> from autoclip_tf.optimizers import SGD
    >>> model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])
    >>> model.compile(SGD(0.1, gradient_transformers=[QuantileClip(0.9)]), loss="mse")
    >>> x, y = np.ones((8, 2)), np.ones((8, 1))
    >>> history = model.fit(x, y, verbose=0, callbacks=[ClipLogger()]).history
    >>> sorted(history)
    ['clip/clip_rate', 'clip/nonfinite_total', 'clip/norm', 'clip/threshold', 'loss']
    """

    _implements_train_batch_hooks = staticmethod(_has_batch_hooks)
    _implements_test_batch_hooks = staticmethod(_has_batch_hooks)
    _implements_predict_batch_hooks = staticmethod(_has_batch_hooks)

    def __init__(self, clippers: AnyClipper | Sequence[AnyClipper] | None = None):
        super().__init__()
        self._given = None if clippers is None else _check_clippers(clippers)
        self._clippers: list[PolicyClipper] = []
        self._steps: dict[PolicyClipper, float] = {}

    def on_train_begin(self, logs: Any = None) -> None:
        """Find the clippers of the model, unless they were given.

        Raises:
          ValueError: the model has no clipper.
        """
        clippers = clippers_of(self.model) if self._given is None else self._given
        if not clippers:
            optimizer = type(self.model.optimizer).__name__
            raise ValueError(
                f"ClipLogger needs a model with a clipper, got one with the optimizer "
                f"{optimizer} and without a clipper in it or in its attributes; write "
                "autoclip_tf.optimizers.Adam(gradient_transformers=[QuantileClip()]), "
                "or ClipLogger(clippers)"
            )
        self._clippers = list(split_pairs(clippers))
        self._steps = {
            each: _get_steps(each.metrics()) for each in self._clippers if each.built
        }

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        """Add the metrics to the logs, which the next callbacks receive."""
        if logs is None:
            return
        steps: dict[PolicyClipper, float] = {}
        for names, clips_update in ((NAMES, False), (UPDATE_NAMES, True)):
            clippers = [c for c in self._clippers if c.clips_update == clips_update]
            for index, clipper in enumerate(clippers):
                number = f"{index}/" if len(clippers) > 1 else ""
                metrics = clipper.metrics()
                steps[clipper] = _get_steps(metrics)
                for name in names:
                    logs[name.replace("/", f"/{number}", 1)] = metrics[name]
        self._warn_if_idle(steps)
        self._steps = steps

    def _warn_if_idle(self, steps: dict[PolicyClipper, float]) -> None:
        """Warn if a clipper took no step since the last epoch."""
        for clipper, count in steps.items():
            if count == self._steps.get(clipper, 0.0):
                warnings.warn(
                    f"{clipper.class_name} took no step in this epoch, so its "
                    f"logged norm is an old one, after {count:.0f} steps; was the "
                    "model compiled with another optimizer, does its train_step not "
                    "call optimizer.apply(gradients, variables), or does a loss scale "
                    "skip every update because no gradient is finite?",
                    RuntimeWarning,
                    stacklevel=3,
                )
                return


def _get_steps(metrics: dict[str, float]) -> float:
    """Return the number of steps that a clipper has taken."""
    return metrics.get("clip/update_steps", metrics.get("clip/steps", 0.0))


def _check_clippers(clippers: Any) -> list[AnyClipper]:
    """Return the clippers as a list.

    Raises:
      TypeError: a value is not a clipper.
      ValueError: there is no clipper.
    """
    values = list(clippers) if isinstance(clippers, Sequence) else [clippers]
    for value in values:
        if not isinstance(value, AnyClipper):
            rule, way_out = "a clipper of autoclip_tf, or a list", "see clippers_of"
            raise TypeError(format_error("clippers", rule, value, way_out))
    if not values:
        way_out = "leave it out to find those of the model"
        raise ValueError(format_error("clippers", "at least one", values, way_out))
    return values
