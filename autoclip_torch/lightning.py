"""A Lightning callback that clips inside each optimizer's step."""

import warnings
from collections.abc import Callable
from typing import Any

from .clipper import Clipper
from .groups import optimizer_groups

try:
    import lightning.pytorch as pl
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        "autoclip_torch.lightning needs Lightning: pip install lightning"
    ) from error


class ClipCallback(pl.Callback):
    """Clip the gradients of every optimizer of a `LightningModule`.

    Works with automatic and manual optimization, with any precision, and with any
    strategy whose optimizers step in this process, but FSDP1. Each optimizer has a
    clipper of its own, whose history is saved in the checkpoint. What `metrics()`
    returns is logged whenever the trainer logs; of several optimizers as
    `clip/optimizer0/norm` and so on.

    Args:
      clipper: a class of `autoclip_torch`, or a function that takes what a clipper's
        first argument may be and returns a clipper.
      **keywords: what it accepts.

    >>> from autoclip_torch import QuantileClip
    >>> callback = ClipCallback(QuantileClip, quantile=0.9, scope="global")
    >>> trainer = pl.Trainer(  # leave gradient_clip_val out
    ...     callbacks=[callback], accelerator="cpu", logger=False,
    ...     enable_checkpointing=False)
    """

    def __init__(self, clipper: Callable[..., Clipper], **keywords: Any) -> None:
        """Remember what to make when the optimizers are there."""
        self._make = clipper
        self._keywords = keywords
        self._saved: list[dict[str, Any]] | None = None
        self.clippers: list[Clipper] = []
        """One per optimizer, from the start of training on."""

    @property
    def state_key(self) -> str:
        """Name the state by class, scope and exclude: a trainer may have several.

        Other settings do not count: a state that differs in them is refused with what
        differs, where one under another name would be ignored.
        """
        name = getattr(self._make, "__name__", type(self._make).__name__)
        exclude = self._keywords.get("exclude")
        # A function has an address, which is another one in the next process.
        told = getattr(exclude, "__qualname__", exclude)
        scope = self._keywords.get("scope")
        return self._generate_state_key(clipper=name, scope=scope, exclude=told)

    def on_train_start(self, trainer: "pl.Trainer", pl_module: Any) -> None:
        """Make the clippers and attach each to its optimizer."""
        if trainer.gradient_clip_val:
            warnings.warn(
                f"Trainer(gradient_clip_val={trainer.gradient_clip_val}) clips before "
                "ClipCallback, which then sees clipped norms; leave it out",
                stacklevel=2,
            )
        self.clippers, saved = [], self._saved or []
        for index, optimizer in enumerate(trainer.optimizers):
            groups = optimizer_groups(optimizer, pl_module)
            clipper = self._make(groups, **self._keywords)
            if index < len(saved):
                clipper.load_state_dict(saved[index])
            clipper.attach(optimizer)
            self.clippers.append(clipper)
        self._saved = None

    def on_train_batch_end(
        self, trainer: "pl.Trainer", pl_module: Any, *args: Any, **kwargs: Any
    ) -> None:
        """Log, as often as the trainer does."""
        if not trainer._logger_connector.should_update_logs:
            return
        for index, clipper in enumerate(self.clippers):
            prefix = f"clip/optimizer{index}/" if len(self.clippers) > 1 else "clip/"
            found = clipper.metrics().items()
            pl_module.log_dict({k.replace("clip/", prefix, 1): v for k, v in found})

    def on_train_end(self, trainer: "pl.Trainer", pl_module: Any) -> None:
        """Leave the optimizers as they were; the history stays."""
        for clipper in self.clippers:
            clipper.detach()

    def state_dict(self) -> dict[str, Any]:
        """Return the state of each optimizer's clipper."""
        saved = [clipper.state_dict() for clipper in self.clippers]
        return {"clippers": saved or self._saved or []}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep the state until the optimizers are there."""
        self._saved = state_dict["clippers"]
