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

from .layouts import choose_rule, find_unit_rule

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
    is_split: bool
    """Whether a row has a second part, of what clipping does not scale. The numbers of
    these parts follow after those of all rows."""
    norm: str
    """The norm of each row."""
    axis_name: Any
    """The mesh axes that cut a leaf into pieces, or None."""

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
      rule, scale_only, norm, axis_name: as in `clip_by_policy`.

    Raises:
      TypeError: `axis_name` names no axes.
      ValueError: the arguments disagree, or the rule or the norm is unknown.
    """

    name: str
    labels: Labels = None
    rule: str = "flax"
    scale_only: Mask = None
    norm: str = "l2"
    axis_name: Any = None

    def __post_init__(self) -> None:
        """Check the arguments."""
        find_unit_rule(self.rule)
        if self.rule != "flax" and self.name != "unit":
            rule = 'given with scope="unit"'
            way_out = 'it defines which axes form a unit; add scope="unit"'
            raise ValueError(format_error("rule", rule, self.rule, way_out))
        check_norm(self.norm)
        self._check_axis_name()

    def _check_axis_name(self) -> None:
        """Refuse a value that names no axes, and any axes at scope "unit"."""
        if self.axis_name is None:
            return
        names = [self.axis_name] if isinstance(self.axis_name, str) else self.axis_name
        is_list = isinstance(names, tuple | list)
        if not is_list or not all(isinstance(name, str) for name in names):
            rule = "the name of a mesh axis, or a tuple of names"
            raise TypeError(format_error("axis_name", rule, self.axis_name, ""))
        if self.name == "unit":
            way_out = (
                "inside shard_map it is unknown whether an axis cuts a unit or lies "
                "between units; jit the step on sharded arrays instead: there, norms "
                "are global without axis_name"
            )
            rule = 'left out with scope="unit"'
            raise ValueError(format_error("axis_name", rule, self.axis_name, way_out))

    def rows(self, tree: Any, params: Any = None) -> Rows:
        """Return the rows of a tree, whose leaves are arrays or have a shape.

        If the parameters are given, a `None` has the units and the label of its
        parameter. The leaves that clipping does not scale are in the second part.
        """
        if self.name in ("unit", "group") and params is not None:
            tree = jax.tree.map(_gradient_or_param, tree, params, is_leaf=is_none)
        parameters, names = self._assign_rows(tree)
        flags, count = [True] * len(parameters), len(names)
        if self.scale_only is not None:
            flags = repeat_mask(self.scale_only, tree, "scale_only")
        parameters = [
            p if flag else replace(p, start=p.start + count, stop=p.stop + count)
            for p, flag in zip(parameters, flags, strict=True)
        ]
        return Rows(parameters, names, not all(flags), self.norm, self.axis_name)

    def _assign_rows(self, tree: Any) -> tuple[list[ParameterRows], list[str]]:
        """Return the rows of each leaf, and the names of all rows."""
        leaves = jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_none)
        if self.name == "global":
            return [ParameterRows(0, 1) for _ in leaves], ["global"]
        if self.name == "group":
            return self._assign_groups(tree)
        parameters: list[ParameterRows] = []
        names: list[str] = []
        for path, leaf in leaves:
            name, units = jax.tree_util.keystr(path) or "parameter", None
            if self.name == "unit" and is_gradient(leaf):
                rule = choose_rule(self.rule, tree, path)
                units = find_unit_rule(rule)(path, tuple(leaf.shape))
            start = len(names)
            names += [name] if units is None else name_units(name, leaf.shape, units)
            parameters.append(ParameterRows(start, len(names), units))
        return parameters, names

    def _assign_groups(self, tree: Any) -> tuple[list[ParameterRows], list[str]]:
        labels = self.labels(tree) if callable(self.labels) else self.labels
        leaf_labels = _label_leaves(labels, tree)
        # 1 and "1" are two labels. A None, which has no gradient, may have no label.
        unique = {label for label in leaf_labels if label is not None}
        labels = sorted(unique, key=lambda label: (str(label), repr(label)))
        by_label = {label: ParameterRows(i, i + 1) for i, label in enumerate(labels)}
        parameters = [by_label.get(label, ParameterRows(0, 0)) for label in leaf_labels]
        texts = [str(label) for label in labels]
        pairs = zip(labels, texts, strict=True)
        names = [text if texts.count(text) == 1 else repr(x) for x, text in pairs]
        return parameters, names


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
    default: str = "parameter",
) -> str:
    """Return the name of the scope that the arguments of a factory agree on.

    Raises:
      ValueError: the arguments disagree, or the scope is unknown.
    """
    if scope is not None:
        check_choice("scope", scope, SCOPES)
    if global_clipping is not None:
        scope = settings.choose_scope(scope, global_clipping, "parameter")
    if labels is None:
        return scope or default
    if scope is not None:
        way_out = "the labels define the rows; leave the scope out"
        error = format_error("labels", "given without a scope", scope, way_out)
        raise ValueError(error)
    return "group"


def is_none(leaf: Any) -> bool:
    """Keep `None` as a leaf: a parameter without a gradient has an unobserved row."""
    return leaf is None


def is_gradient(leaf: Any) -> bool:
    """Return whether a leaf has a norm; integers, keys and `float0` have none."""
    if leaf is None or not hasattr(leaf, "dtype"):
        return False
    return bool(jnp.issubdtype(leaf.dtype, jnp.inexact))
