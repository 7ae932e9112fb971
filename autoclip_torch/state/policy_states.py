"""The policy states of a clipper and its counts, on the CPU or on a device."""

from collections.abc import Mapping
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor

from autoclip_core import Decision, decide
from autoclip_core.clipper import metrics
from autoclip_core.clipper.metrics import Tally
from autoclip_core.loss import LossDecision
from autoclip_core.policy import select_rows
from autoclip_core.scale import find_level, ignore_overflow
from autoclip_torch.gradients.transfer import read_arrays
from autoclip_torch.rows.rows import Rows

from .loss_monitor import LossMonitor
from .namespace import TorchNamespace
from .serialize import state_to_dict, states_from_list, tally_from_dict
from .trees import move, store

_FLAGS = ("clipped", "finite", "skipped", "dropped")
"""The booleans of a decision, which a transfer from a device makes numbers."""


class PolicyStates:
    """The states of all policies of a clipper. A step calls `decide` once per policy.

    Args:
      rows: the rows and the policy of each.
      nonfinite: as in `Clipper`.
      losses: the monitor of the loss policy, or None without one.
    """

    def __init__(
        self, rows: Rows, nonfinite: str, losses: LossMonitor | None = None
    ) -> None:
        self.losses = losses
        self.rows = rows
        self.nonfinite = nonfinite
        self.sizes: Any = None
        """The elements of each row in the last step, for "rms"; None for all."""
        self._namespace: TorchNamespace | None = None
        self.states = [b.policy.init(b.count) for b in rows.by_policy]
        self.tally = metrics.empty_tally(len(rows.names))
        self.decision = metrics.empty_decision(len(rows.names))
        self.may_skip = self._try_policies(np)
        """Whether a step may cancel the update."""

    @property
    def device(self) -> torch.device | None:
        """The device of the states; None is NumPy on the CPU."""
        return None if self._namespace is None else self._namespace.device

    @property
    def xp(self) -> Any:
        """The array namespace: NumPy on the CPU, or torch on the device."""
        return self._namespace or np

    def as_array(self, values: Tensor) -> Any:
        """Return a tensor as an array of the namespace `xp`."""
        if self.device is None:
            return values.cpu().numpy()
        return values.to(self.device, non_blocking=True)

    def reset(self) -> None:
        """Delete the recorded norms and the counts."""
        rows, xp = len(self.rows.names), self.xp
        states = [b.policy.init(b.count, xp) for b in self.rows.by_policy]
        self.states = self._store(states, self.states)
        self.tally = self._store(metrics.empty_tally(rows, xp), self.tally)
        self.decision = metrics.empty_decision(rows, xp)
        if self.losses is not None:
            self.losses.reset()

    def _try_policies(self, xp: Any) -> bool:
        """Return whether a policy or a rule can cancel an update, by a trial step.

        The trial also copies the tables of the policies to the device of the namespace,
        so that no step has to.

        Raises:
          ValueError: a policy has a history that needs the CPU.
        """
        may_skip = self.nonfinite == "skip" or self.losses is not None
        for block in self.rows.by_policy:
            state = block.policy.init(block.count, xp)
            norms = xp.full((block.count,), 1.0, dtype=xp.float32)
            limit = block.policy.limit(state, norms, param_norms=norms, xp=xp)
            block.policy.record(state, norms, limit, xp)
            may_skip |= limit.cancels
        return may_skip

    def move_to(self, device: torch.device | None) -> None:
        """Move states, counts and decision to a device, or to NumPy arrays (None)."""
        if device == self.device:
            return
        namespace = None if device is None else TorchNamespace(device)
        self._try_policies(namespace or np)
        self._namespace = namespace
        self.states = [move(state, device) for state in self.states]
        self.tally = move(self.tally, device)
        self.decision = move(self.decision, device)
        if self.losses is not None:
            self.losses.move_to(namespace)

    # `torch.compile` calls `move_to` once, while it traces, not in the compiled code.
    # `torch.compiler.assume_constant_result` sets the same mark, but it imports the
    # compiler, which takes a second.
    move_to._dynamo_marked_constant = True  # type: ignore[attr-defined]

    def decide(
        self,
        norms: Any,
        observed: Any,
        param_norms: Any = None,
        *,
        loss: LossDecision | None = None,
    ) -> Decision:
        """Decide on one step, and record its norms.

        Args:
          norms: shape (rows,), an array of the namespace `xp`.
          observed: booleans of shape (rows,).
          param_norms: shape (rows,), or None if no policy needs them.
          loss: the decision on the loss of the step, if there is a loss policy.
        """
        states, decisions = [], []
        # With "raise", the clipper has checked the norms already.
        nonfinite = "propagate" if self.nonfinite == "raise" else self.nonfinite
        for block, state, part in self._split(norms):
            rows = slice(block.start, block.stop)
            after, decision = decide(
                block.policy,
                state,
                part,
                observed=observed[rows],
                param_norms=None if param_norms is None else param_norms[rows],
                nonfinite=nonfinite,
                loss=loss,
                xp=self.xp,
            )
            states.append(after)
            decisions.append(decision)
        states, decision = self._join(states, decisions, observed)
        self.states = self._store(states, self.states)
        return self.count_step(decision)

    def count_step(self, decision: Decision) -> Decision:
        """Add a decision to the counts, whether it comes from a policy or not."""
        self.decision = decision
        tally = metrics.count_step(self.tally, decision, self.xp)
        self.tally = self._store(tally, self.tally)
        return decision

    def get_thresholds(self, param_norms: Any) -> Any:
        """Return the threshold of each row before its norm is known."""
        parts, xp = [], self.xp
        if param_norms is not None:
            param_norms = xp.asarray(param_norms, dtype=xp.float32)
        for block, state, part in self._split(param_norms):
            with ignore_overflow(xp):
                limit = block.policy.limit(state, None, param_norms=part, xp=xp)
            # A policy without state returns one number for all rows.
            rows = xp.zeros((block.count,), dtype=xp.float32)
            parts.append(find_level(limit, xp) + rows)
        return xp.concatenate(parts)

    def read(self) -> tuple[Decision, Tally, dict[str, Any]]:
        """Return decision, tally and metrics of the loss, all in NumPy.

        From a device this is one transfer. Without a loss policy the dict is empty.
        """
        losses = {} if self.losses is None else self.losses.compute_metrics()
        arrays = [*self.decision, *self.tally, *losses.values()]
        if self.device is not None:
            arrays = read_arrays(arrays)
        parts = iter(arrays)
        decision = Decision(*islice(parts, len(self.decision)))
        flags = {name: getattr(decision, name) != 0 for name in _FLAGS}
        tally = Tally(*islice(parts, len(self.tally)))
        return decision._replace(**flags), tally, dict(zip(losses, parts, strict=True))

    def describe_norm(self) -> dict[str, Any]:
        """Return the norm and the sizes of the rows in the last step, in NumPy."""
        if self.rows.norm != "rms":
            return {"norm": self.rows.norm}
        rows, sizes = self.rows, self.sizes
        if sizes is None:
            sizes = rows.count_elements(rows.by_parameter)
        if isinstance(sizes, dict):
            return {"norm": "rms", "sizes": rows.repeat(sizes)}
        return {"norm": "rms", "sizes": torch.as_tensor(sizes).numpy(force=True)}

    def to_dict(self) -> dict[str, Any]:
        """Return copies of states and counts as tensors, for a checkpoint."""
        saved: dict[str, Any] = {
            "states": [state_to_dict(state) for state in self.states],
            "tally": state_to_dict(self.tally),
        }
        if self.losses is not None:
            saved["loss"] = self.losses.to_dict()
        return saved

    def load_dict(self, saved: Mapping[str, Any], strict: bool = True) -> None:
        """Load states and counts. On a ValueError nothing changes."""
        states = states_from_list(saved["states"], self.states)
        tally = tally_from_dict(saved["tally"], self.tally)
        if self.losses is not None:
            self.losses.load(self.losses.convert(saved.get("loss"), strict))
        self.states = self._store(states, self.states)
        self.tally = self._store(tally, self.tally)
        self.decision = metrics.empty_decision(len(self.rows.names), self.xp)

    def _store(self, new: Any, old: Any) -> Any:
        """Return the new state; on a device, in the memory of the old one."""
        return store(new, old, self.device)

    def _split(self, rows: Any) -> list[tuple[Any, Any, Any]]:
        """Return the rows of each policy, its state, and its part of an array."""
        blocks = self.rows.by_policy
        parts = [None if rows is None else rows[b.start : b.stop] for b in blocks]
        return list(zip(blocks, self.states, parts, strict=True))

    def _join(
        self, states: list[Any], decisions: list[Decision], observed: Any
    ) -> tuple[list[Any], Decision]:
        """Join the decisions of the policies. If one cancels the update, all do."""
        if len(decisions) == 1:
            return states, decisions[0]
        decision = Decision(*map(self.xp.concatenate, zip(*decisions, strict=True)))
        if not self.may_skip:
            return states, decision
        skipped = decision.skipped | self.xp.any(decision.skipped)
        scale = self.xp.where(skipped & observed, 0.0, decision.scale)
        if self.nonfinite == "skip":
            is_recorded = decision.finite & ~self.xp.any(~decision.finite)
            pairs = zip(states, self._split(is_recorded), strict=True)
            states = [select_rows(p, new, old, self.xp) for new, (_, old, p) in pairs]
        return states, decision._replace(skipped=skipped, scale=scale)
