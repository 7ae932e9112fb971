"""Warn if an optimizer steps parameters that no clipper has."""

from collections.abc import Callable, Iterable, Sequence, Set
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from autoclip_torch.step.unwrap import stepped_parameters
from autoclip_torch.step.warn import warn

_LOOKS = 3
"""It warns if so many comparisons in a row find such parameters.

Another clipper may take its first step after this one.
"""


class LeftOutCheck:
    """Whether an optimizer of clipped gradients has others that no clipper has."""

    def __init__(self) -> None:
        self._looks = 0
        self._has_warned = False
        self._others: set[int] = set()

    @property
    def is_suspected(self) -> bool:
        """Whether the last comparison found such parameters, and did not warn yet."""
        return 0 < self._looks < _LOOKS

    def add_others(self, parameters: Iterable[Tensor]) -> None:
        """Note those of a clipper that takes its first step, perhaps its only one."""
        if self.is_suspected:
            self._others.update(map(id, parameters))

    def check(
        self,
        optimizers: Sequence[Optimizer],
        known: Set[int],
        find_others: Callable[[], Set[int]],
    ) -> None:
        """Warn once of parameters with a gradient that no clipper has.

        Args:
          optimizers: those that step what the clipper has clipped.
          known: the ids of all parameters of the clipper, the excluded ones too.
          find_others: returns the ids of those of all clippers.
        """
        if self._has_warned:
            return
        left_out = _find_left_out(optimizers, known)
        if left_out is not None:
            left_out = _find_left_out(optimizers, find_others() | self._others)
        self._looks = 0 if left_out is None else self._looks + 1
        if left_out is not None and self._looks == _LOOKS:
            self._has_warned = True
            _warn(*left_out)


def _find_left_out(
    optimizers: Sequence[Optimizer], known: Set[int]
) -> tuple[Optimizer, list[Tensor]] | None:
    """Return an optimizer that trains other parameters by dense gradients, and these.

    Sparse ones are often left out on purpose: torch's own functions do not clip them.
    """
    for optimizer in optimizers:
        groups = [group for group in optimizer.param_groups if not _is_frozen(group)]
        stepped = [p for group in groups for p in group["params"]]
        others = [p for p in stepped if id(p) not in known and p.requires_grad]
        dense = [p for p in others if p.grad is not None and not p.grad.is_sparse]
        if dense:
            return optimizer, dense
    return None


def _is_frozen(group: dict[str, Any]) -> bool:
    """Return whether the learning rate is 0. A tensor is not read from its device."""
    return not isinstance(rate := group.get("lr"), Tensor) and rate == 0


def _warn(optimizer: Optimizer, left_out: Sequence[Tensor]) -> None:
    count = len(stepped_parameters(optimizer))
    warn(
        f"{type(optimizer).__name__} steps {count} tensors, and no clipper clips "
        f"{len(left_out)} of them, such as {_find_label(optimizer, left_out[0])}; give "
        'the clipper the model, or call clipper.add_param_group({"params": ...}) with '
        "them; to leave them out on purpose, give it the model and exclude=[...] with "
        "their names"
    )


def _find_label(optimizer: Optimizer, parameter: Tensor) -> str:
    """Return the name of a parameter in its optimizer, or else its shape."""
    for group in optimizer.param_groups:
        pairs = zip(group.get("param_names", ()), group["params"], strict=False)
        for name, each in pairs:
            if each is parameter:
                return str(name)
    return f"one of shape {tuple(parameter.shape)}"
