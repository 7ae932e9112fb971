"""The array namespace with which a core policy runs on tensors of any Keras backend."""

from typing import Any

from keras import ops

float32 = "float32"
int32 = "int32"


def __getattr__(name: str) -> Any:
    """Return the function of `keras.ops` with this name."""
    return getattr(ops, name)


def asarray(array: Any, dtype: str | None = None) -> Any:
    """Return a tensor."""
    return ops.convert_to_tensor(array, dtype=dtype)
