"""A Lightning callback that clips inside each optimizer's step."""

from collections.abc import Callable
from typing import Any

from torch.optim import Optimizer

from .clipper import Clipper
from .hooks.follow import clipper_of, follow
from .step.unwrap import unwrap
from .step.warn import warn

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
    clipper of its own, which follows it: what is unfrozen and added to it later is
    clipped from then on. The history is saved in the checkpoint. What `metrics()`
    returns is logged whenever the trainer logs; of several optimizers as
    `clip/optimizer0/norm` and so on.

    Args:
      clipper: a class of `autoclip_torch`, or a function that takes what a clipper's
        first argument may be and returns a clipper.
      optimizer: the number of the one optimizer to clip, as `configure_optimizers`
        returns them; by default each. For another rule per optimizer, give the trainer
        a callback for each.
      **keywords: what `clipper` accepts; `exclude` may name what is frozen as yet.

    Raises:
      ValueError: when training starts: there is no such optimizer, `exclude` names no
        parameter of the module, or the checkpoint does not fit.

    >>> from autoclip_torch import QuantileClip
    >>> callback = ClipCallback(QuantileClip, quantile=0.9, scope="global")
    >>> trainer = pl.Trainer(  # leave gradient_clip_val out
    ...     callbacks=[callback], accelerator="cpu", logger=False,
    ...     enable_checkpointing=False)
    """

    def __init__(
        self,
        clipper: Callable[..., Clipper],
        *,
        optimizer: int | None = None,
        **keywords: Any,
    ) -> None:
        """Remember what to make when the optimizers are there."""
        self._make = clipper
        self._keywords = keywords
        self._only = optimizer
        self._saved: list[dict[str, Any]] | None = None
        self._optimizers: dict[int, Optimizer] = {}
        self.clippers: list[Clipper] = []
        """One per optimizer that is clipped, from the start of training on."""

    @property
    def state_key(self) -> str:
        """Name the state by class, optimizer, scope and exclude: there may be several.

        Other settings do not count: a state that differs in them is refused with what
        differs, where one under another name would be ignored.
        """
        name = getattr(self._make, "__name__", type(self._make).__name__)
        exclude = self._keywords.get("exclude")
        # A function has an address, which is another one in the next process.
        told = {
            "scope": self._keywords.get("scope"),
            "exclude": getattr(exclude, "__qualname__", exclude),
        }
        if self._only is not None:
            told["optimizer"] = self._only
        return self._generate_state_key(clipper=name, **told)

    def on_train_start(self, trainer: "pl.Trainer", pl_module: Any) -> None:
        """Make the clippers and attach each to its optimizer."""
        _warn_of_another(trainer, pl_module)
        self._optimizers = _choose(trainer.optimizers, self._only)
        self.clippers = [
            clipper_of(self._make, self._keywords, optimizer, pl_module)
            for optimizer in self._optimizers.values()
        ]
        if self._saved is not None:
            self._restore(self._saved)
        elif trainer.ckpt_path is not None:
            warn(
                f"{trainer.ckpt_path} has no history for ClipCallback, which starts "
                "without one: it was saved without this callback, or with another "
                "class, scope or exclude"
            )
        for clipper, optimizer in self._pairs():
            clipper.attach(optimizer)

    def on_before_optimizer_step(
        self, trainer: "pl.Trainer", pl_module: Any, optimizer: Any
    ) -> None:
        """Follow the optimizer: a callback may have given it what was frozen."""
        for clipper, ours in self._pairs():
            if ours is unwrap(optimizer):
                follow(clipper, ours, pl_module)

    def on_train_batch_end(
        self, trainer: "pl.Trainer", pl_module: Any, *args: Any, **kwargs: Any
    ) -> None:
        """Log, as often as the trainer does."""
        if not trainer._logger_connector.should_update_logs:
            return
        for index, clipper in zip(self._optimizers, self.clippers, strict=True):
            several = len(trainer.optimizers) > 1
            prefix = f"clip/optimizer{index}/" if several else "clip/"
            found = clipper.metrics().items()
            pl_module.log_dict({k.replace("clip/", prefix, 1): v for k, v in found})

    def on_train_end(self, trainer: "pl.Trainer", pl_module: Any) -> None:
        """Leave the optimizers as they were; the history stays."""
        self._detach()

    def on_exception(
        self, trainer: "pl.Trainer", pl_module: Any, exception: BaseException
    ) -> None:
        """Do as at the end, which an interrupted run does not reach."""
        self._detach()

    def state_dict(self) -> dict[str, Any]:
        """Return the state of each optimizer's clipper."""
        saved = [clipper.state_dict() for clipper in self.clippers]
        return {"clippers": saved or self._saved or []}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep the state until the optimizers are there."""
        self._saved = state_dict["clippers"]

    def _pairs(self) -> list[tuple[Clipper, Optimizer]]:
        return list(zip(self.clippers, self._optimizers.values(), strict=True))

    def _restore(self, saved: list[dict[str, Any]]) -> None:
        """Go on with the history of the checkpoint."""
        if len(saved) != len(self.clippers):
            raise ValueError(
                "the checkpoint must hold one history per optimizer that is clipped, "
                f"got {len(saved)} for {len(self.clippers)}; resume with as many as it "
                "was saved with"
            )
        for clipper, state in zip(self.clippers, saved, strict=True):
            clipper.load_state_dict(state)
        self._saved = None  # the next run begins anew

    def _detach(self) -> None:
        for clipper in self.clippers:
            clipper.detach()


def _warn_of_another(trainer: "pl.Trainer", pl_module: Any) -> None:
    """Warn where Lightning or the module clips, too: both do so before us."""
    own = type(pl_module).configure_gradient_clipping
    other = None
    if trainer.gradient_clip_val:
        other = f"Trainer(gradient_clip_val={trainer.gradient_clip_val})"
    elif own is not pl.LightningModule.configure_gradient_clipping:
        other = f"{type(pl_module).__name__}.configure_gradient_clipping"
    if other is not None:
        warn(
            f"{other} clips before ClipCallback, which then sees clipped norms; leave "
            "it out"
        )


def _choose(optimizers: list[Optimizer], only: int | None) -> dict[int, Optimizer]:
    """Return the optimizers to clip, by number."""
    found = dict(enumerate(optimizers))
    if only is None:
        return found
    if only not in found:
        raise ValueError(
            f"optimizer must be the number of one of the {len(found)} that "
            f"configure_optimizers returns, counted from 0, got {only!r}"
        )
    return {only: found[only]}
