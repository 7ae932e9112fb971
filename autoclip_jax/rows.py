"""Which leaf of a pytree belongs to which row; computed in Python, once per trace."""

from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from autoclip_core.checks import check_choice, format_error
from autoclip_core.clipper import settings
from autoclip_core.clipper.norms import check_norm
from autoclip_core.clipper.units import ParameterRows, name_units

from .layouts import UnitRule, find_unit_rule

SCOPES = ("parameter", "global", "unit")

Labels = Any
"""A pytree of labels, a prefix of the updates' tree, or a function that returns one."""

Mask = Any
"""A pytree of booleans, as for `optax.masked`, or a function that returns one."""


@dataclass(frozen=True)
class Rows:
    """The rows of a pytree.

    Every leaf has an entry, a `None` too. With labels, a `None` without a label has an
    empty range.
    """

    parameters: list[ParameterRows]
    """One per leaf."""
    names: list[str]
    """One per row."""
    is_split: bool = False
    """Whether a row has a second part, of what clipping does not scale. The numbers of
    these parts follow after those of all rows."""

    @property
    def part_count(self) -> int:
        """The number of parts of all rows."""
        return len(self.names) * (2 if self.is_split else 1)


@dataclass(frozen=True)
class Scope:
    """How a pytree is cut into rows.

    Args:
      name: "parameter", "global", "unit" or, with labels, "group".
      labels: as for `optax.partition`: a pytree or a function.
      unit_rule: how a leaf is cut into units; only at scope "unit".
      scale_only: as in `clip_by_policy`.
      norm: the norm of each row.
    """

    name: str
    labels: Labels = None
    unit_rule: UnitRule | None = None
    scale_only: Mask = None
    norm: str = "l2"

    def rows(self, tree: Any, params: Any = None) -> Rows:
        """Return the rows of a tree, whose leaves are arrays or have a shape.

        If the parameters are given, a `None` has the units and the label of its
        parameter.
        """
        if self.name in ("unit", "group") and params is not None:
            tree = jax.tree.map(_gradient_or_param, tree, params, is_leaf=is_none)
        rows = self._whole_rows(tree)
        return rows if self.scale_only is None else self._split(rows, tree)

    def _split(self, rows: Rows, tree: Any) -> Rows:
        """Return the rows in two parts; the second has the leaves not to scale."""
        flags = repeat_mask(self.scale_only, tree, "scale_only")
        count = len(rows.names)
        parameters = [
            p if flag else replace(p, start=p.start + count, stop=p.stop + count)
            for p, flag in zip(rows.parameters, flags, strict=True)
        ]
        return Rows(parameters, rows.names, is_split=not all(flags))

    def _whole_rows(self, tree: Any) -> Rows:
        """Return the rows without a second part."""
        leaves = jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_none)
        if self.name == "global":
            return Rows([ParameterRows(0, 1) for _ in leaves], ["global"])
        if self.name == "group":
            return self._group_rows(tree)
        parameters: list[ParameterRows] = []
        names: list[str] = []
        for path, leaf in leaves:
            name, start = jax.tree_util.keystr(path) or "parameter", len(names)
            if self.unit_rule is None or not is_gradient(leaf):
                names.append(name)
                parameters.append(ParameterRows(start, start + 1))
                continue
            units = self.unit_rule(path, tuple(leaf.shape))
            names.extend(name_units(name, leaf.shape, units))
            parameters.append(ParameterRows(start, len(names), units))
        return Rows(parameters, names)

    def _group_rows(self, tree: Any) -> Rows:
        given = self.labels(tree) if callable(self.labels) else self.labels
        leaf_labels = _label_leaves(given, tree)
        # 1 and "1" are two labels. A None, which has no gradient, may have no label.
        unique = {label for label in leaf_labels if label is not None}
        labels = sorted(unique, key=lambda label: (str(label), repr(label)))
        by_label = {label: ParameterRows(i, i + 1) for i, label in enumerate(labels)}
        parameters = [by_label.get(label, ParameterRows(0, 0)) for label in leaf_labels]
        texts = [str(label) for label in labels]
        pairs = zip(labels, texts, strict=True)
        names = [text if texts.count(text) == 1 else repr(x) for x, text in pairs]
        return Rows(parameters, names)


