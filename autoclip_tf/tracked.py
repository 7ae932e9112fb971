"""What a clipper is to a checkpoint: on TensorFlow, a `tf.Module`."""

from typing import Any

import keras

Tracked: Any = object
"""`tf.Module` on TensorFlow, where checkpoints follow attributes; else `object`."""

if keras.backend.backend() == "tensorflow":
    import tensorflow as tf

    Tracked = tf.Module
