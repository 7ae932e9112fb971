"""`TrustClip`: a filter of gradients and a bound of updates, with defaults for both."""

from collections.abc import Iterable, Mapping
from typing import Any

import keras

from autoclip_core.clipper.patterns import Pattern
from autoclip_core.clipper.settings import format_clipper
from autoclip_core.clipper.trust import (
    HISTORY_LENGTH,
    QUANTILE,
    RATIO,
    make_bound,
    make_filter,
)

from .clipper import Clipper
from .optimizers import add_transformers
from .state.settings import Settings, patterns_from_config
from .state.transformer import TransformerPair
from .step.check_transformers import ActsInOptimizer
from .update import UpdateClipper


@keras.saving.register_keras_serializable("autoclip_tf")
class TrustClip(ActsInOptimizer, TransformerPair):
    """Clip the gradient at a quantile of its norms, and the update by the weights.

    Before the step, all gradients together are clipped to the quantile of their past
    norms. After the step, the change of a row is scaled back to the threshold T if its
    root mean square is larger:

        T = ratio * max(rms(w_old), 0.2)

    The first rule filters spikes. The second bounds what a learning rate, momentum or a
    preconditioner that is too large does to the weights. The constant 0.2 lets weights
    that start at 0 grow.

    `gradient` is the `Clipper` of the first rule, and `update` the `UpdateClipper` of
    the second. Each has its `decision`. Pass it in `gradient_transformers` of an
    optimizer of `autoclip_tf.optimizers`, or call `as_optimizer`.

    Args:
      ratio: of the bound: the largest update relative to the weights, > 0.
      quantile: of the filter: the quantile of past norms, in [0, 1].
      history_length: of the filter: the number of norms that it keeps, >= 1.
      scope: of the bound: the variables that share one norm: "parameter", "global" or
        "unit".
      exclude: of both: variables that are left alone, as in `Clipper`.
      nonfinite: of the filter: "zero" or "propagate", as in `Clipper`. The bound always
        restores a row whose update is not finite.
      dry_run: of both: measure, decide and record, but change nothing.

    Raises:
      ValueError, TypeError: an argument breaks its rule; the message says which.

    >>> weight = keras.Variable([3.0, 4.0])
    >>> optimizer = TrustClip().as_optimizer(keras.optimizers.SGD(1.0))
    >>> optimizer.apply([keras.ops.array([0.0, 8.0])], [weight])
    >>> weight.numpy()
    array([3.  , 3.95], dtype=float32)

    Reference:
      Seetharaman et al., "AutoClip", 2020, https://arxiv.org/abs/2007.14469, for the
      filter. You, Gitman, Ginsburg, "Large batch training of convolutional networks",
      2017, https://arxiv.org/abs/1708.03888, for the bound, on lr * gradient there.
    """

    gradient: Clipper
    update: UpdateClipper

    def __init__(
        self,
        *,
        ratio: float = RATIO,
        quantile: float = QUANTILE,
        history_length: int = HISTORY_LENGTH,
        scope: str = "parameter",
        exclude: Pattern | Iterable[Pattern] | None = None,
        nonfinite: str = "zero",
        dry_run: bool = False,
    ) -> None:
        self._settings = Settings(
            scope=scope, exclude=exclude, nonfinite=nonfinite, dry_run=dry_run
        )
        policy = make_filter(quantile, history_length)
        both: dict[str, Any] = {"exclude": exclude, "dry_run": dry_run}
        super().__init__(
            Clipper(policy, scope="global", nonfinite=nonfinite, **both),
            UpdateClipper(make_bound(ratio), scope=scope, norm="rms", **both),
        )

    @property
    def built(self) -> bool:
        """Whether both halves were built for their variables."""
        return self.gradient.built and self.update.built

    def as_optimizer(self, optimizer: Any) -> Any:
        """Return a new Keras optimizer with the same settings that clips in its step.

        Args:
          optimizer: a Keras 3 optimizer that is not built yet.

        Raises:
          ValueError: `optimizer` is built, wraps another optimizer, or clips updates.
          TypeError: `optimizer` is not a Keras optimizer.

        >>> TrustClip().as_optimizer(keras.optimizers.Adam()).gradient_transformers
        (TrustClip(ratio=0.01, scope='parameter'),)
        """
        return add_transformers(optimizer, [self])

    def metrics(self, *, per_row: bool = False) -> dict[str, float]:
        """Return what to log of the last step and of the run, for both halves.

        Args:
          per_row: as in `Clipper.metrics`.

        Returns:
          `clip/norm`, `clip/update_norm` and so on, each a float.

        Raises:
          ValueError: the halves are not built.

        >>> weight, clip = keras.Variable([1.0]), TrustClip()
        >>> clip.as_optimizer(keras.optimizers.SGD()).build([weight])
        >>> clip.metrics()["clip/steps"], clip.metrics()["clip/update_steps"]
        (0.0, 0.0)
        """
        first, second = (
            half.metrics(per_row=per_row) for half in (self.gradient, self.update)
        )
        return first | second

    def check_state(self) -> None:
        """Raise if the state of a half is invalid, as `Clipper.check_state` does.

        Raises:
          ValueError: the state is invalid, or the halves are not built.

        >>> clip = TrustClip()
        >>> clip.as_optimizer(keras.optimizers.SGD()).build([keras.Variable([1.0])])
        >>> clip.check_state()
        """
        self.gradient.check_state()
        self.update.check_state()

    def reset(self) -> None:
        """Set the state of both halves to its start, as `Clipper.reset` does.

        Raises:
          ValueError: the halves are not built.

        >>> clip = TrustClip()
        >>> clip.as_optimizer(keras.optimizers.SGD()).build([keras.Variable([1.0])])
        >>> clip.reset()
        """
        self.gradient.reset()
        self.update.reset()

    def get_config(self) -> dict[str, Any]:
        """Return the arguments that make an equal clipper, as plain data to save.

        >>> TrustClip(ratio=0.05).get_config()["ratio"]
        0.05
        """
        return {**self._arguments(), **self._settings.to_config()}

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> "TrustClip":
        """Return the clipper that `get_config` described, without its history.

        Args:
          config: the result of `get_config`.

        Raises:
          TypeError, ValueError: an argument breaks its rule; the message says which.

        >>> TrustClip.from_config(TrustClip(quantile=0.5).get_config())
        TrustClip(ratio=0.01, quantile=0.5, scope='parameter')
        """
        exclude = patterns_from_config(config.get("exclude"))
        return cls(**{**config, "exclude": exclude})

    def __repr__(self) -> str:
        """Return code that makes an equal clipper; a built one adds its row count."""
        settings = self._settings.non_defaults()
        scope = settings.pop("scope")
        if self.built:
            settings["rows"] = len(self.update.names)
        return format_clipper(type(self), self._arguments(), scope, settings)

    def _arguments(self) -> dict[str, Any]:
        """Return the numbers of the two policies."""
        policy: Any = self.gradient.policy
        bound: Any = self.update.policy
        return {
            "ratio": bound.clipping,
            "quantile": policy.quantile,
            "history_length": policy.history_length,
        }
