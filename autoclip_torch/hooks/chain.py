"""The clippers attached to one optimizer: each measures, then one update follows."""

from torch.optim import Optimizer

from autoclip_torch.observer.observer import Observer
from autoclip_torch.step import amp
from autoclip_torch.step.stepper import Stepper
from autoclip_torch.step.unwrap import stepped_parameters

from .fused import Controls, is_fused
from .new_parameters import warn_of_left_out


class ClipperChain:
    """The clippers that act in the step of one optimizer, in the order of attaching.

    Every method takes the optimizer: a reference from here would keep it alive.
    """

    def __init__(self) -> None:
        """Start without a clipper."""
        self.clippers: list[Observer] = []
        self.controls = Controls()
        self._is_cancelled = False
        self._requires_every_step = False

    def add(self, clipper: Observer, optimizer: Optimizer) -> None:
        """Append a clipper."""
        self.clippers.append(clipper)
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
        if stepper is self.clippers[0]._stepper:
            self._follow(optimizer)
        if stepper.process_group is not None and not self.controls.are_set:
            amp.refuse_scaler(optimizer)
        if is_fused(optimizer):
            is_alone = len(self.clippers) == 1
            self.controls.clip(stepper, optimizer, is_alone)
        else:
            self._clip_in_place(stepper, optimizer)

    def _clip_in_place(self, stepper: Stepper, optimizer: Optimizer) -> None:
        """Clip gradients; if the update is cancelled, the last clipper removes them."""
        if stepper is self.clippers[0]._stepper:
            self._is_cancelled = False
        decision = stepper.clip()
        cancels = stepper.cancels(decision)
        self._is_cancelled |= cancels
        if self._is_cancelled and stepper is self.clippers[-1]._stepper:
            for parameter in stepped_parameters(optimizer):
                parameter.grad = None
        stepper.check(cancels)

    def _follow(self, optimizer: Optimizer) -> None:
        """Take over the parameters that the optimizer steps now.

        Parameters that it steps in addition are clipped if they belong to the module of
        a clipper. Otherwise the clipper may be meant for the other parameters only.
        """
        left_out = [clipper._follow_optimizer(optimizer) for clipper in self.clippers]
        if not any(left_out):
            return
        known = {id(p) for clipper in self.clippers for p in clipper.parameters}
        warn_of_left_out([p for p in left_out[0] if id(p.parameter) not in known])

    @property
    def _has_process_group(self) -> bool:
        return any(each.process_group is not None for each in self.clippers)
