"""Which call of `step` is the outermost: a subclass may call `super().step()`.

torch runs the hooks of an optimizer in both calls. The clippers act in the outer one. A
count of open calls would be wrong after a step that raised an error.
"""

import sys
from types import FrameType

import torch
from torch.optim import Optimizer

_HOOKED_STEP = Optimizer.profile_hook_step(lambda optimizer: None).__code__
"""The code that runs the hooks, the same for every class of optimizers."""


def is_outermost_step(optimizer: Optimizer) -> bool:
    """Return whether a hook runs in the outermost call of the optimizer's `step`."""
    if torch.compiler.is_compiling():  # traced code has no frames
        return True
    calls = 0
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_code is _HOOKED_STEP and frame.f_locals.get("self") is optimizer:
            calls += 1
        frame = frame.f_back
    return calls < 2
