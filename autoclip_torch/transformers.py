"""A callback of the Hugging Face `Trainer` that clips inside the optimizer's step."""

from functools import partial
from typing import Any

import torch
from torch import Tensor

from .clipper import Clipper
from .named import AGC, AdaGC, NormClip, QuantileClip, StandardClip, ZClip
from .observer.base import BaseClipper
from .step.warn import warn
from .trainers.arguments import check_arguments
from .trainers.create_clipper import create_clipper
from .trainers.history import load_history
from .trainers.json_settings import as_tensors, check_json, from_json, to_json
from .trainers.replaced_callback import describe_changes, find_replaced_callback
from .trust import TrustClip
from .update import UpdateClipper
from .value import ValueClip

try:
    from transformers import TrainerCallback
    from transformers.trainer_callback import ExportableState
except ModuleNotFoundError as error:
    if error.name not in ("transformers", "accelerate"):
        raise
    raise ModuleNotFoundError(
        "autoclip_torch.transformers needs Transformers and Accelerate: "
        "pip install transformers accelerate",
        name=error.name,
    ) from error

_KINDS = (Clipper, ValueClip, AGC, AdaGC, NormClip, QuantileClip, StandardClip, ZClip)
_CLASSES: dict[str, Any] = {
    kind.__name__: kind for kind in (*_KINDS, TrustClip, UpdateClipper)
}

_FUNCTIONS = ("on_clip", "on_skip")
"""The keywords that no checkpoint holds."""


