"""Model surgery for a clipper with two halves."""

from abc import ABC, abstractmethod
from collections.abc import Sequence

from torch import Tensor

from autoclip_torch.observer.observer import Observer
from autoclip_torch.rows.read import ParametersLike, read_parameters


class HasHalves(ABC):
    """A clipper whose halves have the same parameters, such as a `TrustClip`.

    Both follow the optimizer before each step, so these methods are seldom needed.
    """

    @property
    @abstractmethod
    def _halves(self) -> Sequence[Observer]:
        """Return both halves."""

    def remove_params(self, parameters: ParametersLike) -> None:
        """Remove parameters from both halves, as `Clipper.remove_params`.

        Args:
          parameters: a parameter, a module, or an iterable of parameters.

        Raises:
          ValueError: a parameter is not one of the clipper, or none would be left;
            nothing was changed.

        >>> import torch
        >>> from autoclip_torch import TrustClip
        >>> layer = torch.nn.Linear(2, 1)
        >>> clipper = TrustClip(layer, torch.optim.SGD(layer.parameters()))
        >>> clipper.remove_params([layer.bias])
        >>> clipper.names
        ['weight']
        """
        given = read_parameters(parameters)
        for half in self._halves:
            half.remove_params(given)

    def replace_param(self, old: Tensor, new: Tensor) -> None:
        """Replace a parameter in both halves, as `Clipper.replace_param`.

        Args:
          old: a parameter of the clipper.
          new: a parameter that the clipper does not have; at scope="unit" it must have
            as many units.

        Raises:
          TypeError, ValueError: an argument breaks its rule.

        >>> import torch
        >>> from autoclip_torch import TrustClip
        >>> layer = torch.nn.Linear(2, 1)
        >>> clipper = TrustClip(layer, torch.optim.SGD(layer.parameters()))
        >>> clipper.replace_param(layer.bias, torch.nn.Parameter(torch.zeros(3)))
        >>> clipper.names
        ['weight', 'bias']
        """
        for half in reversed(self._halves):  # the bound may refuse it
            half.replace_param(old, new)
