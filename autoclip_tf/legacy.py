"""`gradient_transformers=` for the newer optimizers of tf_keras, which lack it.

The optimizers of `tf_keras.optimizers.legacy` accept the argument themselves.
"""

from functools import cache
from typing import Any

import numpy as np

from .state.transformer import split_pairs
from .state.variables import make_variable
from .step.check_transformers import refuse_pairs
from .step.optimizer_mixin import GradientTransformersMixin


class _TfKerasMixin(GradientTransformersMixin):
    """Transforms gradients after they are aggregated and sparse ones deduplicated."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        for transformer in self.gradient_transformers:
            if self.update_clipper in split_pairs([transformer]):
                refuse_pairs(type(transformer))

    def add_state_variable(self, name: str, value: np.ndarray[Any, Any]) -> Any:
        """Return a new variable of this optimizer."""
        variable = make_variable(name, value)
        self._variables.append(variable.value)  # type: ignore[attr-defined]
        return variable

    def _internal_apply_gradients(self, grads_and_vars: Any) -> Any:
        pairs = self.transform(grads_and_vars)
        return super()._internal_apply_gradients(pairs)  # type: ignore[misc]


@cache
def with_gradient_transformers(optimizer_class: Any) -> Any:
    """Return a subclass of a newer tf_keras optimizer that accepts the argument.

    Args:
      optimizer_class: a subclass of `tf_keras.optimizers.Optimizer`.

    Raises:
      ValueError: the class accepts `gradient_transformers=` itself.

    >>> import tf_keras
    >>> from autoclip_tf import NormClip
    >>> Adam = with_gradient_transformers(tf_keras.optimizers.Adam)
    >>> [*Adam(gradient_transformers=[NormClip(2.0)]).gradient_transformers]
    [NormClip(max_norm=2.0, scope='global')]
    """
    import tf_keras

    if issubclass(optimizer_class, tf_keras.optimizers.legacy.Optimizer):
        raise ValueError(
            "optimizer_class must be a class without gradient_transformers, got "
            f"tf_keras.optimizers.legacy.{optimizer_class.__name__}; pass the clipper "
            "directly: "
            f"{optimizer_class.__name__}(gradient_transformers=[clipper])"
        )
    namespace = {"__module__": __name__, "__doc__": GradientTransformersMixin.__doc__}
    bases = (_TfKerasMixin, optimizer_class)
    subclass = type(optimizer_class.__name__, bases, namespace)
    register = tf_keras.saving.register_keras_serializable
    return register("autoclip_tf", optimizer_class.__name__)(subclass)
