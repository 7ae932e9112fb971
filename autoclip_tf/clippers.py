"""The named clippers: each is `Clipper` with one policy and the policy's arguments.

A policy of `autoclip_core` documents its arguments, their ranges and its source, and
`Clipper` documents the common keywords. Both raise the errors. The docstrings here say
only what is different in Keras.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Unpack

import keras

from autoclip_core import EmaRatio, Fixed, MeanStd, ParamRatio, Quantile, ZScore
from autoclip_core.checks import check_choice, format_error
from autoclip_core.clipper.settings import PolicyKeywords, WarmupKeywords
from autoclip_core.policy import get_arguments

from .clipper import Clipper
from .layouts import UnitsOf, make_unit_rule

_register = keras.saving.register_keras_serializable("autoclip_tf")


class _Named(Clipper):
    """A clipper whose configuration holds the arguments of its policy."""

    def _arguments(self) -> dict[str, Any]:
        return get_arguments(self.policy)


@_register
class QuantileClip(_Named):
    """`Clipper` with `autoclip_core.Quantile`: a quantile of the last norms (AutoClip).

    Each variable has a history by default. The paper has one for all variables:
    `global_clipping=True`. `history_length` must be a number: a graph cannot hold a
    history without bound.

    >>> weight, clip = keras.Variable([0.0, 0.0]), QuantileClip(quantile=0.5)
    >>> for norm in [1.0, 3.0, 8.0]:
    ...     [(gradient, _)] = clip([(keras.ops.array([norm, 0.0]), weight)])
    >>> keras.ops.convert_to_numpy(gradient)
    array([2., 0.], dtype=float32)
    """

    def __init__(
        self,
        quantile: float = 0.9,
        *,
        history_length: int | None = 1000,
        include_current: bool = False,
        **common: Unpack[WarmupKeywords],
    ) -> None:
        policy = Quantile(
            quantile, history_length=history_length, include_current=include_current
        )
        super().__init__(policy, **common)


@_register
class StandardClip(_Named):
    """`Clipper` with `autoclip_core.MeanStd`: mean plus k standard deviations.

    `history_length` must be a number: a graph cannot hold a history without bound.

    >>> weight, clip = keras.Variable([0.0]), StandardClip(1.0, history_length=32)
    >>> for norm in [1.0, 3.0, 10.0]:
    ...     [_] = clip([(keras.ops.array([norm]), weight)])
    >>> clip.decision.threshold
    array([3.4142137], dtype=float32)
    """

    def __init__(
        self,
        deviations: float = 2.0,
        *,
        history_length: int | None = 1000,
        log: bool = False,
        ddof: int = 1,
        include_current: bool = False,
        **common: Unpack[WarmupKeywords],
    ) -> None:
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
    """`Clipper` with `autoclip_core.ParamRatio`: adaptive gradient clipping (AGC).

    The default scope is "unit". The axes of a unit follow from the path of a variable,
    as long as layers have their default names; see `autoclip_tf.layouts`. The paper
    leaves out the weight of the classifier: `exclude="*/head/kernel"`.

    Args:
      rule: "unit"; "layer", each variable as a whole; or "nfnets", the axes of the
        NFNets reference and of optax.
      axes: exceptions to the rule, from the path of a variable, or a pattern, to the
        axes of a unit's norm; `axes_by_layer(model)` returns such a dict.

    >>> weight, clip = keras.Variable([[1.0], [1.0]]), AGC(0.5)
    >>> [(gradient, _)] = clip([(keras.ops.array([[3.0], [4.0]]), weight)])
    >>> keras.ops.convert_to_numpy(gradient).ravel().round(4)
    array([0.4243, 0.5657], dtype=float32)
    """

    _default_scope = "unit"

    def __init__(
        self,
        clipping: float = 0.01,
        *,
        eps: float = 1e-3,
        rule: str = "unit",
        axes: Mapping[str, Sequence[int]] | None = None,
        **common: Unpack[WarmupKeywords],
    ) -> None:
        super().__init__(ParamRatio(clipping, eps=eps), **common)
        self.rule = check_choice("rule", rule, ("unit", "layer", "nfnets"))
        self._axes = _UntrackedAxes(axes or {})
        if self.scope != "unit" and (rule != "unit" or axes):
            name, value = ("rule", rule) if rule != "unit" else ("axes", axes)
            way_out = "it defines a unit; leave out this argument, or the scope"
            rule = f'given only at scope "unit", not at {self.scope!r}'
            raise ValueError(format_error(name, rule, value, way_out))

    def _arguments(self) -> dict[str, Any]:
        axes = {pattern: list(over) for pattern, over in self._axes.by_path.items()}
        return {**super()._arguments(), "rule": self.rule, "axes": axes or None}

    def _units(self) -> UnitsOf:
        return make_unit_rule(self.rule, self._axes.by_path)


class _UntrackedAxes:
    """Hides a mapping from TensorFlow, which would track it for checkpoints."""

    def __init__(self, by_path: Mapping[str, Sequence[int]]) -> None:
        self.by_path = {path: tuple(over) for path, over in by_path.items()}


@_register
class ZClip(_Named):
    """`Clipper` with `autoclip_core.ZScore`: a moving mean plus z deviations (ZClip).

    The default scope is "global".

    >>> weight = keras.Variable([0.0])
    >>> clip = ZClip(2.0, warmup_steps=2, target="threshold")
    >>> for norm in [1.0, 3.0, 8.0]:
    ...     [(gradient, _)] = clip([(keras.ops.array([norm]), weight)])
    >>> keras.ops.convert_to_numpy(gradient)
    array([4.], dtype=float32)
    """

    _default_scope = "global"
    _keywords = PolicyKeywords

    def __init__(
        self,
        z: float = 2.5,
        *,
        alpha: float = 0.97,
        warmup_steps: int = 25,
        target: str = "reciprocal",
        record: str = "winsorized",
        log: bool = False,
        **common: Unpack[PolicyKeywords],
    ) -> None:
        policy = ZScore(
            z,
            alpha=alpha,
            warmup_steps=warmup_steps,
            target=target,
            record=record,
            log=log,
        )
        super().__init__(policy, **common)


@_register
class AdaGC(_Named):
    """`Clipper` with `autoclip_core.EmaRatio`: a ratio to a moving average (AdaGC).

    The paper clips the global norm during the warm-up; for that, put a `NormClip`
    before this clipper.

    >>> weight, clip = keras.Variable([0.0]), AdaGC(2.0, warmup_steps=0)
    >>> for norm in [1.0, 4.0]:
    ...     [(gradient, _)] = clip([(keras.ops.array([norm]), weight)])
    >>> keras.ops.convert_to_numpy(gradient)
    array([2.], dtype=float32)
    """

    _keywords = PolicyKeywords

    def __init__(
        self,
        ratio: float = 1.05,
        *,
        beta: float = 0.98,
        warmup_steps: int = 100,
        warmup_threshold: float = 1.0,
        **common: Unpack[PolicyKeywords],
    ) -> None:
        policy = EmaRatio(
            ratio,
            beta=beta,
            warmup_steps=warmup_steps,
            warmup_threshold=warmup_threshold,
        )
        super().__init__(policy, **common)


@_register
class NormClip(_Named):
    """`Clipper` with `autoclip_core.Fixed`: a constant norm, like `global_clipnorm`.

    The default scope is "global". Three things differ from `global_clipnorm`. Gradients
    are clipped after the sum over replicas. Duplicate slices of an embedding are summed
    before the norm. A NaN does not spread.

    >>> weight, clip = keras.Variable([0.0, 0.0]), NormClip(1.0)
    >>> [(gradient, _)] = clip([(keras.ops.array([3.0, 4.0]), weight)])
    >>> keras.ops.convert_to_numpy(gradient)
    array([0.6, 0.8], dtype=float32)
    """

    _default_scope = "global"

    def __init__(self, max_norm: float, **common: Unpack[WarmupKeywords]) -> None:
        super().__init__(Fixed(max_norm), **common)
