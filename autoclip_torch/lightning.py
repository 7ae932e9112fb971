"""A Lightning callback that clips inside each optimizer's step."""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from autoclip_core.checks import check_flag

from .clipper import Clipper
from .observer.base import BaseClipper
from .step.warn import warn
from .trainers.arguments import check_arguments
from .trainers.clippers import OptimizerClippers
from .trainers.create_clipper import find_function, takes_optimizer
from .trainers.lightning_checks import (
    choose_optimizers,
    refuse_scaler,
    warn_of_other_clipping,
)
from .trainers.losses import BackwardLosses

try:
    import lightning.pytorch as pl
except ModuleNotFoundError as error:
    if error.name != "lightning":
        raise
    try:  # the same code under its other name
        import pytorch_lightning as pl  # type: ignore[no-redef]
    except ModuleNotFoundError as other_error:
        if other_error.name != "pytorch_lightning":
            raise
        raise ModuleNotFoundError(
            "autoclip_torch.lightning needs Lightning: pip install lightning",
            name=error.name,
        ) from error


class ClipCallback(pl.Callback):
    """Clip the gradients of every optimizer of a `LightningModule`.

    It works with automatic and manual optimization and with any precision. It works
    with any strategy whose optimizers step in this process, except FSDP1. The trainer
    may be that of `lightning` or of `pytorch_lightning`.

    Each optimizer has its own clipper. Parameters that are unfrozen and added to the
    optimizer later are clipped from then on. An optimizer that replaces another one
    continues its history. The history is saved in the checkpoint. In a resumed run the
    settings of the callback apply; a difference causes a warning. The trainer logs the
    result of `metrics()` whenever it logs. With several optimizers, the names are
    `clip/optimizer0/norm` and so on.

    Lightning's tuner runs without callbacks, so its own steps are not clipped.

    A `loss_policy` receives the losses of the backward passes before the step: their
    mean with `accumulate_grad_batches`, their sum with manual optimization. Steps of
    several optimizers after one backward pass use the same loss.

    Args:
      clipper: a class of `autoclip_torch`, such as `TrustClip` or `UpdateClipper`, also
        in a `functools.partial`. Or a function that takes parameter groups, the first
        argument of a `Clipper`, and returns a `Clipper`.
      optimizer: the number of the only optimizer to clip, in the order of
        `configure_optimizers`; by default all are clipped. For a different rule per
        optimizer, give the trainer several callbacks.
      one_clipper: whether one `Clipper` clips the gradients of all optimizers. With
        scope="global" they then share one norm, as Muon and AdamW do in one model. All
        optimizers must step after each backward pass.
      **keywords: the keywords of `clipper`; `exclude` and `scale_only` may name
        parameters that are still frozen.

    Raises:
      TypeError, ValueError: an argument of the clipper breaks its rule.
      TypeError: at the start of training, if a function cannot make a `Clipper`.
      ValueError: at the start of training, if there is no optimizer, `optimizer` is not
        a valid index, a pattern matches no parameter of the module, the checkpoint does
        not fit, or `one_clipper` is used with a GradScaler.

    >>> from autoclip_torch import QuantileClip
    >>> callback = ClipCallback(QuantileClip, quantile=0.9, scope="global")
    >>> trainer = pl.Trainer(  # leave gradient_clip_val out
    ...     callbacks=[callback], accelerator="cpu", logger=False,
    ...     enable_checkpointing=False)
    """

    def __init__(
        self,
        clipper: Callable[..., BaseClipper],
        *,
        optimizer: int | None = None,
        one_clipper: bool = False,
        **keywords: Any,
    ) -> None:
        check_arguments(clipper, keywords)
        if check_flag("one_clipper", one_clipper) and takes_optimizer(clipper):
            raise TypeError(
                "one_clipper must be used with a Clipper of gradients, got "
                f"{find_function(clipper).__name__}, which clips inside each optimizer"
            )
        self._make = clipper
        self._keywords = keywords
        self._index = optimizer
        self._is_one = one_clipper
        self._is_training = True
        self._group = OptimizerClippers(clipper, keywords, one_clipper)
        self._saved: list[dict[str, Any]] | None = None
        self._losses = BackwardLosses()

    @property
    def clippers(self) -> list[BaseClipper]:
        """One per clipped optimizer, from the start of training."""
        return self._group.clippers

    @property
    def state_key(self) -> str:
        """The name of the state: class, optimizer, scope, exclude and scale_only.

        A trainer may have several of these callbacks. Other settings are not part of
        the name: a state under another name would be ignored.
        """
        name = getattr(self._make, "__name__", type(self._make).__name__)
        keywords = self._keywords
        settings = {"scope": keywords.get("scope"), "exclude": keywords.get("exclude")}
        if "scale_only" in keywords:  # earlier checkpoints have no such entry
            settings["scale_only"] = keywords["scale_only"]
        # The repr of a function has an address, which differs in the next process.
        settings = {k: getattr(v, "__qualname__", v) for k, v in settings.items()}
        if self._index is not None:
            settings["optimizer"] = self._index
        if self._is_one:
            settings["one_clipper"] = True
        return self._generate_state_key(clipper=name, **settings)

    def setup(self, trainer: "pl.Trainer", pl_module: Any, stage: str) -> None:
        """Note whether a checkpoint is loaded to train, and not to validate or test."""
        self._is_training = stage == "fit"

    def teardown(self, trainer: "pl.Trainer", pl_module: Any, stage: str) -> None:
        """End a validation or test: a state that is loaded later is for training."""
        self._is_training = True

    def on_train_start(self, trainer: "pl.Trainer", pl_module: Any) -> None:
        """Create the clippers and attach each to its optimizer."""
        warn_of_other_clipping(trainer, pl_module)
        if self._is_one:
            refuse_scaler(trainer)
        self._group.make(choose_optimizers(trainer.optimizers, self._index), pl_module)
        if self._saved:
            self._group.load(self._saved)
        elif self._saved is None and trainer.ckpt_path is not None:
            warn(
                f"{trainer.ckpt_path} has no history for ClipCallback, so clipping "
                "starts without one: it was saved without this callback, or with "
                "another class, scope or exclude"
            )
        self._saved = None  # the next run starts without a history
        self._group.attach()
        self._losses.reset()

    def on_train_batch_start(
        self, trainer: "pl.Trainer", pl_module: Any, batch: Any, batch_idx: int
    ) -> None:
        """Follow the optimizers of the trainer, which may have been replaced."""
        self._follow(trainer, pl_module)

    def on_before_backward(
        self, trainer: "pl.Trainer", pl_module: Any, loss: Tensor
    ) -> None:
        """Keep the loss, without the loss scale of 16-bit precision."""
        self._group.begin_backward()
        if any(map(_needs_loss, self.clippers)):
            scaler = getattr(trainer.precision_plugin, "scaler", None)
            loss = loss.detach()
            self._losses.add(loss if scaler is None else loss / scaler._scale)

    def on_before_optimizer_step(
        self, trainer: "pl.Trainer", pl_module: Any, optimizer: Any
    ) -> None:
        """Add parameters that a callback has unfrozen, and give the step its loss."""
        loss = self._losses.take(
            is_automatic=pl_module.automatic_optimization,
            accumulated=trainer.accumulate_grad_batches,
        )
        clipper, clipped_optimizer = self._group.find(optimizer)
        if clipper is None and self._follow(trainer, pl_module) and not self._is_one:
            warn(
                "an optimizer was replaced within a batch, so its first step is not "
                "clipped; replace it before, for example in on_train_epoch_start"
            )
            return
        clipper, clipped_optimizer = self._group.find(optimizer)
        if not isinstance(clipper, Clipper):
            return
        if _needs_loss(clipper):
            clipper.observe_loss(loss)
        self._group.step(clipped_optimizer)

    def on_train_batch_end(
        self, trainer: "pl.Trainer", pl_module: Any, *args: Any, **kwargs: Any
    ) -> None:
        """Log the metrics, as often as the trainer logs."""
        if not trainer._logger_connector.should_update_logs:
            return
        has_several = len(trainer.optimizers) > 1 and not self._is_one
        for index, clipper in zip(self._group.optimizers, self.clippers, strict=False):
            prefix = f"clip/optimizer{index}/" if has_several else "clip/"
            metrics = clipper.metrics().items()
            pl_module.log_dict({k.replace("clip/", prefix, 1): v for k, v in metrics})

    def on_train_end(self, trainer: "pl.Trainer", pl_module: Any) -> None:
        """Detach the clippers from the optimizers; the history stays."""
        self._group.detach()

    def on_exception(
        self, trainer: "pl.Trainer", pl_module: Any, exception: BaseException
    ) -> None:
        """Detach as in `on_train_end`, which an interrupted run does not reach."""
        self._group.detach()

    def state_dict(self) -> dict[str, Any]:
        """Return the state of each optimizer's clipper."""
        saved = [clipper.state_dict() for clipper in self.clippers]
        return {"clippers": saved or self._saved or []}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load the state into the clippers, or keep it until the optimizers exist."""
        if not self._is_training:
            return
        self._saved = state_dict["clippers"]
        if self._group.is_attached and self._saved:  # Lightning's finders do this
            self._group.load(self._saved)
            self._saved = None

    def _follow(self, trainer: "pl.Trainer", pl_module: Any) -> bool:
        """Follow replaced optimizers, and return whether there are any."""
        present = choose_optimizers(trainer.optimizers, self._index)
        return self._group.follow(present, pl_module)


def _needs_loss(clipper: BaseClipper) -> bool:
    return isinstance(clipper, Clipper) and clipper.loss_policy is not None
