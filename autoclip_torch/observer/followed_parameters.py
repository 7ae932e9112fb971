"""The parameters of a clipper, which follow an optimizer or modules during a run."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from autoclip_torch.coverage.check import CoverageCheck
from autoclip_torch.gradients.ranks import has_other_ranks
from autoclip_torch.rows.flat_parts import refuse_flat_parts
from autoclip_torch.rows.groups import Group, NamedParameter, refuse_shared
from autoclip_torch.rows.predecessors import Present
from autoclip_torch.rows.row_rules import RowRules
from autoclip_torch.rows.rows import Rows
from autoclip_torch.rows.sources import find_restarted, find_source_rows
from autoclip_torch.step.stepper import Stepper
from autoclip_torch.step.unwrap import stepped_parameter_ids, stepped_parameters
from autoclip_torch.step.warn import warn

from .comparison import Comparison
from .surgery import check_replaces, remove_parameters, replace_parameter


class FollowedParameters:
    """The parameters of one clipper.

    A parameter that replaces another one continues its history, if it has the same
    name, or else the same place in the optimizer.

    Args:
      given: the first argument of the clipper. If it is an optimizer, they follow it.
      rules: how they are cut into rows.
      stepper: the steps of the clipper. It holds the groups and their rows.
      coverage: the checks of the clipper, which need the present parameters.
    """

    def __init__(
        self, given: Any, rules: RowRules, stepper: Stepper, coverage: CoverageCheck
    ) -> None:
        """Compare from now on with what was the first argument."""
        self._rules, self._stepper, self._coverage = rules, stepper, coverage
        self._comparison = Comparison(given if isinstance(given, Optimizer) else None)
        self._shapes = _list_shapes(stepper.rows)

    @property
    def groups(self) -> Sequence[Group]:
        """The groups, with the excluded parameters."""
        return self._stepper.groups

    @property
    def all(self) -> list[Tensor]:
        """Every parameter, the excluded ones too."""
        return [named.parameter for group in self.groups for named in group.parameters]

    @property
    def known(self) -> list[Tensor]:
        """Every parameter, and those that the user removed."""
        return [*self.all, *self._comparison.removed]

    def add_stepped(self, optimizer: Optimizer) -> None:
        """Add parameters that the clipper's modules got after it was made.

        The optimizer must step them.
        """
        self._comparison.accept_known(optimizer, self.all)
        self._update(self._comparison.compare_with_optimizers([optimizer], self.groups))
        self._comparison.accept_optimizers([optimizer])

    def follow(self, given: Optimizer | None = None) -> None:
        """Take over what has changed since the last step of a clipper by hand.

        Args:
          given: the optimizer that `step` received. It is compared from then on if it
            steps all trained parameters.
        """
        optimizer = self._comparison.optimizer
        if given is not None and given is not optimizer:
            trained = {id(p) for p in self.all if p.requires_grad}
            if trained and trained <= stepped_parameter_ids(given):
                self._comparison.adopt(optimizer := given)
        if optimizer is not None:
            self.follow_optimizers(optimizer)
            return
        present = self._comparison.compare_with_modules(self.groups)
        self._update(present)
        if present is not None:
            self._comparison.accept_modules(self.groups)

    def follow_optimizers(self, *optimizers: Optimizer) -> list[NamedParameter]:
        """Take over what has changed in the optimizers, before a step inside them.

        Returns:
          The new parameters of the optimizers that the clipper does not have.
        """
        present = self._comparison.compare_with_optimizers(optimizers, self.groups)
        if present is not None:
            self._refuse_flat_parts(optimizers)
        self._update(present)
        if present is None:
            return []
        self._comparison.accept_optimizers(optimizers)
        return present.unknown

    def add(self, new: list[Group]) -> None:
        """Add groups; a parameter of the clipper is refused."""
        groups = [*self.groups, *new]
        refuse_shared(groups)
        self._rules.selection.check(groups)
        self._change(groups, {})
        self._comparison.take_back(p.parameter for each in new for p in each.parameters)

    def remove(self, given: list[Tensor]) -> None:
        """Remove parameters, and their rows."""
        self._change(remove_parameters(self.groups, given), {})
        self._comparison.leave_out(given)

    def replace(self, old: Tensor, new: Tensor) -> None:
        """Replace a parameter; the new one continues the history of the old one."""
        before, groups = replace_parameter(self.groups, old, new)
        predecessors = {id(new): before}
        rows = self._rules.make_rows(groups)
        check_replaces(find_restarted(self._stepper.rows, rows, predecessors))
        self._change(groups, predecessors)
        self._comparison.leave_out([old])
        self._comparison.take_back([new])

    def _refuse_flat_parts(self, optimizers: Sequence[Optimizer]) -> None:
        """Refuse the tensors of an engine, unless their norm is that of the model."""
        is_one_row = self._rules.scope == "global" and not has_other_ranks()
        if self._stepper.process_group is None and not is_one_row:
            for optimizer in optimizers:
                refuse_flat_parts(self.all, stepped_parameters(optimizer))

    def _update(self, present: Present | None) -> None:
        """Continue with the present parameters; None if only shapes can have changed.

        A parameter whose `data` has another shape may be cut into other units.
        """
        if present is None:
            is_cut = self._rules.scope == "unit"
            if is_cut and _list_shapes(self._stepper.rows) != self._shapes:
                self._change(self.groups, {})
        elif not any(group.parameters for group in present.groups):
            names = self._stepper.rows.names
            warn(
                f"none of the clipper's parameters, such as {names[0]}, is trained any "
                "more, and the clipper still measures them; call replace_param(old, "
                "new), or make another clipper"
            )
        elif _list_ids(present.groups) != _list_ids(self.groups):
            self._change(present.groups, present.predecessors)

    def _change(
        self, groups: Sequence[Group], predecessors: Mapping[int, NamedParameter]
    ) -> None:
        """Continue with other parameters; the other rows keep their history.

        Args:
          groups: the parameters from now on.
          predecessors: the parameter that each of them continues, by id. A parameter
            without an entry continues itself.
        """
        before, rows = self._stepper.rows, self._rules.make_rows(groups)
        sources = find_source_rows(before, rows, predecessors)
        self._stepper.change_rows(groups, rows, sources)
        self._shapes = _list_shapes(rows)
        self._coverage.update()
        for entry, count in find_restarted(before, rows, predecessors):
            name = entry.name or rows.names[entry.start]
            warn(
                f"{name} has {entry.count} units in place of {count}, so "
                'its history starts again; choose scope="parameter" to keep the '
                "history of a parameter that gets another shape"
            )


def _list_shapes(rows: Rows) -> list[Any]:
    return [entry.parameter.shape for entry in rows.by_parameter]


def _list_ids(groups: Sequence[Group]) -> list[list[int]]:
    return [[id(named.parameter) for named in g.parameters] for g in groups]
