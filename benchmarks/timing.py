"""Timing in one process: contenders alternate, and each step starts from one state."""

import gc
import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor
from torch.nn import Parameter
from torch.nn.utils import get_total_norm

from contenders import Contender
from models import set_gradients

LEAST_ROUNDS = 5
MOST_ROUNDS = 400


class Spread(NamedTuple):
    """The median, and the quartiles around it."""

    low: float
    median: float
    high: float


@dataclass(frozen=True)
class Result:
    """What one contender took."""

    milliseconds: Spread
    ratio: Spread
    """Of its time to the reference's in the same round."""
    fastest: float
    """Its fastest step in milliseconds: what others on the machine disturb least."""
    rounds: int


def measure(
    contenders: Sequence[Contender],
    parameters: list[Parameter],
    factor: float,
    seconds: float,
) -> dict[str, Result]:
    """Time every contender in every round, in a new random order each.

    Before each step, outside the timed part, the gradients are written anew and the
    contender forgets its last step. So every step meets the same gradients, the same
    history and the same memory, and whether it clips never changes.

    Args:
      contenders: the first is the reference.
      parameters: whose gradients they clip.
      factor: a gradient over its weight; below 1 nothing is clipped, above 1 all is.
      seconds: how long to go on.

    Raises:
      RuntimeError: a contender clipped what it should not, or the reverse, or left
        another norm than the reference does; looked at before and after the rounds.
    """

    def prepare(contender: Contender) -> None:
        contender.restore()
        set_gradients(parameters, factor)

    def check() -> None:
        prepare(contenders[0])
        contenders[0].step()
        wanted = _norm(parameters)
        for contender in contenders:
            prepare(contender)
            contender.step()
            _check(contender, parameters, factor, wanted)

    check()  # this also warms all of them up
    taken = alternate(contenders, prepare, seconds)
    check()  # as after the first step, so after the last one
    reference = taken[contenders[0].name]
    return {name: _result(times, reference) for name, times in taken.items()}


def alternate(
    contenders: Sequence[Contender],
    prepare: Callable[[Contender], None],
    seconds: float,
) -> dict[str, list[float]]:
    """Return the seconds of every step, by contender and in the order of rounds."""
    taken: dict[str, list[float]] = {contender.name: [] for contender in contenders}
    order, shuffle = list(contenders), random.Random(0).shuffle
    end, rounds = time.perf_counter() + seconds, 0
    gc.collect()
    gc.disable()
    try:
        while rounds < LEAST_ROUNDS or (
            rounds < MOST_ROUNDS and time.perf_counter() < end
        ):
            shuffle(order)
            for contender in order:
                prepare(contender)
                start = time.perf_counter()
                contender.step()
                taken[contender.name].append(time.perf_counter() - start)
            rounds += 1
    finally:
        gc.enable()
    return taken


def _check(
    contender: Contender, parameters: list[Parameter], factor: float, wanted: float
) -> None:
    """Refuse to time something else than was meant."""
    if not contender.clips:
        return
    for parameter in parameters:
        before, after = parameter.detach() * factor, parameter.grad
        assert isinstance(after, Tensor)
        clipped = (after.abs() < before.abs()) | (before == 0)
        if not bool(clipped.all() if factor > 1 else (after == before).all()):
            wanted_clips = "all gradients" if factor > 1 else "no gradient"
            raise RuntimeError(f"{contender.name} should have clipped {wanted_clips}")
    # The thresholds are about the norms of the weights, and so is what they leave.
    if not 0.7 < (found := _norm(parameters)) / wanted < 1.5:
        told = f"left a norm of {found:.3g}, and the reference {wanted:.3g}"
        raise RuntimeError(f"{contender.name} {told}")


def _norm(parameters: list[Parameter]) -> float:
    """Return the norm of all gradients together."""
    return float(get_total_norm(p.grad for p in parameters if p.grad is not None))


def _result(times: Sequence[float], reference: Sequence[float]) -> Result:
    ratios = [mine / other for mine, other in zip(times, reference, strict=True)]
    milliseconds = [1e3 * seconds for seconds in times]
    fastest = min(milliseconds)
    return Result(spread(milliseconds), spread(ratios), fastest, len(times))


def spread(values: Sequence[float]) -> Spread:
    """Return quartiles and median of at least two values."""
    return Spread(*statistics.quantiles(values, n=4, method="inclusive"))
