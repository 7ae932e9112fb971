"""The parameters of a clipper, and how they change during a run."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import _global_optimizer_pre_hooks

from autoclip_torch.coverage.check import CoverageCheck
from autoclip_torch.coverage.swap import SwapCheck, end_swap_checks
from autoclip_torch.gradients.ranks import has_other_ranks
from autoclip_torch.optimizer_steps.global_hook import add_hook, list_hooks
from autoclip_torch.optimizer_steps.weak_hook import WeakHook
from autoclip_torch.rows.flat_parts import refuse_flat_parts, refuse_fsdp1
from autoclip_torch.rows.groups import Group, NamedParameter
from autoclip_torch.rows.predecessors import Present
from autoclip_torch.rows.read import ParametersLike
from autoclip_torch.rows.rows import Rows
from autoclip_torch.rows.sources import find_restarted, find_source_rows
from autoclip_torch.step.stepper import Stepper
from autoclip_torch.step.unwrap import stepped_parameter_ids, stepped_parameters
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
    _coverage: CoverageCheck
    _shapes: list[Any]
    scope: str

    @property
    def parameters(self) -> list[Tensor]:
        """Every parameter of the first argument, the excluded ones too."""
        return [named.parameter for group in self._groups for named in group.parameters]

    def _start(self, given: ParametersLike) -> None:
        """Compare from now on with what was the first argument."""
        is_optimizer = isinstance(given, Optimizer)
        self._comparison = Comparison(given if is_optimizer else None)
        self._shapes = _list_shapes(self._stepper.rows)
        self._coverage = CoverageCheck()

    def _add_stepped(self, optimizer: Optimizer) -> None:
        """Add what the optimizer steps and the clipper's modules got meanwhile."""
        self._comparison.accept_known(optimizer, self.parameters)
        self._update_parameters(
            self._comparison.compare_with_optimizers([optimizer], self._groups)
        )
        self._comparison.accept_optimizers([optimizer])

    def _expect_steps(self, optimizer: Optimizer, *, is_wrapped: bool = False) -> None:
        """Warn from now on if another optimizer steps what the clipper clips."""
        self._end_swap_checks()
        self._coverage.swap = SwapCheck(optimizer, is_wrapped)
        self._update_swap_check()

    def _end_swap_checks(self) -> None:
        """Expect no steps of this clipper, or of earlier ones of its parameters."""
        self._coverage.end()
        end_swap_checks(self._stepper.rows.parameters)

    def _update_swap_check(self) -> None:
        """Give the check of a swapped optimizer the present parameters."""
        if self._coverage.swap is not None:
            groups, parameters = self._groups, self._stepper.rows.parameters
            label = next(p.label for group in groups for p in group.parameters)
            modules = {id(g.module): g.module for g in groups if g.module is not None}
            has_modules = all(group.module is not None for group in groups)
            self._coverage.swap.set_parameters(
                parameters, modules.values() if has_modules else (), label
            )

    def _check_coverage(self, optimizers: Iterable[Optimizer]) -> None:
        """Compare the parameters with those that are stepped, in every few steps.

        A clipper that only measures may have any part of them. Compiled steps are not
        compared.
        """
        if not self._coverage.begin_step() or torch.compiler.is_compiling():
            return
        refuse_fsdp1(self.parameters)  # it may have wrapped them after the clipper
        if self._coverage.steps == 1:
            add_hook(_global_optimizer_pre_hooks, WeakHook(self._before_update))
            for each in _list_clippers():
                each._coverage.left_out.add_others(self._known)
        stepper, is_joint = self._stepper, self.scope in ("global", "group")
        self._coverage.compare(
            [] if stepper.dry_run else list(optimizers),
            clipped=stepper.rows.parameters,
            known=self._known,
            find_others=_find_known,
            is_joint=is_joint and stepper.quantity == "gradient",
        )

    def _before_update(self, optimizer: Optimizer, args: Any, kwargs: Any) -> Any:
        """Change nothing. By this hook the checks of other clippers find this one."""
        return None

    def _is_shared(self) -> bool:
        """Return whether another clipper clips some of the same parameters."""
        return self._count_sharing() > 0

    def _count_sharing(self) -> int:
        """Return the number of other clippers of some of the same parameters."""
        others = [
            each._stepper.rows.parameters
            for each in _list_clippers()
            if each is not self
            and each._stepper.quantity == "gradient"
            and not each._stepper.dry_run
        ]
        ids = set(map(id, self._stepper.rows.parameters)) if others else set()
        return sum(not ids.isdisjoint(map(id, each)) for each in others)

    @property
    def _known(self) -> list[Tensor]:
        """Every parameter, and those that the user removed."""
        return [*self.parameters, *self._comparison.removed]

    def _follow(self, given: Optimizer | None = None) -> None:
        """Take over what has changed since the last step of a clipper by hand.

        Args:
          given: the optimizer that `step` received. It is compared from then on if it
            steps all trained parameters.
        """
        optimizer = self._comparison.optimizer
        if given is not None and given is not optimizer:
            trained = {id(p) for p in self.parameters if p.requires_grad}
            if trained and trained <= stepped_parameter_ids(given):
                self._comparison.adopt(optimizer := given)
        if optimizer is not None:
            self._compare_with_optimizers(optimizer)
            return
        present = self._comparison.compare_with_modules(self._groups)
        self._update_parameters(present)
        if present is not None:
            self._comparison.accept_modules(self._groups)

    def _follow_optimizer(self, *optimizers: Optimizer) -> None:
        """Take over what has changed in the optimizers, before a step inside them."""
        self._compare_with_optimizers(*optimizers)
        self._check_coverage(optimizers)

    def _compare_with_optimizers(self, *optimizers: Optimizer) -> list[NamedParameter]:
        """Do the same, without the check of the coverage.

        Returns:
          The new parameters of the optimizers that the clipper does not have.
        """
        present = self._comparison.compare_with_optimizers(optimizers, self._groups)
        if present is not None:
            self._refuse_flat_parts(optimizers)
        self._update_parameters(present)
        if present is None:
            return []
        self._comparison.accept_optimizers(optimizers)
        return present.left_out

    def _refuse_flat_parts(self, optimizers: Sequence[Optimizer]) -> None:
        """Refuse the tensors of an engine, unless their norm is that of the model."""
        is_one_row = self.scope == "global" and not has_other_ranks()
        if self._stepper.process_group is None and not is_one_row:
            for optimizer in optimizers:
                refuse_flat_parts(self.parameters, stepped_parameters(optimizer))

    def _update_parameters(self, present: Present | None) -> None:
        """Continue with the present parameters; None if only shapes can have changed.

        A parameter whose `data` has another shape may be cut into other units.
        """
        if present is None:
            is_cut = self.scope == "unit"
            if is_cut and _list_shapes(self._stepper.rows) != self._shapes:
                self._change(self._groups, {})
        elif not any(group.parameters for group in present.groups):
            names = self._stepper.rows.names
            warn(
                f"none of the clipper's parameters, such as {names[0]}, is trained any "
                "more, and the clipper still measures them; call replace_param(old, "
                "new), or make another clipper"
            )
        elif _list_ids(present.groups) != _list_ids(self._groups):
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
        self._update_swap_check()
        for entry, count in find_restarted(before, rows, predecessors):
            name = entry.name or rows.names[entry.start]
            warn(
                f"{name} has {entry.count} units in place of {count}, so "
                'its history starts again; choose scope="parameter" to keep the '
                "history of a parameter that gets another shape"
            )

    @abstractmethod
    def _lay_out(self, groups: Sequence[Group]) -> Rows:
        """Return the rows of the parameters that are not excluded."""


def _list_clippers() -> list[MeasuredParameters]:
    """Return the clippers that have taken a step."""
    owners = [hook.owner for hook in list_hooks(_global_optimizer_pre_hooks)]
    return [each for each in owners if isinstance(each, MeasuredParameters)]


def _find_known() -> set[int]:
    """Return the ids of the parameters of all clippers."""
    return {id(parameter) for each in _list_clippers() for parameter in each._known}


def _list_shapes(rows: Rows) -> list[Any]:
    return [entry.parameter.shape for entry in rows.by_parameter]


def _list_ids(groups: list[Group]) -> list[list[int]]:
    return [[id(named.parameter) for named in g.parameters] for g in groups]
