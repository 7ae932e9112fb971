"""The two policies of `TrustClip` and their defaults, and the policy of LARC.

One policy filters the gradient, the other bounds the update: the change of the weights
in one step. A gradient does not depend on the learning rate, the momentum or the
preconditioner of the optimizer. The update depends on all three.
"""

from autoclip_core.checks import check_positive
from autoclip_core.policies.param_ratio import ParamRatio, TrustRatio
from autoclip_core.policies.quantile import Quantile

RATIO = 0.01
"""The default bound of an update, as a fraction of the weights' root mean square."""

FLOOR = 0.2
"""The least root mean square of weights that the bound uses.

Weights that start at 0 can therefore grow.
"""

QUANTILE = 0.9
"""The default quantile of the gradient filter."""

HISTORY_LENGTH = 1000
"""The default number of norms that the gradient filter keeps."""


def make_filter(
    quantile: float = QUANTILE, history_length: int = HISTORY_LENGTH
) -> Quantile:
    """Return the policy for the norm of all gradients.

    >>> make_filter().quantile
    0.9
    """
    return Quantile(quantile, history_length=history_length)


def make_bound(ratio: float = RATIO) -> ParamRatio:
    """Return the policy for updates: T = ratio * max(rms(w), FLOOR), for norm="rms".

    As l2 norms of a row of N elements: T = ratio * max(|w|, FLOOR * sqrt(N)).

    >>> make_bound(0.05)
    ParamRatio(clipping=0.05, eps=0.2)
    """
    return ParamRatio(check_positive("ratio", ratio), eps=FLOOR)


def make_larc(trust_coefficient: float) -> TrustRatio:
    """Return the policy of LARC, for the norm lr * |g|.

    >>> make_larc(0.02).clipping
    0.02
    """
    return TrustRatio(check_positive("trust_coefficient", trust_coefficient))
