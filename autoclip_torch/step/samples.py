"""Choose the parameters whose gradients the checks of a step look at."""

from collections.abc import Sequence

from torch import Tensor


def choose_samples(parameters: Sequence[Tensor], count: int) -> Sequence[Tensor]:
    """Return at most so many trained parameters, from all parts of the model."""
    trained = [p for p in parameters if p.requires_grad and p.is_leaf]
    return trained[:: 1 + len(trained) // count]
