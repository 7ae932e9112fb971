"""The array namespace that lets a core policy run on tensors of any Keras backend."""

from typing import Any

from keras import ops

float32 = "float32"
int32 = "int32"


def __getattr__(verb: str) -> Any:
    """Return the verb as `keras.ops` has it."""
    return getattr(ops, verb)


def asarray(array: Any, dtype: str | None = None) -> Any:
    """Return a tensor."""
    return ops.convert_to_tensor(array, dtype=dtype)
