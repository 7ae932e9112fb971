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

A gradient transformer receives variables, not layers. The kind of a layer follows from
the path of a variable, as long as the layer has its default name. If the layers do
not have their default names, `axes_by_layer(model)` reads the axes from the layers.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from keras import layers

from autoclip_core.checks import check_choice
from autoclip_core.clipper.patterns import Pattern, matches
from autoclip_core.clipper.units import Units, nfnets_units, one_unit, units_along_axis

UnitsOf = Callable[[str, Sequence[int]], Units]
"""From a variable's path and shape to its output units."""

Axes = Mapping[str, Sequence[int]]
"""From the path of a variable, or a pattern, to the axes of a unit's norm."""


def make_unit_rule(rule: str, axes: Axes) -> UnitsOf:
    """Return the function from a variable's path and shape to its units.

    Args:
      rule: as in `AGC`; "unit" is the table above, and "nfnets" depends only on the
        number of axes.
      axes: as in `AGC`.

    Raises:
      ValueError: `rule` is unknown.

    >>> make_unit_rule("unit", {"up/kernel": [0, 1, 3]})("up/kernel", (3, 3, 8, 4))
    Units(axes=(0, 1, 3), groups=1)
    """
    rules: dict[str, UnitsOf] = {
        "unit": by_path,
        "layer": lambda path, shape: one_unit(shape),
        "nfnets": lambda path, shape: nfnets_units(shape),
    }
    by_rule = rules[check_choice("rule", rule, rules)]

    def units_of(path: str, shape: Sequence[int]) -> Units:
        for pattern, norm_axes in axes.items():
            if matches_path(pattern, path, None):
                return Units(tuple(axis % len(shape) for axis in norm_axes))
        return by_rule(path, shape)

    return units_of


def by_path(path: str, shape: Sequence[int]) -> Units:
    """Return the units of a variable, from its name and the name of its layer.

    Args:
      path: names joined by "/"; the last two are the layer's and the variable's.
      shape: the shape of the variable.

    >>> by_path("model/conv2d_transpose_1/kernel", (3, 3, 8, 4))
    Units(axes=(0, 1, 3), groups=1)
    >>> by_path("model/attention/query/kernel", (16, 2, 8))
    Units(axes=(0,), groups=1)
    """
    layer, name = (["", "", *path.split("/")])[-2:]
    last = len(shape) - 1
    if len(shape) < 2 or name in ("gamma", "beta", "scale"):
        return one_unit(shape)
    if name == "bias":  # a GRU has two vectors; attention has one, cut into heads
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
    """Return the axes of a unit's norm for each kernel of a model, from its layers.

    Pass the result to a clipper as `axes=` if the layers have names of their own.

    Args:
      model: a built `keras.Model` or layer.

    Returns:
      A dict from a variable's path to axes, for each layer whose kernel does not end in
      the output axis: transposed and depthwise convolutions, EinsumDense, embeddings.

    >>> import keras
    >>> layer = keras.layers.Conv2DTranspose(8, 3, name="up")
    >>> layer.build((None, 16, 16, 4))
    >>> axes_by_layer(layer)
    {'up/kernel': (0, 1, 3)}
    """
    axes: dict[str, tuple[int, ...]] = {}
    for layer in model._flatten_layers():
        if isinstance(layer, layers.EinsumDense):
            axes[layer.kernel.path] = _einsum_axes(layer.equation)
        elif isinstance(layer, _TRANSPOSED):
            shape = layer.kernel.shape
            axes[layer.kernel.path] = units_along_axis(shape, len(shape) - 2).axes
        elif isinstance(layer, _DEPTHWISE):
            axes[layer.kernel.path] = tuple(range(len(layer.kernel.shape) - 2))
        elif isinstance(layer, layers.Embedding):
            axes[layer.embeddings.path] = (1,)
    return axes


_TRANSPOSED = (layers.Conv1DTranspose, layers.Conv2DTranspose, layers.Conv3DTranspose)
_DEPTHWISE = (layers.DepthwiseConv1D, layers.DepthwiseConv2D)


def _einsum_axes(equation: str) -> tuple[int, ...]:
    """Return the axes of the kernel over which the layer sums.

    >>> _einsum_axes("abc,cde->abde")
    (0,)
    """
    inputs, output = equation.split("->")
    kernel = inputs.split(",")[1]
    return tuple(axis for axis, letter in enumerate(kernel) if letter not in output)


def path_of(variable: Any) -> str:
    """Return a variable's path, or its TensorFlow name without `:0`.

    Args:
      variable: a variable of Keras or TensorFlow.

    >>> import keras
    >>> path_of(keras.Variable(1.0, name="gain"))
    'gain'
    """
    path = getattr(variable, "path", None) or variable.name
    return str(path).split(":")[0]


def matches_path(pattern: Pattern, path: str | None, variable: Any) -> bool:
    """Return whether a pattern matches a path, or its end from any layer on.

    The first part of a path is the name that Keras gave to the model. A model that
    `load_model` returned lacks it, so a leading `*/` may also match nothing.

    Args:
      pattern: a name, a pattern with `*`, a regular expression or a function of (path,
        variable).
      path: the path of the variable, or None.
      variable: the variable, which only a function receives.

    >>> [matches_path(p, "sequential_6/head/bias", None) for p in ["head", "bias", "b"]]
    [True, True, False]
    >>> matches_path("*/head/bias", "head/bias", None)
    True
    """
    if path is None or callable(pattern):
        return matches(pattern, path, variable, "/")
    parts = ["", *path.split("/")]
    ends = ("/".join(parts[start:]) for start in range(len(parts)))
    return any(matches(pattern, end, variable, "/") for end in ends)
