"""Each step starts from one state, and does what it is timed for."""

from collections.abc import Callable, Sequence

from torch import Tensor
from torch.nn.utils import get_total_norm

from contenders import Contender, Parameters
from models import set_gradients
from timing import Times, alternate, clock


def measure(
    contenders: Sequence[Contender],
    parameters: Parameters,
    factor: float,
    seconds: float,
) -> Times:
    """Time every contender in every round.

    Before each step, outside the timed part, the gradients are written again and the
    contender's state is restored. So every step has the same gradients, the same
    history and the same memory, and always or never clips.

    Args:
      contenders: the first is the reference.
      parameters: whose gradients they clip.
      factor: a gradient over its weight; below 1 nothing is clipped, above 1 all is.
      seconds: how long to go on.

    Raises:
      RuntimeError: a contender clipped what it should not, or the reverse, or left
        another norm than the reference does; looked at before and after the rounds.
    """
    timed = {
        contender.name: clock(contender.step, _prepare(contender, parameters, factor))
        for contender in contenders
    }
    _check_all(contenders, parameters, factor)  # this also warms all of them up
    taken = alternate(timed, seconds)
    _check_all(contenders, parameters, factor)  # as after the first, so after the last
    return taken


def _prepare(
    contender: Contender, parameters: Parameters, factor: float
) -> Callable[[], None]:
    def prepare() -> None:
        contender.restore()
        set_gradients(parameters, factor)

    return prepare


def _check_all(
    contenders: Sequence[Contender], parameters: Parameters, factor: float
) -> None:
    wanted = None
    for contender in contenders:
        _prepare(contender, parameters, factor)()
        contender.step()
        wanted = wanted or _norm(parameters)
        _check(contender.name, parameters, factor, wanted)


def _check(name: str, parameters: Parameters, factor: float, wanted: float) -> None:
    """Refuse to time something else than was meant."""
    for parameter in parameters:
        before, after = parameter.detach() * factor, parameter.grad
        assert isinstance(after, Tensor)
        clipped = (after.abs() < before.abs()) | (before == 0)
        if not bool(clipped.all() if factor > 1 else (after == before).all()):
            wanted_clips = "all gradients" if factor > 1 else "no gradient"
            raise RuntimeError(f"{name} should have clipped {wanted_clips}")
    # The thresholds are about the norms of the weights, and so is what they leave.
    if not 0.7 < (norm := _norm(parameters)) / wanted < 1.5:
        problem = f"left a norm of {norm:.3g}, and the reference {wanted:.3g}"
        raise RuntimeError(f"{name} {problem}")


def _norm(parameters: Parameters) -> float:
    """Return the norm of all gradients together."""
    return float(get_total_norm(p.grad for p in parameters if p.grad is not None))
