"""Which variable belongs to which row; decided in Python, when a clipper is built."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from autoclip_core.clipper.patterns import Pattern, check_names
from autoclip_core.clipper.units import Units, unit_count

from .layouts import UnitsOf
from .paths import matches_path, path_of


@dataclass(frozen=True)
class Slot:
    """One variable and the rows it belongs to."""

    start: int
    stop: int
    units: Units | None = None
    """How the variable is cut into units, at scope "unit"."""


class Rows:
    """The rows of the variables that a clipper was built for.

    Args:
      variables: all that may come, in any order; those without a gradient included.
      scope: "parameter", "global" or "unit".
      units_of: how a variable is cut, at scope "unit".
      exclude: the variables that belong to no row.

    Raises:
      ValueError: a name is excluded that no variable has, or every variable is.
    """

    def __init__(
        self,
        variables: Sequence[Any],
        scope: str,
        units_of: UnitsOf,
        exclude: Sequence[Pattern],
    ) -> None:
        """Lay out the rows."""
        members = [(path_of(variable), variable) for variable in variables]
        check_names(exclude, members, matches_path, "give every variable a name")
        self.names: list[str] = ["global"] if scope == "global" else []
        self._slots: dict[int, Slot | None] = {}
        self._variables = list(variables)  # kept, so that an id stays a variable's own
        for path, variable in members:
            slot = None
            if not any(matches_path(pattern, path, variable) for pattern in exclude):
                shape = tuple(variable.shape)
                units = units_of(path, shape) if scope == "unit" else None
                slot = self._slot(path, shape, scope, units)
            self._slots[_key(variable)] = slot
        if not any(self._slots.values()):
            raise ValueError(
                f"exclude must leave a variable to clip, got {list(exclude)!r}, which "
                f"excludes all of {', '.join(path for path, _ in members)}"
            )

    def _slot(
        self, path: str, shape: tuple[int, ...], scope: str, units: Units | None
    ) -> Slot:
        if scope == "global":
            return Slot(0, 1)
        start = len(self.names)
        count = 1 if units is None else unit_count(shape, units)
        each = [path] if count == 1 else [f"{path}[{i}]" for i in range(count)]
        self.names.extend(each)
        return Slot(start, start + count, units)

    def members(self) -> list[tuple[Any, Slot]]:
        """Return the variables that belong to rows, with their slots."""
        pairs = ((v, self._slots[_key(v)]) for v in self._variables)
        return [(variable, slot) for variable, slot in pairs if slot is not None]

    def of(self, variable: Any) -> Slot | None:
        """Return the slot of a variable; None where it is excluded.

        Raises:
          ValueError: the clipper was not built for this variable.
        """
        key = _key(variable)
        if key not in self._slots:
            known = ", ".join(self.names[:8])
            raise ValueError(
                f"a clipper must be built for the variables it meets, got "
                f"{path_of(variable)!r}; it was built for {known}"
                f"{', ...' if len(self.names) > 8 else ''}; call "
                "build(model.trainable_variables) before the first step"
            )
        return self._slots[key]


def _key(variable: Any) -> int:
    """Return what stays the same of a variable, wrapped or not, on every replica."""
    own = getattr(variable, "_value", None)  # what a Keras variable on TensorFlow wraps
    own = variable if own is None or not hasattr(own, "assign") else own
    if hasattr(own, "_distributed_container"):
        own = own._distributed_container()
    return id(own)
