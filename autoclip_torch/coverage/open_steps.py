"""Which steps of optimizers are running, by the frames of the interpreter."""

import sys
from collections.abc import Iterator
from types import FrameType

import torch
from torch.optim import Optimizer

_HOOKED_STEP = Optimizer.profile_hook_step(lambda optimizer: None).__code__
"""The code that runs the hooks, the same for every class of optimizers."""

_CHECKPOINTS = "torch.distributed.checkpoint.state_dict"


def is_outermost_step(optimizer: Optimizer) -> bool:
    """Return whether a hook runs in the outermost call of the optimizer's `step`.

    A subclass may call `super().step()`. torch then runs the hooks in both calls, and
    the clippers act in the outer one. A count of open calls would be wrong after a step
    that raised an error. A step that only creates the optimizer's state, for a
    distributed checkpoint, is no step of the clippers.
    """
    if torch.compiler.is_compiling():  # traced code has no frames
        return True
    calls = 0
    for frame in _list_frames():
        calls += _is_step(frame, optimizer)
        if calls > 1 or _creates_state(frame):
            return False
    return True


def is_in_step(optimizer: Optimizer) -> bool:
    """Return whether the optimizer's `step` is running, in eager code."""
    return any(_is_step(frame, optimizer) for frame in _list_frames())


def _is_step(frame: FrameType, optimizer: Optimizer) -> bool:
    """Return whether a frame runs the optimizer's `step` and its hooks."""
    is_step = frame.f_code is _HOOKED_STEP
    return is_step and frame.f_locals.get("self") is optimizer


def _creates_state(frame: FrameType) -> bool:
    """Return whether torch steps with zero gradients and lr = 0 in this frame."""
    has_name = frame.f_code.co_name == "_init_optim_state"
    return has_name and frame.f_globals.get("__name__") == _CHECKPOINTS


def _list_frames() -> Iterator[FrameType]:
    """Yield the frames of the interpreter, the innermost first."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        yield frame
        frame = frame.f_back
