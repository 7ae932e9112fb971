"""`gradient_transformers=` for an optimizer class of Keras 3, on every backend."""

from collections.abc import Sequence
from typing import Any

import keras
import numpy as np
from keras import ops

from autoclip_core.checks import format_error
from autoclip_tf.state.variables import constant_initializer

from .optimizer_mixin import GradientTransformersMixin

_IS_TENSORFLOW = keras.backend.backend() == "tensorflow"
if _IS_TENSORFLOW:
    import tensorflow as tf

_KEEP_WEIGHTS = tuple(
    getattr(keras.optimizers, name)
    for name in ("Ftrl", "ScheduleFreeAdamW")
    if hasattr(keras.optimizers, name)
)
"""Optimizers that compute weights from copies or sums, which are not clipped."""


class KerasMixin(GradientTransformersMixin):
    """Transforms gradients, and clips updates, in methods that `fit` always calls.

    Keras applies weight decay, then calls `_backend_update_step`. With an update
    clipper, that method applies both, because weight decay belongs to the update. What
    follows does not belong to it: moving averages of the weights, and constraints.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.update_clipper is not None and isinstance(self, _KEEP_WEIGHTS):
            rule = "left out of the transformers of an optimizer that keeps weights"
            way_out = "its state holds weights of its own; clip the gradient alone"
            name = type(self).__name__
            raise ValueError(format_error("an update clipper", rule, name, way_out))

    def add_state_variable(self, name: str, value: np.ndarray[Any, Any]) -> Any:
        """Return a new variable, updated by one replica: all have the same gradient.

        Its name is unique, because an `.h5` file has one entry per name.
        """
        taken = {variable.name for variable in self._variables}  # type: ignore[attr-defined]
        candidates = (name, *(f"{name}_{number}" for number in range(1, len(taken))))
        name = next(each for each in candidates if each not in taken)
        return self.add_variable(  # type: ignore[attr-defined]
            shape=value.shape,
            initializer=constant_initializer(value),
            dtype=value.dtype.name,
            aggregation="only_first_replica",
            name=name,
        )

    def _apply_weight_decay(self, variables: Any) -> None:
        """Leave weight decay to `_backend_update_step` if it clips the update."""
        if self.update_clipper is None:
            super()._apply_weight_decay(variables)  # type: ignore[misc]

    def _backend_update_step(self, gradients: Any, variables: Any, rate: Any) -> None:
        if self.update_clipper is None:
            self._take_step(gradients, variables, rate)
            return
        # Not `convert_to_tensor`: torch updates the memory of that tensor in place.
        before = [ops.stop_gradient(ops.copy(variable)) for variable in variables]
        super()._apply_weight_decay(variables)  # type: ignore[misc]
        self._take_step(gradients, variables, rate)
        self._clip_update(variables, before)

    if _IS_TENSORFLOW:

        def _take_step(self, gradients: Any, variables: Any, rate: Any) -> None:
            super()._backend_update_step(gradients, variables, rate)  # type: ignore[misc]

        # Keras sums over replicas inside the update. Before that sum, each replica has
        # only a part of the gradient.
        def _all_reduce_sum_gradients(self, pairs: Any) -> Any:
            summed = super()._all_reduce_sum_gradients(pairs)  # type: ignore[misc]
            return self.transform(summed)

        def _clip_update(self, variables: Any, before: Sequence[Any]) -> None:
            """Clip once for all replicas, whose weights are equal."""
            interim = tf.__internal__.distribute.interim
            interim.maybe_merge_call(
                self._clip_on_every_replica,
                self._distribution_strategy,  # type: ignore[attr-defined]
                [v.value if isinstance(v, keras.Variable) else v for v in variables],
                before,
            )

        def _clip_on_every_replica(
            self, strategy: Any, variables: Any, before: Any
        ) -> None:
            first = [strategy.experimental_local_results(each)[0] for each in before]
            for variable, value in self._clipped(variables, first):
                strategy.extended.update(variable, _assign, args=(value,), group=False)

    else:

        def _take_step(self, gradients: Any, variables: Any, rate: Any) -> None:
            pairs = self.transform(zip(gradients, variables, strict=True))
            gradients, variables = [g for g, _ in pairs], [v for _, v in pairs]
            super()._backend_update_step(gradients, variables, rate)  # type: ignore[misc]

        def _clip_update(self, variables: Any, before: Sequence[Any]) -> None:
            for variable, value in self._clipped(variables, before):
                variable.assign(value)

    def _clipped(self, variables: Any, before: Sequence[Any]) -> Any:
        """Return each variable and its value after clipping."""
        clipper: Any = self.update_clipper
        after = [ops.stop_gradient(ops.convert_to_tensor(v)) for v in variables]
        values = clipper.clip_update(variables, before, after)
        return zip(variables, values, strict=True)


def _assign(variable: Any, value: Any) -> None:
    variable.assign(value)
