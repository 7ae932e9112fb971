"""The clippers attached to one optimizer: each measures, then one update follows."""

from torch.optim import Optimizer

from autoclip_torch.step import amp
from autoclip_torch.step.stepper import Stepper
from autoclip_torch.step.unwrap import stepped_parameters
from autoclip_torch.step.warn import warn

from .fused import Controls, is_fused


class ClipperChain:
    """The clippers that act in the step of one optimizer, in the order of attaching.

    Every method takes the optimizer: a reference from here would keep it alive.
    """

    def __init__(self) -> None:
        """Start without a clipper."""
        self.steppers: list[Stepper] = []
        self.controls = Controls()
        self._is_cancelled = False
        self._requires_every_step = False
        self._group_sizes: list[int] = []

    def add(self, stepper: Stepper, optimizer: Optimizer) -> None:
        """Append a clipper."""
        if not self.steppers:
            self._group_sizes = _group_sizes(optimizer)
        self.steppers.append(stepper)
        if self._has_process_group:
            self._requires_every_step |= amp.require_every_step(optimizer)

    def restore(self, optimizer: Optimizer) -> None:
        """Remove from the optimizer what was set for a step or for removed clippers."""
        self.controls.restore(optimizer)
        if self._requires_every_step and not self._has_process_group:
            amp.allow_skipped_steps(optimizer)
            self._requires_every_step = False

    def clip(self, stepper: Stepper, optimizer: Optimizer) -> None:
        """Clip; cancel the update if this clipper or one before it requires that."""
        self._warn_of_new_parameters(optimizer)
        if stepper.process_group is not None and not self.controls.are_set:
            amp.refuse_scaler(optimizer)
        if is_fused(optimizer):
            is_alone = len(self.steppers) == 1
            self.controls.clip(stepper, optimizer, is_alone)
        else:
            self._clip_in_place(stepper, optimizer)

    def _clip_in_place(self, stepper: Stepper, optimizer: Optimizer) -> None:
        """Clip gradients; if the update is cancelled, the last clipper removes them."""
        if stepper is self.steppers[0]:
            self._is_cancelled = False
        decision = stepper.clip()
        cancels = stepper.cancels(decision)
        self._is_cancelled |= cancels
        if self._is_cancelled and stepper is self.steppers[-1]:
            for parameter in stepped_parameters(optimizer):
                parameter.grad = None
        stepper.check(cancels)

    def _warn_of_new_parameters(self, optimizer: Optimizer) -> None:
        """Warn of parameters that were added to the optimizer only, and not clipped."""
        if (sizes := _group_sizes(optimizer)) == self._group_sizes:
            return
        before = dict(enumerate(self._group_sizes))
        groups = enumerate(optimizer.param_groups)
        new = [p for i, group in groups for p in group["params"][before.get(i, 0) :]]
        self._group_sizes = sizes
        clipped = [group for each in self.steppers for group in each.groups]
        known = {id(named.parameter) for group in clipped for named in group.parameters}
        if unclipped := [p for p in new if id(p) not in known]:
            warn(
                f"the optimizer was given {len(unclipped)} parameters after attach() "
                "that no clipper has, so they are not clipped; call "
                'clipper.add_param_group({"params": ...}) with them, too'
            )

    @property
    def _has_process_group(self) -> bool:
        return any(each.process_group is not None for each in self.steppers)


def _group_sizes(optimizer: Optimizer) -> list[int]:
    """Return the number of parameters of each group."""
    return [len(group["params"]) for group in optimizer.param_groups]
