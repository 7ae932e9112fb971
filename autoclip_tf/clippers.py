"""The named clippers: each is `Clipper` with one policy and its arguments."""

from collections.abc import Mapping, Sequence
from typing import Any, Unpack

import keras

from autoclip_core import EmaRatio, Fixed, MeanStd, ParamRatio, Quantile, ZScore
from autoclip_core.checks import check_choice, format_error
from autoclip_core.clipper.settings import check_keywords
from autoclip_core.policy import get_arguments

from .clipper import Clipper
from .layouts import UnitsOf, units_by
from .settings import Common, CommonAndWarmup

_register = keras.saving.register_keras_serializable("autoclip_tf")


class _Named(Clipper):
    """A clipper whose configuration holds the arguments of its policy."""

    def _arguments(self) -> dict[str, Any]:
        return get_arguments(self.policy)


@_register
class QuantileClip(_Named):
    """Clip to a quantile of the norms of the last steps: AutoClip.

    T = quantile(the last norms, q).

    One history per variable by default; `global_clipping=True` keeps one for all, as
    the paper does. q = 0.9 clips about 10 % of the steps. The paper's "percentile 10"
    is `quantile=0.1, include_current=True` over all of the run.

    Args:
      quantile: q, in [0, 1].
      history_length: steps that are remembered, >= 1.
      include_current: whether the current norm belongs to the history that limits it.
      **common: see `Clipper`.

    Raises:
      TypeError, ValueError: an argument breaks its rule; the message says which.

    >>> weight, clip = keras.Variable([0.0, 0.0]), QuantileClip(quantile=0.5)
    >>> for norm in [1.0, 3.0, 8.0]:
    ...     [(gradient, _)] = clip([(keras.ops.array([norm, 0.0]), weight)])
    >>> keras.ops.convert_to_numpy(gradient)
    array([2., 0.], dtype=float32)

    Reference:
      Seetharaman, Wichern, Pardo, Le Roux, "AutoClip: Adaptive gradient clipping for
      source separation networks", 2020, https://arxiv.org/abs/2007.14469
    """

    def __init__(
        self,
        quantile: float = 0.9,
        *,
        history_length: int | None = 1000,
        include_current: bool = False,
        **common: Unpack[CommonAndWarmup],
    ) -> None:
        """Make the policy and the clipper."""
        check_keywords(type(self).__name__, common, CommonAndWarmup)
        policy = Quantile(
            quantile, history_length=history_length, include_current=include_current
        )
        super().__init__(policy, **common)


@_register
class StandardClip(_Named):
    """Clip to the mean plus k standard deviations of the norms of the last steps.

    T = mean + k * deviation, or with `log` exp of that of ln(norm).

    Args:
      deviations: k, finite; 1 to 4.
      history_length: steps that are remembered, >= 1.
      log: whether to take mean and deviation of the logarithms.
      ddof: the deviation divides by n - ddof; nothing is clipped before
        max(2, ddof + 1) steps.
      include_current: whether the current norm belongs to the history that limits it.
      **common: see `Clipper`.

    Raises:
      TypeError, ValueError: an argument breaks its rule; the message says which.

    >>> weight, clip = keras.Variable([0.0]), StandardClip(1.0, history_length=32)
    >>> for norm in [1.0, 3.0, 10.0]:
    ...     _ = clip([(keras.ops.array([norm]), weight)])
    >>> clip.decision.threshold
    array([3.4142137], dtype=float32)

    Reference:
      Chen, Firat, Bapna et al., "The best of both worlds: Combining recent advances in
      neural machine translation", 2018, https://arxiv.org/abs/1804.09849
    """

    def __init__(
        self,
        deviations: float = 2.0,
        *,
        history_length: int | None = 1000,
        log: bool = False,
        ddof: int = 1,
        include_current: bool = False,
        **common: Unpack[CommonAndWarmup],
    ) -> None:
        """Make the policy and the clipper."""
        check_keywords(type(self).__name__, common, CommonAndWarmup)
        policy = MeanStd(
            deviations,
            history_length=history_length,
            log=log,
            ddof=ddof,
            include_current=include_current,
        )
        super().__init__(policy, **common)


