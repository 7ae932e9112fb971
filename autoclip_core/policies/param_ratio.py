"""A ratio to the norm of the parameters: adaptive gradient clipping, AGC, and LARC."""

from dataclasses import KW_ONLY, dataclass
from typing import Any

import numpy as np

from autoclip_core.checks import check_positive
from autoclip_core.policy import Policy, set_fields
from autoclip_core.scale import XP, Array, Limit


@dataclass(frozen=True, repr=False)
class ParamRatio(Policy):
    """Clip to a fraction of the parameters' norm: T = R = clipping * max(|w|, eps).

    |w| is the norm of the parameters in the row. At scope "unit", where each output
    unit is a row, this policy is AGC. It limits how far one step may move a unit,
    relative to the size of the unit. It has no history.

    The paper does not clip the weight of the classifier: exclude it by name.

    Args:
      clipping: the ratio, > 0. Use 0.01 for batches of 1024 and more, and up to 0.16
        for small batches.
      eps: the lower bound of |w|, > 0. It lets a unit that starts at zero move.

    Raises:
      TypeError: an argument is not a number.
      ValueError: an argument is outside its range.

    >>> from autoclip_core import decide
    >>> policy = ParamRatio(0.1)
    >>> _, decision = decide(policy, policy.init(rows=2), [1.0, 1.0],
    ...                      param_norms=[5.0, 0.0])
    >>> [float(f"{threshold:.4g}") for threshold in decision.threshold]
    [0.5, 0.0001]

    Reference:
      Brock, De, Smith, Simonyan, "High-performance large-scale image recognition
      without normalization", 2021, https://arxiv.org/abs/2102.06171
    """

    clipping: float = 0.01
    _: KW_ONLY
    eps: float = 1e-3

    def __post_init__(self) -> None:
        """Check the arguments."""
        clipping = check_positive("clipping", self.clipping)
        way_out = "it lets parameters that start at zero move; 1e-3 is usual"
        eps = check_positive("eps", self.eps, way_out)
        set_fields(self, clipping=clipping, eps=eps)

    @property
    def needs_param_norms(self) -> bool:
        """True: the threshold is a fraction of the norms of the parameters."""
        return True

    def limit(
        self, state: Any, norms: Array = None, *, param_norms: Array = None, xp: XP = np
    ) -> Limit:
        """Return `clipping` times the norm of the parameters.

        Raises:
          ValueError: `param_norms` is None.
        """
        if param_norms is None:
            raise ValueError(
                "param_norms must be given, got None: ParamRatio limits a gradient by "
                "the norm of its parameters; pass param_norms=, one per row"
            )
        # A norm that is NaN or infinite gives no threshold: eps replaces it.
        is_valid = xp.isfinite(param_norms) & (param_norms > self.eps)
        threshold = self.clipping * xp.where(is_valid, param_norms, self.eps)
        return Limit(threshold, threshold)


@dataclass(frozen=True, repr=False)
class TrustRatio(ParamRatio):
    """The threshold of LARC: T = R = clipping * |w|, and none for weights of 0.

    A row whose weights are 0 is left alone. `eps` is the largest |w| that counts as 0.
    """

    eps: float = 1e-30

    def limit(
        self, state: Any, norms: Array = None, *, param_norms: Array = None, xp: XP = np
    ) -> Limit:
        """Return `clipping` times the norm of the parameters.

        Raises:
          ValueError: `param_norms` is None.
        """
        threshold = super().limit(state, norms, param_norms=param_norms, xp=xp)[0]
        has_norm = xp.isfinite(param_norms) & (param_norms > self.eps)
        threshold = xp.where(has_norm, threshold, float("inf"))
        return Limit(threshold, threshold)
