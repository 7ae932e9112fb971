"""Runs on the CPU and on stand-ins for an accelerator, which raise if a value is read.

Three stand-ins for an accelerator show that a step reads nothing back:

- `Watched`, a tensor subclass, computes as any tensor and raises if its values are
  read. It is not a plain tensor, so a clipper takes the device path.
- Tensors on the "meta" device have no values, and a copy to them from the CPU fails.
  (`FakeTensorMode` with device "cuda" would do the same, but a build for CPUs has no
  device guard for it: `~x` raises there.)
- A CUDA device, in the mode that makes every synchronization an error.
"""

from contextlib import contextmanager

import numpy as np
import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from autoclip_core import Drop, EmaRatio, StreamingQuantile
from autoclip_torch import (
    AGC,
    AdaGC,
    Clipper,
    NormClip,
    QuantileClip,
    StandardClip,
    ValueClip,
    ZClip,
)

READS = set(
    "item tolist numpy cpu nonzero is_nonzero equal allclose masked_select unique "
    "__bool__ __float__ __int__ __index__ __complex__ __array__ __contains__ "
    "__format__ __repr__ __dlpack__ data_ptr".split()
)
"""The functions that read a value of a tensor."""

KERNELS = set("_local_scalar_dense nonzero masked_select _unique2 equal item".split())
"""The kernels that read one."""


class HostReadError(Exception):
    """A value was read on the CPU."""


class Watched(torch.Tensor):
    """A tensor that raises if its value is read, or counts the reads."""

    looks = None

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        name = getattr(func, "__name__", "")
        if name not in READS:
            return super().__torch_function__(func, types, args, kwargs or {})
        if cls.looks is None:
            raise HostReadError(name)
        cls.looks.append(name)
        return func(*map(unwatched, args), **(kwargs or {}))


class NoFunctionReads(TorchFunctionMode):
    """No function reads a tensor, not even a plain one computed from a watched one."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        name = getattr(func, "__name__", "")
        if name in READS:
            raise HostReadError(name)
        return func(*args, **(kwargs or {}))


class NoKernelReads(TorchDispatchMode):
    """No kernel reads a value; an index by booleans has to count them."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if name in KERNELS:
            raise HostReadError(name)
        if name in ("index", "index_put", "index_put_"):
            for index in args[1]:
                if index is not None and index.dtype == torch.bool:
                    raise HostReadError("index by booleans")
        return func(*args, **(kwargs or {}))


@contextmanager
def nothing_read():
    with NoKernelReads(), NoFunctionReads():
        yield


@contextmanager
def looks_counted():
    """Allow reads, and list them."""
    Watched.looks = []
    try:
        yield Watched.looks
    finally:
        Watched.looks = None


def watched(tensor):
    return None if tensor is None else tensor.as_subclass(Watched)


def unwatched(tensor):
    """Return the same tensor, readable."""
    return tensor.as_subclass(torch.Tensor) if isinstance(tensor, Watched) else tensor


def read_fields(decision):
    """Return the fields of a decision as NumPy arrays."""
    return [unwatched(field).numpy() for field in decision]


