"""Notice a clipper that is called before gradients are summed over the replicas."""

import sys
import warnings

import keras

_OPTIMIZERS = ("autoclip_tf.step.optimizer_mixin", "tf_keras.src.optimizers")
"""Modules of optimizers that call a clipper after the sum."""


def warn_if_before_sum(name: str) -> None:
    """Warn if a clipper is called in a replica function, and not by an optimizer.

    There each replica has a part of the gradient. It would be clipped alone, by the
    norm of its part.

    Args:
      name: the class of the clipper.
    """
    count = _count_replicas()
    if count > 1 and not _is_called_by_optimizer():
        warnings.warn(
            f"{name} is called inside the replica function of a strategy with {count} "
            "replicas: unless you have summed the gradients, each replica clips its "
            "part alone; let the optimizer clip, which does it after the sum: "
            "optimizer = clipper.as_optimizer(keras.optimizers.SGD(0.1)), then "
            "optimizer.apply(gradients, variables)",
            RuntimeWarning,
            stacklevel=4,
        )


def _count_replicas() -> int:
    """Return the number of replicas, if the caller is one of them; else 1."""
    if keras.backend.backend() != "tensorflow":
        return 1
    import tensorflow as tf

    context = tf.distribute.get_replica_context()
    return 1 if context is None else int(context.num_replicas_in_sync)


def _is_called_by_optimizer() -> bool:
    frame = sys._getframe()
    while frame.f_back is not None:
        frame = frame.f_back
        if frame.f_globals.get("__name__", "").startswith(_OPTIMIZERS):
            return True
    return False
