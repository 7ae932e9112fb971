"""The named transformations: `clip_by_policy` with one policy and its arguments.

Their keywords are written out, because `optax.inject_hyperparams` reads the signature.
"""

from typing import Any

import jax
import optax

from autoclip_core import EmaRatio, MeanStd, ParamRatio, Quantile, ZScore

from .clipper import clip_by_policy
from .rows import Labels


def clip_by_quantile(
    quantile: float = 0.9,
    *,
    history_length: int = 1000,
    include_current: bool = False,
    scope: str | None = None,
    global_clipping: bool | None = None,
    labels: Labels = None,
    nonfinite: str = "zero",
    axis_name: Any = None,
    rule: str = "flax",
) -> optax.GradientTransformationExtraArgs:
    """Clip updates to a quantile of the norms of the last steps: AutoClip.

    T = quantile(the last norms, q).

    Args:
      quantile: q, in [0, 1]; 0.9 clips about 10 % of the steps.
      history_length: steps that are remembered, >= 1.
      include_current: whether the current norm belongs to the history that limits it.
      scope, global_clipping, labels, nonfinite, axis_name, rule: see
        `clip_by_policy`.

    Returns:
      A :class:`optax.GradientTransformationExtraArgs` object.

    Raises:
      TypeError, ValueError: an argument breaks its rule; the message says which.

    >>> import jax.numpy as jnp
    >>> tx = optax.chain(clip_by_quantile(0.5, scope="global"), optax.sgd(1.0))
    >>> params = jnp.zeros(1)
    >>> state = tx.init(params)
    >>> for norm in [1.0, 3.0, 8.0]:
    ...     updates, state = tx.update(jnp.array([norm]), state, params)
    >>> updates.tolist()
    [-2.0]

    References:
      Seetharaman et al., `AutoClip: Adaptive gradient clipping for source separation
      networks <https://arxiv.org/abs/2007.14469>`_, 2020
    """
    policy = Quantile(
        **_plain(
            quantile=quantile,
            history_length=history_length,
            include_current=include_current,
        )
    )
    return clip_by_policy(
        policy,
        scope=scope,
        global_clipping=global_clipping,
        labels=labels,
        nonfinite=nonfinite,
        axis_name=axis_name,
        rule=rule,
    )


def clip_by_mean_std(
    deviations: float = 2.0,
    *,
    history_length: int = 1000,
    log: bool = False,
    ddof: int = 1,
    include_current: bool = False,
    scope: str | None = None,
    global_clipping: bool | None = None,
    labels: Labels = None,
    nonfinite: str = "zero",
    axis_name: Any = None,
    rule: str = "flax",
) -> optax.GradientTransformationExtraArgs:
    """Clip updates to the mean plus k deviations of the norms of the last steps.

    T = mean + k * deviation, or with `log` exp of that of ln(norm).

    Args:
      deviations: k, finite; 1 to 4.
      history_length: steps that are remembered, >= 1.
      log: whether to take mean and deviation of the logarithms.
      ddof: the deviation divides by n - ddof.
      include_current: whether the current norm belongs to the history that limits it.
      scope, global_clipping, labels, nonfinite, axis_name, rule: see
        `clip_by_policy`.

    Returns:
      A :class:`optax.GradientTransformationExtraArgs` object.

    Raises:
      TypeError, ValueError: an argument breaks its rule; the message says which.

    >>> import jax.numpy as jnp
    >>> tx = clip_by_mean_std(1.0, history_length=32)
    >>> state = tx.init(jnp.zeros(1))
    >>> for norm in [1.0, 3.0, 10.0]:
    ...     updates, state = tx.update(jnp.array([norm]), state)
    >>> round(float(state.clip_threshold[0]), 4)
    3.4142

    References:
      Chen et al., `The best of both worlds: Combining recent advances in neural machine
      translation <https://arxiv.org/abs/1804.09849>`_, 2018
    """
    policy = MeanStd(
        **_plain(
            deviations=deviations,
            history_length=history_length,
            log=log,
            ddof=ddof,
            include_current=include_current,
        )
    )
    return clip_by_policy(
        policy,
        scope=scope,
        global_clipping=global_clipping,
        labels=labels,
        nonfinite=nonfinite,
        axis_name=axis_name,
        rule=rule,
    )


def clip_by_zscore(
    z: float = 2.5,
    *,
    alpha: float = 0.97,
    warmup_steps: int = 25,
    target: str = "reciprocal",
    record: str = "winsorized",
    scope: str | None = None,
    global_clipping: bool | None = None,
    labels: Labels = None,
    nonfinite: str = "zero",
    axis_name: Any = None,
    rule: str = "flax",
) -> optax.GradientTransformationExtraArgs:
    """Clip norms more than z deviations above their moving average: ZClip.

    T = mu + z * sigma, both moving averages; see `autoclip_core.ZScore`.

    Args:
      z: deviations above the mean, > 0; 2 to 3.
      alpha: the memory, in [0, 1).
      warmup_steps: norms recorded before anything is clipped, >= 0.
      target: what a clipped norm becomes: "reciprocal", "mean" or "threshold".
      record: what is learned of it: "winsorized", "applied", "raw" or "none".
      scope: see `clip_by_policy`, but "global" unless given.
      global_clipping, labels, nonfinite, axis_name, rule: see `clip_by_policy`.

    Returns:
      A :class:`optax.GradientTransformationExtraArgs` object.

    Raises:
      TypeError, ValueError: an argument breaks its rule; the message says which.

    >>> import jax.numpy as jnp
    >>> tx = clip_by_zscore(2.0, warmup_steps=2, target="threshold")
    >>> state = tx.init(jnp.zeros(1))
    >>> for norm in [1.0, 3.0, 8.0]:
    ...     updates, state = tx.update(jnp.array([norm]), state)
    >>> updates.tolist()
    [4.0]

    References:
      Kumar et al., `ZClip: Adaptive spike mitigation for LLM pre-training
      <https://arxiv.org/abs/2504.02507>`_, 2025
    """
    policy = ZScore(
        **_plain(
            z=z, alpha=alpha, warmup_steps=warmup_steps, target=target, record=record
        )
    )
    return clip_by_policy(
        policy,
        scope=_default("global", scope, global_clipping, labels),
        global_clipping=global_clipping,
        labels=labels,
        nonfinite=nonfinite,
        axis_name=axis_name,
        rule=rule,
    )


