"""The settings of a clipper cannot be assigned: its policy and its state have them."""

from collections.abc import Iterator
from dataclasses import is_dataclass
from functools import cache, wraps
from inspect import Parameter, signature
from typing import Any, get_args

from autoclip_core.policy import get_arguments


class FixedSettings:
    """Refuses to assign a setting after the constructor, which has used it.

    The settings are the arguments of the constructor and of the policies in them. A
    property with a setter may be assigned. So may every other name, and in the
    constructor of a subclass every name. An argument of a policy is no setting of an
    object that has an attribute of this name.
    """

    _to_change_settings = "make a new clipper"
    """What to do instead."""

    _is_made = False
    """Whether the constructor has returned."""

    def __init_subclass__(cls, **keywords: Any) -> None:
        """Let the constructor of a class mark its objects as made."""
        super().__init_subclass__(**keywords)
        if (construct := vars(cls).get("__init__")) is None:
            return

        @wraps(construct)
        def construct_and_mark(self: Any, *args: Any, **kwargs: Any) -> None:
            construct(self, *args, **kwargs)
            if type(self).__init__ is construct_and_mark:  # no subclass continues
                self._is_made = True

        cls.__init__ = construct_and_mark  # type: ignore[method-assign]

    def __setattr__(self, name: str, value: Any) -> None:
        """Assign an attribute that is no setting.

        Raises:
          AttributeError: it is a setting.
        """
        # A step assigns only private names.
        if self._is_made and not name.startswith("_") and self._is_fixed(name):
            raise AttributeError(
                f"{name} is set when the {type(self).__name__} is made, and cannot "
                f"be assigned; {self._to_change_settings}; for a threshold "
                "that changes with the step, use the policy Scheduled"
            )
        super().__setattr__(name, value)

    def _is_fixed(self, name: str) -> bool:
        """Return whether the name is a setting without a setter."""
        owner: Any = type(self)
        if getattr(getattr(owner, name, None), "fset", None) is not None:
            return False
        if name in _list_arguments(owner):
            return True
        is_own = name in vars(self)  # the constructor of a subclass has set it
        return not is_own and name in _list_fields(getattr(self, "policy", None))


@cache
def _list_arguments(owner: type) -> frozenset[str]:
    """Return "policy" and the arguments of the first class that is not a user's."""
    ours = next(c for c in owner.__mro__ if c.__module__.startswith("autoclip_"))
    names = {"policy"}
    _, *parameters = signature(ours.__init__).parameters.values()  # type: ignore[misc]
    for parameter in parameters:
        if parameter.kind is Parameter.VAR_KEYWORD:  # `Unpack` of a TypedDict
            for keywords in get_args(parameter.annotation):
                names |= keywords.__optional_keys__
        else:
            names.add(parameter.name)
    return frozenset(names)


def _list_fields(policy: Any) -> Iterator[str]:
    """Yield the arguments of a policy and of the policies in it."""
    if is_dataclass(policy):
        for name, value in get_arguments(policy).items():  # type: ignore[arg-type]
            yield name
            yield from _list_fields(value)
