"""What the Lightning callback asks of a trainer and a module before they train."""

from typing import Any

from torch.optim import Optimizer

from autoclip_torch.step.warn import warn


def warn_of_other_clipping(trainer: Any, pl_module: Any) -> None:
    """Warn if Lightning or the module clips, too: both clip before this callback."""
    method = type(pl_module).configure_gradient_clipping
    other = None
    if trainer.gradient_clip_val:
        other = f"Trainer(gradient_clip_val={trainer.gradient_clip_val})"
    elif method.__module__.partition(".")[0] not in ("lightning", "pytorch_lightning"):
        other = f"{type(pl_module).__name__}.configure_gradient_clipping"
    if other is not None:
        warn(
            f"{other} clips before ClipCallback, which then measures clipped norms; "
            "leave it out"
        )


def refuse_scaler(trainer: Any) -> None:
    """Refuse a GradScaler, which unscales one optimizer's gradients at a time."""
    if getattr(trainer.precision_plugin, "scaler", None) is not None:
        raise ValueError(
            "one_clipper must be False with a GradScaler, which unscales the gradients "
            'of each optimizer in its own step; use precision="bf16-mixed"'
        )


def choose_optimizers(
    optimizers: list[Optimizer], index: int | None
) -> dict[int, Optimizer]:
    """Return the optimizers to clip, by number.

    Raises:
      ValueError: the module returns none, or none with this index.
    """
    if [type(each).__name__ for each in optimizers] == ["_MockOptimizer"]:
        raise ValueError(
            "configure_optimizers must return the optimizers to clip, got None; return "
            "those that the module has made, or leave ClipCallback out and call "
            "clipper.attach(optimizer) for each"
        )
    numbered = dict(enumerate(optimizers))
    if index is None:
        return numbered
    if index not in numbered:
        raise ValueError(
            f"optimizer must be the number of one of the {len(numbered)} that "
            f"configure_optimizers returns, counted from 0, got {index!r}"
        )
    return {index: numbered[index]}
