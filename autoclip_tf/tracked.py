"""What TensorFlow needs to know of a clipper; on other backends there is nothing."""

from contextlib import nullcontext
from typing import Any

import keras

Tracked: Any = object
"""`tf.Module` on TensorFlow, where checkpoints follow attributes; else `object`."""

outside_graphs: Any = nullcontext
"""A context in which variables are made for good, even in the midst of a trace."""

if keras.backend.backend() == "tensorflow":
    import tensorflow as tf

    Tracked, outside_graphs = tf.Module, tf.init_scope
