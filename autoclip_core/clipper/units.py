"""The axes of a parameter that form one output unit: a row of AGC at scope "unit".

A unit is the part of a parameter that produces one output: a row of a torch `Linear`
weight, a filter of a convolution, the vector of one token. Its norm is taken over the
other axes.

>>> units_along_axis((8, 3, 5, 5), 0)
Units(axes=(1, 2, 3), groups=1)
>>> unit_count((8, 3, 5, 5), units_along_axis((8, 3, 5, 5), 0))
8
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple


class Units(NamedTuple):
    """How a parameter is divided into units."""

    axes: tuple[int, ...]
    """The axes that a norm is taken over; the other axes enumerate the units."""
    groups: int = 1
    """The number of groups into which axis 0 is split first, as a new leading axis; 1
    means no split."""


@dataclass(frozen=True)
class ParameterRows:
    """One parameter and the rows that hold its norms: `start` to `stop`."""

    start: int
    stop: int
    units: Units | None = None
    """How the parameter is divided into units; None if one row holds it whole."""


def split_shape(shape: Sequence[int], units: Units) -> tuple[int, ...]:
    """Return the shape after axis 0 is split into groups."""
    if units.groups == 1:
        return tuple(shape)
    return (units.groups, shape[0] // units.groups, *shape[1:])


def unit_shape(shape: Sequence[int], units: Units) -> tuple[int, ...]:
    """Return the shape of one number per unit; it broadcasts against the parameter."""
    return tuple(
        1 if axis in units.axes else size
        for axis, size in enumerate(split_shape(shape, units))
    )


def unit_count(shape: Sequence[int], units: Units) -> int:
    """Return the number of units."""
    return math.prod(unit_shape(shape, units))


def row_size(shape: Sequence[int], rows: ParameterRows) -> int:
    """Return the number of elements of a parameter in each of its rows.

    >>> row_size((8, 3, 5, 5), ParameterRows(start=0, stop=8))
    75
    """
    return math.prod(shape) // max(1, rows.stop - rows.start)


def name_units(name: str, shape: Sequence[int], units: Units) -> list[str]:
    """Return a name for each unit: `name[0]`, `name[1]`, ...; `name` for a single one.

    >>> name_units("w", (2, 3), Units((1,))), name_units("b", (2,), Units((0,)))
    (['w[0]', 'w[1]'], ['b'])
    """
    count = unit_count(shape, units)
    return [name] if count == 1 else [f"{name}[{i}]" for i in range(count)]


def one_unit(shape: Sequence[int]) -> Units:
    """Return the whole parameter as one unit: biases, gains and the rule "layer"."""
    return Units(tuple(range(len(shape))))


def units_along_axis(shape: Sequence[int], output_axis: int) -> Units:
    """Return one unit per index of an axis; a vector or a scalar is one unit."""
    if len(shape) < 2:
        return one_unit(shape)
    return Units(tuple(axis for axis in range(len(shape)) if axis != output_axis))


def transposed_conv_units(shape: Sequence[int], groups: int) -> Units:
    """Return one unit per output of a torch ConvTranspose kernel.

    The shape of the kernel is (inputs, outputs / groups, *window). An output belongs to
    one group of inputs, so the inputs are split first.

    >>> units = transposed_conv_units((6, 2, 3), groups=3)
    >>> split_shape((6, 2, 3), units), units.axes, unit_count((6, 2, 3), units)
    ((3, 2, 2, 3), (1, 3), 6)
    """
    if groups == 1:
        return units_along_axis(shape, 1)
    return Units((1, *range(3, len(shape) + 1)), groups)


def nfnets_units(shape: Sequence[int]) -> Units:
    """Return the units of the NFNets reference and of optax, for JAX kernel layouts.

    | shape                          | norm over    |
    |--------------------------------|--------------|
    | at most one axis longer than 1 | everything   |
    | 2 or 3 axes                    | axis 0       |
    | 4 axes                         | 0, 1, 2      |
    | 5 axes                         | 0, 1, 2, 3   |

    Raises:
      ValueError: the parameter has more than 5 axes; there is no rule for them.
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