@_register
class AGC(_Named):
    """Clip each output unit to a fraction of its weights' norm: adaptive clipping, AGC.

    T = clipping * max(|w|, eps), with |w| the norm of the unit's weights.

    Which axes make a unit follows from the variable's path, as long as layers have
    their default names; see `autoclip_tf.layouts`. The paper leaves out the
    classifier's weight: `exclude="*/head/kernel"`.

    Args:
      clipping: the ratio, > 0; 0.01 for batches of 1024 and more, up to 0.16 for small
        ones.
      eps: the floor of the weights' norm, > 0, so that a unit that starts at zero can
        move.
      rule: "unit"; "layer", each variable as a whole; or "nfnets", the axes of the
        NFNets reference and of optax.
      axes: what a rule does not know: from the path of a variable, or a pattern, to
        the axes that a unit's norm is over; `axes_by_layer(model)` makes it.
      **common: see `Clipper`; the scope is "unit" unless given.

    Raises:
      TypeError, ValueError: an argument breaks its rule; the message says which.

    >>> weight, clip = keras.Variable([[1.0], [1.0]]), AGC(0.5)
    >>> [(gradient, _)] = clip([(keras.ops.array([[3.0], [4.0]]), weight)])
    >>> keras.ops.convert_to_numpy(gradient).ravel().round(4)
    array([0.4243, 0.5657], dtype=float32)

    Reference:
      Brock, De, Smith, Simonyan, "High-performance large-scale image recognition
      without normalization", 2021, https://arxiv.org/abs/2102.06171
    """

    _default_scope = "unit"

    def __init__(
        self,
        clipping: float = 0.01,
        *,
        eps: float = 1e-3,
        rule: str = "unit",
        axes: Mapping[str, Sequence[int]] | None = None,
        **common: Unpack[CommonAndWarmup],
    ) -> None:
        """Make the policy and the clipper."""
        check_keywords(type(self).__name__, common, CommonAndWarmup)
        super().__init__(ParamRatio(clipping, eps=eps), **common)
        self.rule = check_choice("rule", rule, ("unit", "layer", "nfnets"))
        self._axes = _Axes(axes or {})
        if self.scope != "unit" and (rule != "unit" or axes):
            name, value = ("rule", rule) if rule != "unit" else ("axes", axes)
            way_out = "it says what a unit is; leave it out, or the scope"
            given = f'given at scope "unit" only, not {self.scope!r}'
            raise ValueError(format_error(name, given, value, way_out))

    def _arguments(self) -> dict[str, Any]:
        axes = {pattern: list(over) for pattern, over in self._axes.by_path.items()}
        return {**super()._arguments(), "rule": self.rule, "axes": axes or None}

    def _units(self) -> UnitsOf:
        return units_by(self.rule, self._axes.by_path)


class _Axes:
    """Hides a mapping from TensorFlow, which would track it for checkpoints."""

    def __init__(self, by_path: Mapping[str, Sequence[int]]) -> None:
        self.by_path = {path: tuple(over) for path, over in by_path.items()}


