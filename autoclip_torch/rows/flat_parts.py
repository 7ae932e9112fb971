"""Refuse parameters that an engine flattens and cuts: each rank has another part."""

from collections.abc import Iterable, Sequence

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


def refuse_fsdp1(parameters: Iterable[Tensor]) -> None:
    """Refuse parameters that FSDP1 has wrapped.

    Raises:
      ValueError: a parameter is a part of a flat tensor of FSDP1.
    """
    if any(getattr(parameter, "_fsdp_flattened", False) for parameter in parameters):
        raise ValueError(
            "parameters must not be those of FSDP1, which flattens them: each rank "
            "holds another part; use fully_shard (FSDP2), or let FSDP1 clip at the "
            "threshold() of a clipper made before wrapping, and observe() its norm"
        )
