"""A callback of the Hugging Face `Trainer` that clips inside the optimizer's step."""

import json
from typing import Any

import numpy as np
import torch

import autoclip_core
from autoclip_core.clipper.serialize import policy_from_dict, policy_to_dict

from . import named
from .clipper import Clipper
from .hooks.follow import clipper_of, follow
from .step.warn import warn
from .value import ValueClip

try:
    from transformers import TrainerCallback
    from transformers.trainer_callback import ExportableState
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        "autoclip_torch.transformers needs Transformers and Accelerate: "
        "pip install transformers accelerate"
    ) from error

_CLASSES: dict[str, type[Clipper]] = {
    kind.__name__: kind
    for kind in (
        Clipper,
        ValueClip,
        named.AGC,
        named.AdaGC,
        named.NormClip,
        named.QuantileClip,
        named.StandardClip,
        named.ZClip,
    )
}


class ClipCallback(TrainerCallback, ExportableState):
    """Clip in the `Trainer`, and log `clip/...` beside its `grad_norm`.

    What the optimizer steps is clipped, in the optimizer's groups, and what is unfrozen
    and added to it later, from then on. The trainer itself clips first, at
    `max_grad_norm=1.0` by default: set it to 0. To go on with the history after a
    checkpoint, set `restore_callback_states_from_checkpoint=True`.

    Args:
      clipper: a class of `autoclip_torch`, or its name.
      **keywords: what it accepts: plain Python and policies, which are saved as JSON;
        `exclude` may name what is frozen as yet.

    Raises:
      ValueError, TypeError: a class or a setting that no checkpoint can hold; when
        training starts, what does not fit the model or the checkpoint.

    >>> from autoclip_torch import QuantileClip
    >>> callback = ClipCallback(QuantileClip, quantile=0.9, scope="global")
    """

    def __init__(self, clipper: type[Clipper] | str, **keywords: Any) -> None:
        """Remember what to make when the model and the optimizer are there."""
        name = clipper if isinstance(clipper, str) else clipper.__name__
        if name not in _CLASSES or clipper not in (name, _CLASSES[name]):
            raise ValueError(
                f"clipper must be one of {', '.join(sorted(_CLASSES))}, got {name!r}; "
                "a checkpoint can hold no class of your own: use clipper.attach(...)"
            )
        self._name = name
        self._keywords = {k: _from_json(value) for k, value in keywords.items()}
        for key, value in self._keywords.items():
            _check_json(key, value)
        self.clipper: Clipper | None = None
        """The clipper, from the beginning of training on."""
        self.saved: dict[str, Any] | None = None
        """The state to begin with; the trainer sets it from a checkpoint."""

    def on_train_begin(
        self, args: Any, state: Any, control: Any, **kwargs: Any
    ) -> None:
        """Make the clipper of the model's parameters and attach it."""
        _check_arguments(args)
        if self.clipper is not None:  # a run that was interrupted never ended
            self.clipper.detach()
        make, optimizer = _CLASSES[self._name], kwargs["optimizer"]
        clipper = clipper_of(make, self._keywords, optimizer, kwargs["model"])
        if self.saved is not None:
            clipper.load_state_dict(_as_tensors(self.saved, clipper.state_dict()))
            self.saved = None  # the next run begins anew
        elif state.global_step > 0:
            _warn_of_no_history(args)
        clipper.attach(optimizer)
        self.clipper = clipper

    def on_pre_optimizer_step(
        self, args: Any, state: Any, control: Any, **kwargs: Any
    ) -> None:
        """Follow the optimizer: a callback may have given it what was frozen."""
        if self.clipper is not None:
            follow(self.clipper, kwargs["optimizer"], kwargs["model"])

    def on_log(
        self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any
    ) -> None:
        """Add the metrics to what is logged of a training step."""
        if self.clipper is None or not logs or "grad_norm" not in logs:
            return
        found = self.clipper.metrics()
        logs.update(found)  # for the callbacks after this one
        state.log_history[-1].update(found)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Leave the optimizer as it was; the history stays."""
        if self.clipper is not None:
            self.clipper.detach()

    def state(self) -> dict[str, Any]:
        """Return constructor arguments and history as plain Python, for JSON."""
        keywords = {name: _to_json(value) for name, value in self._keywords.items()}
        saved = self.saved if self.clipper is None else self.clipper.state_dict()
        attributes = {"saved": _to_json(saved)}
        return {"args": {"clipper": self._name, **keywords}, "attributes": attributes}


def _check_arguments(args: Any) -> None:
    """Warn of a second clipper, and refuse an engine that steps within backward."""
    if getattr(args, "deepspeed", None):
        raise RuntimeError(
            "under DeepSpeed the engine clips and steps within backward, before any "
            "callback; use clipper.threshold() and clipper.observe() as docs/stacks.md "
            "shows"
        )
    if args.max_grad_norm and args.max_grad_norm > 0:
        warn(
            f"TrainingArguments(max_grad_norm={args.max_grad_norm}) clips before "
            "ClipCallback, which then sees clipped norms, while grad_norm is the norm "
            "before both; set max_grad_norm=0"
        )


def _warn_of_no_history(args: Any) -> None:
    way_out = "set restore_callback_states_from_checkpoint=True"
    if args.restore_callback_states_from_checkpoint:
        way_out = (
            "its checkpoint holds none, or those of several ClipCallbacks, which "
            "Transformers cannot tell apart: give the trainer one"
        )
    warn(f"this run was resumed, but the clipper starts without its history; {way_out}")


def _check_json(key: str, value: Any) -> None:
    """Refuse what the first checkpoint could not hold."""
    try:
        json.dumps(_to_json(value))
    except TypeError:
        raise TypeError(
            f"{key} must be a number, a name, a pattern with *, a policy or a list of "
            f"these, because the checkpoint is JSON, got {value!r}; for anything else "
            "make the clipper yourself and call clipper.attach(optimizer)"
        ) from None


def _to_json(value: Any) -> Any:
    """Return policies as descriptions, tensors as lists and NumPy's numbers as ours."""
    if isinstance(value, torch.Tensor | np.generic):
        return value.tolist()
    if isinstance(value, dict):
        return {name: _to_json(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [_to_json(part) for part in value]
    if hasattr(value, "limit"):
        return policy_to_dict(value)
    return value


def _from_json(value: Any) -> Any:
    """Return a policy where there is the description of one."""
    if isinstance(value, dict) and "type" in value:
        find = vars(autoclip_core).get
        return policy_from_dict(value, find)
    return value


def _as_tensors(saved: Any, like: Any) -> Any:
    """Return a state read from JSON, with tensors where this clipper's has them."""
    if isinstance(like, torch.Tensor):
        return torch.tensor(saved, dtype=like.dtype)
    if isinstance(like, dict) and isinstance(saved, dict):
        return {k: _as_tensors(part, like.get(k)) for k, part in saved.items()}
    if isinstance(like, list) and isinstance(saved, list) and len(like) == len(saved):
        return [_as_tensors(*pair) for pair in zip(saved, like, strict=True)]
    return saved
