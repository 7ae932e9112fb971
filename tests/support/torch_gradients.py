"""Every kind of gradient that torch makes, and the expected norms and scaled values.

The expected numbers are float64 NumPy, computed from the dense gradient.
"""

import numpy as np
import pytest
import torch

INF, NAN = float("inf"), float("nan")
LARGEST = float(np.finfo(np.float32).max)
SMALLEST = float(np.finfo(np.float32).tiny)
TYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]


def normal(*shape, dtype=torch.float32, seed=0):
    """Return reproducible normal numbers; complex ones have two such parts."""
    generator = torch.Generator().manual_seed(seed)
    wide = torch.complex128 if dtype.is_complex else torch.float64
    return torch.randn(shape, generator=generator, dtype=wide).to(dtype)


def sparse(places, values, shape, dtype=torch.float32, *, coalesced=False):
    """Return a sparse gradient, with duplicates unless it is coalesced."""
    indices = torch.tensor(places, dtype=torch.long)
    values = torch.as_tensor(values).to(dtype)
    tensor = torch.sparse_coo_tensor(indices, values, shape, check_invariants=True)
    return tensor.coalesce() if coalesced else tensor


TOKENS = [[1, 3, 1, 0]], [[3.0, 0.0], [1.0, 2.0], [4.0, 0.0], [0.0, 0.0]], (5, 2)
PLACES = [[0, 2, 0], [1, 1, 1]], [[2.0, 1.0], [1.0, 1.0], [0.5, -3.0]], (3, 2, 2)

# Each call makes the same gradient again, as before a step.
GRADIENTS = {
    **{
        str(dtype)[6:]: (lambda dtype=dtype: normal(4, 6, dtype=dtype))
        for dtype in TYPES
    },
    "strided": lambda: normal(4, 12)[:, ::2],
    "transposed": lambda: normal(6, 4).t(),
    "bfloat16 transposed": lambda: normal(6, 4, dtype=torch.bfloat16).t(),
    "channels_last": lambda: normal(4, 3, 2, 5).to(memory_format=torch.channels_last),
    "expanded": lambda: normal(1, 6).expand(4, 6),
    "expanded to nothing": lambda: normal(1, 6).expand(1, 6),
    "broadcast scalar": lambda: torch.tensor(3.0).expand(2, 3),
    "negated view": lambda: normal(4, 6, dtype=torch.complex64).conj().imag,
    "vector": lambda: normal(7),
    "one number": lambda: torch.tensor([-3.0]),
    "0-dim": lambda: torch.tensor(-3.0),
    "0-dim float16": lambda: torch.tensor(600.0, dtype=torch.float16),
    "no numbers": lambda: torch.zeros(0),
    "no rows": lambda: torch.zeros(0, 3),
    "empty rows": lambda: torch.zeros(3, 0),
    "zeros": lambda: torch.zeros(3, 2),
    "complex64": lambda: normal(4, 3, dtype=torch.complex64),
    "complex128": lambda: normal(4, 3, dtype=torch.complex128),
    "conjugated": lambda: normal(4, 3, dtype=torch.complex64).conj(),
    "0-dim complex": lambda: torch.tensor(3 - 4j),
    "complex vector": lambda: normal(5, dtype=torch.complex64),
    "sparse": lambda: sparse(*TOKENS),
    "sparse coalesced": lambda: sparse(*TOKENS, coalesced=True),
    "sparse float16": lambda: sparse(*TOKENS, dtype=torch.float16),
    "sparse bfloat16": lambda: sparse(*TOKENS, dtype=torch.bfloat16),
    "sparse float64": lambda: sparse(*TOKENS, dtype=torch.float64),
    "sparse complex": lambda: sparse(*TOKENS, dtype=torch.complex64),
    "sparse in two axes": lambda: sparse(*PLACES),
    "sparse scalars": lambda: sparse([[0, 2, 0]], [3.0, 1.0, 4.0], (4,)),
    "sparse, nothing stored": lambda: sparse([[]], torch.zeros(0, 2), (5, 2)),
}

every_gradient = pytest.mark.parametrize(
    "make", GRADIENTS.values(), ids=list(GRADIENTS)
)
every_type = pytest.mark.parametrize("dtype", TYPES, ids=str)
every_scope = pytest.mark.parametrize("scope", ["parameter", "global", "unit"])


def parameter(gradient):
    """Return a parameter that has this gradient."""
    made = torch.nn.Parameter(torch.zeros(gradient.shape, dtype=gradient.dtype))
    made.grad = gradient
    return made


def numbers(gradient):
    """Return a gradient as a dense array of float64 or complex128."""
    dense = gradient.detach().to_dense()
    wide = torch.complex128 if dense.is_complex() else torch.float64
    return dense.to(wide).resolve_conj().resolve_neg().numpy().copy()


def true_norms(array, scope, norm="l2"):
    """Return the norm of each row, by definition; a vector is one unit."""
    rows = len(array) if scope == "unit" and array.ndim > 1 else 1
    table = np.abs(array).reshape(rows, array.size // max(rows, 1))
    if norm == "max":
        return table.max(axis=1, initial=0.0)
    norms = np.sqrt((table**2).sum(axis=1))
    return norms / np.sqrt(max(table.shape[1], 1)) if norm == "rms" else norms


def spread(values, array):
    """Return one value per row, in a shape that broadcasts against the gradient."""
    values = np.asarray(values)
    if len(values) == 1:
        return values.reshape(())
    return values.reshape(-1, *[1] * (array.ndim - 1))


def scaled(dense, scale, clipped):
    """Return where(clipped, s * g, g), in float32 or a wider type, then cast back."""
    wide = dense.to(torch.float32) if dense.dtype.itemsize == 2 else dense
    array = wide.resolve_conj().resolve_neg().numpy()
    assert scale.dtype == np.float32
    factor = spread(scale, dense).astype(array.real.dtype)
    times = array.copy()
    times.real = array.real * factor
    if dense.is_complex():
        times.imag = array.imag * factor
    kept = np.asarray(np.where(spread(clipped, dense), times, array))
    return torch.from_numpy(kept).to(dense.dtype)


def bits(tensor):
    """Return a tensor's bits to compare, with NaN payloads and signs of zero."""
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor.resolve_conj())
    kinds = {2: torch.int16, 4: torch.int32, 8: torch.int64}
    return tensor.resolve_neg().contiguous().view(kinds[tensor.dtype.itemsize])


def assert_same_bits(actual, expected):
    assert actual.dtype == expected.dtype
    assert actual.shape == expected.shape
    torch.testing.assert_close(bits(actual), bits(expected), rtol=0, atol=0)


def odd_numbers(dtype):
    """Return zeros of both signs, subnormal numbers, and ordinary ones."""
    tiny = torch.finfo(dtype).tiny
    ordinary = [0.1, -0.3, 1 / 3, 0.0, -0.0]
    return torch.tensor([*ordinary, tiny / 2, -tiny / 4, tiny], dtype=dtype)
