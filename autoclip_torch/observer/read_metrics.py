"""Read the metrics of a clipper of one kind, after the checks of its run."""

from collections.abc import Callable

from autoclip_core.clipper.metrics import (
    compute_metrics,
    compute_row_metrics,
    compute_totals,
)
from autoclip_torch.step.stepper import Stepper


def read_metrics(
    stepper: Stepper, count_sharing: Callable[[], int], *, per_row: bool
) -> dict[str, float]:
    """Return the metrics as in `BaseClipper.metrics`.

    Args:
      stepper: the steps of the clipper.
      count_sharing: returns the number of other clippers of some of its parameters.
      per_row: as in `BaseClipper.metrics`.
    """
    stepper.callbacks.flush()
    states, checks = stepper.policy_states, stepper.checks
    decision, tally, losses = states.read()
    checks.check_counts(tally, states.nonfinite, stepper.dry_run)
    totals = compute_totals(decision, **states.describe_norm())
    is_clip = stepper.quantity == "gradient" and not stepper.dry_run
    others = count_sharing() if is_clip else 0
    numbers = compute_metrics(decision, tally, totals=totals, other_clippers=others)
    numbers |= losses
    if per_row:
        numbers |= compute_row_metrics(states.rows.names, decision, tally)
    metrics = {name: float(value) for name, value in numbers.items()}
    checks.check_steps(metrics["clip/steps"], states.rows)
    if is_clip:
        checks.check_norm(metrics["clip/norm"], is_shared=others > 0)
        if states.device is not None:  # otherwise each step checks it
            checks.check_zeros(decision, states.rows)
    return metrics
