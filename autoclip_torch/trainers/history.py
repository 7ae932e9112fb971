"""Load the history of a checkpoint into the clipper of a trainer."""

from typing import Any

from autoclip_torch.step.warn import warn


def load_history(clipper: Any, state: Any, changes: str = "") -> None:
    """Load a history; the settings of this run apply, and a difference warns.

    The warning names the `changes` of settings, or else the first difference.

    Raises:
      ValueError: the history has another meaning in this clipper.
    """
    try:
        clipper.load_state_dict(state)
    except ValueError as error:
        clipper.load_state_dict(state, strict=False)
        changes = changes or describe_error(error)
    if changes:
        warn(
            "this run continues its history with other settings or parameters than "
            f"those of the checkpoint: {changes}; to keep the earlier settings, give "
            "them to ClipCallback"
        )


def describe_error(error: ValueError) -> str:
    """Return what does not fit, without the way out of a call that a trainer hides.

    >>> describe_error(ValueError("state does not fit this clipper: a; pass b"))
    'a'
    """
    text = str(error).removeprefix("state does not fit this clipper: ")
    return text.partition(";")[0]
