"""Settings and states as JSON, which is what a Hugging Face checkpoint holds."""

import json
from typing import Any

import numpy as np
import torch

import autoclip_core
from autoclip_core.clipper.serialize import policy_from_dict, policy_to_dict


def check_json(key: str, value: Any) -> None:
    """Refuse a setting that a checkpoint cannot hold."""
    try:
        json.dumps(to_json(value))
    except TypeError:
        raise TypeError(
            f"{key} must be a number, a name, a pattern with *, a policy or a list of "
            f"these, because the checkpoint is JSON, got {value!r}; for anything else "
            "make the clipper yourself and call clipper.attach(optimizer)"
        ) from None


def to_json(value: Any) -> Any:
    """Return policies as dicts, tensors as lists and NumPy numbers as Python's."""
    if isinstance(value, torch.Tensor | np.generic):
        return value.tolist()
    if isinstance(value, dict):
        return {name: to_json(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [to_json(part) for part in value]
    if hasattr(value, "limit"):
        return policy_to_dict(value)
    return value


def from_json(value: Any) -> Any:
    """Return a policy if the value describes one, otherwise the value."""
    if isinstance(value, dict) and "type" in value:
        return policy_from_dict(value, vars(autoclip_core).get)
    return value


def as_tensors(saved: Any, like: Any) -> Any:
    """Return a state read from JSON, with tensors at the places of those in `like`."""
    if isinstance(like, torch.Tensor):
        return torch.tensor(saved, dtype=like.dtype)
    if isinstance(like, dict) and isinstance(saved, dict):
        return {k: as_tensors(part, like.get(k)) for k, part in saved.items()}
    if isinstance(like, list) and isinstance(saved, list) and len(like) == len(saved):
        return [as_tensors(*pair) for pair in zip(saved, like, strict=True)]
    return saved
