"""The array namespace that lets a core policy run on torch tensors."""

from collections.abc import Sequence
from typing import Any

import array_api_compat.torch as array_api
import torch

from autoclip_core.history.lookup import Columns, get_tables


class TorchNamespace:
    """The verbs of `autoclip_core.policy.NAMESPACE_NAMES`, on one device.

    They come from array-api-compat; what is here makes new arrays on the device, and
    keeps a policy's constant tables there: copying one in every step would synchronise.
    """

    def __init__(self, device: torch.device) -> None:
        """Make new arrays on the device."""
        self.device = device
        self._tables: dict[Any, tuple[torch.Tensor, ...]] = {}

    def __getattr__(self, verb: str) -> Any:
        """Return the verb as array-api-compat has it."""
        return getattr(array_api, verb)

    def __reduce__(self) -> Any:
        """Copy and pickle the device alone: the tables can be made again."""
        return TorchNamespace, (self.device,)

    def full(self, shape: Sequence[int], value: float, dtype: Any) -> torch.Tensor:
        """Return a tensor of one value."""
        return torch.full(tuple(shape), value, dtype=dtype, device=self.device)

    def zeros(self, shape: Sequence[int], dtype: Any) -> torch.Tensor:
        """Return a tensor of zeros."""
        return torch.zeros(tuple(shape), dtype=dtype, device=self.device)

    def arange(self, stop: int, dtype: Any) -> torch.Tensor:
        """Return 0 ... stop - 1."""
        return torch.arange(stop, dtype=dtype, device=self.device)

    def asarray(self, array: Any, dtype: Any = None) -> torch.Tensor:
        """Return a tensor on the device."""
        if isinstance(array, torch.Tensor):
            return array.to(dtype or array.dtype)
        return torch.asarray(array, dtype=dtype, device=self.device)

    def get_tables(
        self, columns: Columns, most: int, *constants: float
    ) -> tuple[torch.Tensor, ...]:
        """Return the lookup tables of `autoclip_core.history` on the device."""
        key = columns, most, *constants
        if key not in self._tables:
            made = get_tables(columns, most, *constants)
            self._tables[key] = tuple(map(self.asarray, made))
        return self._tables[key]

    def take_along_axis(
        self, array: torch.Tensor, places: torch.Tensor, axis: int
    ) -> torch.Tensor:
        """Return one element per place; torch wants 64-bit places."""
        return torch.take_along_dim(array, places.long(), axis)