@_register
class ZClip(_Named):
    """Clip norms more than z deviations above their moving average: ZClip.

    T = mu + z * sigma, both moving averages; see `autoclip_core.ZScore`.

    Args:
      z: deviations above the mean, > 0; 2 to 3.
      alpha: the memory, in [0, 1).
      warmup_steps: norms recorded before anything is clipped, >= 0.
      target: what a clipped norm becomes: "reciprocal" (the larger the spike, the
        nearer to the mean), "mean" or "threshold".
      record: what is learned of a clipped norm: "winsorized", "applied" (the paper's,
        which never follows a lasting rise), "raw" or "none".
      **common: see `Clipper`; the scope is "global" unless given.

    Raises:
      TypeError, ValueError: an argument breaks its rule; the message says which.

    >>> weight = keras.Variable([0.0])
    >>> clip = ZClip(2.0, warmup_steps=2, target="threshold")
    >>> for norm in [1.0, 3.0, 8.0]:
    ...     [(gradient, _)] = clip([(keras.ops.array([norm]), weight)])
    >>> keras.ops.convert_to_numpy(gradient)
    array([4.], dtype=float32)

    Reference:
      Kumar, Owen, Roy Chowdhury, Guera, "ZClip: Adaptive spike mitigation for LLM
      pre-training", 2025, https://arxiv.org/abs/2504.02507
    """

    _default_scope = "global"

    def __init__(
        self,
        z: float = 2.5,
        *,
        alpha: float = 0.97,
        warmup_steps: int = 25,
        target: str = "reciprocal",
        record: str = "winsorized",
        **common: Unpack[Common],
    ) -> None:
        """Make the policy and the clipper."""
        check_keywords(type(self).__name__, common, Common)
        policy = ZScore(
            z, alpha=alpha, warmup_steps=warmup_steps, target=target, record=record
        )
        super().__init__(policy, **common)


@_register
class AdaGC(_Named):
    """Clip each variable to a ratio of the moving average of its clipped norm: AdaGC.

    T = ratio * average; see `autoclip_core.EmaRatio`.

    Most steps are clipped, a little: it is a soft normaliser, and its threshold rises
    by at most 0.1 % a step. For rare spikes alone take a ratio of 2 or 3. The paper
    clips the global norm during the warm-up; for that, put a `NormClip` before this.

    Args:
      ratio: the threshold over the average, > 1.
      beta: the memory, in [0, 1).
      warmup_steps: norms of a row before its average takes over, >= 0.
      warmup_threshold: the threshold until then, > 0.
      **common: see `Clipper`.

    Raises:
      TypeError, ValueError: an argument breaks its rule; the message says which.

    >>> weight, clip = keras.Variable([0.0]), AdaGC(2.0, warmup_steps=0)
    >>> for norm in [1.0, 4.0]:
    ...     [(gradient, _)] = clip([(keras.ops.array([norm]), weight)])
    >>> keras.ops.convert_to_numpy(gradient)
    array([2.], dtype=float32)

    Reference:
      Wang, Li, Chen et al., "AdaGC: Improving training stability for large language
      model pretraining", 2025, https://arxiv.org/abs/2502.11034
    """

    def __init__(
        self,
        ratio: float = 1.05,
        *,
        beta: float = 0.98,
        warmup_steps: int = 100,
        warmup_threshold: float = 1.0,
        **common: Unpack[Common],
    ) -> None:
        """Make the policy and the clipper."""
        check_keywords(type(self).__name__, common, Common)
        policy = EmaRatio(
            ratio,
            beta=beta,
            warmup_steps=warmup_steps,
            warmup_threshold=warmup_threshold,
        )
        super().__init__(policy, **common)


@_register
class NormClip(_Named):
    """Clip to a constant norm, as `global_clipnorm` does, and say what was done.

    T = max_norm.

    Unlike there, gradients are clipped after the replicas' were summed, duplicate
    slices of an embedding are summed before the norm, and a NaN does not spread.

    Args:
      max_norm: the threshold, > 0.
      **common: see `Clipper`; the scope is "global" unless given.

    Raises:
      TypeError, ValueError: an argument breaks its rule; the message says which.

    >>> weight, clip = keras.Variable([0.0, 0.0]), NormClip(1.0)
    >>> [(gradient, _)] = clip([(keras.ops.array([3.0, 4.0]), weight)])
    >>> keras.ops.convert_to_numpy(gradient)
    array([0.6, 0.8], dtype=float32)

    Reference:
      Pascanu, Mikolov, Bengio, "On the difficulty of training recurrent neural
      networks", 2013, https://arxiv.org/abs/1211.5063
    """

    _default_scope = "global"

    def __init__(self, max_norm: float, **common: Unpack[CommonAndWarmup]) -> None:
        """Make the policy and the clipper."""
        check_keywords(type(self).__name__, common, CommonAndWarmup)
        super().__init__(Fixed(max_norm), **common)
