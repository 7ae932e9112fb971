"""The clippers of a trainer's optimizers: made, attached, moved to other optimizers."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from torch.optim import Optimizer

from autoclip_torch.hooks.attachable import Attachable
from autoclip_torch.step.unwrap import unwrap
from autoclip_torch.step.warn import warn

from .create_clipper import create_clipper
from .history import describe_error, load_history
from .one_clipper import OneClipper


class OptimizerClippers:
    """One clipper for each optimizer, or one for all.

    Args:
      make, keywords: as in `create_clipper`.
      is_one: whether one clipper serves all optimizers.
    """

    def __init__(
        self, make: Callable[..., Any], keywords: Mapping[str, Any], is_one: bool
    ) -> None:
        self._create = partial(create_clipper, make, keywords)
        self._is_one = is_one
        self._one: OneClipper | None = None
        self.is_attached = False
        self.optimizers: Mapping[int, Optimizer] = {}
        """The clipped optimizers, by their number in the trainer."""
        self.clippers: list[Any] = []
        """One per optimizer, or the only one."""

    def make(self, optimizers: Mapping[int, Optimizer], model: Any) -> None:
        """Create the clippers of the optimizers of a model."""
        self.optimizers, present = optimizers, list(optimizers.values())
        is_one = self._is_one and present
        shares = [present] if is_one else [[each] for each in present]
        self.clippers = [self._create(share, model) for share in shares]

    def attach(self) -> None:
        """Let each clipper act before the steps of its optimizer."""
        self.is_attached = True
        if self._is_one:
            if self.clippers:  # there is none without an optimizer
                self._one = OneClipper(self.clippers[0], self.optimizers.values())
            return
        for clipper, optimizer in self.get_pairs():
            if isinstance(clipper, Attachable):
                clipper.attach(optimizer)

    def detach(self) -> None:
        """Let no clipper act; each keeps its history."""
        self.is_attached, self._one = False, None
        for clipper in self.clippers:
            clipper.detach()

    def follow(self, optimizers: Mapping[int, Optimizer], model: Any) -> bool:
        """Continue with the present optimizers; return whether one was replaced.

        An optimizer that replaces another one has a new clipper, with the history of
        the rows that the clipper before it had, too.
        """
        if [*map(id, optimizers.values())] == [*map(id, self.optimizers.values())]:
            return False
        states = [clipper.state_dict() for clipper in self.clippers]
        self.detach()
        self.make(optimizers, model)
        for clipper, state in zip(self.clippers, states, strict=False):
            try:
                clipper.load_state_dict(state, strict=False)
            except ValueError as error:
                warn(
                    "an optimizer was replaced, and its clipper starts without a "
                    f"history, because none fits: {describe_error(error)}"
                )
        self.attach()
        return True

    def load(self, states: Sequence[dict[str, Any]]) -> None:
        """Load the history of a checkpoint; see `load_history`.

        Raises:
          ValueError: it is that of another number of clippers, or one does not fit.
        """
        if len(states) != len(self.clippers):
            raise ValueError(
                "the checkpoint must hold one history per optimizer that is clipped, "
                f"got {len(states)} for {len(self.clippers)}; resume with as many "
                "optimizers as it was saved with"
            )
        for clipper, state in zip(self.clippers, states, strict=True):
            load_history(clipper, state)

    def get_pairs(self) -> list[tuple[Any, Optimizer]]:
        """Return each optimizer with its clipper."""
        optimizers, clippers = self.optimizers.values(), self.clippers
        if self._is_one:
            clippers = clippers * len(optimizers)
        return list(zip(clippers, optimizers, strict=True))

    def find(self, optimizer: Any) -> tuple[Any, Optimizer]:
        """Return the clipper of an optimizer, or None, and the optimizer inside it."""
        inner = unwrap(optimizer)
        pairs = self.get_pairs()
        return next((pair for pair in pairs if unwrap(pair[1]) is inner), (None, inner))

    def begin_backward(self) -> None:
        """Note that gradients follow which are not clipped."""
        if self._one is not None:
            self._one.begin_backward()

    def step(self, optimizer: Optimizer) -> None:
        """Clip before a step of an optimizer, if one clipper serves all."""
        if self._one is not None:
            self._one.step(optimizer)
