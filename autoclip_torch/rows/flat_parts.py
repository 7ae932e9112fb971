"""Refuse the flat tensors that an engine steps in place of the parameters."""

from collections.abc import Sequence

from torch import Tensor
from torch.nn import Parameter


def refuse_flat_parts(known: Sequence[Tensor], stepped: Sequence[Tensor]) -> None:
    """Refuse tensors that an engine made of all parameters, such as DeepSpeed's ZeRO.

    They have one axis and are no parameters of a module. Each rank steps others.

    Args:
      known: the parameters of a clipper.
      stepped: what its optimizer steps now.

    Raises:
      ValueError: `stepped` holds such tensors only, and `known` holds parameters.
    """
    are_flat = all(p.ndim == 1 and not isinstance(p, Parameter) for p in stepped)
    if stepped and are_flat and all(isinstance(p, Parameter) for p in known):
        raise ValueError(
            "parameters must not be those of an engine that flattens them, such as "
            "DeepSpeed's ZeRO: each rank steps another part; let the engine clip at "
            "the threshold() of a clipper, and observe() its norm"
        )
