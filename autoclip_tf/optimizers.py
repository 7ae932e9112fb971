"""A subclass of each Keras optimizer, of the same name, with `gradient_transformers=`.

    from autoclip_tf.optimizers import Adam

is the Adam of `keras.optimizers` with one more argument. The module has every optimizer
of Keras. A transformer is a callable from a list of (gradient, variable) pairs to such
a list: a clipper of this package, or any function. An `UpdateClipper` or a `TrustClip`
also belongs into the list.

It runs once per update, on the gradients that the update uses: after unscaling, after
accumulation, and after the sum over all replicas. Keras's own `clipnorm` acts before
that sum. The state of a clipper is among the optimizer's variables, so it is saved and
restored with them.
"""

import re
from collections.abc import Sequence
from functools import cache
from typing import Any

import keras

from autoclip_core.checks import format_error

from . import legacy
from .step.check_transformers import Transformer, refuse_clipping_twice
from .step.keras_mixin import KerasMixin
from .step.optimizer_mixin import GradientTransformersMixin

_PACKAGE = "autoclip_tf"
_WRAPPERS = (
    keras.optimizers.LossScaleOptimizer,
    *filter(None, [getattr(keras.optimizers, "MultiOptimizer", None)]),
)


@cache
def with_gradient_transformers(optimizer_class: Any) -> Any:
    """Return a subclass of an optimizer class that accepts `gradient_transformers=`.

    `autoclip_tf.optimizers` already has this subclass for each optimizer of Keras.

    Args:
      optimizer_class: a subclass of `keras.optimizers.Optimizer`, or a newer optimizer
        of `tf_keras`; those in `tf_keras.optimizers.legacy` accept the argument
        themselves. For `load_model` in another process, call this at import, as for
        any class that Keras does not know.

    Raises:
      TypeError: `optimizer_class` is not an optimizer class.
      ValueError: the class wraps another optimizer, or has the argument already.

    >>> Lion = with_gradient_transformers(keras.optimizers.Lion)
    >>> Lion(1e-4, gradient_transformers=[]).gradient_transformers
    ()
    """
    if _is_of_tf_keras(optimizer_class):
        return legacy.with_gradient_transformers(optimizer_class)
    _check_class(optimizer_class)
    if issubclass(optimizer_class, GradientTransformersMixin):
        return optimizer_class
    base = optimizer_class
    if keras.backend.backend() == "torch":  # Keras then makes an object of a subclass
        base = type(optimizer_class.__new__(optimizer_class))
    namespace = {"__module__": __name__, "__doc__": _docstring(optimizer_class)}
    subclass = type(optimizer_class.__name__, (KerasMixin, base), namespace)
    register = keras.saving.register_keras_serializable
    return register(_PACKAGE, _registered_name(optimizer_class))(subclass)


def add_transformers(optimizer: Any, transformers: Sequence[Transformer]) -> Any:
    """Return a new optimizer with the same settings and these transformers.

    Args:
      optimizer: a Keras 3 optimizer; transformers that it has stay, and come first.
      transformers: callables that each gradient goes through, in order.

    Raises:
      TypeError: `optimizer` is not a Keras optimizer.
      ValueError: `optimizer` is built, clips by itself, or wraps another optimizer.

    >>> from autoclip_tf import NormClip
    >>> sgd = keras.optimizers.SGD(0.1)
    >>> add_transformers(sgd, [NormClip(2.0)]).gradient_transformers
    (NormClip(max_norm=2.0, scope='global'),)
    """
    if isinstance(optimizer, type) or not hasattr(optimizer, "get_config"):
        way_out = "write one, such as keras.optimizers.Adam(1e-3)"
        error = format_error("optimizer", "a Keras optimizer", optimizer, way_out)
        raise TypeError(error)
    optimizer_class: Any = type(optimizer)
    _refuse_wrapper("optimizer", optimizer_class)
    subclass = with_gradient_transformers(optimizer_class)
    if getattr(optimizer, "built", False) or getattr(optimizer, "_built", False):
        way_out = (
            "wrap type(optimizer).from_config(optimizer.get_config()); to keep the "
            "moments, compile with the result, call its build(model."
            "trainable_variables), then model.load_weights(file)"
        )
        rule = "one that is not built yet"
        raise ValueError(format_error("optimizer", rule, optimizer.name, way_out))
    config = optimizer.get_config()
    names = ", ".join(type(each).__name__ for each in transformers)
    way_out = f"build the optimizer without {{name}}: {names} clips"
    refuse_clipping_twice(config, way_out)
    present = getattr(optimizer, "gradient_transformers", ())
    config["gradient_transformers"] = [*present, *transformers]
    return subclass.from_config(config)


