"""Keras 3 optimizers that accept `gradient_transformers=`, under their own names.

    from autoclip_tf.optimizers import Adam

has every optimizer of `keras.optimizers`. A transformer is a callable from a list of
(gradient, variable) pairs to such a list: a clipper of this package, or any function.

It runs once per update, on the gradients that the update uses: after a loss scale was
divided out, after accumulation, and after those of all replicas were summed. Keras's
own `clipnorm` comes before that sum. What a clipper remembers is among the optimizer's
variables, so it is saved and restored with them.
"""

import re
from collections.abc import Sequence
from functools import cache
from typing import Any

import keras
import numpy as np

from autoclip_core.checks import format_error

from .memory import constant
from .mixin import GradientTransformersMixin, Transformer

_PACKAGE = "autoclip_tf"
_WRAPPERS = (
    keras.optimizers.LossScaleOptimizer,
    *filter(None, [getattr(keras.optimizers, "MultiOptimizer", None)]),
)


class _OfKeras(GradientTransformersMixin):
    """Transforms at the one place that `fit` of every backend passes."""

    def add_memory(self, name: str, value: np.ndarray[Any, Any]) -> Any:
        """Return a new variable; replicas have the same gradients, so one counts."""
        return self.add_variable(  # type: ignore[attr-defined]
            shape=value.shape,
            initializer=constant(value),
            dtype=value.dtype.name,
            aggregation="only_first_replica",
            name=name,
        )

    if keras.backend.backend() == "tensorflow":
        # Keras sums over replicas inside the update; before that, each replica has but
        # a part of the gradient.
        def _all_reduce_sum_gradients(self, pairs: Any) -> Any:
            summed = super()._all_reduce_sum_gradients(pairs)  # type: ignore[misc]
            return self.transformed(summed)

    else:

        def _backend_update_step(
            self, gradients: Any, variables: Any, rate: Any
        ) -> Any:
            pairs = self.transformed(zip(gradients, variables, strict=True))
            gradients, variables = [g for g, _ in pairs], [v for _, v in pairs]
            return super()._backend_update_step(gradients, variables, rate)  # type: ignore[misc]


@cache
def with_gradient_transformers(optimizer_class: Any) -> Any:
    """Return a subclass of an optimizer class that takes `gradient_transformers=`.

    The optimizers of Keras are here already, by their names. Of `tf_keras`, the newer
    optimizers can be given; those in `tf_keras.optimizers.legacy` take it themselves.

    Args:
      optimizer_class: a subclass of `keras.optimizers.Optimizer`. For `load_model` in
        another process call this at import, as Keras asks for any class of your own.

    Raises:
      TypeError: it is no optimizer class.
      ValueError: it wraps another optimizer, or has the argument already.

    >>> Lion = with_gradient_transformers(keras.optimizers.Lion)
    >>> Lion(1e-4, gradient_transformers=[]).gradient_transformers
    ()
    """
    if _is_of_tf_keras(optimizer_class):
        from . import legacy  # imports tf_keras

        return legacy.with_gradient_transformers(optimizer_class)
    _check_class(optimizer_class)
    if issubclass(optimizer_class, GradientTransformersMixin):
        return optimizer_class
    base = optimizer_class
    if keras.backend.backend() == "torch":  # Keras swaps in a faster class of the name
        base = type(optimizer_class.__new__(optimizer_class))
    own = {"__module__": __name__, "__doc__": _docstring(optimizer_class)}
    made = type(optimizer_class.__name__, (_OfKeras, base), own)
    register = keras.saving.register_keras_serializable
    return register(_PACKAGE, _registered_name(optimizer_class))(made)


