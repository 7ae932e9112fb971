"""What a `TrustClip` does with both halves: its metrics, its state, its parameters."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from autoclip_core.checks import format_error
from autoclip_torch.observer.reporter import Reporter
from autoclip_torch.observer.undo import undo_on_error
from autoclip_torch.rows.read import ParametersLike, read_parameters


class HasHalves(Reporter):
    """A clipper that filters gradients and bounds updates of the same parameters.

    Both halves follow the optimizer before each step, so `remove_params` and
    `replace_param` are seldom needed.
    """

    _filter: Any  # `Clipper` and `UpdateClipper`, whose modules stand above this one
    _bound: Any

    @property
    def names(self) -> list[str]:
        """The name of each row of the bound; the filter has one row, "global"."""
        names: list[str] = self._bound.names
        return names

    def detach(self) -> None:
        """Remove both halves from the optimizer; the history stays.

        >>> import torch
        >>> from autoclip_torch import TrustClip
        >>> layer = torch.nn.Linear(2, 1)
        >>> optimizer = torch.optim.SGD(layer.parameters(), lr=100.0)
        >>> TrustClip(layer, optimizer).detach()
        >>> clipper = TrustClip(layer, optimizer, ratio=0.05)
        """
        for half in self._observers:
            half.detach()

    def state_dict(self) -> dict[str, Any]:
        """Return the states of both halves: tensors and plain Python.

        >>> import torch
        >>> from autoclip_torch import TrustClip
        >>> layer = torch.nn.Linear(2, 1, bias=False)
        >>> clipper = TrustClip(layer, torch.optim.SGD(layer.parameters()))
        >>> sorted(clipper.state_dict())
        ['class', 'gradient', 'update']
        """
        return {
            "class": type(self).__name__,
            "gradient": self._filter.state_dict(),
            "update": self._bound.state_dict(),
        }

    def load_state_dict(
        self, state_dict: dict[str, Any], *, strict: bool = True
    ) -> None:
        """Continue from a saved state. A resumed run is identical bit for bit.

        Args:
          state_dict: the result of `state_dict()`.
          strict: whether parameters and plain settings (the quantile, the ratio) must
            agree; see `Clipper.load_state_dict`.

        Raises:
          ValueError: the state of a half does not fit; the message names the
            difference, and neither half was changed.

        >>> import torch
        >>> from autoclip_torch import TrustClip
        >>> layer = torch.nn.Linear(2, 1, bias=False)
        >>> clipper = TrustClip(layer, torch.optim.SGD(layer.parameters()))
        >>> clipper.load_state_dict(clipper.state_dict())
        """
        _check_has_halves(state_dict)
        with undo_on_error(self._observers):
            self._filter.load_state_dict(state_dict["gradient"], strict=strict)
            self._bound.load_state_dict(state_dict["update"], strict=strict)

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
        for half in self._observers:
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
        for half in reversed(self._observers):  # the bound may refuse it
            half.replace_param(old, new)

    @property
    def _observers(self) -> Sequence[Any]:
        return [self._filter, self._bound]


def _check_has_halves(state_dict: Any) -> None:
    """Refuse a state dict that lacks a half of a `TrustClip`.

    Raises:
      ValueError: it is not the state dict of a `TrustClip`.
    """
    is_mapping = isinstance(state_dict, Mapping)
    if not is_mapping or not {"gradient", "update"} <= set(state_dict):
        rule = 'the state_dict() of a TrustClip, with "gradient" and "update"'
        value = sorted(state_dict) if is_mapping else state_dict
        raise ValueError(format_error("state_dict", rule, value, ""))
