"""Which steps of optimizers are running, by the frames of the interpreter."""

import sys
from collections.abc import Iterator
from types import FrameType
from typing import Any

import torch
from torch.optim import Optimizer

_HOOKED_STEP = Optimizer.profile_hook_step(lambda optimizer: None).__code__
"""The code that runs the hooks, the same for every class of optimizers."""


def is_outermost_step(optimizer: Optimizer) -> bool:
    """Return whether a hook runs in the outermost call of the optimizer's `step`.

    A subclass may call `super().step()`. torch then runs the hooks in both calls, and
    the clippers act in the outer one. A count of open calls would be wrong after a step
    that raised an error. A step that only creates the optimizer's state, for a
    distributed checkpoint, is no step of the clippers.
    """
    if torch.compiler.is_compiling():  # traced code has no frames
        return True
    return _count_calls(optimizer) < 2 and not creates_state()


def is_in_step(optimizer: Optimizer) -> bool:
    """Return whether the optimizer's `step` is running, in eager code."""
    return _count_calls(optimizer) > 0


def list_open_steps() -> list[Optimizer]:
    """Return the optimizer of each running step, the innermost first, in eager code."""
    return [args[0] for args, _ in list_step_arguments()]


def list_step_arguments() -> list[tuple[Any, dict[str, Any]]]:
    """Return the arguments of each running step, as a hook receives them."""
    return [
        (frame.f_locals["args"], frame.f_locals["kwargs"])
        for frame in _list_frames()
        if frame.f_code is _HOOKED_STEP
    ]


def creates_state() -> bool:
    """Return whether torch is creating an optimizer's state, with lr = 0."""
    checkpoints = sys.modules.get("torch.distributed.checkpoint.state_dict")
    create_state = getattr(checkpoints, "_init_optim_state", None)
    if create_state is None:  # only a distributed checkpoint imports it
        return False
    code = create_state.__code__
    return any(frame.f_code is code for frame in _list_frames())


def _count_calls(optimizer: Optimizer) -> int:
    return sum(each is optimizer for each in list_open_steps())


def _list_frames() -> Iterator[FrameType]:
    """Yield the frames of the interpreter, the innermost first."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        yield frame
        frame = frame.f_back
