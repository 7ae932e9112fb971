"""Warn if an optimizer steps parameters that no clipper has."""

from collections.abc import Callable, Iterable, Sequence, Set

from torch import Tensor
from torch.optim import Optimizer

from autoclip_torch.gradients.dtensor import get_local
from autoclip_torch.gradients.transfer import is_capturing
from autoclip_torch.optimizer_steps.learning_rate import is_frozen
from autoclip_torch.step.unwrap import stepped_parameters
from autoclip_torch.step.warn import warn

_LOOKS = 3
"""It warns if so many comparisons find such parameters with a gradient.

Another clipper may take its first step after this one. A part that has a gradient in
some steps only is found in some comparisons only.
"""


class UnclippedCheck:
    """Whether an optimizer of clipped gradients has others that no clipper has."""

    def __init__(self) -> None:
        self.has_found = False
        """Whether the last comparison found such parameters, and did not warn."""
        self._looks = 0
        self._has_warned = False
        self._ignored: set[int] = set()

    def add_others(self, parameters: Iterable[Tensor]) -> None:
        """Note those of a clipper that takes its first step, perhaps its only one."""
        if 0 < self._looks < _LOOKS:
            self._ignored.update(map(id, parameters))

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
        unclipped = _find_unclipped(optimizers, known)
        if unclipped is not None:
            unclipped = _find_unclipped(optimizers, find_others() | self._ignored)
        if unclipped is None:
            self._looks = 0
        self.has_found = unclipped is not None and bool(unclipped[1])
        self._looks += self.has_found
        if unclipped is not None and self._looks == _LOOKS:
            self._end(*unclipped)

    def _end(self, optimizer: Optimizer, unclipped: Sequence[Tensor]) -> None:
        """Warn, or begin again without the parameters whose gradients are 0.

        `zero_grad(set_to_none=False)` leaves gradients of 0 in a part that is not
        trained any more. They are read once.
        """
        self.has_found, self._looks = False, 0
        changing = _list_nonzero(unclipped)
        self._has_warned = bool(changing)
        if changing:
            _warn(optimizer, changing)
        self._ignored.update(map(id, unclipped))


def _find_unclipped(
    optimizers: Sequence[Optimizer], known: Set[int]
) -> tuple[Optimizer, list[Tensor]] | None:
    """Return an optimizer that trains other parameters, and which have a gradient.

    Sparse ones are often left out on purpose: torch's own functions do not clip them.

    Returns:
      None if no optimizer trains others. If none of them has a gradient in this step,
      the list is empty.
    """
    found = None
    for optimizer in optimizers:
        groups = [group for group in optimizer.param_groups if not is_frozen(group)]
        stepped = [p for group in groups for p in group["params"]]
        others = [p for p in stepped if id(p) not in known and p.requires_grad]
        dense = [p for p in others if p.grad is not None and not p.grad.is_sparse]
        if dense:
            return optimizer, dense
        if others:
            found = optimizer, dense
    return found


def _list_nonzero(parameters: Sequence[Tensor]) -> list[Tensor]:
    """Return the parameters whose gradient on this rank is not 0 everywhere.

    A CUDA graph cannot read while it is captured: then it returns all.
    """
    gradients = [get_local(p.grad) for p in parameters]
    if any(is_capturing(gradient.device) for gradient in gradients):
        return list(parameters)
    return [p for p, g in zip(parameters, gradients, strict=True) if g.any()]


def _warn(optimizer: Optimizer, unclipped: Sequence[Tensor]) -> None:
    count = len(stepped_parameters(optimizer))
    warn(
        f"{type(optimizer).__name__} steps {count} tensors, and no clipper clips "
        f"{len(unclipped)} of them, such as {_find_label(optimizer, unclipped[0])}; "
        'give the clipper the model, or call clipper.add_param_group({"params": ...}) '
        "with them; to leave them out on purpose, give it the model and exclude=[...] "
        "with their names"
    )


def _find_label(optimizer: Optimizer, parameter: Tensor) -> str:
    """Return the name of a parameter in its optimizer, or else its shape."""
    for group in optimizer.param_groups:
        pairs = zip(group.get("param_names", ()), group["params"], strict=False)
        for name, each in pairs:
            if each is parameter:
                return str(name)
    return f"one of shape {tuple(parameter.shape)}"
