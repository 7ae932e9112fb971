"""Between two updates of a `GradScaler`, a clipper clips once, unscaled gradients."""

import sys
import weakref
from types import FrameType
from typing import Any

import torch
from torch.optim import Optimizer

from autoclip_torch.step.amp import refuse_after_step

_CLIPPERS = "autoclip_clippers"
"""The key of the clippers in the state that a `GradScaler` keeps until `update()`."""

_MOST_FRAMES = 16


class ScalerRule:
    """The rule for one clipper, and the scalers of its optimizers.

    A scaler is known when a step receives it. A clipper whose steps receive none knows
    it from the first update that the scaler makes.
    """

    def __init__(self) -> None:
        """Start without a scaler."""
        self._scalers: weakref.WeakKeyDictionary[Any, weakref.ref[Optimizer]]
        self._scalers = weakref.WeakKeyDictionary()
        self._scaled: weakref.ref[Any] | None = None

    def begin(self, clipper: Any, scaler: Any = None, optimizer: Any = None) -> None:
        """Check and record a step of the clipper.

        A later backward pass would add scaled gradients, which a scaler unscales only
        once.

        Args:
          clipper: the object that clips.
          scaler: the scaler that this step received, if any.
          optimizer: the innermost optimizer that this step received, if any.

        Raises:
          RuntimeError: the clipper has clipped since the last `update()` of one of its
            scalers, or a scaler has stepped the optimizer since.
        """
        if scaler is not None:
            self._scalers[scaler] = weakref.ref(optimizer)
        self._scaled = None
        for each, reference in list(self._scalers.items()):
            states = each._per_optimizer_states
            _refuse_second_step(clipper, states.values())
            state = states.get(id(reference()), {})
            stage = state["stage"].name if state else "READY"
            if stage == "STEPPED":
                refuse_after_step()
            if stage == "UNSCALED":
                state.setdefault(_CLIPPERS, []).append(clipper)
            else:
                self._scaled = weakref.ref(each)

    def was_scaled(self, optimizer: Optimizer) -> bool:
        """Return whether the scaler that steps had not unscaled what was clipped.

        Its state was that before `unscale_` when the clipper clipped.
        """
        scaled, self._scaled = self._scaled, None
        scaler = _find_scaler(optimizer)
        if scaler is None or not scaler.is_enabled():  # that one keeps no states
            return False
        self._scalers[scaler] = weakref.ref(optimizer)
        return scaled is not None and scaled() is scaler


def _refuse_second_step(clipper: Any, states: Any) -> None:
    before = [each for state in states for each in state.get(_CLIPPERS, ())]
    if any(each is clipper for each in before):
        raise RuntimeError(
            "with a GradScaler clipper.step must be called once before "
            "scaler.update(), got a second call: the gradients of a later backward "
            "pass are still multiplied by the loss scale; when accumulating, call it "
            "once, before scaler.step(optimizer); to leave out a batch after it, call "
            "optimizer.zero_grad() and scaler.update()"
        )


def refuse_other_unscaling(wrapper: Optimizer, inner: Optimizer) -> None:
    """Refuse a scaler that has unscaled the optimizer inside, and steps the wrapper.

    It keeps a state for each of the two, so it has unscaled their gradients twice.

    Raises:
      RuntimeError: it has.
    """
    scaler = _find_scaler(wrapper)
    if scaler is None or not scaler.is_enabled():
        return
    if id(inner) in scaler._per_optimizer_states:
        raise RuntimeError(
            "scaler.unscale_ must receive the optimizer that scaler.step receives, got "
            "the optimizer inside it, so the gradients were divided by the loss scale "
            "twice; give both the optimizer of as_optimizer()"
        )


def _find_scaler(optimizer: Optimizer) -> Any:
    """Return the scaler whose `step` is calling that of the optimizer, or None.

    A subclass may have a `step` of its own.
    """
    frame: FrameType | None = sys._getframe(1)
    for _ in range(_MOST_FRAMES):
        if frame is None:
            break
        if frame.f_code.co_name == "step":
            values = frame.f_locals.values()
            scaler = frame.f_locals.get("self")
            if isinstance(scaler, torch.amp.GradScaler):
                return scaler if any(each is optimizer for each in values) else None
        frame = frame.f_back
    return None
