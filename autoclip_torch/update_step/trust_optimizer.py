"""The optimizer of `TrustClip.as_optimizer`, and what a `TrustClip` refuses."""

from typing import Any

from autoclip_torch.hooks.clipped_optimizer import ClippedOptimizer
from autoclip_torch.hooks.clipper_chain import (
    clips_gradients,
    has_trust_clip,
    list_attached,
)
from autoclip_torch.observer.observer import Observer
from autoclip_torch.step.unwrap import unwrap

from .optimizers import find_innermost


class TrustOptimizer(ClippedOptimizer):
    """An optimizer whose `TrustClip` acts in the step of the optimizer inside."""

    def _clip(self, closure_loss: Any = None) -> None:
        """Leave that to the hooks of the `TrustClip`."""

    def _register_clipper(self) -> None:
        """Leave that to the hooks of the `TrustClip`, too."""

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Wrap the copied optimizer, and register the clipper on it."""
        super().__setstate__(state)
        self.clipper._register(find_innermost(self.optimizer))


def refuse_other_filters(optimizer: Any) -> None:
    """Refuse an optimizer whose gradients another clipper clips.

    Raises:
      RuntimeError: a `TrustClip` or another clipper of gradients acts in its step.
    """
    inner, steppers = unwrap(optimizer), []
    while isinstance(inner, ClippedOptimizer):
        if isinstance(inner.clipper, Observer):
            steppers.append(inner.clipper._stepper)
        inner = unwrap(inner.optimizer)
    if has_trust_clip(inner):
        raise RuntimeError(
            "the optimizer has a TrustClip already, so a second one would clip twice; "
            "call detach() on the first one, or leave this one out"
        )
    if any(map(clips_gradients, [*steppers, *list_attached(inner)])):
        raise RuntimeError(
            "the optimizer has a clipper of gradients already, and a TrustClip would "
            "clip the same gradients; leave that clipper out, or keep it and bound the "
            "update alone: UpdateClipper(model, optimizer, ParamRatio(0.01, eps=0.2), "
            'norm="rms")'
        )
