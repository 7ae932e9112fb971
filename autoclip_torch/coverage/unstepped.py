"""Warn if a clipper measures parameters that no optimizer steps."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.utils.weak import TensorWeakRef

from autoclip_torch.gradients.dtensor import get_local
from autoclip_torch.gradients.layout import get_stored
from autoclip_torch.step.warn import warn


class UnsteppedCheck:
    """Compares the versions of parameters, then the values of one of them.

    What is unchanged in three checks, while others change, is not stepped.
    """

    def __init__(self) -> None:
        self._versions: dict[int, int] = {}
        self._suspect: tuple[TensorWeakRef, Tensor] | None = None
        self._has_warned = False

    def check(self, measured: Sequence[Tensor]) -> None:
        """Warn once of parameters with a gradient that nothing changes."""
        if self._has_warned:
            return
        before = self._versions
        self._versions = {id(p): p._version for p in measured if get_local(p).numel()}
        known = [p for p in measured if id(p) in before]
        observed = [p for p in known if p.grad is not None]
        unchanged = [p for p in observed if before[id(p)] == p._version]
        if not unchanged or len(unchanged) == len(observed):
            self._suspect = None
            return
        smallest = min(unchanged, key=Tensor.numel)
        if self._suspect is None or self._suspect[0]() is not smallest:
            # `parameter.data` may be changed without a new version.
            copy = get_local(smallest).detach().clone()
            self._suspect = TensorWeakRef(smallest), copy
        elif _is_stale(smallest, self._suspect[1]):
            self._has_warned, self._suspect = True, None
            warn(
                f"the clipper measures {len(unchanged)} parameters, such as one of "
                f"shape {tuple(smallest.shape)}, that no optimizer steps: their "
                "gradients make its norm too large; freeze them with "
                "requires_grad_(False), or call clipper.remove_params with them; if "
                "the loop removes their gradients, let it do so before the clip"
            )


def _is_stale(parameter: Tensor, copy: Tensor) -> bool:
    """Return whether a gradient that is not 0 has left a parameter as it was."""
    local, gradient = get_local(parameter), parameter.grad
    if gradient is None or not torch.equal(copy, local):
        return False
    return bool(get_stored(get_local(gradient)).any())
