"""Output units of variables as Keras lays them out.

| variable                                          | a unit is                     |
|---------------------------------------------------|-------------------------------|
| kernel of Dense, Conv, LSTM, GRU, EinsumDense     | each index of the last axis   |
| kernel of a transposed convolution (..., O, I)    | each index of the axis before |
| kernel of a depthwise convolution (..., I, M)     | each (input, multiple)        |
| embedding table                                   | each row, a token's vector    |
| attention: query, key, value kernel (d, heads, k) | each (head, k)                |
| attention: output kernel (heads, k, d)            | each index of the last axis   |
| bias of a GRU (2, 3H)                             | each of the two biases        |
| bias, gain, any vector                            | the whole variable            |

A gradient transformer meets variables, not layers, and a variable's path says what its
layer is as long as the layer has its default name. For models whose layers were named,
`axes_by_layer(model)` looks at the layers themselves.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import keras

from autoclip_core.checks import check_choice
from autoclip_core.clipper.units import Units, nfnets_units, one_unit, units_along_axis

from .paths import matches_path

UnitsOf = Callable[[str, Sequence[int]], Units]
"""From a variable's path and shape to its output units."""

Axes = Mapping[str, Sequence[int]]
"""From the path of a variable, or a pattern, to the axes a unit's norm is over."""


def units_by(rule: str, axes: Axes) -> UnitsOf:
    """Return the function from a variable's path and shape to its units.

    Args:
      rule: "unit", the table above; "layer", the variable as a whole; "nfnets", the
        rule of the NFNets reference and of optax, by the number of axes alone.
      axes: what the rule does not know, by path or pattern.

    Raises:
      ValueError: `rule` is another word.

    >>> units_by("unit", {"up/kernel": [0, 1, 3]})("up/kernel", (3, 3, 8, 4))
    Units(axes=(0, 1, 3), groups=1)
    """
    rules: dict[str, UnitsOf] = {
        "unit": by_path,
        "layer": lambda path, shape: one_unit(shape),
        "nfnets": lambda path, shape: nfnets_units(shape),
    }
    by_rule = rules[check_choice("rule", rule, rules)]

    def units_of(path: str, shape: Sequence[int]) -> Units:
        for pattern, over in axes.items():
            if matches_path(pattern, path, None):
                return Units(tuple(axis % len(shape) for axis in over))
        return by_rule(path, shape)

    return units_of


def by_path(path: str, shape: Sequence[int]) -> Units:
    """Return the units of a variable by its own name and that of its layer.

    Args:
      path: names joined by "/", the layer's and its own at the end.
      shape: the variable's.

    >>> by_path("model/conv2d_transpose_1/kernel", (3, 3, 8, 4))
    Units(axes=(0, 1, 3), groups=1)
    >>> by_path("model/attention/query/kernel", (16, 2, 8))
    Units(axes=(0,), groups=1)
    """
    layer, name = (["", "", *path.split("/")])[-2:]
    last = len(shape) - 1
    if len(shape) < 2 or name in ("gamma", "beta", "scale"):
        return one_unit(shape)
    if name == "bias":  # of a GRU: two vectors; of attention: one, cut into heads
        return Units((1,)) if "gru" in layer and shape[0] == 2 else one_unit(shape)
    if name == "embeddings":
        return units_along_axis(shape, 0)
    if name == "depthwise_kernel" or layer.startswith("depthwise_conv"):
        return Units(tuple(range(last - 1)))
    if "transpose" in layer:
        return units_along_axis(shape, last - 1)
    if layer in ("query", "key", "value") and len(shape) == 3:
        return Units((0,))
    return units_along_axis(shape, last)


def axes_by_layer(model: Any) -> dict[str, tuple[int, ...]]:
    """Return the axes of a unit's norm for each kernel of a model, by its layers.

    Give it to a clipper as `axes=`, where layers were given names of their own.

    Args:
      model: a built `keras.Model` or layer.

    Returns:
      From each variable's path to axes, for the layers whose kernel does not end in the
      output axis: transposed and depthwise convolutions, EinsumDense, embeddings.

    >>> layer = keras.layers.Conv2DTranspose(8, 3, name="up")
    >>> layer.build((None, 16, 16, 4))
    >>> axes_by_layer(layer)
    {'up/kernel': (0, 1, 3)}
    """
    found: dict[str, tuple[int, ...]] = {}
    for layer in model._flatten_layers():
        if isinstance(layer, keras.layers.EinsumDense):
            found[layer.kernel.path] = _einsum_axes(layer.equation)
        elif isinstance(layer, _TRANSPOSED):
            last = len(layer.kernel.shape) - 1
            found[layer.kernel.path] = units_along_axis(
                layer.kernel.shape, last - 1
            ).axes
        elif isinstance(layer, _DEPTHWISE):
            found[layer.kernel.path] = tuple(range(len(layer.kernel.shape) - 2))
        elif isinstance(layer, keras.layers.Embedding):
            found[layer.embeddings.path] = (1,)
    return found


_TRANSPOSED = (
    keras.layers.Conv1DTranspose,
    keras.layers.Conv2DTranspose,
    keras.layers.Conv3DTranspose,
)
_DEPTHWISE = (keras.layers.DepthwiseConv1D, keras.layers.DepthwiseConv2D)


def _einsum_axes(equation: str) -> tuple[int, ...]:
    """Return the axes of the kernel that the sum runs over.

    >>> _einsum_axes("abc,cde->abde")
    (0,)
    """
    inputs, output = equation.split("->")
    kernel = inputs.split(",")[1]
    return tuple(axis for axis, letter in enumerate(kernel) if letter not in output)
