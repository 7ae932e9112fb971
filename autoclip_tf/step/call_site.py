"""Who calls a clipper: an optimizer, or a loop that may have the wrong gradients."""

import sys
import warnings
import weakref
from collections.abc import Iterator
from types import FrameType
from typing import Any, TypeVar

import keras

_Kind = TypeVar("_Kind")

_OPTIMIZERS = ("autoclip_tf.step.optimizer_mixin", "tf_keras.src.optimizers")
"""Modules of optimizers that call a clipper at the right place."""


def warn_if_before_sum(name: str) -> None:
    """Warn if a clipper is called in a replica function, and not by an optimizer.

    There each replica has a part of the gradient. It would be clipped alone, by the
    norm of its part.

    Args:
      name: the class of the clipper.
    """
    count = count_replicas()
    if count > 1 and not is_called_by_optimizer():
        warnings.warn(
            f"{name} is called inside the replica function of a strategy with {count} "
            "replicas: unless you have summed the gradients, each replica clips its "
            "part alone; let the optimizer clip, which does it after the sum: "
            "optimizer = clipper.as_optimizer(keras.optimizers.SGD(0.1)), then "
            "optimizer.apply(gradients, variables)",
            RuntimeWarning,
            stacklevel=4,
        )


def warn_if_unscaled_later(name: str) -> None:
    """Warn if the optimizer that receives the clipped gradients unscales them.

    That optimizer reads the pairs, or belongs to the model whose `train_step` does. A
    model may step with an optimizer in another attribute, which must unscale, too.

    Args:
      name: the class of the clipper.
    """
    readers = (frame.f_locals.get("self") for frame in _list_frames())
    optimizers = next(filter(None, map(_list_optimizers, readers)), [])
    kind = keras.optimizers.LossScaleOptimizer
    if optimizers and all(isinstance(each, kind) for each in optimizers):
        warnings.warn(
            f"{name} clips before a LossScaleOptimizer: unless you have unscaled the "
            "gradients, its norms are scaled ones; let the inner optimizer clip: "
            "LossScaleOptimizer(clipper.as_optimizer(keras.optimizers.SGD(0.1)))",
            RuntimeWarning,
            stacklevel=4,
        )


def _list_optimizers(reader: Any) -> list[Any]:
    """Return an optimizer itself, or those of a compiled model, without the inner."""
    kind = keras.optimizers.Optimizer
    if isinstance(reader, kind):
        return [reader]
    compiled = getattr(reader, "optimizer", None)
    if not isinstance(reader, keras.Model) or not isinstance(compiled, kind):
        return []
    inner = getattr(compiled, "inner_optimizer", None)
    values = [compiled, *vars(reader).values()]
    return [each for each in values if isinstance(each, kind) and each is not inner]


def get_graph() -> Any:
    """Return a weak reference to the graph, whose code runs once; None if eager."""
    if keras.backend.backend() != "tensorflow":
        return None
    import tensorflow as tf

    eager = tf.executing_eagerly()
    return None if eager else weakref.ref(tf.compat.v1.get_default_graph())


def count_replicas() -> int:
    """Return the number of replicas, if the caller is one of them; else 1."""
    if keras.backend.backend() != "tensorflow":
        return 1
    import tensorflow as tf

    context = tf.distribute.get_replica_context()
    return 1 if context is None else int(context.num_replicas_in_sync)


def _list_frames() -> Iterator[FrameType]:
    """Yield the frames of the callers, from the inside out."""
    frame = sys._getframe(1)
    while frame.f_back is not None:
        frame = frame.f_back
        yield frame


def list_in_reach(kind: type[_Kind]) -> Iterator[_Kind]:
    """Yield the objects of a class in the callers' local names and in their `self`."""
    for frame in _list_frames():
        owner = getattr(frame.f_locals.get("self"), "__dict__", {})
        for value in [*frame.f_locals.values(), *owner.values()]:
            if issubclass(type(value), kind):
                yield value


def is_called_by_optimizer() -> bool:
    """Return whether an optimizer calls the clipper, and no loop."""
    modules = (frame.f_globals.get("__name__", "") for frame in _list_frames())
    return any(module.startswith(_OPTIMIZERS) for module in modules)
