"""Watch whether a backward pass runs between two places of a training loop."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from autoclip_torch.optimizer_steps.weak_hook import register_weak_hook

from .gradient_samples import GradientVersions


class BackwardWatch:
    """Notes whether a backward pass adds to the gradients of some parameters."""

    def __init__(self) -> None:
        """Start without parameters."""
        self._handles: list[Any] = []
        self._computed: dict[int, GradientVersions] = {}
        self._frozen: set[int] = set()

    @property
    def is_active(self) -> bool:
        """Whether backward passes are noted."""
        return bool(self._handles)

    def start(self, samples: Sequence[Tensor]) -> None:
        """Note the backward passes from now on. A frozen parameter takes no hook."""
        self.stop()
        self._frozen = {id(sample) for sample in samples if not sample.requires_grad}
        self._handles = [
            register_weak_hook(sample.register_post_accumulate_grad_hook, self._note)
            for sample in samples
            if sample.requires_grad
        ]

    def reset(self) -> None:
        """Note only the backward passes from now on, if they are noted."""
        self._computed.clear()

    def list_computed(self, samples: Sequence[Tensor]) -> list[Tensor]:
        """Return the parameters whose gradient nothing has changed since the passes."""
        return [sample for sample in samples if self._is_computed(sample)]

    def _is_computed(self, sample: Tensor) -> bool:
        if sample.grad is None:
            return False
        if id(sample) in self._frozen:  # it had no hook: the gradient must be new
            return sample.grad._version == 0
        computed = self._computed.get(id(sample))
        return computed is not None and computed.are_same((sample,))

    def stop(self) -> bool:
        """Return whether a backward pass has run since `start`."""
        for handle in self._handles:
            handle.remove()
        has_run = bool(self._computed)
        self._handles, self._computed, self._frozen = [], {}, set()
        return has_run

    def _note(self, parameter: Tensor) -> None:
        self._computed[id(parameter)] = GradientVersions((parameter,))
