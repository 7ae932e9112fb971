"""`on_clip` and `on_skip`: functions that are called with the decision of a step."""

from collections.abc import Callable
from typing import Any

import torch

from autoclip_core import Decision
from autoclip_torch.gradients.transfer import is_capturing, start_reading
from autoclip_torch.rows.settings import StepCallback
from autoclip_torch.state.policy_states import PolicyStates

_Arguments = tuple[Decision, list[str], int]


class StepCallbacks:
    """The functions of one clipper, and the last step if they still have to be called.

    On the CPU they are called in the step. On an accelerator the decision of step k is
    copied to the CPU without waiting, and they are called at the end of step k + 1.
    """

    def __init__(self) -> None:
        self.on_clip: StepCallback | None = None
        self.on_skip: StepCallback | None = None
        self._read_last: Callable[[], _Arguments] | None = None

    @property
    def are_set(self) -> bool:
        """Whether there is a function."""
        return self.on_clip is not None or self.on_skip is not None

    def report(self, states: PolicyStates) -> None:
        """Call the functions for the step that `states` has counted last, or later.

        On an accelerator this calls them for the step before it.

        Raises:
          RuntimeError: the step is compiled or captured, so no function can be called.
        """
        _refuse_to_trace(states.device)
        read_before, self._read_last = self._read_last, _start_reading(states)
        if read_before is not None:
            self._call(*read_before())
        if is_on_cpu(states):
            self.flush()

    def flush(self) -> None:
        """Call the functions for the last step, unless that was done."""
        read_last, self._read_last = self._read_last, None
        if read_last is not None:
            self._call(*read_last())

    def _call(self, decision: Decision, names: list[str], step: int) -> None:
        if decision.skipped.any():
            function = self.on_skip
        elif (decision.clipped | ~decision.finite).any():
            function = self.on_clip
        else:
            return
        if function is not None:
            function(decision, list(names), step)

    def __reduce__(self) -> Any:
        """Copy no function: torch does not copy the hooks of a step either."""
        return type(self), ()


def is_on_cpu(states: PolicyStates) -> bool:
    """Return whether a decision can be read without waiting for a device."""
    return states.device is None or states.device.type == "cpu"


def _start_reading(states: PolicyStates) -> Callable[[], _Arguments]:
    """Start to copy the last decision; return the function that ends it."""
    names, decision, steps = states.rows.names, states.decision, states.tally.steps
    if is_on_cpu(states):
        on_cpu = Decision(*map(torch.as_tensor, decision))
        return lambda: (on_cpu, names, int(steps) - 1)
    end_reading = start_reading([*decision, steps])
    types = [field.dtype for field in decision]

    def read() -> _Arguments:
        *fields, count = end_reading()
        pairs = zip(fields, types, strict=True)
        copied = Decision(*(torch.as_tensor(field).to(dtype) for field, dtype in pairs))
        return copied, names, int(count) - 1

    return read


def _refuse_to_trace(device: torch.device | None) -> None:
    """Refuse a compiled step and a captured CUDA graph, which call no function."""
    if torch.compiler.is_compiling() or is_capturing(device):
        raise RuntimeError(
            "on_clip and on_skip must be left out of a step that is compiled or "
            "captured in a CUDA graph, because Python does not run in it; call "
            "clipper.step() outside of it, or read clipper.metrics() instead"
        )
