"""The named clippers: each is `Clipper` with one policy and that policy's arguments."""

from inspect import signature
from typing import Any, Unpack

from autoclip_core import EmaRatio, Fixed, MeanStd, ParamRatio, Policy, Quantile, ZScore
from autoclip_core.checks import check_choice, format_error
from autoclip_core.clipper.settings import check_keywords
from autoclip_core.clipper.units import Units, nfnets_units, one_unit
from autoclip_core.policy import get_arguments

from .clipper import Clipper
from .rows.groups import NamedParameter, find_units
from .rows.read import ParametersLike
from .rows.settings import PolicyKeywords, WarmupKeywords, check_keys


class _Named(Clipper):
    """A clipper of one policy; a group may set arguments of that policy."""

    _keywords: Any = WarmupKeywords
    """The keywords of the constructor, in addition to those of the policy."""

    def __init__(
        self, parameters: ParametersLike, policy: Policy, /, **keywords: Any
    ) -> None:
        """Refuse unknown keywords, and create the clipper."""
        # Both are positional only, so that a keyword `policy` is refused by name.
        check_keywords(type(self), keywords, self._keywords)
        super().__init__(parameters, policy, **keywords)

    def _get_arguments(self) -> dict[str, Any]:
        return get_arguments(self.policy)

    @staticmethod
    def _make_group_policy(policy: Policy, overrides: dict[str, Any]) -> Policy:
        check_keys(overrides, signature(type(policy)).parameters)
        return type(policy)(**{**get_arguments(policy), **overrides})


class QuantileClip(_Named):
    """Clip to a quantile of the recent norms: AutoClip, `Quantile`.

    `autoclip_core.Quantile` documents the arguments of the policy, and `Clipper` all
    others. Each parameter has its own history by default. The paper keeps one history
    for all parameters: `scope="global"`.

    >>> import torch
    >>> weight = torch.nn.Parameter(torch.zeros(2))
    >>> clipper = QuantileClip([weight], 0.5, history_length=100)
    >>> for norm in [1.0, 3.0, 8.0]:
    ...     weight.grad = torch.tensor([norm, 0.0])
    ...     decision = clipper.step()
    >>> weight.grad
    tensor([2., 0.])
    """

    def __init__(
        self,
        parameters: ParametersLike,
        quantile: float = 0.9,
        *,
        history_length: int | None = 1000,
        include_current: bool = False,
        **common: Unpack[WarmupKeywords],
    ) -> None:
        policy = Quantile(
            quantile, history_length=history_length, include_current=include_current
        )
        super().__init__(parameters, policy, **common)


