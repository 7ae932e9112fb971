"""What a clipper has learned: its policies' state, on the host or on one device."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from autoclip_core import Decision, decide
from autoclip_core.clipper.metrics import Tally, count_step, empty_tally
from autoclip_core.policy import select_rows
from autoclip_torch.rows.rows import Rows

from .checkpoint import state_from_plain, state_to_plain, states_from_plain
from .namespace import TorchNamespace
from .trees import leaves, moved, overlaid, read


class PolicyStates:
    """One decision per step over all rows; one call of `decide` per policy.

    Args:
      rows: the rows and the policy of each.
      nonfinite: what becomes of a row whose norm is not finite.
    """

    def __init__(self, rows: Rows, nonfinite: str) -> None:
        """Start with no history, on the host."""
        self.rows = rows
        self.nonfinite = nonfinite
        self._namespace: TorchNamespace | None = None
        self.states: list[Any]
        self.tally: Tally
        self._start()

    @property
    def device(self) -> torch.device | None:
        """Where the history is; None is the host."""
        return None if self._namespace is None else self._namespace.device

    @property
    def xp(self) -> Any:
        """NumPy on the host, else the namespace of torch on the device."""
        return self._namespace or np

    def here(self, values: Tensor) -> Any:
        """Return a tensor where decisions are taken."""
        if self.device is None:
            return values.cpu().numpy()
        return values.to(self.device, non_blocking=True)

    def reset(self) -> None:
        """Forget every norm and count."""
        self.states = self._keep(self._fresh(), self.states)
        self.tally = self._keep(empty_tally(len(self.rows.names), self.xp), self.tally)
        self.decision = self._nothing_seen()

    def _start(self) -> None:
        """Make the memory for what will be learned, where decisions are taken."""
        self.states = self._fresh()
        self.tally = empty_tally(len(self.rows.names), self.xp)
        self.decision = self._nothing_seen()
        # Asked once here: whether an update may be cancelled. On a device this also
        # brings the policies' tables there, so that no step has to.
        ones = self.xp.full((len(self.rows.names),), 1.0, dtype=self.xp.float32)
        limits = []
        for block, state, part in self._each(ones):
            limit = block.policy.limit(state, part, param_norms=part, xp=self.xp)
            block.policy.record(state, part, limit, self.xp)
            limits.append(limit)
        self.may_skip = self.nonfinite == "skip" or any(x.cancels for x in limits)

    def _fresh(self) -> list[Any]:
        """Return the states of policies that have seen nothing."""
        return [
            block.policy.init(block.stop - block.start, self.xp)
            for block in self.rows.by_policy
        ]

    # `torch.compile` does this once, when it traces, and not in the compiled code.
    @torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
    def place(self, device: torch.device | None) -> None:
        """Move to the host (None) or to a device, history and all."""
        if device == self.device:
            return
        namespace = None if device is None else TorchNamespace(device)
        for block in self.rows.by_policy:
            block.policy.init(
                1, namespace or np
            )  # refuses a history that only the host can keep
        states, tally, decision = self.states, self.tally, self.decision
        self._namespace = namespace
        self._start()
        self.states = [moved(state, device) for state in states]
        self.tally, self.decision = moved(tally, device), moved(decision, device)

    def decide(self, norms: Any, observed: Any, param_norms: Any) -> Decision:
        """Decide on one step and learn from it.

        Args:
          norms: shape (rows,), an array of this states's namespace.
          observed: booleans of shape (rows,).
          param_norms: shape (rows,), or None where no policy needs them.
        """
        states, decisions = [], []
        # The clipper has looked at the norms if it is to raise; once is enough.
        nonfinite = "propagate" if self.nonfinite == "raise" else self.nonfinite
        for block, state, part in self._each(norms):
            rows = slice(block.start, block.stop)
            after, decision = decide(
                block.policy,
                state,
                part,
                observed=observed[rows],
                param_norms=None if param_norms is None else param_norms[rows],
                nonfinite=nonfinite,
                xp=self.xp,
            )
            states.append(after)
            decisions.append(decision)
        states, decision = self._agree(states, decisions, observed)
        if self.device is not None:  # a threshold may lie in the state, overwritten now
            decision = decision._replace(threshold=decision.threshold.clone())
        self.states = self._keep(states, self.states)
        return self.count(decision)

    def count(self, decision: Decision) -> Decision:
        """Count one step, decided here or by a rule that has no history."""
        self.decision = decision
        tally = count_step(self.tally, decision, self.xp)
        self.tally = self._keep(tally, self.tally)
        return decision

    def thresholds(self, param_norms: Any) -> Any:
        """Return the threshold of each row for a norm that is not known yet."""
        parts, xp = [], self.xp
        if param_norms is not None:
            param_norms = xp.asarray(param_norms, dtype=xp.float32)
        for block, state, _ in self._each(self.tally.observed):
            own = None if param_norms is None else param_norms[block.start : block.stop]
            limit = block.policy.limit(state, None, param_norms=own, xp=self.xp)
            # A policy without state gives one number for all rows.
            rows = self.xp.zeros((block.stop - block.start,), dtype=self.xp.float32)
            parts.append(limit.threshold + rows)
        return self.xp.concatenate(parts)

    def on_host(self) -> tuple[Decision, Tally]:
        """Return the last decision and the tally as NumPy arrays, in one transfer."""
        arrays = [*self.decision, *self.tally]
        if self.device is not None:
            arrays = read(arrays)
        decision = Decision(*arrays[: len(self.decision)])
        flags = {name: getattr(decision, name) != 0 for name in _FLAGS}
        return decision._replace(**flags), Tally(*arrays[len(self.decision) :])

    def extended(self, rows: Rows) -> "PolicyStates":
        """Return a states of more rows, in which these keep what they learned."""
        more = PolicyStates(rows, self.nonfinite)
        more.place(self.device)
        old = {
            block.policy: (block, state)
            for block, state in zip(self.rows.by_policy, self.states, strict=True)
        }
        for index, block in enumerate(rows.by_policy):
            if block.policy not in old:
                continue
            old_band, state = old[block.policy]
            more.states[index] = overlaid(state, more.states[index], self.xp)
            source = slice(old_band.start, old_band.stop)
            target = slice(block.start, block.start + old_band.stop - old_band.start)
            for name in ("observed", "clipped"):
                getattr(more.tally, name)[target] = getattr(self.tally, name)[source]
        kept = ("steps", "nonfinite", "skipped", "skipped_in_a_row")
        more.tally = more.tally._replace(**{n: getattr(self.tally, n) for n in kept})
        return more

    def to_plain(self) -> dict[str, Any]:
        """Return states and counts as tensors of their own."""
        return {
            "states": [state_to_plain(state) for state in self.states],
            "tally": state_to_plain(self.tally),
        }

    def from_plain(self, plain: Mapping[str, Any]) -> None:
        """Take over states and counts; all or, with a ValueError, nothing."""
        states = states_from_plain(plain["states"], self.states)
        tally = state_from_plain(plain["tally"], self.tally, "tally")
        self.states = self._keep(states, self.states)
        self.tally = self._keep(tally, self.tally)
        self.decision = self._nothing_seen()

    def _keep(self, new: Any, old: Any) -> Any:
        """Return a new state; on a device in the memory of the old one.

        A captured CUDA graph writes where it wrote when it was captured.
        """
        if self.device is None:
            return new
        if memory := leaves(old):
            torch._foreach_copy_(memory, leaves(new))
        return old

    def _each(self, rows: Any) -> list[tuple[Any, Any, Any]]:
        """Return each block with its state and its part of an array over the rows."""
        return [
            (block, state, rows[block.start : block.stop])
            for block, state in zip(self.rows.by_policy, self.states, strict=True)
        ]

    def _agree(
        self, states: list[Any], decisions: list[Decision], observed: Any
    ) -> tuple[list[Any], Decision]:
        """Join the policies' decisions: what cancels the update cancels it for all."""
        if len(decisions) == 1:
            return states, decisions[0]
        decision = Decision(*map(self.xp.concatenate, zip(*decisions, strict=True)))
        if not self.may_skip:
            return states, decision
        skipped = decision.skipped | self.xp.any(decision.skipped)
        scale = self.xp.where(skipped & observed, 0.0, decision.scale)
        if self.nonfinite == "skip":
            learns = decision.finite & ~self.xp.any(~decision.finite)
            states = [
                select_rows(part, new, band_and_state[1], self.xp)
                for new, (*band_and_state, part) in zip(
                    states, self._each(learns), strict=True
                )
            ]
        return states, decision._replace(skipped=skipped, scale=scale)

    def _nothing_seen(self) -> Decision:
        xp, rows = self.xp, (len(self.rows.names),)
        number = {
            name: xp.full(rows, value, dtype=xp.float32)
            for name, value in [("norm", np.nan), ("threshold", np.inf), ("scale", 1.0)]
        }
        no = number["scale"] == 0
        return Decision(**number, clipped=no, finite=~no, skipped=no)


_FLAGS = ("clipped", "finite", "skipped")
