"""Where clippers stand in an optimizer state, and so what they clip."""

from collections.abc import Iterator
from typing import Any, NamedTuple

from autoclip_jax.skip_state import SkipState
from autoclip_jax.state import ClipState, TrustState

from .tree import has_clipper, is_chain, list_children, list_leaves


class Place(NamedTuple):
    """A clipper in an optimizer state."""

    state: ClipState | SkipState
    """Its state."""
    is_update: bool
    """Whether it clips the update."""
    clippers_before: int
    """The number of clippers before it in its chain. A mask may part their leaves."""


def find_clippers(
    part: Any, is_behind: bool = False, is_followed: bool = False, before: int = 0
) -> Iterator[Place]:
    """Yield each clipper of an optimizer state.

    A clipper clips the update if another transformation of its chain stands before it,
    and none behind it. Other clippers do not count. In a wrapper, the position is that
    of the wrapper.

    Args:
      part: an optimizer state, or a part of it.
      is_behind: whether another transformation stands before this part.
      is_followed: whether another transformation stands behind this part.
      before: the number of clippers before this part.
    """
    if isinstance(part, ClipState):
        yield Place(part, is_behind and not is_followed, before)
    elif isinstance(part, SkipState):
        yield Place(part, False, before)  # its clipper decides on the gradient
        yield from find_clippers(part.skip_inner_state, is_behind, is_followed, before)
    elif isinstance(part, TrustState):
        yield from find_clippers(part.trust_gradient, before=before)
        yield from find_clippers(part.trust_inner_state, is_behind, is_followed, before)
        yield from find_clippers(part.trust_update, is_behind=True)
    elif has_clipper(part):
        links = list_children(part)
        changes = [is_chain(part) and _has_transformation(link) for link in links]
        for index, link in enumerate(links):
            behind = is_behind or any(changes[:index])
            followed = is_followed or any(changes[index + 1 :])
            yield from find_clippers(link, behind, followed, before)
            if is_chain(part):
                before += sum(isinstance(p, ClipState) for p in list_leaves(link))


def _has_transformation(part: Any) -> bool:
    """Return whether a link of a chain holds a transformation that is no clipper."""
    if isinstance(part, ClipState):
        return False
    if isinstance(part, SkipState):
        return _has_transformation(part.skip_inner_state)
    if isinstance(part, TrustState) or not has_clipper(part):
        return True
    links = list_children(part)
    # The other fields of a wrapper are its counts.
    return any(
        _has_transformation(link)
        for link in links
        if is_chain(part) or has_clipper(link)
    )
