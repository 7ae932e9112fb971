"""Output units of parameters as JAX libraries lay them out, by name and shape.

| parameter                                     | a unit is                        |
|-----------------------------------------------|----------------------------------|
| Flax, Haiku: kernel of Dense, Conv, depthwise | each index of the last axis      |
| Flax, Haiku: embedding table                  | each row, the vector of a token  |
| Flax: query, key, value kernel (d, heads, k)  | each (head, k)                   |
| Flax: attention's out kernel (heads, k, d)    | each index of the last axis      |
| Haiku: transposed convolution (..., O, I)     | each index of the axis before    |
| Equinox: weight (O, I, ...)                   | each index of axis 0             |
| bias, gain, any vector                        | the whole parameter              |
"""

from typing import Any

import jax

from autoclip_core.checks import check_choice
from autoclip_core.clipper.units import Units, nfnets_units, one_unit, units_along_axis

from .rows import UnitsOf

_GAINS = {"bias", "scale", "offset"}


def units_by(rule: str) -> UnitsOf:
    """Return the function from a leaf's path and shape to its units.

    Args:
      rule: "flax" (also for Haiku), "equinox", "layer" (the leaf as a whole) or
        "nfnets" (the reference's and optax's rule, by the number of axes alone).
    """
    rules: dict[str, UnitsOf] = {
        "flax": last_axis,
        "equinox": first_axis,
        "layer": lambda path, shape: one_unit(shape),
        "nfnets": lambda path, shape: nfnets_units(shape),
    }
    return rules[check_choice("rule", rule, rules)]


def last_axis(path: tuple[Any, ...], shape: tuple[int, ...]) -> Units:
    """Return the units of a Flax or Haiku parameter: kernels end in the output axis."""
    names = [_name(key) for key in path]
    own, above = (["", "", *names])[-1], (["", "", *names])[-2]
    if own == "value" and len(names) > 1:  # nnx.Param wraps the array
        own, above = names[-2], (["", *names])[-3]
    if _is_gain(own, shape):
        return one_unit(shape)
    if own.startswith("embedding"):
        return units_along_axis(shape, 0)
    if above in ("query", "key", "value") and len(shape) == 3:
        return Units((0,))
    # Haiku: (..., outputs, inputs), under the name of the module, last in its path; its
    # kernels are called w, and Flax's, which end in the outputs, are not.
    if own == "w" and len(shape) > 2 and "transpose" in above.split("/")[-1]:
        return units_along_axis(shape, len(shape) - 2)
    return units_along_axis(shape, len(shape) - 1)


def first_axis(path: tuple[Any, ...], shape: tuple[int, ...]) -> Units:
    """Return the units of an Equinox parameter: weights begin with the output axis."""
    if _is_gain(_name(path[-1]) if path else "", shape):
        return one_unit(shape)
    return units_along_axis(shape, 0)


def _is_gain(name: str, shape: tuple[int, ...]) -> bool:
    """Tell biases and gains: Haiku's `b` may be (8, 1, 1), and a matrix may be `b`."""
    vector = sum(size > 1 for size in shape) < 2
    return len(shape) < 2 or name in _GAINS or (name == "b" and vector)


def _name(key: Any) -> str:
    return jax.tree_util.keystr((key,)).strip(".[]'\"")