def clip_by_ema_ratio(
    ratio: float = 1.05,
    *,
    beta: float = 0.98,
    warmup_steps: int = 100,
    warmup_threshold: float = 1.0,
    scope: str | None = None,
    global_clipping: bool | None = None,
    labels: Labels = None,
    nonfinite: str = "zero",
    axis_name: Any = None,
    rule: str = "flax",
) -> optax.GradientTransformationExtraArgs:
    """Clip updates to a ratio of the moving average of their clipped norm: AdaGC.

    T = ratio * average; see `autoclip_core.EmaRatio`.

    Args:
      ratio: the threshold over the average, > 1.
      beta: the memory, in [0, 1).
      warmup_steps: norms of a row before its average takes over, >= 0.
      warmup_threshold: the threshold until then, > 0.
      scope, global_clipping, labels, nonfinite, axis_name, rule: see
        `clip_by_policy`.

    Returns:
      A :class:`optax.GradientTransformationExtraArgs` object.

    Raises:
      TypeError, ValueError: an argument breaks its rule; the message says which.

    >>> import jax.numpy as jnp
    >>> tx = clip_by_ema_ratio(2.0, warmup_steps=0)
    >>> state = tx.init(jnp.zeros(1))
    >>> for norm in [1.0, 4.0]:
    ...     updates, state = tx.update(jnp.array([norm]), state)
    >>> updates.tolist()
    [2.0]

    References:
      Wang et al., `AdaGC: Improving training stability for large language model
      pretraining <https://arxiv.org/abs/2502.11034>`_, 2025
    """
    policy = EmaRatio(
        **_plain(
            ratio=ratio,
            beta=beta,
            warmup_steps=warmup_steps,
            warmup_threshold=warmup_threshold,
        )
    )
    return clip_by_policy(
        policy,
        scope=scope,
        global_clipping=global_clipping,
        labels=labels,
        nonfinite=nonfinite,
        axis_name=axis_name,
        rule=rule,
    )


def clip_by_param_ratio(
    clipping: float = 0.01,
    *,
    eps: float = 1e-3,
    scope: str | None = None,
    global_clipping: bool | None = None,
    labels: Labels = None,
    nonfinite: str = "zero",
    axis_name: Any = None,
    rule: str = "flax",
) -> optax.GradientTransformationExtraArgs:
    """Clip each output unit to a fraction of its weights' norm: AGC.

    T = clipping * max(|w|, eps), with |w| the norm of the unit's weights.

    Args:
      clipping: the ratio, > 0.
      eps: the floor of the weights' norm, > 0.
      scope: see `clip_by_policy`, but "unit" unless given.
      global_clipping, labels, nonfinite, axis_name, rule: see `clip_by_policy`.

    Returns:
      A :class:`optax.GradientTransformationExtraArgs` object; `update` needs `params`.

    Raises:
      TypeError, ValueError: an argument breaks its rule; the message says which.

    >>> import jax.numpy as jnp
    >>> tx = clip_by_param_ratio(0.5)
    >>> params = jnp.array([3.0, 4.0])
    >>> updates, state = tx.update(jnp.array([6.0, 8.0]), tx.init(params), params)
    >>> updates.tolist()
    [1.5, 2.0]

    References:
      Brock et al., `High-performance large-scale image recognition without
      normalization <https://arxiv.org/abs/2102.06171>`_, 2021
    """
    policy = ParamRatio(**_plain(clipping=clipping, eps=eps))
    return clip_by_policy(
        policy,
        scope=_default("unit", scope, global_clipping, labels),
        global_clipping=global_clipping,
        labels=labels,
        nonfinite=nonfinite,
        axis_name=axis_name,
        rule=rule,
    )


def _plain(**settings: Any) -> dict[str, Any]:
    """Return the settings of a policy, which are plain numbers: they shape the trace.

    Raises:
      TypeError: `optax.inject_hyperparams` made an array of one.
    """
    for name, value in settings.items():
        if isinstance(value, jax.Array):
            raise TypeError(
                f"{name} must be a number known at tracing, got {value!r}; "
                f"under optax.inject_hyperparams name it in static_args: {[*settings]}"
            )
    return settings


def _default(
    default: str, scope: str | None, global_clipping: bool | None, labels: Labels
) -> str | None:
    """Return the scope, or a default where no argument says another."""
    said = any(value is not None for value in (scope, global_clipping, labels))
    return scope if said else default
