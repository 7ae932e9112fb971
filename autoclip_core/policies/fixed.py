"""A constant threshold: the baseline, and the smallest policy."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from autoclip_core.checks import check_limit
from autoclip_core.policy import NoState as NoState  # pickles name it here
from autoclip_core.policy import Policy, set_fields
from autoclip_core.scale import XP, Array, Limit


@dataclass(frozen=True, repr=False)
class Fixed(Policy):
    """Clip every norm above one constant: T = R = max_norm.

    `Fixed(float("inf"))` clips nothing: the clipper only observes the norms.

    The threshold has the unit of a gradient norm. A good value depends on the loss, on
    the scale of the loss and on the model. The threshold does not adapt to any of them.

    Args:
      max_norm: the threshold, > 0. Usual values are 0.5 to 10 times the mean norm of a
        healthy run. +inf clips nothing.

    Raises:
      TypeError: `max_norm` is not a number.
      ValueError: `max_norm` is not positive.

    >>> from autoclip_core import decide
    >>> policy = Fixed(1.0)
    >>> _, decision = decide(policy, policy.init(rows=2), [0.5, 4.0])
    >>> decision.scale.tolist()
    [1.0, 0.25]

    Reference:
      Pascanu, Mikolov, Bengio, "On the difficulty of training recurrent neural
      networks", 2013, https://arxiv.org/abs/1211.5063
    """

    max_norm: float

    def __post_init__(self) -> None:
        """Check the threshold."""
        way_out = "use a positive threshold (0 would remove every gradient)"
        set_fields(self, max_norm=check_limit("max_norm", self.max_norm, way_out))

    @property
    def can_limit_losses(self) -> bool:
        """True: a constant does not depend on the sign of what it limits."""
        return True

    def limit(
        self, state: Any, norms: Array = None, *, param_norms: Array = None, xp: XP = np
    ) -> Limit:
        """Return the constant; without norms, one value that applies to every row."""
        shape = (1,) if norms is None else tuple(norms.shape)
        threshold = xp.full(shape, self.max_norm, dtype=xp.float32)
        return Limit(threshold, threshold)
