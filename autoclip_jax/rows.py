"""Which leaf of a pytree belongs to which row; decided in Python, once per trace."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from autoclip_core.checks import check_choice, check_flag, format_error
from autoclip_core.clipper import units
from autoclip_core.clipper.units import Units

SCOPES = ("parameter", "global", "unit")

Labels = Any
"""A pytree of labels, a prefix of the updates' tree, or a function that makes one."""

UnitsOf = Callable[[tuple[Any, ...], tuple[int, ...]], Units]
"""From a leaf's path and shape to its output units."""


@dataclass(frozen=True)
class Slot:
    """One leaf and the rows it belongs to."""

    start: int
    stop: int
    units: Units | None = None
    """How the leaf is cut into units, at scope "unit"."""


@dataclass(frozen=True)
class Rows:
    """The rows of a pytree, one slot per leaf; a `None` keeps its slot.

    Where labels make the rows and a `None` has no label, its slot is empty.
    """

    slots: list[Slot]
    names: list[str]
    """One per row."""


@dataclass(frozen=True)
class Scope:
    """How a pytree is cut into rows.

    Args:
      name: "parameter", "global", "unit" or, with labels, "group".
      labels: what `optax.partition` takes: a pytree or a function.
      units_of: how a leaf is cut, at scope "unit".
    """

    name: str
    labels: Labels = None
    units_of: UnitsOf | None = None

    def rows(self, tree: Any, params: Any = None) -> Rows:
        """Return the rows of a tree of arrays or of what has a shape.

        A `None` has the units and the label of its parameter, where the parameters are
        given.
        """
        if self.name in ("unit", "group") and params is not None:
            tree = jax.tree.map(_param_of_none, tree, params, is_leaf=is_none)
        leaves = jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_none)
        if self.name == "global":
            return Rows([Slot(0, 1) for _ in leaves], ["global"])
        if self.name == "group":
            return self._groups(tree)
        slots: list[Slot] = []
        names: list[str] = []
        for path, leaf in leaves:
            name, start = jax.tree_util.keystr(path) or "parameter", len(names)
            if self.units_of is None or not is_gradient(leaf):
                names.append(name)
                slots.append(Slot(start, start + 1))
                continue
            cut = self.units_of(path, tuple(leaf.shape))
            count = units.unit_count(leaf.shape, cut)
            names.extend(
                [name] if count == 1 else [f"{name}[{i}]" for i in range(count)]
            )
            slots.append(Slot(start, len(names), cut))
        return Rows(slots, names)

    def _groups(self, tree: Any) -> Rows:
        of_leaf = _labels_of_leaves(
            self.labels(tree) if callable(self.labels) else self.labels, tree
        )
        # 1 and "1" are two labels; a None, which has no gradient, may have none.
        known = {label for label in of_leaf if label is not None}
        labels = sorted(known, key=lambda label: (str(label), repr(label)))
        place = {label: Slot(row, row + 1) for row, label in enumerate(labels)}
        slots = [place.get(label, Slot(0, 0)) for label in of_leaf]
        return Rows(slots, [str(label) for label in labels])


def _param_of_none(leaf: Any, param: Any) -> Any:
    """Return the parameter where there is no gradient."""
    if leaf is not None:
        return leaf
    if not jax.tree_util.all_leaves([param], is_leaf=is_none):
        raise ValueError(
            "updates must have a None for each parameter without a gradient, got one "
            f"for all of {jax.tree.structure(param)}; spread it over them"
        )
    return param


def _labels_of_leaves(labels: Labels, tree: Any) -> list[Any]:
    """Return the label of each leaf of a tree, the `None`s among them.

    Raises:
      ValueError: the labels are no prefix of the tree, or leave out an array.
    """

    def spread(label: Any, part: Any) -> Any:
        return jax.tree.map(lambda _: label, part, is_leaf=is_none)

    try:
        of_leaf = jax.tree.map(spread, labels, tree, is_leaf=is_none)
    except ValueError as error:
        rule = "a prefix of the tree of the updates"
        raise ValueError(format_error("labels", rule, labels, str(error))) from error
    found = jax.tree.leaves(of_leaf, is_leaf=is_none)
    leaves = jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_none)
    for label, (path, leaf) in zip(found, leaves, strict=True):
        if label is None and leaf is not None:
            way_out = f"{jax.tree_util.keystr(path)} has none"
            raise ValueError(
                format_error("labels", "a label per array", labels, way_out)
            )
    return found


def choose_scope(
    scope: str | None,
    global_clipping: bool | None,
    labels: Labels,
    default: str,
    units_of: UnitsOf,
) -> Scope:
    """Return the scope that the spellings agree on.

    Raises:
      ValueError: they disagree, or the scope is unknown.
    """
    if scope is not None:
        check_choice("scope", scope, SCOPES)
    if global_clipping is not None:
        check_flag("global_clipping", global_clipping)
        if scope is not None and global_clipping != (scope == "global"):
            rule = f"in agreement with scope={scope!r}"
            way_out = "global_clipping is the older spelling of scope; give scope alone"
            raise ValueError(
                format_error("global_clipping", rule, global_clipping, way_out)
            )
        spared = "parameter" if default == "global" else default
        scope = scope or ("global" if global_clipping else spared)
    if labels is not None:
        if scope is not None:
            way_out = "labels make the rows; leave the scope out"
            raise ValueError(
                format_error("labels", "given without a scope", scope, way_out)
            )
        return Scope("group", labels)
    name = scope or default
    return Scope(name, units_of=units_of if name == "unit" else None)


def is_none(leaf: Any) -> bool:
    """Keep `None` as a leaf: a parameter without a gradient has a row, unobserved."""
    return leaf is None


def is_gradient(leaf: Any) -> bool:
    """Tell whether a leaf has a norm: integers, keys and `float0` pass through."""
    if leaf is None or not hasattr(leaf, "dtype"):
        return False
    return bool(jnp.issubdtype(leaf.dtype, jnp.inexact))
