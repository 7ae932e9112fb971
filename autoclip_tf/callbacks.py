"""Add the clip statistics to the logs and the history of `fit`."""

from collections.abc import Iterator
from typing import Any

import keras

from autoclip_core.clipper.metrics import name_update_metrics

from .policy_clipper import PolicyClipper
from .state.transformer import split_pairs

NAMES = ("clip/norm", "clip/threshold", "clip/clip_rate", "clip/nonfinite_total")
"""The metrics that are logged; `Clipper.metrics` documents all metrics. Those of an
`UpdateClipper` are `UPDATE_NAMES`."""

UPDATE_NAMES = tuple(name_update_metrics(dict.fromkeys(NAMES, 0.0)))
"""The same of the updates."""


class ClipLogger(keras.callbacks.Callback):  # type: ignore[misc]
    """Put the clipper's metrics into the logs of each epoch, with one read per epoch.

    They reach `History`, and each callback that is listed after this one, such as
    `CSVLogger` and `TensorBoard`. Norm and threshold belong to the epoch's last
    step; clip rate and count belong to the whole run. Several clippers of gradients are
    numbered `clip/0/norm`, `clip/1/norm` in the order of the optimizer. The metrics of
    updates are `clip/update_norm` and so on. This is a callback of Keras 3. In
    tf_keras, write `LambdaCallback(on_epoch_end=lambda epoch, logs:
    logs.update(clipper.metrics()))`.

    Raises:
      ValueError: the optimizer has no clipper when training begins.

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

    def on_train_begin(self, logs: Any = None) -> None:
        """Find the clippers of the optimizer.

        Raises:
          ValueError: the optimizer has no clipper.
        """
        self._clippers = list(clippers_of(self.model.optimizer))
        if not self._clippers:
            raise ValueError(
                "ClipLogger needs an optimizer with a clipper, got "
                f"{type(self.model.optimizer).__name__} without one; write "
                "autoclip_tf.optimizers.Adam(gradient_transformers=[QuantileClip()])"
            )

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        """Add the metrics to the logs, which the next callbacks receive."""
        if logs is None:
            return
        clippers = self._clippers
        for names, group in (
            (NAMES, [each for each in clippers if not each.clips_update]),
            (UPDATE_NAMES, [each for each in clippers if each.clips_update]),
        ):
            for index, clipper in enumerate(group):
                number = f"{index}/" if len(group) > 1 else ""
                metrics = clipper.metrics()
                for name in names:
                    logs[name.replace("/", f"/{number}", 1)] = metrics[name]


def clippers_of(optimizer: Any) -> Iterator[PolicyClipper]:
    """Yield the clippers of an optimizer and of the optimizers that it wraps.

    In place of a `TrustClip`, its two halves are yielded.

    Args:
      optimizer: the optimizer of a compiled model, or None.

    >>> from autoclip_tf import NormClip
    >>> optimizer = NormClip(2.0).as_optimizer(keras.optimizers.SGD(0.1))
    >>> list(clippers_of(keras.optimizers.LossScaleOptimizer(optimizer)))
    [NormClip(max_norm=2.0, scope='global')]
    """
    if optimizer is None:
        return
    for transformer in split_pairs(getattr(optimizer, "gradient_transformers", ())):
        if isinstance(transformer, PolicyClipper):
            yield transformer
    yield from clippers_of(getattr(optimizer, "inner_optimizer", None))
    for inner in getattr(optimizer, "optimizers", ()):
        yield from clippers_of(inner)
