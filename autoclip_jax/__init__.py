"""Adaptive gradient clipping for JAX, as optax gradient transformations.

This package may import `autoclip_core`, jax, optax and numpy. Read `clipper.py` first:
`decide_step` measures the updates and decides.
"""

from autoclip_core import __version__ as __version__

try:
    from .clipper import clip_by_policy as clip_by_policy
    from .factories import clip_by_ema_ratio as clip_by_ema_ratio
    from .factories import clip_by_mean_std as clip_by_mean_std
    from .factories import clip_by_param_ratio as clip_by_param_ratio
    from .factories import clip_by_quantile as clip_by_quantile
    from .factories import clip_by_zscore as clip_by_zscore
    from .metrics import clip_metrics as clip_metrics
    from .metrics import row_names as row_names
    from .opt_state.check_state import check_state as check_state
    from .opt_state.upgrade_state import upgrade_state as upgrade_state
    from .schedule import OptaxSchedule as OptaxSchedule
    from .skip import check_skips as check_skips
    from .skip import skip_steps as skip_steps
    from .skip_state import SkipState as SkipState
    from .state import ClipState as ClipState
    from .state import TrustState as TrustState
    from .trust import trust_clip as trust_clip
except ModuleNotFoundError as error:
    if error.name not in ("jax", "optax"):
        raise
    raise ModuleNotFoundError(
        f"autoclip_jax needs {error.name}; install it with: "
        'pip install "autoclip-toolkit[jax]"',
        name=error.name,
    ) from error
