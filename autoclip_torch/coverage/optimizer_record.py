"""What the check of coverage knows of one optimizer."""

from torch import Tensor
from torch.optim import Optimizer
from torch.utils.weak import TensorWeakRef

from autoclip_torch.step.unwrap import stepped_parameters
from autoclip_torch.step.warn import warn

from .clipper_record import ClipperRecord, dereference

_INTERVAL = 8
"""The parameters of an optimizer are compared in every so many steps, or fewer."""

_MOST_FROZEN = 64
"""So many frozen parameters without a clipper are looked at in each step."""


class OptimizerRecord:
    """The steps of one optimizer, and the clippers of its parameters."""

    def __init__(self) -> None:
        """Start before the first step."""
        self.steps = 0
        self.inside: list[ClipperRecord] = []
        """The clippers that act in its step."""
        self.clippers: list[ClipperRecord] = []
        """All clippers of its parameters."""
        self.similar: list[ClipperRecord] = []
        """Clippers of other parameters of the same shapes, if it has no clipper."""
        self.twins: dict[ClipperRecord, int] = {}
        """Clippers inside another optimizer of the same parameters, and its steps."""
        self.complete: set[ClipperRecord] = set()
        """Clippers whose parameters it steps all."""
        self.was_covered: bool | None = None
        """Whether its clippers had all trained parameters; None before a comparison."""
        self.unclipped = 0
        """How many steps in a row were not clipped."""
        self._steps_before: dict[ClipperRecord, int] = {}
        self._frozen: list[TensorWeakRef] = []
        self._sizes: list[int] = []
        self._version = -1
        self._wait = 0

    def is_due(self, optimizer: Optimizer, version: int) -> bool:
        """Return whether the parameters are compared in this step.

        Args:
          optimizer: the optimizer.
          version: it changes if a clipper is made or removed.
        """
        sizes = [len(group["params"]) for group in optimizer.param_groups]
        self._wait -= 1
        has_new = any(map(_has_gradient, dereference(self._frozen)))
        if (
            self._wait > 0
            and not has_new
            and version == self._version
            and sizes == self._sizes
        ):
            return False
        self._sizes, self._version = sizes, version
        self._wait = _INTERVAL + sum(sizes) // 64
        return True

    def count_step(self, optimizer: Optimizer) -> set[ClipperRecord]:
        """Count a step; return the clippers that acted since the last one."""
        self.steps += 1
        before = self._steps_before
        self._steps_before = {each: each.steps for each in self.clippers}
        for each in self.clippers:
            each.is_served |= each.owner is None
        for each in self.inside:
            each.keep_gradient()
        for each in self.similar:
            each.other = type(optimizer).__name__
        return {each for each in self.clippers if before.get(each) != each.steps}

    def check_left_out(self, optimizer: Optimizer, acted: set[ClipperRecord]) -> None:
        """Warn once if a parameter was frozen or new, and no clipper has it now.

        If a trained parameter was without a clipper from the start, the clippers are
        meant for a part.
        """
        clippers = [each for each in self.clippers if each.acts_in(optimizer)]
        if acted.isdisjoint(clippers):
            return
        known = {id(p) for each in clippers for p in each.known}
        left_out = [p for p in stepped_parameters(optimizer) if id(p) not in known]
        was_covered = self.was_covered
        if was_covered is None:
            was_covered = not any(p.requires_grad for p in left_out)
        new = [p for p in left_out if was_covered and _has_gradient(p)]
        self.was_covered = was_covered and not new
        frozen = left_out[:_MOST_FROZEN] if self.was_covered else []
        self._frozen = list(map(TensorWeakRef, frozen))
        if new:
            warn(
                f"the optimizer steps {len(new)} parameters, such as one of shape "
                f"{tuple(new[0].shape)}, that were frozen or not in it before; no "
                "clipper has them, so they are not clipped; call "
                'clipper.add_param_group({"params": ...}) with them, or give the '
                "clipper the model"
            )


def _has_gradient(parameter: Tensor) -> bool:
    return parameter.requires_grad and parameter.grad is not None