def rebuilt(optimizer: Any, transformers: Sequence[Transformer]) -> Any:
    """Return an optimizer of the same settings with transformers.

    Args:
      optimizer: a Keras 3 optimizer; the transformers it has come first.
      transformers: callables that each gradient goes through, in order.

    Raises:
      TypeError: it is no optimizer.
      ValueError: it has met its variables, or wraps another optimizer.

    >>> from autoclip_tf import NormClip
    >>> rebuilt(keras.optimizers.SGD(0.1), [NormClip(2.0)]).gradient_transformers
    (NormClip(max_norm=2.0),)
    """
    if isinstance(optimizer, type) or not hasattr(optimizer, "get_config"):
        way_out = "write one, such as keras.optimizers.Adam(1e-3)"
        raise TypeError(
            format_error("optimizer", "a Keras optimizer", optimizer, way_out)
        )
    kind: Any = type(optimizer)
    clipped = with_gradient_transformers(kind)
    if getattr(optimizer, "built", False) or getattr(optimizer, "_built", False):
        way_out = "make the clipped optimizer before the first step"
        rule = "one that has not met its variables yet"
        raise ValueError(format_error("optimizer", rule, optimizer.name, way_out))
    config = optimizer.get_config()
    others = getattr(optimizer, "gradient_transformers", ())
    config["gradient_transformers"] = [*others, *transformers]
    return clipped.from_config(config)


def _check_class(optimizer_class: Any) -> None:
    kind = keras.optimizers.Optimizer
    if not isinstance(optimizer_class, type) or not issubclass(optimizer_class, kind):
        way_out = "for an optimizer object, call clipper.as_optimizer(optimizer)"
        rule = "a subclass of keras.optimizers.Optimizer"
        raise TypeError(format_error("optimizer_class", rule, optimizer_class, way_out))
    if issubclass(optimizer_class, _WRAPPERS):
        way_out = "clip inside it: give it an optimizer that has gradient_transformers"
        name = optimizer_class.__name__
        rule = "an optimizer that does not wrap another"
        raise ValueError(format_error("optimizer_class", rule, name, way_out))


def _docstring(optimizer_class: Any) -> str:
    name = f"{optimizer_class.__module__}.{optimizer_class.__name__}"
    name = re.sub(r"^keras\.src\.optimizers\..*\.", "keras.optimizers.", name)
    return (
        f"`{name}` that takes `gradient_transformers=`, too.\n\n"
        "Args:\n"
        "  *args, **kwargs: as there.\n"
        "  gradient_transformers: callables that gradients go through, in order.\n\n"
        "Raises:\n"
        "  TypeError, ValueError: a transformer is not callable or comes twice; the\n"
        "    optimizer is to clip by itself, too.\n\n"
        ">>> from autoclip_tf import NormClip\n"
        f">>> optimizer = {optimizer_class.__name__}(\n"
        "...     gradient_transformers=[NormClip(2.0)])\n"
        ">>> optimizer.gradient_transformers\n"
        "(NormClip(max_norm=2.0),)\n"
    )


def _registered_name(optimizer_class: Any) -> str:
    """Return the name in saved files; a class of yours may be called Adam, too."""
    if optimizer_class.__module__.startswith("keras."):
        return str(optimizer_class.__name__)
    return f"{optimizer_class.__module__}.{optimizer_class.__qualname__}"


def _is_of_tf_keras(optimizer_class: Any) -> bool:
    modules = (kind.__module__ for kind in getattr(optimizer_class, "__mro__", ()))
    return any(module.split(".")[0] == "tf_keras" for module in modules)


def _all_of_keras() -> dict[str, Any]:
    """Return our optimizers by name; what was saved is loaded only if they exist."""
    theirs = vars(keras.optimizers)
    return {
        name: with_gradient_transformers(kind)
        for name, kind in theirs.items()
        if isinstance(kind, type)
        and issubclass(kind, keras.optimizers.Optimizer)
        and kind is not keras.optimizers.Optimizer
        and not issubclass(kind, _WRAPPERS)
    }


globals().update(_all_of_keras())


def __getattr__(name: str) -> Any:
    """Say which optimizers there are; Keras decides, so a type checker cannot know."""
    names = ", ".join(sorted(_all_of_keras()))
    raise AttributeError(f"autoclip_tf.optimizers has {names}; it has no {name!r}")