class StandardClip(_Named):
    """Clip to the mean plus k standard deviations of the recent norms: `MeanStd`.

    `autoclip_core.MeanStd` documents the arguments of the policy, and `Clipper` all
    others. Each parameter has its own history by default.

    >>> import torch
    >>> weight = torch.nn.Parameter(torch.zeros(2))
    >>> clipper = StandardClip([weight], 1.0, history_length=32)
    >>> for norm in [1.0, 3.0, 10.0]:
    ...     weight.grad = torch.tensor([norm, 0.0])
    ...     decision = clipper.step()
    >>> decision.threshold
    tensor([3.4142])
    """

    def __init__(
        self,
        parameters: ParametersLike,
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
        super().__init__(parameters, policy, **common)


def _find_whole(named: NamedParameter) -> Units:
    return one_unit(named.parameter.shape)


def _find_nfnets_units(named: NamedParameter) -> Units:
    return nfnets_units(named.parameter.shape)


_UNIT_RULES = {"unit": find_units, "layer": _find_whole, "nfnets": _find_nfnets_units}
"""The values of `rule` of `AGC`."""


class AGC(_Named):
    """Clip each output unit to a fraction of its weights' norm: AGC, `ParamRatio`.

    `autoclip_core.ParamRatio` documents `clipping` and `eps`, and `Clipper` the
    keywords. The scope is "unit" by default. Pass the module rather than its
    parameters: the units of a transposed convolution or a normalisation layer are then
    correct. With bare parameters, each index of axis 0 is a unit. The paper excludes
    the classifier's weight: `exclude=["head.weight"]`.

    `rule` says what a unit is. "unit" is an output unit, and "layer" a whole parameter.
    "nfnets" takes the axes of the NFNets reference and of optax, which expect kernels
    in JAX's layout.

    >>> import torch
    >>> layer = torch.nn.Linear(2, 1, bias=False)
    >>> _ = torch.nn.init.constant_(layer.weight, 1.0)
    >>> layer.weight.grad = torch.tensor([[3.0, 4.0]])
    >>> decision = AGC(layer, 0.5).step()
    >>> layer.weight.grad
    tensor([[0.4243, 0.5657]])
    """

    _default_scope = "unit"

    def __init__(
        self,
        parameters: ParametersLike,
        clipping: float = 0.01,
        *,
        eps: float = 1e-3,
        rule: str = "unit",
        **common: Unpack[WarmupKeywords],
    ) -> None:
        self.rule = check_choice("rule", rule, tuple(_UNIT_RULES))
        self._find_units = _UNIT_RULES[rule]
        scope, is_global = common.get("scope"), common.get("global_clipping")
        if rule != "unit" and (scope not in (None, "unit") or is_global):
            given = 'scope="global"' if scope is None else f"scope={scope!r}"
            way_out = "a rule says what a unit is; leave it out, or the scope"
            error = format_error("rule", f'"unit" with {given}', rule, way_out)
            raise ValueError(error)
        super().__init__(parameters, ParamRatio(clipping, eps=eps), **common)

    def _get_arguments(self) -> dict[str, Any]:
        return {**super()._get_arguments(), "rule": self.rule}

    def _describe(self) -> dict[str, Any]:
        described = super()._describe()
        return {**described, "settings": {**described["settings"], "rule": self.rule}}


class ZClip(_Named):
    """Clip norms more than z deviations above their moving average: ZClip, `ZScore`.

    `autoclip_core.ZScore` documents the arguments of the policy, and `Clipper` all
    others. The scope is "global" by default. `warmup_steps` belongs to the policy,
    which clips nothing during the warm-up: there is no `warmup_threshold`.

    >>> import torch
    >>> weight = torch.nn.Parameter(torch.zeros(1))
    >>> clipper = ZClip([weight], 2.0, warmup_steps=2, target="threshold")
    >>> for norm in [1.0, 3.0, 8.0]:
    ...     weight.grad = torch.tensor([norm])
    ...     decision = clipper.step()
    >>> weight.grad
    tensor([4.])
    """

    _default_scope = "global"
    _keywords = PolicyKeywords

    def __init__(
        self,
        parameters: ParametersLike,
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
        super().__init__(parameters, policy, **common)


class AdaGC(_Named):
    """Clip to a ratio of the moving average of the clipped norm: AdaGC, `EmaRatio`.

    `autoclip_core.EmaRatio` documents the arguments of the policy, and `Clipper` all
    others. Each parameter has its own average by default. `warmup_steps` and
    `warmup_threshold` belong to the policy. The paper clips the global norm during the
    warm-up; to do the same, step a `NormClip` before this clipper.

    >>> import torch
    >>> weight = torch.nn.Parameter(torch.zeros(1))
    >>> clipper = AdaGC([weight], 2.0, warmup_steps=0)
    >>> for norm in [1.0, 4.0]:
    ...     weight.grad = torch.tensor([norm])
    ...     decision = clipper.step()
    >>> weight.grad
    tensor([2.])
    """

    _keywords = PolicyKeywords

    def __init__(
        self,
        parameters: ParametersLike,
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
        super().__init__(parameters, policy, **common)


class NormClip(_Named):
    """Clip to a constant norm, as `clip_grad_norm_` does: `Fixed`.

    `autoclip_core.Fixed` documents `max_norm`, and `Clipper` the keywords. The scope is
    "global" by default. Unlike `clip_grad_norm_`, it returns a decision and adds
    nothing to the divisor. A gradient within the limit is unchanged bit for bit, a
    parameter that is listed twice counts once, and a NaN does not spread.

    >>> import torch
    >>> weight = torch.nn.Parameter(torch.zeros(2))
    >>> weight.grad = torch.tensor([3e-7, 4e-7])
    >>> decision = NormClip([weight], 1e-7).step()
    >>> weight.grad
    tensor([6.0000e-08, 8.0000e-08])
    """

    _default_scope = "global"

    def __init__(
        self,
        parameters: ParametersLike,
        max_norm: float,
        **common: Unpack[WarmupKeywords],
    ) -> None:
        super().__init__(parameters, Fixed(max_norm), **common)
