"""The array namespace with which a core policy runs on torch tensors."""

from collections.abc import Sequence
from typing import Any

import array_api_compat.torch as array_api
import torch

from autoclip_core.history.lookup import Columns, get_tables


class TorchNamespace:
    """The functions of `autoclip_core.policy.NAMESPACE_NAMES`, on one device.

    array-api-compat provides most of them. This class creates arrays on the device. It
    keeps the lookup tables of policies there: copying them in each step would
    synchronize.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._tables: dict[Any, tuple[torch.Tensor, ...]] = {}

    def __getattr__(self, name: str) -> Any:
        """Return the function of array-api-compat."""
        return getattr(array_api, name)

    def __reduce__(self) -> Any:
        """Copy and pickle only the device: the tables can be computed again."""
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
            computed = get_tables(columns, most, *constants)
            self._tables[key] = tuple(map(self.asarray, computed))
        return self._tables[key]

    def take_along_axis(
        self, array: torch.Tensor, indices: torch.Tensor, axis: int
    ) -> torch.Tensor:
        """Return one element per index; torch requires 64-bit indices."""
        return torch.take_along_dim(array, indices.long(), axis)
