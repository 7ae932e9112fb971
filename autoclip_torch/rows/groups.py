"""Parameters in groups: which are excluded, which are scaled, and their units."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from autoclip_core.clipper import units
from autoclip_core.clipper.units import Units


@dataclass(frozen=True)
class NamedParameter:
    """A parameter with its name and its layer."""

    parameter: torch.Tensor
    name: str | None
    layer: nn.Module | None = None
    """The module that owns the parameter, if the clipper received a module."""
    is_scaled: bool = True
    """Whether clipping scales its gradient."""
    is_replicated: bool | None = None
    """Whether every rank of the process group holds it; None if nothing says so."""

    @property
    def label(self) -> str:
        """Its name, or else its shape, for messages."""
        return self.name or f"one of shape {tuple(self.parameter.shape)}"


@dataclass
class Group:
    """Parameters that share one policy."""

    parameters: list[NamedParameter]
    overrides: dict[str, Any] = field(default_factory=dict)
    """The entries of a group dict other than "params"."""
    name: str = "group 0"
    """The name of its row. It stays the same if another group is excluded."""
    module: nn.Module | None = None
    """The module that names the parameters, if the clipper received one."""
    is_of_optimizer: bool = False
    """Whether the parameters are those of a group of an optimizer."""


def refuse_shared(groups: Sequence[Group]) -> None:
    """Refuse a parameter that is in two groups.

    Raises:
      ValueError: a parameter is in two groups; it would be measured and scaled twice.
    """
    group_of: dict[int, int] = {}
    for index, group in enumerate(groups):
        for named in group.parameters:
            if group_of.setdefault(id(named.parameter), index) != index:
                raise ValueError(
                    f"a parameter must be in one group, got {named.label} in groups "
                    f"{group_of[id(named.parameter)]} and {index}; list it once, or it "
                    "would be scaled twice"
                )


def find_units(named: NamedParameter) -> Units:
    """Return the parameter's output units; the type of its layer decides, if known.

    | layer                                  | a unit is                         |
    |----------------------------------------|-----------------------------------|
    | Linear, Bilinear, Conv, Embedding, RNN | each index of axis 0              |
    | MultiheadAttention                     | each index of axis 0              |
    | ConvTranspose                          | each output channel (axis 1)      |
    | LayerNorm, RMSNorm, PReLU, any vector  | the whole parameter               |
    | unknown                                | each index of axis 0              |
    """
    shape = tuple(named.parameter.shape)
    layer = named.layer
    # The magnitudes that weight_norm keeps have another shape than the weight.
    if isinstance(layer, _Transposed) and shape[:2] == (
        layer.in_channels,
        layer.out_channels // layer.groups,
    ):
        return units.transposed_conv_units(shape, layer.groups)
    if isinstance(layer, _GAINS):
        return units.one_unit(shape)
    return units.units_along_axis(shape, 0)


_Transposed = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_GAINS = (nn.LayerNorm, nn.RMSNorm, nn.PReLU)
