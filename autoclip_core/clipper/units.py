"""Which axes of a parameter form one output unit: a row of AGC at scope "unit".

A unit is what produces one output: a row of a torch `Linear` weight, a filter of a
convolution, the vector of one token. Its norm is taken over the other axes.

>>> units_along_axis((8, 3, 5, 5), 0)
Units(axes=(1, 2, 3), groups=1)
>>> unit_count((8, 3, 5, 5), units_along_axis((8, 3, 5, 5), 0))
8
"""

import math
from collections.abc import Sequence
from typing import NamedTuple


class Units(NamedTuple):
    """How a parameter is cut into units."""

    axes: tuple[int, ...]
    """The axes that a norm is taken over; the others tell the units apart."""
    groups: int = 1
    """Into how many groups axis 0 is split first, as a new leading axis; 1 is none."""


def split_shape(shape: Sequence[int], units: Units) -> tuple[int, ...]:
    """Return the shape after axis 0 was split into its groups."""
    if units.groups == 1:
        return tuple(shape)
    return (units.groups, shape[0] // units.groups, *shape[1:])


def unit_shape(shape: Sequence[int], units: Units) -> tuple[int, ...]:
    """Return the shape of one number per unit that broadcasts against the parameter."""
    return tuple(
        1 if axis in units.axes else size
        for axis, size in enumerate(split_shape(shape, units))
    )


def unit_count(shape: Sequence[int], units: Units) -> int:
    """Return the number of units."""
    return math.prod(unit_shape(shape, units))


def one_unit(shape: Sequence[int]) -> Units:
    """The parameter is one unit: biases, gains, and the rule "layer"."""
    return Units(tuple(range(len(shape))))


def units_along_axis(shape: Sequence[int], output_axis: int) -> Units:
    """Each index of one axis is a unit; a vector or a scalar is one unit as a whole."""
    if len(shape) < 2:
        return one_unit(shape)
    return Units(tuple(axis for axis in range(len(shape)) if axis != output_axis))


def transposed_conv_units(shape: Sequence[int], groups: int) -> Units:
    """A torch ConvTranspose kernel (inputs, outputs / groups, *window), by its outputs.

    An output belongs to one group of inputs, so the inputs are split first.

    >>> units = transposed_conv_units((6, 2, 3), groups=3)
    >>> split_shape((6, 2, 3), units), units.axes, unit_count((6, 2, 3), units)
    ((3, 2, 2, 3), (1, 3), 6)
    """
    if groups == 1:
        return units_along_axis(shape, 1)
    return Units((1, *range(3, len(shape) + 1)), groups)


def nfnets_units(shape: Sequence[int]) -> Units:
    """The rule of the NFNets reference and of optax, for kernels as JAX lays them out.

    | shape                          | norm over    |
    |--------------------------------|--------------|
    | at most one axis longer than 1 | everything   |
    | 2 or 3 axes                    | axis 0       |
    | 4 axes                         | 0, 1, 2      |
    | 5 axes                         | 0, 1, 2, 3   |

    Raises:
      ValueError: the parameter has more than 5 axes, for which there is no rule.
    """
    if sum(size > 1 for size in shape) <= 1:
        return one_unit(shape)
    if len(shape) <= 3:
        return Units((0,))
    if len(shape) <= 5:
        return Units(tuple(range(len(shape) - 1)))
    raise ValueError(
        f'rule="nfnets" must have parameters of at most 5 axes, got shape '
        f'{tuple(shape)}; use rule="unit", or exclude this parameter'
    )
