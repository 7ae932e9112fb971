"""Which variable belongs to which row; decided in Python when a clipper is built."""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from autoclip_core.clipper.parts import join_norms
from autoclip_core.clipper.patterns import Pattern, check_patterns_match
from autoclip_core.clipper.units import ParameterRows, Units, name_units, row_size
from autoclip_tf.layouts import UnitsOf, matches_path, path_of

from . import namespace


class Rows:
    """The rows of the variables that a clipper was built for.

    Args:
      variables: all that can occur, in any order, with or without a gradient.
      scope: as in `Clipper`.
      units_of: how a variable is cut into units, at scope "unit".
      exclude: as in `Clipper`; these variables belong to no row.
      scale_only: as in `Clipper`. The other variables belong to a second part of their
        row, whose numbers follow after those of all rows.
      norm: as in `Clipper`.

    Raises:
      ValueError: no variable has an excluded name, or every variable is excluded.
    """

    part_count: int
    """The number of rows, or twice that number if rows have two parts."""

    def __init__(
        self,
        variables: Sequence[Any],
        scope: str,
        units_of: UnitsOf,
        exclude: Sequence[Pattern],
        scale_only: Sequence[Pattern] = (),
        norm: str = "l2",
    ) -> None:
        self.norm = norm
        named = [(path_of(variable), variable) for variable in variables]
        check_patterns_match(exclude, named, matches_path, "give every variable a name")
        self.names: list[str] = ["global"] if scope == "global" else []
        self._rows_by_id: dict[int, ParameterRows | None] = {}
        self._variables = list(variables)  # an id is unique only while its object lives
        for path, variable in named:
            rows = None
            if not any(matches_path(pattern, path, variable) for pattern in exclude):
                shape = tuple(variable.shape)
                units = units_of(path, shape) if scope == "unit" else None
                rows = self._add_rows(path, shape, scope, units)
            self._rows_by_id[stable_id(variable)] = rows
        if not any(self._rows_by_id.values()):
            raise ValueError(
                f"exclude must leave a variable to clip, got {list(exclude)!r}, which "
                f"excludes all of {', '.join(path for path, _ in named)}"
            )
        self._split(scale_only)

    def _split(self, patterns: Sequence[Pattern]) -> None:
        """Move the rows of each variable that no pattern matches to the second part."""
        named = [(path_of(v), v) for v, _ in self.clipped_variables()]
        way_out = "give every variable a name"
        check_patterns_match(patterns, named, matches_path, way_out, "scale_only")
        self.part_count = count = len(self.names)
        for path, variable in named:
            if not patterns or any(matches_path(p, path, variable) for p in patterns):
                continue
            rows: Any = self._rows_by_id[stable_id(variable)]
            moved = replace(rows, start=rows.start + count, stop=rows.stop + count)
            self._rows_by_id[stable_id(variable)] = moved
            self.part_count = 2 * count

    @property
    def is_split(self) -> bool:
        """Whether rows have two parts: what clipping scales, and the rest."""
        return self.part_count != len(self.names)

    @property
    def sizes(self) -> np.ndarray[Any, Any]:
        """The number of elements of each row."""
        sizes: np.ndarray[Any, Any] = np.zeros(self.part_count, np.float32)
        for variable, rows in self.clipped_variables():
            sizes[rows.start : rows.stop] += row_size(variable.shape, rows)
        return sizes.reshape(-1, len(self.names)).sum(axis=0)

    def join(self, part_norms: Any, sizes: Any) -> Any:
        """Return the norm of each row from the norms and the sizes of its parts."""
        if not self.is_split:
            return part_norms
        return join_norms(part_norms, self.norm, sizes=sizes, xp=namespace)

    def is_scaled(self, rows: ParameterRows) -> bool:
        """Return whether clipping scales the variable with these rows."""
        return rows.start < len(self.names) or not self.is_split

    def _add_rows(
        self, path: str, shape: tuple[int, ...], scope: str, units: Units | None
    ) -> ParameterRows:
        if scope == "global":
            return ParameterRows(0, 1)
        start = len(self.names)
        self.names += [path] if units is None else name_units(path, shape, units)
        return ParameterRows(start, len(self.names), units)

    def clipped_variables(self) -> list[tuple[Any, ParameterRows]]:
        """Return the variables that are not excluded, each with its rows."""
        pairs = ((v, self._rows_by_id[stable_id(v)]) for v in self._variables)
        return [(variable, rows) for variable, rows in pairs if rows is not None]

    def read_weights(self) -> np.ndarray[Any, Any]:
        """Return the values of the two smallest variables."""
        variables = [variable for variable, _ in self.clipped_variables()]
        pair = sorted(variables, key=lambda variable: math.prod(variable.shape))[:2]
        values = [variable.numpy().astype(np.float32) for variable in pair]
        return np.concatenate([each.ravel() for each in values])

    def has_any(self, ids: set[int]) -> bool:
        """Return whether a variable that is not excluded has one of the stable ids."""
        return any(
            stable_id(variable) in ids for variable, _ in self.clipped_variables()
        )

    def find_rows(self, variable: Any) -> ParameterRows | None:
        """Return the rows of a variable, or None if it is excluded.

        Raises:
          ValueError: the clipper was not built for this variable.
        """
        key = stable_id(variable)
        if key not in self._rows_by_id:
            known = ", ".join(self.names[:8])
            raise ValueError(
                "every variable must be one that the clipper was built for, got "
                f"{path_of(variable)!r}; it was built for {known}"
                f"{', ...' if len(self.names) > 8 else ''}; call "
                "build(model.trainable_variables) before the first step"
            )
        return self._rows_by_id[key]


def stable_id(variable: Any) -> int:
    """Return an id that a variable and its wrappers share, on every replica."""
    inner = getattr(variable, "_value", None)  # Keras wraps a TensorFlow variable
    inner = variable if inner is None or not hasattr(inner, "assign") else inner
    if hasattr(inner, "_distributed_container"):
        inner = inner._distributed_container()
    return id(inner)