class ClipCallback(TrainerCallback, ExportableState):
    """Clip in the `Trainer`, and log `clip/...` together with its `grad_norm`.

    All parameters of the optimizer are clipped, in the optimizer's groups. Parameters
    that are unfrozen and added to it later are clipped from then on. The trainer itself
    clips first, at `max_grad_norm=1.0` by default: set it to 0. To keep the history
    when a run is resumed, set `restore_callback_states_from_checkpoint=True`.

    A `loss_policy` receives the loss that the trainer backpropagates, with gradient
    accumulation the mean. The model must return its loss; a loss that the trainer
    computes (`compute_loss_func`, `label_smoothing_factor`) is not available here.

    Args:
      clipper: a class of `autoclip_torch`, such as `TrustClip` or `UpdateClipper`, or
        its name.
      **keywords: the keywords of the class: plain Python and policies, which are saved
        as JSON, and the functions `on_clip` and `on_skip`, which are not. `exclude` and
        `scale_only` may name parameters that are still frozen. In a resumed run these
        settings apply, and not those of the checkpoint; a difference causes a warning.

    Raises:
      ValueError, TypeError: an argument of the clipper breaks its rule, or is a class
        or a setting that no checkpoint can hold.
      ValueError: when training starts: a setting or the checkpoint does not fit.

    >>> from autoclip_torch import QuantileClip
    >>> callback = ClipCallback(QuantileClip, quantile=0.9, scope="global")
    """

    def __init__(self, clipper: type[BaseClipper] | str, **keywords: Any) -> None:
        self._changes = ""
        if (given := find_replaced_callback(ClipCallback)) is not None:
            # The settings of the callback that the trainer was given apply.
            self._changes = describe_changes(keywords, given._json_keywords)
            clipper, keywords = given._name, given._keywords
        name = getattr(clipper, "__name__", str(clipper))
        if name not in _CLASSES or clipper not in (name, _CLASSES[name]):
            raise ValueError(
                f"clipper must be one of {', '.join(sorted(_CLASSES))}, got {name!r}; "
                "give the class and its keywords: ClipCallback(TrustClip, ratio=0.01). "
                "A checkpoint cannot hold a class of your own: use clipper.attach(...)"
            )
        self._name = name
        self._keywords = {k: from_json(value) for k, value in keywords.items()}
        for key, value in self._keywords.items():
            if key not in _FUNCTIONS:
                check_json(key, value)
        check_arguments(_CLASSES[name], self._keywords)
        self.clipper: BaseClipper | None = None
        """The clipper, from the start of training."""
        self.saved: dict[str, Any] | None = None
        """The state to start with; the trainer sets it from a checkpoint."""
        self._losses: list[Tensor] = []
        self._forward_hook: Any = None

    def on_train_begin(
        self, args: Any, state: Any, control: Any, **kwargs: Any
    ) -> None:
        """Create the clipper of the model's parameters and attach it."""
        _check_arguments(args)
        if self.clipper is not None:  # a run that was interrupted never ended
            self.clipper.detach()
        optimizer, model = kwargs["optimizer"], kwargs["model"]
        kind, keywords = _CLASSES[self._name], self._keywords
        clipper = create_clipper(kind, keywords, [optimizer], model)
        self.clipper = clipper
        if self.saved is not None:
            self._load(clipper, self.saved)
            self.saved = None  # the next run starts without a history
        elif state.global_step > 0:
            _warn_of_no_history(args)
        self._remove_hook()
        if not isinstance(clipper, Clipper):
            return
        clipper.attach(optimizer)
        if clipper.loss_policy is not None:
            self._forward_hook = model.register_forward_hook(self._follow_loss)

    def on_pre_optimizer_step(
        self, args: Any, state: Any, control: Any, **kwargs: Any
    ) -> None:
        """Add parameters that a callback has unfrozen, and give the step its loss."""
        if not isinstance(self.clipper, Clipper):
            return  # the others add new parameters themselves
        optimizer = kwargs["optimizer"]
        if self.clipper.loss_policy is not None:
            losses, self._losses = self._losses, []
            scaler = getattr(optimizer, "scaler", None)
            self.clipper.observe_loss(_join_losses(losses, scaler))

    def on_log(
        self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any
    ) -> None:
        """Add the metrics to the logs of a training step."""
        if self.clipper is None or not logs or "grad_norm" not in logs:
            return
        metrics = self.clipper.metrics()
        logs.update(metrics)  # for the callbacks after this one
        state.log_history[-1].update(metrics)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Detach the clipper from the optimizer; the history stays."""
        self._remove_hook()
        if self.clipper is not None:
            self.clipper.detach()

    def state(self) -> dict[str, Any]:
        """Return constructor arguments and history as plain Python, for JSON."""
        saved = self.saved if self.clipper is None else self.clipper.state_dict()
        arguments = {"clipper": self._name, **self._json_keywords}
        return {"args": arguments, "attributes": {"saved": to_json(saved)}}

    @property
    def _json_keywords(self) -> dict[str, Any]:
        """The keywords that a checkpoint holds."""
        pairs = self._keywords.items()
        return {name: to_json(value) for name, value in pairs if name not in _FUNCTIONS}

    def _load(self, clipper: BaseClipper, saved: Any) -> None:
        """Load the history of a checkpoint; the settings of this callback apply.

        Raises:
          ValueError: the history has another meaning with these settings.
        """
        state = as_tensors(saved, clipper.state_dict())
        try:
            load_history(clipper, state, self._changes)
        except ValueError as error:
            raise ValueError(
                f"{error}; to start without the history, set "
                "restore_callback_states_from_checkpoint=False"
            ) from error

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _follow_loss(self, model: Any, args: Any, output: Any) -> None:
        """Keep the loss that the model returns, as far as it is backpropagated.

        The trainer divides it by the number of micro-batches, unless the model has
        done so, and scales it. The gradient of the loss is the product of all that.
        """
        if not model.training:
            return
        loss = output.get("loss") if isinstance(output, dict) else output[0]
        if isinstance(loss, Tensor) and loss.requires_grad:
            add = partial(self._add_loss, loss.detach())
            loss.register_hook(add)  # type: ignore[no-untyped-call]

    def _add_loss(self, loss: Tensor, weight: Tensor) -> None:
        self._losses.append(loss * weight)

    def _remove_hook(self) -> None:
        if self._forward_hook is not None:
            self._forward_hook.remove()
        self._forward_hook, self._losses = None, []


def _join_losses(losses: list[Tensor], scaler: Any) -> Tensor:
    """Return the loss of a step, without the loss scale.

    Raises:
      ValueError: no loss of the model was backpropagated.
    """
    if not losses:
        raise ValueError(
            "with loss_policy the model must return the loss that is backpropagated, "
            "got none; leave compute_loss_func and label_smoothing_factor out, or make "
            "the clipper yourself and call clipper.observe_loss(loss) in compute_loss"
        )
    total = torch.stack(losses).sum()
    is_scaled = scaler is not None and scaler.is_enabled()
    return total / scaler._scale if is_scaled else total


def _check_arguments(args: Any) -> None:
    """Warn if the trainer clips, too; refuse an engine that steps within backward."""
    if getattr(args, "deepspeed", None):
        raise RuntimeError(
            "under DeepSpeed the engine clips and steps within backward, before any "
            "callback; use clipper.threshold() and clipper.observe() as "
            "docs/trainers.md shows"
        )
    if args.max_grad_norm and args.max_grad_norm > 0:
        warn(
            f"TrainingArguments(max_grad_norm={args.max_grad_norm}) clips before "
            "ClipCallback, which then measures clipped norms, while grad_norm is the "
            "norm before both; set max_grad_norm=0"
        )


def _warn_of_no_history(args: Any) -> None:
    way_out = "set restore_callback_states_from_checkpoint=True"
    if args.restore_callback_states_from_checkpoint:
        way_out = (
            "its checkpoint holds none, or those of several ClipCallbacks, which "
            "Transformers cannot distinguish: give the trainer one"
        )
    warn(f"this run was resumed, but the clipper starts without its history; {way_out}")
