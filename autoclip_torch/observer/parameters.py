"""The parameters of a clipper, and how they change during a run."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from autoclip_torch.rows.changes import Present
from autoclip_torch.rows.groups import Group, NamedParameter, refuse_shared
from autoclip_torch.rows.read import ParametersLike, read_groups, read_parameters
from autoclip_torch.rows.rows import Rows
from autoclip_torch.rows.sources import find_restarted, find_source_rows
from autoclip_torch.step.stepper import Stepper
from autoclip_torch.step.unwrap import stepped_parameter_ids
from autoclip_torch.step.warn import warn

from .comparison import Comparison


class MeasuredParameters(ABC):
    """The parameters of a clipper. They follow an optimizer, or modules.

    A parameter that replaces another one continues its history, if it has the same
    name, or else the same place in the optimizer.
    """

    _groups: list[Group]
    _stepper: Stepper
    _comparison: Comparison
    _shapes: list[Any]
    scope: str

    @property
    def parameters(self) -> list[Tensor]:
        """Every parameter of the first argument, the excluded ones too."""
        return [named.parameter for group in self._groups for named in group.parameters]

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
        self._check_patterns(groups)
        self._change(groups, {})
        self._comparison.take_back(p.parameter for each in new for p in each.parameters)

    def remove_params(self, parameters: ParametersLike) -> None:
        """Remove parameters and their rows; the other rows keep their history.

        An optimizer that steps them must give them up, too.

        Args:
          parameters: a parameter, a module, or an iterable of parameters.

        Raises:
          ValueError: a parameter is not one of the clipper, or none would be left;
            nothing was changed.

        >>> import torch
        >>> from autoclip_torch import QuantileClip
        >>> head, body = (torch.nn.Parameter(torch.zeros(2)) for _ in range(2))
        >>> clipper = QuantileClip([("head", head), ("body", body)], quantile=0.5)
        >>> decision = clipper.observe([1.0, 3.0])
        >>> clipper.remove_params([head])
        >>> clipper.names, clipper.threshold()
        (['body'], tensor([3.]))
        """
        given = read_parameters(parameters)
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

    def replace_param(self, old: Tensor, new: Tensor) -> None:
        """Replace a parameter; the new one continues the history of the old one.

        An optimizer that steps the old one must step the new one instead. A clipper
        that knows its optimizer, or its module, does this by itself before the next
        step, if the name or the place in the optimizer is the same.

        Args:
          old: a parameter of the clipper.
          new: a parameter that the clipper does not have. It may have another shape; at
            scope="unit" it must have as many units.

        Raises:
          TypeError, ValueError: an argument breaks its rule; nothing was changed.

        >>> import torch
        >>> from autoclip_torch import QuantileClip
        >>> few, many = (torch.nn.Parameter(torch.zeros(n, 3)) for n in (2, 5))
        >>> clipper = QuantileClip([("points", few)], quantile=0.5)
        >>> decision = clipper.observe([1.0, 3.0])
        >>> clipper.replace_param(few, many)
        >>> clipper.names, clipper.threshold()
        (['points'], tensor([2.]))
        """
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
                f"{entry.stop - entry.start}; call remove_params([old]) and "
                'add_param_group({"params": [new]})'
            )
        self._change(groups, continued)
        self._comparison.leave_out([old])
        self._comparison.take_back([new])

    def _start(self, given: ParametersLike) -> None:
        """Compare from now on with what was the first argument."""
        is_optimizer = isinstance(given, Optimizer)
        self._comparison = Comparison(given if is_optimizer else None)
        self._shapes = _list_shapes(self._stepper.rows)

    def _follow(self, given: Optimizer | None = None) -> list[NamedParameter]:
        """Take over what has changed since the last step of a clipper by hand.

        Args:
          given: the optimizer that `step` received. It is compared from then on if it
            steps all trained parameters.

        Returns:
          As `_follow_optimizer`.
        """
        optimizer = self._comparison.optimizer
        if given is not None and given is not optimizer:
            trained = {id(p) for p in self.parameters if p.requires_grad}
            if trained and trained <= stepped_parameter_ids(given):
                self._comparison.adopt(optimizer := given)
        if optimizer is not None:
            return self._follow_optimizer(optimizer)
        present = self._comparison.compare_with_modules(self._groups)
        self._take_over(present)
        if present is not None:
            self._comparison.accept_modules(self._groups)
        return []

    def _follow_optimizer(self, *optimizers: Optimizer) -> list[NamedParameter]:
        """Take over what has changed in the optimizers since the last step.

        Returns:
          The new parameters of the optimizers that the clipper does not have.
        """
        present = self._comparison.compare_with_optimizers(optimizers, self._groups)
        self._take_over(present)
        if present is None:
            return []
        self._comparison.accept_optimizers(optimizers)
        return present.left_out

    def _take_over(self, present: Present | None) -> None:
        """Continue with the present parameters; None if only shapes can have changed.

        A parameter whose `data` has another shape may be cut into other units.
        """
        if present is None:
            shapes = self._shapes
            if self.scope == "unit" and _list_shapes(self._stepper.rows) != shapes:
                self._change(self._groups, {})
        elif not any(group.parameters for group in present.groups):
            names = self._stepper.rows.names
            warn(
                f"none of the clipper's parameters, such as {names[0]}, is trained any "
                "more, and the clipper still measures them; call replace_param(old, "
                "new), or make another clipper"
            )
        elif not _have_same_parameters(present.groups, self._groups):
            self._change(present.groups, present.predecessors)

    def _change(
        self, groups: list[Group], predecessors: Mapping[int, NamedParameter]
    ) -> None:
        """Continue with other parameters; the other rows keep their history.

        Args:
          groups: the parameters from now on.
          predecessors: the parameter that each of them continues, by id. A parameter
            without an entry continues itself.
        """
        before, rows = self._stepper.rows, self._lay_out(groups)
        sources = find_source_rows(before, rows, predecessors)
        self._stepper.change_rows(groups, rows, sources)
        self._groups, self._shapes = groups, _list_shapes(rows)
        for entry, count in find_restarted(before, rows, predecessors):
            name = entry.name or rows.names[entry.start]
            warn(
                f"{name} has {entry.stop - entry.start} units in place of {count}, so "
                'its history starts again; choose scope="parameter" to keep the '
                "history of a parameter that gets another shape"
            )

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

    @abstractmethod
    def _lay_out(self, groups: Sequence[Group]) -> Rows:
        """Return the rows of the parameters that are not excluded."""

    @abstractmethod
    def _check_patterns(self, groups: Sequence[Group]) -> None:
        """Refuse a pattern that matches no parameter."""


def _list_shapes(rows: Rows) -> list[Any]:
    """Return the shape of each parameter."""
    return [entry.parameter.shape for entry in rows.by_parameter]


def _have_same_parameters(first: list[Group], second: list[Group]) -> bool:
    """Return whether groups hold the same parameters, in the same order."""
    ids = [
        [[id(p.parameter) for p in g.parameters] for g in x] for x in (first, second)
    ]
    return ids[0] == ids[1]


def _label(value: Any) -> str:
    is_tensor = isinstance(value, Tensor)
    shape = f" of shape {tuple(value.shape)}" if is_tensor else ""
    return type(value).__name__ + shape
