"""The clippers attached to one optimizer: each sees its gradients, then one update."""

from torch.optim import Optimizer

from autoclip_torch.step.amp import (
    allow_skipped_steps,
    refuse_scaler,
    require_every_step,
)
from autoclip_torch.step.stepper import Stepper
from autoclip_torch.step.unwrap import stepped_parameters
from autoclip_torch.step.warn import warn

from .fused import Controls, is_fused


class ClipperChain:
    """Those that clip in the step of one optimizer, in the order of attaching.

    The optimizer is passed to every method: whoever holds it here would keep it alive.
    """

    def __init__(self) -> None:
        """Start with nobody."""
        self._steppers: list[Stepper] = []
        self._controls = Controls()
        self._is_cancelled = False
        self._is_marked = False
        self._known: list[int] = []

    def add(self, stepper: Stepper, optimizer: Optimizer) -> None:
        """Let another clip after those that are here."""
        if not self._steppers:
            self._known = _sizes(optimizer)
        self._steppers.append(stepper)
        if self._has_stages:
            self._is_marked |= require_every_step(optimizer)

    def remove(self, stepper: Stepper) -> None:
        """Let one clip no more."""
        self._steppers.remove(stepper)

    def restore(self, optimizer: Optimizer) -> None:
        """Take back what the optimizer was told for a step, or for those who left."""
        self._controls.restore(optimizer)
        if self._is_marked and not self._has_stages:
            allow_skipped_steps(optimizer)
            self._is_marked = False

    def begin(self, stepper: Stepper, optimizer: Optimizer) -> None:
        """Forget a step that has failed."""
        self._controls.begin(stepper, optimizer)

    def clip(self, stepper: Stepper, optimizer: Optimizer) -> None:
        """Clip, and cancel the update if anybody who has clipped wants that."""
        self._check_parameters(optimizer)
        if stepper.process_group is not None and not self._controls.telling:
            refuse_scaler(optimizer)
        if is_fused(optimizer):
            alone = len(self._steppers) == 1
            self._controls.clip(stepper, optimizer, alone)
        else:
            self._clip_here(stepper, optimizer)

    def _clip_here(self, stepper: Stepper, optimizer: Optimizer) -> None:
        """Clip gradients, and take all of them away once everybody has seen his."""
        if stepper is self._steppers[0]:
            self._is_cancelled = False
        decision = stepper.clip()
        cancels = stepper.cancels(decision)
        self._is_cancelled |= cancels
        if self._is_cancelled and stepper is self._steppers[-1]:
            for parameter in stepped_parameters(optimizer):
                parameter.grad = None
        stepper.check(cancels)

    def _check_parameters(self, optimizer: Optimizer) -> None:
        """Warn of parameters that the optimizer was given since, and nobody clips."""
        if (sizes := _sizes(optimizer)) == self._known:
            return
        before = dict(enumerate(self._known))
        groups = enumerate(optimizer.param_groups)
        new = [p for i, group in groups for p in group["params"][before.get(i, 0) :]]
        self._known = sizes
        clipped = [group for each in self._steppers for group in each.groups]
        known = {id(named.parameter) for group in clipped for named in group.parameters}
        if added := [p for p in new if id(p) not in known]:
            warn(
                f"the optimizer was given {len(added)} parameters after attach() that "
                "no clipper has, so they are not clipped; call "
                'clipper.add_param_group({"params": ...}) with them, too'
            )

    @property
    def _has_stages(self) -> bool:
        return any(each.process_group is not None for each in self._steppers)


def _sizes(optimizer: Optimizer) -> list[int]:
    """Return how many parameters each group has."""
    return [len(group["params"]) for group in optimizer.param_groups]
