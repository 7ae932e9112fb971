"""`gradient_transformers=` for the newer optimizers of tf_keras, which refuse it."""

from functools import cache
from typing import Any

import numpy as np
import tf_keras

from .memory import own_variable
from .mixin import GradientTransformersMixin


class _OfTfKeras(GradientTransformersMixin):
    """Transforms after gradients were aggregated and sparse ones deduplicated."""

    def add_memory(self, name: str, value: np.ndarray[Any, Any]) -> Any:
        """Return a new variable of this optimizer."""
        variable = own_variable(name, value)
        self._variables.append(variable.value)  # type: ignore[attr-defined]
        return variable

    def _internal_apply_gradients(self, grads_and_vars: Any) -> Any:
        pairs = self.transformed(grads_and_vars)
        return super()._internal_apply_gradients(pairs)  # type: ignore[misc]


@cache
def with_gradient_transformers(optimizer_class: Any) -> Any:
    """Return a subclass of a newer tf_keras optimizer that takes the argument.

    Args:
      optimizer_class: a subclass of `tf_keras.optimizers.Optimizer`.

    Raises:
      ValueError: the class takes `gradient_transformers=` itself.

    >>> from autoclip_tf import NormClip
    >>> Adam = with_gradient_transformers(tf_keras.optimizers.Adam)
    >>> [*Adam(gradient_transformers=[NormClip(2.0)]).gradient_transformers]
    [NormClip(max_norm=2.0)]
    """
    if issubclass(optimizer_class, tf_keras.optimizers.legacy.Optimizer):
        raise ValueError(
            f"optimizer_class must be one that lacks gradient_transformers, got "
            f"tf_keras.optimizers.legacy.{optimizer_class.__name__}; give them to it: "
            f"{optimizer_class.__name__}(gradient_transformers=[clipper])"
        )
    own = {"__module__": __name__, "__doc__": GradientTransformersMixin.__doc__}
    made = type(optimizer_class.__name__, (_OfTfKeras, optimizer_class), own)
    register = tf_keras.saving.register_keras_serializable
    return register("autoclip_tf", optimizer_class.__name__)(made)
