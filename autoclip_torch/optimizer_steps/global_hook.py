"""The hooks of this package that run in the steps of all optimizers."""

import threading
import weakref
from typing import Any

import torch
from torch.utils.hooks import RemovableHandle

from .weak_hook import WeakHook

_LOCK = threading.RLock()
"""Two threads may not change the hooks at the same time."""


class GlobalHook:
    """The one hook in a table of torch that calls those of this package.

    torch goes through its table in a step, and fails if a hook is added or removed
    meanwhile, such as by another thread. This hook goes through a tuple.
    """

    def __init__(self) -> None:
        """Start without hooks."""
        self.hooks: tuple[Any, ...] = ()
        self.owners: tuple[weakref.ref[Any], ...] = ()
        """The clippers, also those without a hook."""

    def __call__(self, optimizer: Any, args: Any, kwargs: Any) -> Any:
        """Call the hooks, except in compiled steps.

        Returns:
          The last arguments that a hook returned in place of those of the step, or
          None.
        """
        if torch.compiler.is_compiling():
            return None
        changed = None
        for hook in self.hooks:
            if (result := hook(optimizer, args, kwargs)) is not None:
                changed = args, kwargs = result
        return changed


def list_hooks(table: dict[int, Any]) -> tuple[Any, ...]:
    """Return the hooks of this package in a table of torch."""
    with _LOCK:
        return _find(table).hooks


def list_owners(table: dict[int, Any]) -> list[Any]:
    """Return the clippers that were added to a table of torch, and still exist."""
    with _LOCK:
        owners = [reference() for reference in _find(table).owners]
    return [owner for owner in owners if owner is not None]


def add_owner(table: dict[int, Any], owner: Any) -> None:
    """Let `list_owners` return a clipper, once, as long as it exists."""
    with _LOCK:
        found = _find(table)
        others = (ref for ref in found.owners if ref() not in (None, owner))
        found.owners = *others, weakref.ref(owner)


def add_hook(table: dict[int, Any], hook: Any) -> None:
    """Call a hook in the steps of all optimizers, and remove those without an owner.

    Args:
      table: torch's hooks before the steps, or those after them.
      hook: it takes what such a hook takes.
    """
    with _LOCK:
        found = _find(table)
        found.hooks = (*filter(_has_owner, found.hooks), hook)


def remove_hook(table: dict[int, Any], hook: Any) -> None:
    """Do not call a hook any more, if it is in the table."""
    with _LOCK:
        found = _find(table)
        found.hooks = tuple(each for each in found.hooks if each is not hook)


def _find(table: dict[int, Any]) -> GlobalHook:
    """Return the hook in a table of torch; add it if there is none."""
    for hook in [*table.values()]:
        if isinstance(hook, GlobalHook):
            return hook
    hook = table[RemovableHandle(table).id] = GlobalHook()
    return hook


def _has_owner(hook: Any) -> bool:
    return not isinstance(hook, WeakHook) or hook.owner is not None