def _check_class(optimizer_class: Any) -> None:
    base = keras.optimizers.Optimizer
    if not isinstance(optimizer_class, type) or not issubclass(optimizer_class, base):
        way_out = "for an optimizer object, call clipper.as_optimizer(optimizer)"
        rule = "a subclass of keras.optimizers.Optimizer"
        raise TypeError(format_error("optimizer_class", rule, optimizer_class, way_out))
    _refuse_wrapper("optimizer_class", optimizer_class)


def _refuse_wrapper(argument: str, optimizer_class: type) -> None:
    if issubclass(optimizer_class, _WRAPPERS):
        name = optimizer_class.__name__
        way_out = f"clip inside it: {name}(clipper.as_optimizer(optimizer))"
        rule = "an optimizer that does not wrap another"
        raise ValueError(format_error(argument, rule, name, way_out))


def _docstring(optimizer_class: Any) -> str:
    name = f"{optimizer_class.__module__}.{optimizer_class.__name__}"
    name = re.sub(r"^keras\.src\.optimizers\..*\.", "keras.optimizers.", name)
    return (
        f"`{name}` that also accepts `gradient_transformers=`.\n\n"
        "Args:\n"
        f"  *args, **kwargs: the arguments of `{name}`.\n"
        "  gradient_transformers: callables that gradients go through, in order, and\n"
        "    at most one clipper of updates.\n\n"
        "Raises:\n"
        "  TypeError: a transformer is not callable.\n"
        "  ValueError: a transformer is repeated, two clip updates, or the optimizer\n"
        "    also clips by itself.\n\n"
        ">>> from autoclip_tf import NormClip\n"
        f">>> optimizer = {optimizer_class.__name__}(\n"
        "...     gradient_transformers=[NormClip(2.0)])\n"
        ">>> optimizer.gradient_transformers\n"
        "(NormClip(max_norm=2.0, scope='global'),)\n"
    )


def _registered_name(optimizer_class: Any) -> str:
    """Return the name in saved files; a user's class may have the name of Keras's."""
    if optimizer_class.__module__.startswith("keras."):
        return str(optimizer_class.__name__)
    return f"{optimizer_class.__module__}.{optimizer_class.__qualname__}"


def _is_of_tf_keras(optimizer_class: Any) -> bool:
    modules = (base.__module__ for base in getattr(optimizer_class, "__mro__", ()))
    return any(module.split(".")[0] == "tf_keras" for module in modules)


def _all_of_keras() -> dict[str, Any]:
    """Return the subclasses by name; Keras can load a file only after they are made."""
    return {
        name: with_gradient_transformers(value)
        for name, value in vars(keras.optimizers).items()
        if isinstance(value, type)
        and issubclass(value, keras.optimizers.Optimizer)
        and value is not keras.optimizers.Optimizer
        and not issubclass(value, _WRAPPERS)
    }


globals().update(_all_of_keras())


def __getattr__(name: str) -> Any:
    """List the optimizers in the error; a type checker cannot know what Keras has."""
    names = ", ".join(sorted(_all_of_keras()))
    raise AttributeError(f"autoclip_tf.optimizers has {names}; it has no {name!r}")
