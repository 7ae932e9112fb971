"""`Clipper`: a gradient transformer, from (gradient, variable) pairs to pairs."""

from collections.abc import Iterable
from typing import Any

import keras
from keras import ops

from .gradients.row_tensor import RowTensor
from .gradients.rows import Rows, stable_id
from .gradients.scale import scale_all
from .gradients.sparse import densify
from .policy_clipper import PolicyClipper
from .state.transformer import without_autograph
from .state.variables import outside_graphs
from .step.call_site import list_in_reach, warn_if_before_sum
from .step.check_transformers import Pair
from .step.clipped_pairs import ClippedPairs, LoopChecks


@keras.saving.register_keras_serializable("autoclip_tf")
class Clipper(PolicyClipper):
    """Clip gradients by any policy, at any scope, inside a Keras optimizer.

    A clipper is a callable from a list of (gradient, variable) pairs to such a list.
    Pass it as `gradient_transformers` to an optimizer of `autoclip_tf.optimizers` or of
    `tf_keras.optimizers.legacy`, or call it in a custom training loop. It runs eagerly,
    in graphs and under XLA.

    Args:
      policy: any policy of `autoclip_core`.
      scope: the gradients that share one norm: each "parameter" (the default), all of
        them ("global"), or each output "unit" of each variable.
      global_clipping: the older spelling of `scope="global"`.
      norm: the norm of a row: "l2"; "rms", the l2 norm divided by the square root of
        the number of elements; or "max", the largest magnitude. Thresholds, recorded
        norms and the norms of variables are norms of this kind.
      nonfinite: the rule for a row whose norm is NaN or infinite: "zero" sets its
        gradient to 0, "propagate" leaves it unchanged. The norm is never recorded.
      warmup_steps: norms that each row records before the policy is used, >= 0.
      warmup_threshold: the threshold until then, > 0; by default nothing is clipped.
      min_threshold: the threshold is never below this, > 0.
      max_threshold: the threshold is never above this, > 0, also during the warm-up.
      exclude: variables that are not measured and not scaled: names of layers or
        variables, ends of paths, patterns with `*`, compiled regular expressions,
        functions of (path, variable).
      scale_only: the variables that clipping scales, in the forms of `exclude`; by
        default all. The others belong to the norm of their row and are not scaled. A
        row that is not finite or dropped is still set to 0 as a whole. In a decision,
        `scale` is then the norm after divided by the norm before.
      dry_run: measure, decide and record, but change no gradient.

    Raises:
      ValueError, TypeError: an argument breaks its rule; the message says which.

    >>> from autoclip_core import Fixed
    >>> weight = keras.Variable([0.0, 0.0])
    >>> clip = Clipper(Fixed(1.0))
    >>> [(gradient, _)] = clip([(ops.convert_to_tensor([3.0, 4.0]), weight)])
    >>> ops.convert_to_numpy(gradient), clip.decision.norm
    (array([0.6, 0.8], dtype=float32), array([5.], dtype=float32))
    """

    _checks: LoopChecks | None = None
    """The checks of the loop that calls it; None before the first call."""

    @without_autograph
    def __call__(self, grads_and_vars: Iterable[Pair]) -> list[Pair]:
        """Take one step: measure, decide, record, and return the scaled pairs.

        Args:
          grads_and_vars: pairs of a gradient (dense, `tf.IndexedSlices`, or None) and
            its variable. A sparse gradient of JAX or torch becomes dense.

        Returns:
          The pairs in the same order. A gradient within its limit is unchanged bit for
          bit.

        >>> from autoclip_core import Fixed
        >>> weight, clip = keras.Variable([0.0]), Clipper(Fixed(2.0))
        >>> [(gradient, _)] = clip([(ops.convert_to_tensor([4.0]), weight)])
        >>> ops.convert_to_numpy(gradient).tolist()
        [2.0]
        """
        pairs = list(grads_and_vars)
        if self._checks is None:
            warn_if_before_sum(self.class_name)
            self._checks = LoopChecks(self.class_name, self._count_steps)
            is_clipped = isinstance(grads_and_vars, ClippedPairs)
            self.is_behind |= is_clipped or self._follows_another(pairs)
        if not self.built:
            self.build([variable for _, variable in pairs])
        if not pairs and not self.built:
            return []
        if self.scope == "global":
            self._checks.compare_variables({stable_id(v) for _, v in pairs})
        rows = self._built_rows()
        tensors = {}
        for index, (gradient, variable) in enumerate(pairs):
            variable_rows = rows.find_rows(variable)
            if variable_rows is not None and gradient is not None:
                tensor, shape = densify(gradient), tuple(variable.shape)
                tensors[index] = RowTensor(variable_rows, tensor, shape)
        scaled = self._step(list(tensors.values()), rows)
        for index, gradient in zip(tensors, scaled, strict=True):
            pairs[index] = (gradient, pairs[index][1])
        return pairs if self.dry_run else ClippedPairs(pairs, self._checks)

    def _follows_another(self, pairs: list[Pair]) -> bool:
        """Return whether the loop called another clipper of the variables before."""
        ids = {stable_id(variable) for _, variable in pairs}
        return any(
            clip is not self
            and clip._checks is not None
            and clip.built
            and not clip.dry_run
            and clip._built_rows().has_any(ids)
            for clip in list_in_reach(Clipper)
        )

    def _count_steps(self) -> int:
        """Return the steps since the start of the run; a graph may be traced."""
        with outside_graphs():
            return int(self._read_numpy().tally.steps)

    def _check_steps(self, steps: float) -> None:
        """Warn once if a loop calls it several times for each update."""
        if self._checks is not None:
            self._checks.count_steps(steps)

    def _step(self, tensors: list[RowTensor], rows: Rows) -> list[Any]:
        """Measure, decide and record; return the scaled gradients."""

        def parameters() -> list[RowTensor]:
            return [
                RowTensor(of, ops.convert_to_tensor(variable), tuple(variable.shape))
                for variable, of in rows.clipped_variables()
            ]

        scales = self._decide(tensors, parameters, rows)
        if self.dry_run or not tensors:
            return [item.tensor for item in tensors]
        return scale_all(tensors, scales)
