"""The named transformations: `clip_by_policy` with one policy and its arguments.

Their keywords are written out, because `optax.inject_hyperparams` reads the signature.
"""

from typing import Any

import optax

from autoclip_core import EmaRatio, MeanStd, ParamRatio, Quantile, ZScore

from .arguments import explain_arguments
from .clipper import make_transformation
from .gradients.rows import Labels, Mask, Scope, choose_scope


@explain_arguments()
def clip_by_quantile(
    quantile: float = 0.9,
    *,
    history_length: int = 1000,
    include_current: bool = False,
    scope: str | None = None,
    global_clipping: bool | None = None,
    labels: Labels = None,
    scale_only: Mask = None,
    norm: str = "l2",
    nonfinite: str = "zero",
    axis_name: Any = None,
    rule: str = "flax",
) -> optax.GradientTransformationExtraArgs:
    """Clip updates by the policy `autoclip_core.Quantile`, as AutoClip does.

    The policy documents the arguments before `scope`; `clip_by_policy` documents the
    later ones. JAX needs arrays of a fixed shape, so `history_length` must be a number.

    >>> import jax.numpy as jnp
    >>> tx = optax.chain(clip_by_quantile(0.5, scope="global"), optax.sgd(1.0))
    >>> params = jnp.zeros(1)
    >>> state = tx.init(params)
    >>> for norm in [1.0, 3.0, 8.0]:
    ...     updates, state = tx.update(jnp.array([norm]), state, params)
    >>> updates.tolist()
    [-2.0]
    """
    policy = Quantile(
        quantile, history_length=history_length, include_current=include_current
    )
    name = choose_scope(scope, global_clipping, labels)
    row_scope = Scope(name, labels, rule, scale_only, norm, axis_name)
    return make_transformation(policy, row_scope, nonfinite)


@explain_arguments()
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
    scale_only: Mask = None,
    norm: str = "l2",
    nonfinite: str = "zero",
    axis_name: Any = None,
    rule: str = "flax",
) -> optax.GradientTransformationExtraArgs:
    """Clip updates by the policy `autoclip_core.MeanStd`.

    The policy documents the arguments before `scope`; `clip_by_policy` documents the
    later ones. JAX needs arrays of a fixed shape, so `history_length` must be a number.

    >>> import jax.numpy as jnp
    >>> tx = clip_by_mean_std(1.0, history_length=32)
    >>> state = tx.init(jnp.zeros(1))
    >>> for norm in [1.0, 3.0, 10.0]:
    ...     updates, state = tx.update(jnp.array([norm]), state)
    >>> round(float(state.clip_threshold[0]), 4)
    3.4142
    """
    policy = MeanStd(
        deviations,
        history_length=history_length,
        log=log,
        ddof=ddof,
        include_current=include_current,
    )
    name = choose_scope(scope, global_clipping, labels)
    row_scope = Scope(name, labels, rule, scale_only, norm, axis_name)
    return make_transformation(policy, row_scope, nonfinite)


@explain_arguments("clip_by_policy({}, scope='global')")
def clip_by_zscore(
    z: float = 2.5,
    *,
    alpha: float = 0.97,
    warmup_steps: int = 25,
    target: str = "reciprocal",
    record: str = "winsorized",
    log: bool = False,
    scope: str | None = None,
    global_clipping: bool | None = None,
    labels: Labels = None,
    scale_only: Mask = None,
    norm: str = "l2",
    nonfinite: str = "zero",
    axis_name: Any = None,
    rule: str = "flax",
) -> optax.GradientTransformationExtraArgs:
    """Clip updates by the policy `autoclip_core.ZScore`, as ZClip does.

    The policy documents the arguments before `scope`; `clip_by_policy` documents the
    later ones. The default scope is "global".

    >>> import jax.numpy as jnp
    >>> tx = clip_by_zscore(2.0, warmup_steps=2, target="threshold")
    >>> state = tx.init(jnp.zeros(1))
    >>> for norm in [1.0, 3.0, 8.0]:
    ...     updates, state = tx.update(jnp.array([norm]), state)
    >>> updates.tolist()
    [4.0]
    """
    policy = ZScore(
        z,
        alpha=alpha,
        warmup_steps=warmup_steps,
        target=target,
        record=record,
        log=log,
    )
    name = choose_scope(scope, global_clipping, labels, "global")
    row_scope = Scope(name, labels, rule, scale_only, norm, axis_name)
    return make_transformation(policy, row_scope, nonfinite)


@explain_arguments()
def clip_by_ema_ratio(
    ratio: float = 1.05,
    *,
    beta: float = 0.98,
    warmup_steps: int = 100,
    warmup_threshold: float = 1.0,
    scope: str | None = None,
    global_clipping: bool | None = None,
    labels: Labels = None,
    scale_only: Mask = None,
    norm: str = "l2",
    nonfinite: str = "zero",
    axis_name: Any = None,
    rule: str = "flax",
) -> optax.GradientTransformationExtraArgs:
    """Clip updates by the policy `autoclip_core.EmaRatio`, as AdaGC does.

    The policy documents the arguments before `scope`; `clip_by_policy` documents the
    later ones.

    >>> import jax.numpy as jnp
    >>> tx = clip_by_ema_ratio(2.0, warmup_steps=0)
    >>> state = tx.init(jnp.zeros(1))
    >>> for norm in [1.0, 4.0]:
    ...     updates, state = tx.update(jnp.array([norm]), state)
    >>> updates.tolist()
    [2.0]
    """
    policy = EmaRatio(
        ratio, beta=beta, warmup_steps=warmup_steps, warmup_threshold=warmup_threshold
    )
    name = choose_scope(scope, global_clipping, labels)
    row_scope = Scope(name, labels, rule, scale_only, norm, axis_name)
    return make_transformation(policy, row_scope, nonfinite)


@explain_arguments("clip_by_policy({}, scope='unit')")
def clip_by_param_ratio(
    clipping: float = 0.01,
    *,
    eps: float = 1e-3,
    scope: str | None = None,
    global_clipping: bool | None = None,
    labels: Labels = None,
    scale_only: Mask = None,
    norm: str = "l2",
    nonfinite: str = "zero",
    axis_name: Any = None,
    rule: str = "flax",
) -> optax.GradientTransformationExtraArgs:
    """Clip updates by the policy `autoclip_core.ParamRatio`: AGC.

    The policy documents the arguments before `scope`; `clip_by_policy` documents the
    later ones. The default scope is "unit". `update` needs `params`.

    >>> import jax.numpy as jnp
    >>> tx = clip_by_param_ratio(0.5)
    >>> params = jnp.array([3.0, 4.0])
    >>> updates, state = tx.update(jnp.array([6.0, 8.0]), tx.init(params), params)
    >>> updates.tolist()
    [1.5, 2.0]
    """
    policy = ParamRatio(clipping, eps=eps)
    name = choose_scope(scope, global_clipping, labels, "unit")
    row_scope = Scope(name, labels, rule, scale_only, norm, axis_name)
    return make_transformation(policy, row_scope, nonfinite)