class NoCopies(TorchDispatchMode):
    """No copy between devices, which would synchronize, too."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if name in ("_to_copy", "copy_"):
            pair = args[:2] if name == "copy_" else (args[0], result)
            if len({tensor.device for tensor in pair}) > 1:
                raise HostReadError("a copy between devices")
        return result


# Clippers, a model and gradients, for the CPU and a device.

INF, NAN = float("inf"), float("nan")

CLIPPERS = {
    "quantile": lambda m, **k: QuantileClip(m, quantile=0.7, history_length=5, **k),
    "quantile, current": lambda m, **k: QuantileClip(
        m, quantile=0.6, history_length=5, include_current=True, **k
    ),
    "quantile between": lambda m, **k: QuantileClip(
        m,
        quantile=0.7,
        warmup_steps=4,
        warmup_threshold=1.0,
        min_threshold=0.1,
        max_threshold=2.0,
        **k,
    ),
    "standard": lambda m, **k: StandardClip(m, deviations=0.5, history_length=6, **k),
    "standard, log": lambda m, **k: StandardClip(
        m, deviations=0.5, history_length=6, log=True, **k
    ),
    "agc": lambda m, **k: AGC(m, clipping=0.1, **k),
    "zclip": lambda m, **k: ZClip(m, z=0.5, alpha=0.9, warmup_steps=3, **k),
    "adagc": lambda m, **k: AdaGC(m, warmup_steps=3, **k),
    "norm": lambda m, **k: NormClip(m, max_norm=1.0, **k),
    "value": lambda m, **k: ValueClip(m, clip_value=0.5, **k),
    "agc, rms": lambda m, **k: AGC(m, clipping=0.1, norm="rms", **k),
    "value, rms": lambda m, **k: ValueClip(m, clip_value=0.5, norm="rms", **k),
    "norm, max": lambda m, **k: NormClip(m, max_norm=1.0, norm="max", **k),
    "agc, max": lambda m, **k: AGC(m, clipping=0.1, norm="max", **k),
    "streaming": lambda m, **k: Clipper(m, StreamingQuantile(0.5), **k),
    "drop": lambda m, **k: Clipper(m, Drop(EmaRatio(1.1, warmup_steps=2)), **k),
    "drop and clip": lambda m, **k: Clipper(
        m, Drop(EmaRatio(1.1, warmup_steps=2), clip=StreamingQuantile(0.5)), **k
    ),
}
MODES = [
    ("parameter", "zero"),
    ("group", "zero"),
    ("global", "zero"),
    ("unit", "zero"),
    ("parameter", "propagate"),
    ("unit", "propagate"),
]

every_clipper = pytest.mark.parametrize("make", CLIPPERS.values(), ids=list(CLIPPERS))

# A policy receives rows and does not know the mode, so the clippers take turns at the
# modes.
# Three run in every mode: the quantile; AGC, which also measures the parameters of a
# row; and the value clip, which is no policy.
clippers_and_modes = pytest.mark.parametrize(
    ("make", "scope", "nonfinite"),
    [
        pytest.param(make, *mode, id=f"{name}-{'-'.join(mode)}")
        for number, (name, make) in enumerate(CLIPPERS.items())
        for place, mode in enumerate(MODES)
        if name in ("quantile", "agc", "value") or place == number % len(MODES)
    ],
)


def rtol_of(make):
    """Return how far thresholds and scales may differ.

    A mean of logarithms is exponentiated. The square root of torch may differ in its
    last bit, which a moving average accumulates.
    """
    loose = {"standard": 1e-5, "standard, log": 1e-5, "zclip": 5e-6}
    return {CLIPPERS[name]: rtol for name, rtol in loose.items()}.get(make, 1e-6)


def model():
    torch.manual_seed(0)
    return torch.nn.Sequential(
        torch.nn.Linear(4, 3),
        torch.nn.Conv1d(2, 2, 1),
        torch.nn.ConvTranspose1d(4, 2, 3, groups=2),
    )


def gradients(parameters, steps=12, seed=1):
    """Yield one gradient per parameter for each step, with every kind of fault."""
    rng = np.random.default_rng(seed)
    for step in range(steps):
        scale = np.exp(rng.standard_normal())
        grads = [
            torch.from_numpy(scale * rng.standard_normal(tuple(p.shape))).float()
            for p in parameters
        ]
        if step == 3:
            grads[0] = None
        if step == 4:
            grads[3] = torch.zeros_like(grads[3])
        if step == 5:
            grads[1].view(-1)[0] = NAN
        if step == 7:
            grads[2].view(-1)[0] = -INF
        if step == 8:
            grads = [None] * len(grads)
        if step == 9:
            grads[4] = grads[4] * 1e30
        yield grads


def give(parameters, gradients, kind=lambda gradient: gradient):
    for p, gradient in zip(parameters, gradients, strict=True):
        p.grad = None if gradient is None else kind(gradient.clone())


def assert_alike(on_device, on_host, rtol=1e-6):
    for one, other in zip(read_fields(on_device), read_fields(on_host), strict=True):
        assert one.dtype == other.dtype
        if one.dtype == bool:
            np.testing.assert_array_equal(one, other)
        else:
            np.testing.assert_allclose(one, other, rtol=rtol)