def _gradient_or_param(leaf: Any, param: Any) -> Any:
    """Return the gradient, or the parameter if there is no gradient."""
    if leaf is not None:
        return leaf
    if not jax.tree_util.all_leaves([param], is_leaf=is_none):
        raise ValueError(
            "updates must have a None for each parameter without a gradient, got one "
            f"for all of {jax.tree.structure(param)}; give each of them its own None"
        )
    return param


def _label_leaves(labels: Labels, tree: Any) -> list[Any]:
    """Return the label of each leaf of a tree, including each `None`.

    Raises:
      ValueError: the labels are not a prefix of the tree, or an array has no label.
    """

    leaf_labels = _repeat_prefix(labels, tree, "labels")
    leaves = jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_none)
    for label, (path, leaf) in zip(leaf_labels, leaves, strict=True):
        if label is None and leaf is not None:
            way_out = f"{jax.tree_util.keystr(path)} has none"
            message = format_error("labels", "a label per array", labels, way_out)
            raise ValueError(message)
    return leaf_labels


def repeat_mask(mask: Mask, tree: Any, argument: str) -> list[bool]:
    """Return the flag of each leaf of a tree, including each `None`.

    Raises:
      TypeError: the flag of an array is not a boolean.
      ValueError: the mask is not a prefix of the tree.
    """
    mask = mask(tree) if callable(mask) else mask
    flags = _repeat_prefix(mask, tree, argument)
    leaves = jax.tree.leaves(tree, is_leaf=is_none)
    for flag, leaf in zip(flags, leaves, strict=True):
        if leaf is not None and not isinstance(flag, bool | np.bool_):
            rule = "a tree of True and False, or a function that returns one"
            way_out = "as the mask of optax.masked"
            raise TypeError(format_error(argument, rule, mask, way_out))
    return flags


def _repeat_prefix(prefix: Any, tree: Any, argument: str) -> list[Any]:
    """Return the entry of a prefix for each leaf of a tree, including each `None`.

    Raises:
      ValueError: the value of the argument is not a prefix of the tree.
    """

    def repeat(entry: Any, part: Any) -> Any:
        return jax.tree.map(lambda _: entry, part, is_leaf=is_none)

    try:
        repeated = jax.tree.map(repeat, prefix, tree, is_leaf=is_none)
    except ValueError as error:
        rule = "a prefix of the tree of the updates"
        raise ValueError(format_error(argument, rule, prefix, str(error))) from error
    return jax.tree.leaves(repeated, is_leaf=is_none)


def choose_scope(
    scope: str | None,
    global_clipping: bool | None,
    labels: Labels,
    rule: str,
    norm: str,
    default: str = "parameter",
    scale_only: Mask = None,
) -> Scope:
    """Return the scope that the arguments of a factory agree on.

    Raises:
      ValueError: the arguments disagree, or the scope, rule or norm is unknown.
    """
    unit_rule = find_unit_rule(rule)
    if scope is not None:
        check_choice("scope", scope, SCOPES)
    if global_clipping is not None:
        scope = settings.choose_scope(scope, global_clipping, "parameter")
    if labels is not None:
        if scope is not None:
            way_out = "the labels define the rows; leave the scope out"
            error = format_error("labels", "given without a scope", scope, way_out)
            raise ValueError(error)
        scope = "group"
    scope = scope or default
    if rule != "flax" and scope != "unit":
        way_out = 'it defines which axes form a unit; add scope="unit"'
        raise ValueError(format_error("rule", 'given with scope="unit"', rule, way_out))
    used_rule = unit_rule if scope == "unit" else None
    return Scope(scope, labels, used_rule, scale_only, check_norm(norm))


def is_none(leaf: Any) -> bool:
    """Keep `None` as a leaf: a parameter without a gradient has an unobserved row."""
    return leaf is None


def is_gradient(leaf: Any) -> bool:
    """Return whether a leaf has a norm; integers, keys and `float0` have none."""
    if leaf is None or not hasattr(leaf, "dtype"):
        return False
    return bool(jnp.issubdtype(leaf.dtype, jnp.inexact))
