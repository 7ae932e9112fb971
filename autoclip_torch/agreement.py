"""Whether the clippers of all ranks have learned and decided the same."""

import hashlib
from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .clipper import Clipper


def check_agreement(clipper: Clipper, group: Any = None) -> None:
    """Raise an error on every rank if the clipper of one differs from the others'.

    Settings, history, counts and last decision are compared bit by bit, by their
    digests, in one small collective. Ranks that stop agreeing scale one gradient
    differently, and their models drift apart unnoticed. Call it now and then, on every
    rank of the group: what is on an accelerator is read back to the host for it.
    Without torch.distributed it does nothing.

    Args:
      clipper: this rank's clipper, after `step()`.
      group: the ranks that must agree; all of them by default. The stages of a pipeline
        agree only with scope="global" and a `process_group`; otherwise name the copies
        of one stage.

    Raises:
      RuntimeError: the clippers differ; the message names the ranks, and what differs.

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
    digests = _digests(clipper)
    own = torch.frombuffer(bytearray(b"".join(digests.values())), dtype=torch.uint8)
    own = own.to(clipper._policy_states.device or "cpu")
    group = group or dist.group.WORLD
    ranks = dist.get_process_group_ranks(group)
    gathered = [torch.empty_like(own) for _ in ranks]
    dist.all_gather(gathered, own, group=group)
    shape = (len(digests), -1)
    of_rank = [tuple(map(tuple, d.view(shape).tolist())) for d in gathered]
    (most, _), *others = Counter(of_rank).most_common()
    if others:
        told = [
            f"rank {rank} ({', '.join(_different(list(digests), digest, most))})"
            for rank, digest in zip(ranks, of_rank, strict=True)
            if digest != most
        ]
        raise RuntimeError(
            "the clippers of all ranks must agree, but these differ from the others: "
            f"{'; '.join(told)}; was a step left out there, another checkpoint loaded, "
            "or the clipper made with other arguments?"
        )


def _different(names: list[str], one: Any, other: Any) -> list[str]:
    """Return the names of the parts in which two ranks differ."""
    parts = zip(names, one, other, strict=True)
    return [name for name, left, right in parts if left != right]


def _digests(clipper: Clipper) -> dict[str, bytes]:
    """Return the digest of each part that has to be the same on all ranks.

    Parameters and their names are none of them: stages of a pipeline hold others.
    """
    state, (decision, _) = clipper.state_dict(), clipper._policy_states.read()
    settings = ("class", "scope", "policies", "settings")
    parts = {
        "settings": {name: state[name] for name in settings},
        "history": state["states"],
        "counts": state["tally"],
        "last decision": decision._asdict(),
    }
    return {name: _digest(part) for name, part in parts.items()}


def _digest(part: Any) -> bytes:
    """Return what differs, but for one chance in 2**256, where a bit does."""
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
