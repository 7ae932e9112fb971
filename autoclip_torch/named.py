"""The named clippers: each is `Clipper` with one policy and its arguments."""

from typing import Any, Unpack

from autoclip_core import (
    EmaRatio,
    Fixed,
    MeanStd,
    ParamRatio,
    Policy,
    Quantile,
    ZScore,
)
from autoclip_core.checks import check_choice, format_error
from autoclip_core.clipper.settings import check_keywords
from autoclip_core.clipper.units import Units, nfnets_units, one_unit
from autoclip_core.policy import get_arguments

from .clipper import Clipper
from .rows.groups import Given, NamedParameter
from .rows.settings import Common, CommonAndWarmup, check_keys


class _Named(Clipper):
    """A clipper whose groups may set the arguments of its policy."""

    def _group_policy(self, overrides: dict[str, Any]) -> Policy:
        own = get_arguments(self.policy)
        check_keys(overrides, own)
        return type(self.policy)(**{**own, **overrides})


class QuantileClip(_Named):
    """Clip to a quantile of the norms of the last steps: AutoClip.

    T = quantile(the last norms, q).

    One history per parameter by default; `global_clipping=True` keeps one for all, as
    the paper does. q = 0.9 clips about 10 % of the steps. The paper's "percentile 10"
    is `quantile=0.1, history_length=None, include_current=True`.

    Args:
      parameters: see `Clipper`.
      quantile: q, in [0, 1].
      history_length: steps that are remembered, >= 1; None remembers all (of
        plain tensors on the CPU).
      include_current: whether the current norm belongs to the history that limits it.
      **common: see `Clipper`.

    Raises:
      TypeError, ValueError: an argument breaks its rule; the message says which.

    >>> import torch
    >>> weight = torch.nn.Parameter(torch.zeros(2))
    >>> clipper = QuantileClip([weight], quantile=0.5, history_length=100)
    >>> for norm in [1.0, 3.0, 8.0]:
    ...     weight.grad = torch.tensor([norm, 0.0])
    ...     decision = clipper.step()
    >>> weight.grad
    tensor([2., 0.])

    Reference:
      Seetharaman, Wichern, Pardo, Le Roux, "AutoClip: Adaptive gradient clipping for
      source separation networks", 2020, https://arxiv.org/abs/2007.14469
    """

    def __init__(
        self,
        parameters: Given,
        *,
        quantile: float = 0.9,
        history_length: int | None = 1000,
        include_current: bool = False,
        **common: Unpack[CommonAndWarmup],
    ) -> None:
        """Make the policy and the clipper."""
        check_keywords(type(self).__name__, common, CommonAndWarmup)
        policy = Quantile(
            quantile, history_length=history_length, include_current=include_current
        )
        super().__init__(parameters, policy, **common)


