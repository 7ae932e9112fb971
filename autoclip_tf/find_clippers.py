"""`clippers_of`: the clippers of a model or of an optimizer."""

from collections.abc import Mapping
from typing import Any

from autoclip_core.checks import format_error

from .policy_clipper import PolicyClipper
from .trust import TrustClip

AnyClipper = PolicyClipper | TrustClip


def clippers_of(model_or_optimizer: Any) -> list[AnyClipper]:
    """Return the clippers of a model or of an optimizer, of Keras 3 or of tf_keras.

    In a loop without `compile`, pass the optimizer. An optimizer is searched with those
    that it wraps, as `LossScaleOptimizer` does. A model is searched for its compiled
    optimizer first, then for the optimizers and clippers in its attributes, in lists
    and in dicts. If it has no clipper, the models in its attributes are searched. So
    the clippers of a GAN with two optimizers are found, and those of a model that
    `load_model` returned. Each clipper is listed once.

    Args:
      model_or_optimizer: an optimizer, or a model that has one.

    Returns:
      The clippers, in the order of `gradient_transformers`; empty if there are none.

    Raises:
      TypeError: the argument is neither a model nor an optimizer.
      ValueError: the argument is a model without an optimizer or a clipper.

    >>> import keras
    >>> from autoclip_tf import NormClip
    >>> model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])
    >>> optimizer = NormClip(2.0).as_optimizer(keras.optimizers.SGD(0.1))
    >>> model.compile(keras.optimizers.LossScaleOptimizer(optimizer), loss="mse")
    >>> clippers_of(model)
    [NormClip(max_norm=2.0, scope='global')]
    """
    name, value = "model_or_optimizer", model_or_optimizer
    if not _is_optimizer(value) and not _is_model(value):
        rule, way_out = "a Keras model or optimizer", "compile the model first"
        raise TypeError(format_error(name, rule, value, way_out))
    clippers = _find_clippers(value, set())
    is_optimizer = _is_optimizer(value)
    if not clippers and not is_optimizer and getattr(value, "optimizer", None) is None:
        rule, way_out = "a model that has an optimizer", "write clippers_of(optimizer)"
        raise ValueError(format_error(name, rule, value, way_out))
    return clippers


def _find_clippers(value: Any, seen: set[int]) -> list[AnyClipper]:
    """Return the clippers of a value, or those of the models in it if it has none.

    Args:
      value: a model or an optimizer.
      seen: the ids of the parts that were searched before.
    """
    clippers, models, stack = [], [], _list_parts(value)[::-1]
    while stack:
        part = stack.pop()
        if id(part) in seen:
            continue
        seen.add(id(part))
        if isinstance(part, AnyClipper):
            clippers.append(part)
        elif _is_model(part):
            models.append(part)
        else:
            stack += _list_parts(part)[::-1]
    return clippers or [clip for each in models for clip in _find_clippers(each, seen)]


def _list_parts(value: Any) -> list[Any]:
    """Return what a model, an optimizer, a dict or a list contains, in its order."""
    if _is_optimizer(value):
        names = ("gradient_transformers", "inner_optimizer", "optimizers")
        return [getattr(value, name, None) for name in names]
    if _is_model(value):
        return [getattr(value, "optimizer", None), *vars(value).values()]
    if isinstance(value, Mapping):
        return list(value.values())
    return list(value) if isinstance(value, list | tuple) else []


def _is_optimizer(value: Any) -> bool:
    return hasattr(type(value), "apply_gradients")


def _is_model(value: Any) -> bool:
    return hasattr(type(value), "fit") and hasattr(type(value), "train_step")
