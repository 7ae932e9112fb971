"""A Lightning callback that clips inside each optimizer's step."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from .clipper import Clipper
from .hooks.new_parameters import add_new_parameters, make_clipper
from .step.unwrap import unwrap
from .step.warn import warn
from .trust import TrustClip
from .update import UpdateClipper

try:
    import lightning.pytorch as pl
except ModuleNotFoundError as error:
    if error.name != "lightning":
        raise
    raise ModuleNotFoundError(
        "autoclip_torch.lightning needs Lightning: pip install lightning",
        name=error.name,
    ) from error

AnyClipper = Clipper | TrustClip | UpdateClipper


class ClipCallback(pl.Callback):
    """Clip the gradients of every optimizer of a `LightningModule`.

    It works with automatic and manual optimization and with any precision. It works
    with any strategy whose optimizers step in this process, except FSDP1.

    Each optimizer has its own clipper. Parameters that are unfrozen and added to the
    optimizer later are clipped from then on. The history is saved in the checkpoint.
    The trainer logs the result of `metrics()` whenever it logs. With several
    optimizers, the names are `clip/optimizer0/norm` and so on.

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
      **keywords: the keywords of `clipper`; `exclude` and `scale_only` may name
        parameters that are still frozen.

    Raises:
      TypeError: at the start of training, if a function cannot make a `Clipper`.
      ValueError: at the start of training, if `optimizer` is not a valid index,
        a pattern matches no parameter of the module, or the checkpoint does not fit.

    >>> from autoclip_torch import QuantileClip
    >>> callback = ClipCallback(QuantileClip, quantile=0.9, scope="global")
    >>> trainer = pl.Trainer(  # leave gradient_clip_val out
    ...     callbacks=[callback], accelerator="cpu", logger=False,
    ...     enable_checkpointing=False)
    """

    def __init__(
        self,
        clipper: Callable[..., AnyClipper],
        *,
        optimizer: int | None = None,
        **keywords: Any,
    ) -> None:
        """Keep the arguments until the optimizers exist."""
        self._make = clipper
        self._keywords = keywords
        self._index = optimizer
        self._saved: list[dict[str, Any]] | None = None
        self._optimizers: dict[int, Optimizer] = {}
        self._losses: list[Tensor] = []
        self._has_stepped = False
        self.clippers: list[AnyClipper] = []
        """One per clipped optimizer, from the start of training."""

    @property
    def state_key(self) -> str:
        """The name of the state: class, optimizer, scope, exclude and scale_only.

        A trainer may have several of these callbacks. Other settings are not part of
        the name: a state that differs in them is refused with the difference, while a
        state under another name would be ignored.
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
        return self._generate_state_key(clipper=name, **settings)

    def on_train_start(self, trainer: "pl.Trainer", pl_module: Any) -> None:
        """Create the clippers and attach each to its optimizer."""
        _warn_of_other_clipping(trainer, pl_module)
        self._optimizers = _choose(trainer.optimizers, self._index)
        self.clippers = []
        for optimizer in self._optimizers.values():
            self.clippers.append(self._create(optimizer, pl_module))
        if self._saved is not None:
            self._restore(self._saved)
        elif trainer.ckpt_path is not None:
            warn(
                f"{trainer.ckpt_path} has no history for ClipCallback, so clipping "
                "starts without one: it was saved without this callback, or with "
                "another class, scope or exclude"
            )
        for clipper, optimizer in self._get_pairs():
            if isinstance(clipper, Clipper):
                clipper.attach(optimizer)
        self._losses = []  # an interrupted run may have left some

    def on_before_backward(
        self, trainer: "pl.Trainer", pl_module: Any, loss: Tensor
    ) -> None:
        """Keep the loss, without the loss scale of 16-bit precision."""
        if any(map(_needs_loss, self.clippers)):
            scaler = getattr(trainer.precision_plugin, "scaler", None)
            loss = loss.detach()
            if self._has_stepped:
                self._losses, self._has_stepped = [], False
            self._losses.append(loss if scaler is None else loss / scaler._scale)

    def on_before_optimizer_step(
        self, trainer: "pl.Trainer", pl_module: Any, optimizer: Any
    ) -> None:
        """Add parameters that a callback has unfrozen, and give the step its loss."""
        losses, self._has_stepped = self._losses, True
        if pl_module.automatic_optimization:
            self._losses = []  # a step without a backward pass has no loss
        for clipper, clipped_optimizer in self._get_pairs():
            if not isinstance(clipper, Clipper):  # it adds new parameters itself
                continue
            if clipped_optimizer is unwrap(optimizer):
                add_new_parameters(clipper, clipped_optimizer, pl_module)
                if _needs_loss(clipper):
                    clipper.observe_loss(_join_losses(losses, trainer, pl_module))

    def on_train_batch_end(
        self, trainer: "pl.Trainer", pl_module: Any, *args: Any, **kwargs: Any
    ) -> None:
        """Log the metrics, as often as the trainer logs."""
        if not trainer._logger_connector.should_update_logs:
            return
        for index, clipper in zip(self._optimizers, self.clippers, strict=True):
            has_several = len(trainer.optimizers) > 1
            prefix = f"clip/optimizer{index}/" if has_several else "clip/"
            metrics = clipper.metrics().items()
            pl_module.log_dict({k.replace("clip/", prefix, 1): v for k, v in metrics})

    def on_train_end(self, trainer: "pl.Trainer", pl_module: Any) -> None:
        """Detach the clippers from the optimizers; the history stays."""
        self._detach()

    def on_exception(
        self, trainer: "pl.Trainer", pl_module: Any, exception: BaseException
    ) -> None:
        """Detach as in `on_train_end`, which an interrupted run does not reach."""
        self._detach()

    def state_dict(self) -> dict[str, Any]:
        """Return the state of each optimizer's clipper."""
        saved = [clipper.state_dict() for clipper in self.clippers]
        return {"clippers": saved or self._saved or []}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep the state until the optimizers exist."""
        self._saved = state_dict["clippers"]

    def _create(self, optimizer: Optimizer, pl_module: Any) -> AnyClipper:
        """Return a clipper of the optimizer; all but a `Clipper` are registered."""
        make: Any = self._make
        kind = _get_function(make)
        if isinstance(kind, type) and issubclass(kind, TrustClip | UpdateClipper):
            clipper: AnyClipper = make(pl_module, optimizer, **self._keywords)
            return clipper
        make = make if isinstance(kind, type) else partial(_call, make)
        clipper = make_clipper(make, self._keywords, optimizer, pl_module)
        return clipper

    def _get_pairs(self) -> list[tuple[AnyClipper, Optimizer]]:
        return list(zip(self.clippers, self._optimizers.values(), strict=True))

    def _restore(self, saved: list[dict[str, Any]]) -> None:
        """Load the history of the checkpoint."""
        if len(saved) != len(self.clippers):
            raise ValueError(
                "the checkpoint must hold one history per optimizer that is clipped, "
                f"got {len(saved)} for {len(self.clippers)}; resume with as many "
                "optimizers as it was saved with"
            )
        for clipper, state in zip(self.clippers, saved, strict=True):
            clipper.load_state_dict(state)
        self._saved = None  # the next run starts without a history

    def _detach(self) -> None:
        for clipper in self.clippers:
            clipper.detach()


def _get_function(make: Any) -> Any:
    """Return the class or function inside partial functions."""
    while isinstance(make, partial):
        make = make.func
    return make


def _call(make: Callable[..., Clipper], groups: Any, **keywords: Any) -> Clipper:
    """Call a function that makes a clipper; its `TypeError` gets the way out."""
    try:
        return make(groups, **keywords)
    except TypeError as error:
        raise TypeError(
            "clipper must be a class of autoclip_torch, or a function that makes a "
            f"Clipper of parameter groups, got a function that raised {error!s}; write "
            "ClipCallback(TrustClip, ratio=0.01), and so for UpdateClipper"
        ) from error


def _needs_loss(clipper: AnyClipper) -> bool:
    return isinstance(clipper, Clipper) and clipper.loss_policy is not None


def _warn_of_other_clipping(trainer: "pl.Trainer", pl_module: Any) -> None:
    """Warn if Lightning or the module clips, too: both clip before this callback."""
    method = type(pl_module).configure_gradient_clipping
    other = None
    if trainer.gradient_clip_val:
        other = f"Trainer(gradient_clip_val={trainer.gradient_clip_val})"
    elif method is not pl.LightningModule.configure_gradient_clipping:
        other = f"{type(pl_module).__name__}.configure_gradient_clipping"
    if other is not None:
        warn(
            f"{other} clips before ClipCallback, which then measures clipped norms; "
            "leave it out"
        )


def _join_losses(losses: list[Tensor], trainer: "pl.Trainer", pl_module: Any) -> Tensor:
    """Return the loss of a step from the losses of its backward passes.

    Lightning has divided each of them by `accumulate_grad_batches`. Without a backward
    pass the loss is NaN, which cancels the update.
    """
    if not losses:
        return torch.tensor(float("nan"))
    total = torch.stack(losses).sum()
    if not pl_module.automatic_optimization:
        return total
    return total * (trainer.accumulate_grad_batches / len(losses))


def _choose(optimizers: list[Optimizer], index: int | None) -> dict[int, Optimizer]:
    """Return the optimizers to clip, by number."""
    numbered = dict(enumerate(optimizers))
    if index is None:
        return numbered
    if index not in numbered:
        raise ValueError(
            f"optimizer must be the number of one of the {len(numbered)} that "
            f"configure_optimizers returns, counted from 0, got {index!r}"
        )
    return {index: numbered[index]}