class StandardClip(_Named):
    """Clip to the mean plus k standard deviations of the norms of the last steps.

    T = mean + k * deviation, or with `log` exp of that of ln(norm).

    Args:
      parameters: see `Clipper`.
      deviations: k, finite; 1 to 4.
      history_length: steps that are remembered, >= 1; None remembers all (of
        plain tensors on the CPU).
      log: whether to take mean and deviation of the logarithms.
      ddof: the deviation divides by n - ddof; nothing is clipped before
        max(2, ddof + 1) steps.
      include_current: whether the current norm belongs to the history that limits it.
      **common: see `Clipper`.

    Raises:
      TypeError, ValueError: an argument breaks its rule; the message says which.

    >>> import torch
    >>> weight = torch.nn.Parameter(torch.zeros(2))
    >>> clipper = StandardClip([weight], deviations=1.0, history_length=32)
    >>> for norm in [1.0, 3.0, 10.0]:
    ...     weight.grad = torch.tensor([norm, 0.0])
    ...     decision = clipper.step()
    >>> decision.threshold
    tensor([3.4142])

    Reference:
      Chen, Firat, Bapna et al., "The best of both worlds: Combining recent advances in
      neural machine translation", 2018, https://arxiv.org/abs/1804.09849
    """

    def __init__(
        self,
        parameters: Given,
        *,
        deviations: float = 2.0,
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
        super().__init__(parameters, policy, **common)


class AGC(_Named):
    """Clip each output unit to a fraction of its weights' norm: adaptive clipping, AGC.

    T = clipping * max(|w|, eps), with |w| the norm of the unit's weights.

    Give the module, not its parameters, and the units of a transposed convolution or a
    normalisation layer are right too; from bare parameters, each index of axis 0 is a
    unit. The paper leaves out the classifier's weight: `exclude=["head.weight"]`.

    Args:
      parameters: see `Clipper`.
      clipping: the ratio, > 0; 0.01 for batches of 1024 and more, up to 0.16 for small
        ones.
      eps: the floor of the weights' norm, > 0, so that a unit that starts at zero can
        move.
      rule: "unit"; "layer", each parameter as a whole; or "nfnets", the axes of the
        NFNets reference and of optax, which expect kernels as JAX lays them out.
      **common: see `Clipper`; the scope is "unit" unless given.

    Raises:
      TypeError, ValueError: an argument breaks its rule; the message says which.

    >>> import torch
    >>> layer = torch.nn.Linear(2, 1, bias=False)
    >>> _ = torch.nn.init.constant_(layer.weight, 1.0)
    >>> layer.weight.grad = torch.tensor([[3.0, 4.0]])
    >>> decision = AGC(layer, clipping=0.5).step()
    >>> layer.weight.grad
    tensor([[0.4243, 0.5657]])

    Reference:
      Brock, De, Smith, Simonyan, "High-performance large-scale image recognition
      without normalization", 2021, https://arxiv.org/abs/2102.06171
    """

    _default_scope = "unit"

    def __init__(
        self,
        parameters: Given,
        *,
        clipping: float = 0.01,
        eps: float = 1e-3,
        rule: str = "unit",
        **common: Unpack[CommonAndWarmup],
    ) -> None:
        """Make the policy and the clipper."""
        check_keywords(type(self).__name__, common, CommonAndWarmup)
        self.rule = check_choice("rule", rule, ("unit", "layer", "nfnets"))
        scope, everything = common.get("scope"), common.get("global_clipping")
        if rule != "unit" and (scope not in (None, "unit") or everything):
            given = 'scope="global"' if scope is None else f"scope={scope!r}"
            way_out = "a rule says what a unit is; leave it out, or the scope"
            raise ValueError(
                format_error("rule", f'"unit" with {given}', rule, way_out)
            )
        super().__init__(parameters, ParamRatio(clipping, eps=eps), **common)

    def _units(self, named: NamedParameter) -> Units:
        if self.rule == "nfnets":
            return nfnets_units(named.parameter.shape)
        if self.rule == "layer":
            return one_unit(named.parameter.shape)
        return super()._units(named)

    def _describe(self) -> dict[str, Any]:
        described = super()._describe()
        return {**described, "settings": {**described["settings"], "rule": self.rule}}


class ZClip(_Named):
    """Clip norms more than z deviations above their moving average: ZClip.

    T = mu + z * sigma, both moving averages; see `autoclip_core.ZScore`.

    Args:
      parameters: see `Clipper`.
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

    >>> import torch
    >>> weight = torch.nn.Parameter(torch.zeros(1))
    >>> clipper = ZClip([weight], z=2.0, warmup_steps=2, target="threshold")
    >>> for norm in [1.0, 3.0, 8.0]:
    ...     weight.grad = torch.tensor([norm])
    ...     decision = clipper.step()
    >>> weight.grad
    tensor([4.])

    Reference:
      Kumar, Owen, Roy Chowdhury, Guera, "ZClip: Adaptive spike mitigation for LLM
      pre-training", 2025, https://arxiv.org/abs/2504.02507
    """

    _default_scope = "global"

    def __init__(
        self,
        parameters: Given,
        *,
        z: float = 2.5,
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
        super().__init__(parameters, policy, **common)


class AdaGC(_Named):
    """Clip each parameter to a ratio of the moving average of its clipped norm: AdaGC.

    T = ratio * average; see `autoclip_core.EmaRatio`.

    Most steps are clipped, a little: it is a soft normaliser, and its threshold rises
    by at most 0.1 % a step. For rare spikes alone take a ratio of 2 or 3. The paper
    clips the global norm during the warm-up; for that, step a `NormClip` before this.

    Args:
      parameters: see `Clipper`.
      ratio: the threshold over the average, > 1.
      beta: the memory, in [0, 1).
      warmup_steps: norms of a row before its average takes over, >= 0.
      warmup_threshold: the threshold until then, > 0.
      **common: see `Clipper`.

    Raises:
      TypeError, ValueError: an argument breaks its rule; the message says which.

    >>> import torch
    >>> weight = torch.nn.Parameter(torch.zeros(1))
    >>> clipper = AdaGC([weight], ratio=2.0, warmup_steps=0)
    >>> for norm in [1.0, 4.0]:
    ...     weight.grad = torch.tensor([norm])
    ...     decision = clipper.step()
    >>> weight.grad
    tensor([2.])

    Reference:
      Wang, Li, Chen et al., "AdaGC: Improving training stability for large language
      model pretraining", 2025, https://arxiv.org/abs/2502.11034
    """

    def __init__(
        self,
        parameters: Given,
        *,
        ratio: float = 1.05,
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
        super().__init__(parameters, policy, **common)


class NormClip(_Named):
    """Clip to a constant norm, as `clip_grad_norm_` does, and say what was done.

    T = max_norm.

    Unlike there, nothing is added to the divisor, a gradient within the limit keeps its
    bits, a parameter listed twice counts once, and a NaN does not spread.

    Args:
      parameters: see `Clipper`.
      max_norm: the threshold, > 0.
      **common: see `Clipper`; the scope is "global" unless given.

    Raises:
      TypeError, ValueError: an argument breaks its rule; the message says which.

    >>> import torch
    >>> weight = torch.nn.Parameter(torch.zeros(2))
    >>> weight.grad = torch.tensor([3e-7, 4e-7])
    >>> decision = NormClip([weight], max_norm=1e-7).step()
    >>> weight.grad
    tensor([6.0000e-08, 8.0000e-08])

    Reference:
      Pascanu, Mikolov, Bengio, "On the difficulty of training recurrent neural
      networks", 2013, https://arxiv.org/abs/1211.5063
    """

    _default_scope = "global"

    def __init__(
        self, parameters: Given, *, max_norm: float, **common: Unpack[CommonAndWarmup]
    ) -> None:
        """Make the policy and the clipper."""
        check_keywords(type(self).__name__, common, CommonAndWarmup)
        super().__init__(parameters, Fixed(max_norm), **common)
