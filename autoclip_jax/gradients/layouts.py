"""The output units of parameters in the layouts of JAX libraries, by name and shape.

| parameter                                     | a unit is                        |
|-----------------------------------------------|----------------------------------|
| Flax, Haiku: kernel of Dense, Conv, depthwise | each index of the last axis      |
| Flax, Haiku: embedding table                  | each row, the vector of a token  |
| Flax: query, key, value kernel (d, heads, k)  | each (head, k)                   |
| Flax: attention's out kernel (heads, k, d)    | each index of the last axis      |
| Haiku: transposed convolution (..., O, I)     | each index of the axis before    |
| Equinox: .weight (O, I, ...), .weight_ih, ... | each index of axis 0             |
| bias, gain, any vector                        | the whole parameter              |
"""

from collections.abc import Callable, Iterator
from typing import Any

import jax

from autoclip_core.checks import check_choice
from autoclip_core.clipper.units import Units, nfnets_units, one_unit, units_along_axis

UnitRule = Callable[[tuple[Any, ...], tuple[int, ...]], Units]
"""From a leaf's path and shape to its output units."""

_GAINS = {"bias", "scale", "offset"}


def find_unit_rule(rule: str) -> UnitRule:
    """Return the function from a leaf's path and shape to its units.

    Args:
      rule: as in `clip_by_policy`; "nfnets" depends only on the number of axes.
    """
    rules: dict[str, UnitRule] = {
        "flax": flax_units,
        "equinox": equinox_units,
        "layer": lambda path, shape: one_unit(shape),
        "nfnets": lambda path, shape: nfnets_units(shape),
    }
    return rules[check_choice("rule", rule, rules)]


def choose_rule(rule: str, tree: Any, path: tuple[Any, ...]) -> str:
    """Return "equinox" in place of "flax" for a weight of an Equinox module.

    The class of the module decides, because other trees may call a matrix (I, O) a
    weight.

    Args:
      rule: the rule of the scope.
      tree: the gradients or the parameters.
      path: of a leaf in the tree.
    """
    if rule != "flax" or not path or not _key_name(path[-1]).startswith("weight"):
        return rule
    owner = tree
    for key in path[:-1]:
        owner = dict(_list_children(owner))[key]
    modules = (base.__module__.partition(".")[0] for base in type(owner).__mro__)
    return "equinox" if "equinox" in modules else rule


def flax_units(path: tuple[Any, ...], shape: tuple[int, ...]) -> Units:
    """Return the units of a Flax or Haiku parameter: the output axis is the last."""
    names = ["", "", *map(_key_name, path)]
    module, name = names[-2:]
    if name == "value" and len(path) > 1:  # nnx.Param wraps the array
        module, name = names[-3:-1]
    if _is_bias_or_gain(name, shape):
        return one_unit(shape)
    if name.startswith("embedding"):
        return units_along_axis(shape, 0)
    if module in ("query", "key", "value") and len(shape) == 3:
        return Units((0,))
    # Haiku's transposed convolution has the axes (..., outputs, inputs). Its kernel is
    # named "w"; its module's name is the last part of the path. Flax's kernels are not
    # named "w", and end in the output axis.
    if name == "w" and len(shape) > 2 and "transpose" in module.split("/")[-1]:
        return units_along_axis(shape, len(shape) - 2)
    return units_along_axis(shape, len(shape) - 1)


def equinox_units(path: tuple[Any, ...], shape: tuple[int, ...]) -> Units:
    """Return the units of an Equinox parameter: the output axis is the first."""
    if _is_bias_or_gain(_key_name(path[-1]) if path else "", shape):
        return one_unit(shape)
    return units_along_axis(shape, 0)


def _list_children(part: Any) -> Iterator[tuple[Any, Any]]:
    """Yield the parts of a pytree, one level down, each with its key."""
    parts = jax.tree_util.tree_leaves_with_path(part, is_leaf=lambda x: x is not part)
    return ((path[0], child) for path, child in parts)


def _is_bias_or_gain(name: str, shape: tuple[int, ...]) -> bool:
    """Return whether a parameter is a bias or a gain; a matrix named `b` is neither.

    Haiku's bias `b` may have the shape (8, 1, 1).
    """
    is_vector = sum(size > 1 for size in shape) < 2
    return len(shape) < 2 or name in _GAINS or (name == "b" and is_vector)


def _key_name(key: Any) -> str:
    return jax.tree_util.keystr((key,)).strip(".[]'\"")
