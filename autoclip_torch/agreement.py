"""Check that the clippers of all ranks have the same state and last decision."""

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .gradients import sharded
from .gradients.ranks import find_device
from .observer.base import BaseClipper
from .observer.observer import Observer


def check_agreement(clipper: BaseClipper, group: Any = None) -> None:
    """Raise an error on every rank if the clippers of the ranks differ.

    Settings, history, counts and last decision are compared bit by bit. One small
    collective exchanges their digests. If the ranks reduce norms or losses in a step, a
    reduction like it comes first and compares their steps. Ranks that do not agree
    scale the same gradient differently, and their models drift apart silently.

    Call it from time to time, on every rank of the group: it reads a state back from an
    accelerator. Without torch.distributed it does nothing.

    Args:
      clipper: this rank's clipper, `UpdateClipper` or `TrustClip`, after a step.
      group: the ranks that must agree, by default all. The stages of a pipeline agree
        only with scope="global" and a `process_group`; otherwise pass the group of the
        copies of one stage.

    Raises:
      RuntimeError: the clippers differ; the message names the ranks and the parts. With
        sharded parameters, the ranks may also be in different steps.

    >>> from autoclip_torch import NormClip
    >>> weight = torch.nn.Parameter(torch.zeros(2))
    >>> clipper = NormClip([weight], max_norm=1.0)
    >>> for step in range(200):
    ...     weight.grad = torch.ones(2)
    ...     decision = clipper.step()
    ...     if step % 100 == 0:
    ...         check_agreement(clipper)
    """
    if not (dist.is_available() and dist.is_initialized()):
        return
    for observer in clipper._observers:
        _check_one(observer, group or dist.group.WORLD)


def _check_one(clipper: Observer, group: Any) -> None:
    ranks = dist.get_process_group_ranks(group)
    _compare_steps(clipper, ranks)
    digests = _make_digests(clipper)
    local = torch.frombuffer(bytearray(b"".join(digests.values())), dtype=torch.uint8)
    local = local.to(_find_device(clipper, group))
    gathered = [torch.empty_like(local) for _ in ranks]
    dist.all_gather(gathered, local, group=group)
    shape = (len(digests), -1)
    rank_digests = [tuple(map(tuple, d.view(shape).tolist())) for d in gathered]
    (majority, _), *others = Counter(rank_digests).most_common()
    if others:
        differences = [
            f"rank {rank} ({', '.join(_different(list(digests), digest, majority))})"
            for rank, digest in zip(ranks, rank_digests, strict=True)
            if digest != majority
        ]
        raise RuntimeError(
            "the clippers of all ranks must agree, but these differ from the others: "
            f"{'; '.join(differences)}; did these ranks leave out a step, load another "
            "checkpoint, or make the clipper with other arguments? Ranks with other "
            "parameters, such as the stages of a pipeline, share one norm only with "
            'scope="global" and process_group'
        )


def _compare_steps(clipper: Observer, ranks: Sequence[int]) -> None:
    """Check that all ranks have taken the same steps, if their steps reduce.

    Without this, the step of one rank would wait for the check of another.
    """
    stepper, states = clipper._stepper, clipper._policy_states
    groups = (dist.group.WORLD,) if stepper.ranks is None else stepper.ranks.groups
    if any(set(dist.get_process_group_ranks(g)).difference(ranks) for g in groups):
        return  # the other ranks of the reduction do not check
    if stepper.ranks is None:
        stepper.loss.compare_steps(states)
        return
    needs_weights = any(b.policy.needs_param_norms for b in stepper.rows.by_policy)
    sequences = 1 + needs_weights + stepper.extra_sequences
    sharded.compare_steps(stepper.parts, sequences, states.device, stepper.ranks)


def _find_device(clipper: Observer, group: Any) -> torch.device:
    """Return the device on which the ranks exchange digests."""
    ranks, device = clipper._stepper.ranks, clipper._policy_states.device
    mesh_device = None if ranks is None else ranks.device
    return find_device([group], mesh_device, device or torch.device("cpu"))


def _different(names: list[str], left: Any, right: Any) -> list[str]:
    """Return the names of the parts in which two ranks differ."""
    parts = zip(names, left, right, strict=True)
    return [name for name, a, b in parts if a != b]


def _make_digests(clipper: Observer) -> dict[str, bytes]:
    """Return the digest of each part that must be the same on all ranks.

    Parameters and their names are left out: the stages of a pipeline hold different
    ones.
    """
    state, (decision, _, losses) = clipper.state_dict(), clipper._policy_states.read()
    settings = ("class", "scope", "norm", "policies", "settings")
    parts = {
        "settings": {name: state.get(name) for name in settings},
        "history": state["states"],
        "counts": state["tally"],
        "last decision": {**decision._asdict(), **losses},
    }
    if "loss" in state:
        parts["losses"] = state["loss"]
    return {name: _digest(part) for name, part in parts.items()}


def _digest(part: Any) -> bytes:
    """Return a SHA-256 digest of every bit of a part."""
    if isinstance(part, Mapping):
        content = b"".join(repr(name).encode() + _digest(part[name]) for name in part)
    elif isinstance(part, list):
        content = b"".join(map(_digest, part))
    elif isinstance(part, Tensor):
        return _digest(part.detach().cpu().numpy())
    elif hasattr(part, "tobytes"):
        content = repr((part.dtype.str, part.shape)).encode() + part.tobytes()
    else:
        content = repr(part).encode()
    return hashlib.sha256(content).digest()
