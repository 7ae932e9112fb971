"""`UpdateClipper`: clip the change of the variables in one step of an optimizer."""

from collections.abc import Sequence
from typing import Any

import keras

from autoclip_core.clipper.metrics import name_update_metrics

from .gradients.updates import find_updates, list_old_values, scale_updates
from .policy_clipper import PolicyClipper
from .state.transformer import without_autograph
from .step.check_transformers import ActsInOptimizer


@keras.saving.register_keras_serializable("autoclip_tf")
class UpdateClipper(ActsInOptimizer, PolicyClipper):
    """Clip updates by any policy, at any scope, inside a Keras optimizer.

    The update of a row is the change of its variables in one step, w_new - w_old. It
    includes momentum, the preconditioner, the learning rate and weight decay. Moving
    averages and constraints act after it. With the norm n of the update, and the scale
    s that the policy decides (T / n if n > T):

        w = w_old + s * (w_new - w_old)

    A row within its limit keeps its new value bit for bit. A row with s = 0 has its old
    value, exactly. The state of the optimizer is not changed. Pass it in
    `gradient_transformers` of an optimizer of `autoclip_tf.optimizers`, or call
    `as_optimizer`. It acts after the step, wherever it stands in the list. An optimizer
    has at most one.

    A step keeps a copy of the variables until it ends. The change of an embedding is
    dense, also if its gradient is sparse.

    Args:
      policy: any policy of `autoclip_core`. Norms of parameters, as for `ParamRatio`,
        are those before the step. With `ParamRatio(0.01, eps=0.2)` and `norm="rms"`,
        weights that start at 0 can grow.
      scope, norm, exclude, scale_only, dry_run: as in `Clipper`, for updates instead of
        gradients.
      warmup_steps, warmup_threshold: as in `Clipper`.
      min_threshold, max_threshold: as in `Clipper`.
      nonfinite: the rule for a row whose update is NaN or infinite: "zero" restores its
        old value, "propagate" leaves the new one. The norm is never recorded.

    Raises:
      ValueError, TypeError: an argument breaks its rule; the message says which.

    >>> from autoclip_core import ParamRatio
    >>> from autoclip_tf.optimizers import SGD
    >>> clip = UpdateClipper(ParamRatio(0.1))
    >>> optimizer = SGD(1.0, gradient_transformers=[clip])
    >>> weight = keras.Variable([3.0, 4.0])
    >>> optimizer.apply([keras.ops.array([0.0, 8.0])], [weight])
    >>> weight.numpy(), clip.metrics()["clip/update_norm"]
    (array([3. , 3.5], dtype=float32), 8.0)

    Reference:
      You, Gitman, Ginsburg, "Large batch training of convolutional networks", 2017,
      https://arxiv.org/abs/1708.03888, whose rule bounds lr * gradient.
    """

    clips_update = True
    _instead_of_skipping = (
        "moments and counters have advanced before the update is known; filter the "
        "gradient first, with a Clipper in the same list"
    )

    @without_autograph
    def clip_update(
        self, variables: Sequence[Any], before: Sequence[Any], after: Sequence[Any]
    ) -> list[Any]:
        """Measure, decide and record; return the values of the variables to keep.

        An optimizer of `autoclip_tf.optimizers` calls it after each step.

        Args:
          variables: those that the step changed.
          before: their values before the step, tensors of the same shapes.
          after: their values after the step.

        Returns:
          A tensor for each variable.

        Raises:
          ValueError: the clipper was not built for one of the variables.

        >>> from autoclip_core import Fixed
        >>> weight, clip = keras.Variable([0.0]), UpdateClipper(Fixed(2.0))
        >>> clip.build([weight])
        >>> old, new = keras.ops.array([1.0]), keras.ops.array([5.0])
        >>> [value] = clip.clip_update([weight], [old], [new])
        >>> keras.ops.convert_to_numpy(value)
        array([3.], dtype=float32)
        """
        rows = self._built_rows()
        updates = find_updates(variables, before, after, rows)
        scales = self._decide(
            [update.change for update in updates],
            lambda: list_old_values(variables, before, rows),
            rows,
        )
        if self.dry_run or not updates:
            return list(after)
        return scale_updates(updates, before, after, scales)

    def metrics(self, *, per_row: bool = False) -> dict[str, float]:
        """Return what to log, under the names of `Clipper.metrics` for updates.

        Args:
          per_row: as in `Clipper.metrics`.

        Returns:
          `clip/update_norm`, `clip/update_threshold` and so on, each a float.

        Raises:
          ValueError: the clipper is not built.

        >>> from autoclip_core import Fixed
        >>> clip = UpdateClipper(Fixed(2.0))
        >>> clip.build([keras.Variable([0.0])])
        >>> clip.metrics()["clip/update_steps"]
        0.0
        """
        return name_update_metrics(super().metrics(per_row=per_row))
