"""Parameters that the user adds to a clipper, removes from it, or replaces in it."""

from dataclasses import replace
from typing import Any

from torch import Tensor

from autoclip_torch.rows.groups import Group, NamedParameter, refuse_shared
from autoclip_torch.rows.read import read_groups
from autoclip_torch.rows.selection import Selection
from autoclip_torch.rows.sources import find_restarted

from .parameters import MeasuredParameters


class ParameterSurgery(MeasuredParameters):
    """The methods that change the parameters of a clipper; `Observer` has them."""

    _selection: Selection

    def add_param_group(self, group: dict[str, Any] | Group) -> None:
        """Add a group of parameters; the existing rows keep their history.

        Args:
          group: `{"params": ...}`, with the keys that the constructor accepts.

        Raises:
          TypeError, ValueError: a parameter is not new, or a setting breaks its rule;
            nothing was changed.

        >>> import torch
        >>> from autoclip_torch import QuantileClip
        >>> weight = torch.nn.Parameter(torch.zeros(2))
        >>> clipper = QuantileClip([weight], quantile=0.5)
        >>> decision = clipper.observe([1.0, 3.0])
        >>> clipper.add_param_group({"params": [torch.nn.Parameter(torch.zeros(3))]})
        >>> clipper.threshold()
        tensor([2., inf])
        """
        if not isinstance(group, dict | Group):
            raise TypeError(
                'group must be a dict with the key "params", got '
                f'{type(group).__name__}; write add_param_group({{"params": '
                "module.parameters()})"
            )
        new = read_groups([group])
        groups = [*self._groups, *new]
        refuse_shared(groups)
        self._selection.check(groups)
        self._change(groups, {})
        self._comparison.take_back(p.parameter for each in new for p in each.parameters)

    def _remove_params(self, given: list[Tensor]) -> None:
        removed = {id(self._find("parameters", parameter)) for parameter in given}
        groups = [
            replace(
                group, parameters=[p for p in group.parameters if id(p) not in removed]
            )
            for group in self._groups
        ]
        if not any(group.parameters for group in groups):
            raise ValueError(
                "parameters must be only a part of the clipper's, got all of them; "
                "make another clipper, or call replace_param(old, new)"
            )
        self._change(groups, {})
        self._comparison.leave_out(given)

    def _replace_param(self, old: Tensor, new: Tensor) -> None:
        before = self._find("old", old)
        if not isinstance(new, Tensor):
            raise TypeError(f"new must be a tensor, got {_label(new)}")
        if any(new is each for each in self.parameters):
            raise ValueError(
                "new must be one that the clipper does not have, got one that it has; "
                "call remove_params([old])"
            )
        read_groups([new])  # checks it

        def substitute(each: NamedParameter) -> NamedParameter:
            return replace(each, parameter=new) if each is before else each

        groups = [
            replace(group, parameters=list(map(substitute, group.parameters)))
            for group in self._groups
        ]
        continued = {id(new): before}
        rows = self._lay_out(groups)
        for entry, count in find_restarted(self._stepper.rows, rows, continued):
            raise ValueError(
                f"new must have {count} units like the old one, got "
                f"{entry.count}; call remove_params([old]) and "
                'add_param_group({"params": [new]})'
            )
        self._change(groups, continued)
        self._comparison.leave_out([old])
        self._comparison.take_back([new])

    def _find(self, argument: str, parameter: Tensor) -> NamedParameter:
        """Return a parameter of the clipper, with its name."""
        for group in self._groups:
            for named in group.parameters:
                if named.parameter is parameter:
                    return named
        raise ValueError(
            f"{argument} must be of this clipper, got {_label(parameter)}; "
            "clipper.parameters lists them"
        )


def _label(value: Any) -> str:
    is_tensor = isinstance(value, Tensor)
    shape = f" of shape {tuple(value.shape)}" if is_tensor else ""
    return type(value).__name__ + shape
