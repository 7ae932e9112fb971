"""What the bytes alone take: as many numbers in one piece, read or written so often.

No step that reads every gradient, or writes it, takes less: a piece has no second call,
no list of tensors and no norm that has to be right.
"""

import torch

from contenders import Parameters, reader
from models import set_gradients
from timing import Timed, clock


def make_limits(parameters: Parameters) -> dict[str, Timed]:
    """Return them for one model, and one read of its gradients tensor by tensor."""
    weights = torch.cat([parameter.detach().view(-1) for parameter in parameters])
    gradients = torch.empty_like(weights)
    sizes = [parameter.numel() for parameter in parameters]
    pieces = list(map(torch.nn.Parameter, weights.split(sizes)))
    for piece, gradient in zip(pieces, gradients.split(sizes), strict=True):
        piece.grad = gradient

    def read(*flat: torch.Tensor) -> None:
        for numbers in flat:
            torch.dot(numbers, numbers)

    def scale() -> None:
        gradients.mul_(0.999)

    steps = {
        "one read": lambda: read(gradients),
        "one product in place": scale,
        "one read, one product": lambda: (read(gradients), scale()),
        "two reads": lambda: read(weights, gradients),
        "two reads, one product": lambda: (read(weights, gradients), scale()),
    }
    limits = {
        name: clock(step, lambda: set_gradients(pieces, 1.0))
        for name, step in steps.items()
    }
    by_tensor = clock(reader(parameters), lambda: set_gradients(parameters, 1.0))
    return limits | {"one read, tensor by tensor": by_tensor}
